"""Stacks of real processes: stuck, stopped, busy, dead, foreign; and a py-spy that hangs or fails is only told of."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from rl import stacks
from rl.stacks import Frame, ProcessStack, ThreadStack, stack_lines, take_stacks, task_lines

STUCK = """
import threading
def waits_for_ever(event):
    print("up", flush=True)
    event.wait()
def helper():
    waits_for_ever(threading.Event())
threading.Thread(target=threading.Event().wait, name="beside", daemon=True).start()
helper()
"""
BUSY = "print('up', flush=True)\nwhile True: pass"


@pytest.fixture(autouse=True)
def short_window(monkeypatch):
    """No test but one reads how busy a process is now."""
    monkeypatch.setattr(stacks, "BUSY_WINDOW_S", 0.0)


@pytest.fixture
def start():
    """Starts programs that print "up"; they are gone after the test."""
    children = []

    def begin(code: str, interpreter: str = sys.executable) -> subprocess.Popen:
        command = [interpreter, "-c", code]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout.readline() == "up\n"
        return child

    yield begin
    for child in children:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def program(folder, text: str) -> str:
    """A stand-in for py-spy."""
    path = folder / "spy"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def kill_and_keep_unreaped(child: subprocess.Popen) -> None:
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


def wait_for_state(pid: int, state: str) -> None:
    """The kernel stops a process soon after the signal, not with it."""
    _, told = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(told) and psutil.Process(pid).status() == state


async def test_a_stuck_process_shows_where_it_is_stuck_innermost_first(start):
    child = start(STUCK)
    (found,) = await take_stacks([child.pid])
    text = "\n".join(stack_lines(found, 20))
    assert found.pid == child.pid and found.command.startswith("python")
    assert "sleeping" in found.facts and "2 thread(s)" in found.facts
    assert text.index("Event.wait") < text.index("waits_for_ever") < text.index("helper")
    assert "MainThread (idle)" in text and "beside (idle)" in text


async def test_a_stopped_process_is_seen_into_and_stays_as_it_was(start):
    child = start(STUCK)
    child.send_signal(signal.SIGSTOP)
    wait_for_state(child.pid, psutil.STATUS_STOPPED)
    (found,) = await take_stacks([child.pid])
    assert "waits_for_ever" in "\n".join(stack_lines(found, 20))
    assert found.facts.startswith("stopped")
    assert psutil.Process(child.pid).status() == psutil.STATUS_STOPPED
    child.send_signal(signal.SIGCONT)


async def test_a_running_process_is_not_paused_and_is_told_from_one_that_waits(start, monkeypatch):
    monkeypatch.setattr(stacks, "BUSY_WINDOW_S", 0.5)
    busy = start(BUSY)
    (found,) = await take_stacks([busy.pid])
    assert found.threads[0].active and "CPU now 0%" not in found.facts
    assert psutil.Process(busy.pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


async def test_one_dead_process_does_not_hide_the_others(start):
    alive, dead = start(STUCK), start(STUCK)
    dead.kill()
    dead.wait()
    gone, there = await take_stacks([dead.pid, alive.pid])
    assert gone.facts == "gone" and stack_lines(gone, 5) == ["  no stack: no such process"]
    assert there.threads


async def test_a_zombie_is_called_one(start):
    child = start(STUCK)
    kill_and_keep_unreaped(child)
    (found,) = await take_stacks([child.pid])
    assert "zombie" in found.facts and stack_lines(found, 5) == ["  no stack: it has ended"]


async def test_what_is_no_python_is_described_by_the_kernel(start):
    child = start("echo up; cat", interpreter="sh")
    (found,) = await take_stacks([child.pid])
    assert found.command == "sh -c echo up; cat" and "sleeping" in found.facts and found.missing == "no Python process"


async def test_this_process_tells_its_own_threads():
    event = threading.Event()

    def own_named_wait() -> None:
        event.wait()

    thread = threading.Thread(target=own_named_wait, name="aside")
    thread.start()
    (found,) = await take_stacks([os.getpid()], spy="/nowhere/py-spy")
    event.set()
    thread.join()
    (aside,) = [each for each in found.threads if each.thread_name == "aside"]
    assert "own_named_wait" in [frame.name for frame in aside.frames]


async def test_a_py_spy_that_hangs_is_killed(start, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "ONE_S", 0.2)
    spy = program(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600")
    (found,) = await take_stacks([start(STUCK).pid], spy=spy)
    assert "did not answer" in found.missing and found.facts.startswith("sleeping")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_all_together_end_at_the_deadline_and_leave_no_py_spy(start, tmp_path):
    spy = program(tmp_path, f"touch {tmp_path}/begun_$$; exec sleep 600")
    children = [start(STUCK).pid for _ in range(2)]
    found = await take_stacks(children, seconds=0.3, spy=spy)
    assert [each.missing for each in found] == ["its turn did not come in time"] * 2
    begun = [int(path.name.removeprefix("begun_")) for path in tmp_path.glob("begun_*")]
    assert not any(psutil.pid_exists(pid) for pid in begun)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'Error: no' >&2; echo 'Permission denied (os error 13)' >&2; exit 1", "rl doctor"),
        ("echo 'not json'", "not understood"),
        (
            "printf 'Error: odd\\n\\nCaused by:\\n    it broke\\n\\nStack backtrace:\\n 0: x\\n' >&2; exit 1",
            "odd; it broke",
        ),
        ("exit 1", "without a word"),
    ],
)
async def test_what_py_spy_complains_of_is_told_in_a_line(start, tmp_path, script, told):
    (found,) = await take_stacks([start(STUCK).pid], spy=program(tmp_path, script))
    assert told in found.missing and "backtrace" not in found.missing


async def test_a_stack_that_was_torn_is_read_again(start, tmp_path):
    once = f"test -e {tmp_path}/tried && echo '[]' && exit 0; touch {tmp_path}/tried"
    spy = program(tmp_path, f"{once}; echo 'Error: Failed to get stack traces' >&2; exit 1")
    (found,) = await take_stacks([start(STUCK).pid], spy=spy)
    assert found.missing == ""


async def test_a_missing_py_spy_is_told_with_its_fix(start):
    (found,) = await take_stacks([start(STUCK).pid], spy="/nowhere/py-spy")
    assert "did not start" in found.missing and "make venv" in found.missing


async def test_of_no_process_there_is_nothing_to_tell():
    assert await take_stacks([]) == []


def test_a_process_keeps_within_its_lines_and_says_what_is_left_out():
    deep = tuple(Frame(f"call_{number}", "deep.py", number) for number in range(40))
    alike = ThreadStack("pool", False, (Frame("wait", "threading.py", 1),))
    others = tuple(ThreadStack(f"other-{number}", True, deep) for number in range(20))
    nothing = ThreadStack("no Python in it", False, ())
    process = ProcessStack(1, "x", "sleeping", (nothing, alike, *others, alike, ThreadStack("MainThread", False, deep)))
    lines = stack_lines(process, 12)
    assert len(lines) == 12
    assert lines[0] == "  MainThread (idle)" and lines[1] == "    call_0 deep.py:0"
    assert lines[7] == "  other-0 (active)" and "37 more below" in lines[10]
    assert "34 more below" in lines[6] and lines[-1] == "  ... 21 more thread(s)"
    assert "  2 x pool (idle): wait threading.py:1" in stack_lines(process, 100)
    assert all(len(stack_lines(process, limit)) <= limit for limit in range(20))


def test_a_call_is_named_shortly():
    assert str(Frame("wrap.<locals>.inner", "ray/util/tracing/helper.py", 3)) == "inner tracing/helper.py:3"
    assert str(Frame("f", None, 0)) == "f ?:0"


async def test_tasks_that_wait_alike_are_told_together_with_the_innermost_call_first():
    event = asyncio.Event()

    async def innermost() -> None:
        await event.wait()

    async def outer() -> None:
        await innermost()

    tasks = [asyncio.create_task(outer(), name="sampling") for _ in range(3)]
    await asyncio.sleep(0)
    (line,) = [line for line in task_lines(50) if "sampling" in line]
    assert line.startswith("3 x sampling: wait locks.py:") and line.index("innermost") < line.index("outer")
    event.set()
    await asyncio.gather(*tasks)
