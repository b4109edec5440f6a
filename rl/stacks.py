"""This file takes the stacks of processes from outside, without touching them: where does a stalled run stand still?

py-spy reads a process's memory and does not pause it (--nonblocking). So it sees into a stopped process too, where its
pausing mode fails, and killing it half-way leaves nothing paused. Where it is refused, or the process is no Python,
there is what the kernel tells: state, what it sleeps in, threads, memory, CPU time. This process reads its own stacks
by itself, since tracing one's parent is what a hardened kernel refuses first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType

import msgspec
import psutil

SIDE_BY_SIDE = 4
ONE_S = 5.0  # one py-spy; it needs hundredths of a second where nothing is wrong
ALL_S = 15.0
KILL_S = 1.0
BUSY_WINDOW_S = 0.5  # over which "CPU now" is measured: what spins is told from what waits
TRIES = 2  # reading a process that moves may find a torn stack
MAX_FRAMES = 30
ROOM_FOR_TWO = 12  # lines, from which on a second thread is told call by call
COMMAND_WIDTH = 50
MIB = 1 << 20


class Frame(msgspec.Struct, frozen=True):
    """One call, as py-spy names it."""

    name: str
    short_filename: str | None
    line: int

    def __str__(self) -> str:
        file = "/".join((self.short_filename or "?").split("/")[-2:])
        return f"{self.name.rpartition('<locals>.')[2]} {file}:{self.line}"


class ThreadStack(msgspec.Struct, frozen=True):
    """One thread: innermost call first. active: it had a CPU, or wanted one."""

    thread_name: str | None
    active: bool
    frames: tuple[Frame, ...]

    @property
    def title(self) -> str:
        """Its name and whether it works."""
        return f"{self.thread_name or 'unnamed thread'} ({'active' if self.active else 'idle'})"


@dataclass(frozen=True)
class ProcessStack:
    """One process: its command, one line of what the kernel tells, its threads, or why there are none."""

    pid: int
    command: str
    facts: str
    threads: tuple[ThreadStack, ...] = ()
    missing: str = ""


class _NoStack(RuntimeError):
    """py-spy has no answer; the message says why."""


async def take_stacks(pids: Iterable[int], seconds: float = ALL_S, spy: str = "") -> list[ProcessStack]:
    """The stacks of these processes, in their order, within about `seconds`; whatever fails is said in its place.

    spy names another program than the py-spy that was installed with this Python.
    """
    numbers = list(dict.fromkeys(pids))
    spy = spy or str(pathlib.Path(sys.executable).with_name("py-spy"))
    started = time.monotonic()
    before = {pid: _cpu_seconds(pid) for pid in numbers}
    turns = asyncio.Semaphore(SIDE_BY_SIDE)
    tasks = {pid: asyncio.create_task(_threads_of(pid, spy, turns)) for pid in numbers}
    try:
        if tasks:
            await asyncio.wait(tasks.values(), timeout=seconds)
    finally:
        for task in tasks.values():
            task.cancel()
    if tasks:
        await asyncio.wait(tasks.values(), timeout=2 * KILL_S)  # those cut short end their py-spy
    await asyncio.sleep(max(0.0, started + BUSY_WINDOW_S - time.monotonic()))
    elapsed = time.monotonic() - started
    return [_described(pid, tasks[pid], before[pid], elapsed) for pid in numbers]


def _described(
    pid: int, task: asyncio.Task[tuple[ThreadStack, ...]], cpu_before: float, elapsed: float
) -> ProcessStack:
    threads, missing = (), ""
    if not task.done() or task.cancelled():
        missing = "its turn did not come in time"
    elif (error := task.exception()) is not None:
        missing = str(error) if isinstance(error, _NoStack) else f"{type(error).__name__}: {error}"
    else:
        threads = task.result()
    try:
        process = psutil.Process(pid)
        command, facts = _command(process), _facts(process, cpu_before, elapsed)
    except psutil.ZombieProcess:
        return ProcessStack(pid, "", "zombie: it ended, and its parent has not asked how", missing="it has ended")
    except psutil.NoSuchProcess:
        return ProcessStack(pid, "", "gone", missing="no such process")
    except psutil.Error as error:
        return ProcessStack(pid, "", f"unknown: {error}", threads, missing)
    return ProcessStack(pid, command, facts, threads, missing)


async def _threads_of(pid: int, spy: str, turns: asyncio.Semaphore) -> tuple[ThreadStack, ...]:
    if pid == os.getpid():
        return _own_threads()
    async with turns:
        for attempt in range(1, TRIES + 1):
            try:
                return await _ask_spy(pid, spy)
            except _NoStack as error:
                if attempt == TRIES or "Failed to get stack traces" not in str(error):
                    raise
    raise AssertionError("the last attempt returned or raised")


async def _ask_spy(pid: int, spy: str) -> tuple[ThreadStack, ...]:
    pipe, none = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    command = (spy, "dump", "--nonblocking", "--json", "--pid", str(pid))
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=none, stdout=pipe, stderr=pipe)
    except OSError as error:
        raise _NoStack(f"py-spy did not start: {error}; run `make venv`") from None
    try:
        async with asyncio.timeout(ONE_S):
            output, errors = await process.communicate()
    except TimeoutError:
        raise _NoStack(f"py-spy did not answer within {ONE_S:.0f} s and was killed") from None
    finally:
        await _end(process)
    if process.returncode:
        raise _NoStack(_reason(errors.decode(errors="replace")))
    try:
        return msgspec.json.decode(output, type=tuple[ThreadStack, ...])
    except msgspec.DecodeError as error:
        raise _NoStack(f"py-spy's answer is not understood: {error}") from None


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what still runs, and reap it; one that even SIGKILL does not end now is left to its kernel."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILL_S):
            await process.wait()


def _reason(errors: str) -> str:
    """The first line of py-spy's complaint and its cause, without its own stack."""
    told = errors.partition("Stack backtrace:")[0].splitlines()
    facts = [line.strip().removeprefix("Error: ") for line in told if line.strip() not in ("", "Caused by:")]
    if any("Permission denied" in line or "Operation not permitted" in line for line in facts):
        return "py-spy may not read it (ptrace is restricted); `rl doctor` has the fix"
    if any("python version" in line for line in facts):
        return "no Python process"
    return "py-spy: " + "; ".join(dict.fromkeys(facts))[:200] if facts else "py-spy failed without a word"


def _own_threads() -> tuple[ThreadStack, ...]:
    """All but the thread that asks: it runs the event loop, and task_lines tells what that one waits for."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return tuple(
        ThreadStack(names.get(ident), False, _frames_from(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )


def _frames_from(frame: FrameType | None) -> tuple[Frame, ...]:
    frames: list[Frame] = []
    while frame is not None and len(frames) < MAX_FRAMES:
        frames.append(_frame(frame))
        frame = frame.f_back
    return tuple(frames)


def _frame(frame: FrameType) -> Frame:
    return Frame(frame.f_code.co_name, os.path.basename(frame.f_code.co_filename), frame.f_lineno)


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:  # gone or not ours: the look afterwards says so
        return 0.0
    return times.user + times.system


def _command(process: psutil.Process) -> str:
    """The command line without the folders of its paths; a process that renamed itself, as Ray's do, has that name."""
    words = " ".join(process.cmdline() or [process.name()]).split()
    return " ".join(word.rpartition("/")[2] or word for word in words)[:COMMAND_WIDTH]


def _facts(process: psutil.Process, cpu_before: float, elapsed: float) -> str:
    with process.oneshot():
        times, threads, resident = process.cpu_times(), process.num_threads(), process.memory_info().rss
    used = times.user + times.system
    busy = 100 * max(0.0, used - cpu_before) / elapsed
    place = _kernel_place(process.pid)
    return (
        f"{process.status()}{' in ' + place if place else ''}, CPU now {busy:.0f}%, {used:.0f} s in all, "
        f"{threads} thread(s), {resident / MIB:.0f} MiB"
    )


def _kernel_place(pid: int) -> str:
    """What the first thread sleeps in, where the kernel tells ("0" or nothing otherwise)."""
    try:
        place = pathlib.Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return ""
    return "" if place in ("", "0") else place


def stack_lines(process: ProcessStack, limit: int) -> list[str]:
    """At most `limit` lines: one or two threads call by call, innermost first; then a line per other thread.

    The main thread leads, and then what works, and what is deep in something: a thread that idles in a pool is shallow.
    """
    threads = [thread for thread in process.threads if thread.frames]
    if process.missing or not threads:
        return [f"  no stack: {process.missing or 'it has no thread but its event loop'}"][:limit]
    threads.sort(key=lambda each: (each.thread_name != "MainThread", not each.active, -len(each.frames)))
    calls = [limit // 2 if threads[1:] else limit - 1, *([limit // 4] if limit >= ROOM_FOR_TWO else [])]
    lines: list[str] = []
    for thread, number in zip(threads, calls, strict=False):
        lines += _call_lines(thread, max(1, number))
    others = threads[len(calls) :]
    alike = Counter(f"{each.title}: {' < '.join(map(str, each.frames[:3]))}" for each in others)
    room = max(0, limit - len(lines))
    shown = list(alike.items())[: room if len(alike) <= room else max(0, room - 1)]
    lines += [f"  {f'{count} x ' if count > 1 else ''}{line}" for line, count in shown]
    hidden = len(others) - sum(count for _, count in shown)
    return (lines + ([f"  ... {hidden} more thread(s)"] if hidden else []))[:limit]


def _call_lines(thread: ThreadStack, calls: int) -> list[str]:
    lines = [f"  {thread.title}", *(f"    {frame}" for frame in thread.frames[:calls])]
    if len(thread.frames) > calls:
        lines[-1] += f"   ... {len(thread.frames) - calls} more below"
    return lines


def task_lines(limit: int) -> list[str]:
    """The tasks of the running event loop, alike ones together, each with the calls it waits in, innermost first."""
    alike = Counter(
        f"{task.get_name() if not task.get_name().startswith('Task-') else 'task'}: {_awaiting(task)}"
        for task in asyncio.all_tasks()
        if task is not asyncio.current_task()
    )
    lines = [f"{count} x {line}" for line, count in alike.most_common(limit)]
    return [*lines, f"... {len(alike) - limit} more kinds of task"] if len(alike) > limit else lines


def _awaiting(task: asyncio.Task[object]) -> str:
    """The innermost three frames; asyncio itself only tells the outermost one of a suspended task."""
    frames: list[Frame] = []
    awaited: object = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        frames.append(_frame(frame))
        awaited = getattr(awaited, "cr_await", None)
    return " < ".join(map(str, reversed(frames[-3:]))) or "not begun, or just ending"
