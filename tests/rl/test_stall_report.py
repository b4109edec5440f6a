"""The page about a run that stands still: complete where all answer, honest where not, never longer than a page."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time

import pytest

from rl import stall_report
from rl.buffer import BufferStats
from rl.orders import PartStatus
from rl.process_guard import MARK
from rl.stacks import Frame, ProcessStack, ThreadStack
from rl.staleness import Gate
from rl.stall_report import PAGE_LINES, PAGE_WIDTH, Situation, Unknown, Versions, Witnesses, gather, render, report
from rl.waits import Wait, Waits, within

STATS = BufferStats(
    drawn=40,
    sampled_tokens=9000,
    buffered_groups=3,
    buffered_tokens=600,
    buffered_bytes=4096,
    leased_groups=8,
    leased_tokens=1600,
    leased_bytes=16384,
    trained_groups=24,
    trained_tokens=6000,
    dropped={"stale": (1, 200), "zero_advantage": (0, 0)},
    oldest_age_s=310.0,
)


def part(number: int = 0, **changes) -> PartStatus:
    facts = {
        "name": f"generator {number}",
        "state": "working",
        "node": "node-a",
        "pids": (1000 + number,),
        "version": 7,
        "heartbeat_age_s": 1.0,
        "in_hand": 0,
        "oldest_request_s": 0.0,
        "restarts": 0,
        "detail": "samples",
    }
    return PartStatus(**(facts | changes))


def situation(**changes) -> Situation:
    facts = {
        "reason": "WaitExpired: waited 900 s for step 8 from the learner ranks",
        "run_id": "a-run",
        "moment": 0.0,
        "now": 1000.0,
        "waits": (Wait("step 8", "the learner ranks", 90.0, 900.0), Wait("group a/1", "its generator", 940.0, 600.0)),
        "versions": Versions(7, 6),
        "gate": {"accepted": 32, "running": 4, "room": 2},
        "buffer": STATS,
        "generators": (part(),),
        "learners": (part(name="learner rank 0", state="dead", pids=(2000,), detail="exit status -9"),),
        "machine": ("load 1.0",),
        "tasks": ("4 x sampling: wait",),
        "processes": (),
        "labels": {},
    }
    return Situation(**(facts | changes))


def process(pid: int, depth: int = 3, what: str = "call") -> ProcessStack:
    frames = tuple(Frame(f"{what}_{number}", "some.py", number) for number in range(depth))
    return ProcessStack(pid, f"command {pid}", "sleeping, CPU now 0%", (ThreadStack("MainThread", False, frames),))


async def answer(value):
    return value


@pytest.fixture
def witnesses(tmp_path):
    return Witnesses(
        run_id=f"stalled-{secrets.token_hex(4)}",
        directory=tmp_path,
        gate=Gate(2, 8),
        buffer_stats=lambda: answer(STATS),
        generators=lambda: [part()],
        learners=lambda: [],
        versions=lambda: Versions(7, 6),
        waits=Waits(),
    )


def broken():
    raise RuntimeError("broken")


def test_the_page_says_who_waits_for_whom_and_how_long():
    page = render(situation())
    assert "WaitExpired: waited 900 s for step 8 from the learner ranks" in page
    assert "15 min of 15 min: step 8 from the learner ranks" in page
    assert "60 s of 10 min: group a/1 from its generator" in page


def test_the_page_says_where_the_groups_are():
    page = render(situation())
    assert "learners 7, confirmed by the generators 6" in page
    assert "accepted 32, running 4, room 2" in page
    assert "3 groups wait (4096 bytes, the oldest for 5 min), 8 leased (16384 bytes), 4 in flight" in page
    assert "40 drawn, 24 trained, dropped: stale 1\n" in page


def test_parts_in_trouble_come_first_with_their_reason():
    lines = render(situation()).splitlines()
    (dead,) = [line for line in lines if line.strip().startswith("learner rank 0")]
    (alive,) = [line for line in lines if line.strip().startswith("generator 0")]
    assert lines.index(dead) < lines.index(alive)
    assert "dead" in dead and "node-a 2000; exit status -9" in dead


def test_a_request_in_hand_has_its_age():
    page = render(situation(generators=(part(in_hand=3, oldest_request_s=131.0, heartbeat_age_s=75.0),)))
    assert "75 s ago" in page and "3, oldest 2 min" in page


def test_every_piece_that_is_unknown_says_why():
    pieces = ("versions", "gate", "buffer", "generators", "learners", "machine", "tasks", "processes")
    page = render(situation(**{piece: Unknown(f"no {piece}") for piece in pieces}))
    assert all(f"no {piece}" in page for piece in pieces)


def test_processes_that_stand_at_the_same_place_are_told_once():
    page = render(situation(processes=(process(1), process(2), process(3, what="other"))))
    assert "1 2: command 1; sleeping" in page and page.count("call_0 some.py:0") == 1
    assert "3: command 3" in page and "other_0 some.py:0" in page


def test_a_process_without_a_stack_takes_one_line():
    bare = ProcessStack(9, "redis-server", "sleeping in ep_poll", missing="no Python process")
    assert "9: redis-server; sleeping in ep_poll; no stack: no Python process" in render(situation(processes=(bare,)))


def test_parts_on_other_nodes_are_named():
    page = render(situation(processes=(process(1000),), labels={1000: "generator 0"}))
    assert "generator 0, 1000: command 1000" in page and "on other nodes or gone: learner rank 0" in page


@pytest.mark.parametrize("count", [1, 10, 60, 1000])
def test_the_page_is_a_page_for_a_run_of_any_size(count):
    page = render(
        situation(
            reason="line\n" * 50,
            waits=tuple(Wait(f"group {number} " + "x" * 300, "its generator", 0.0, 600.0) for number in range(count)),
            generators=tuple(part(number, detail="why\n" * 100) for number in range(count)),
            tasks=tuple(f"task {number}" for number in range(count)),
            processes=tuple(process(number, 50, f"call_{number}") for number in range(count)),
            labels={number: f"generator {number}" for number in range(count)},
        )
    )
    lines = page.splitlines()
    assert len(lines) <= PAGE_LINES and max(map(len, lines)) <= PAGE_WIDTH
    assert "call_0_0 some.py:0" in page and "call_0_1 some.py:1" in page
    if count == 1000:
        assert "more; `py-spy dump --nonblocking --pid N` shows each" in lines[-1]


def test_no_password_is_on_the_page():
    page = render(situation(buffer=Unknown("redis://me:secret@host:1 refuses"), reason="rediss://:secret@host:1/0"))
    assert "secret" not in page and "redis://me:***@host:1" in page


async def test_all_witnesses_are_heard_and_the_runs_processes_looked_into(witnesses):
    code = "def stuck_here():\n  print('up', flush=True)\n  input()\nstuck_here()"
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", code],
        env={**os.environ, MARK: witnesses.run_id},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "up\n"
    waiting = asyncio.create_task(within(asyncio.Event().wait(), 60, "a batch", "the generators", witnesses.waits))
    await asyncio.sleep(0)
    try:
        told = Witnesses(**{**vars(witnesses), "generators": lambda: [part(pids=(child.pid,))]})
        page = render(await gather("asked for", told))
    finally:
        waiting.cancel()
        child.communicate("\n")
    assert "0 s of 60 s: a batch from the generators" in page
    assert f"driver, {os.getpid()}: " in page
    assert f"generator 0, {child.pid}: " in page and "stuck_here" in page
    assert "GiB available" in page and "OOM kills" in page and "room 72" in page
    assert "unknown" not in page


async def test_witnesses_that_fail_do_not_fail_the_report(witnesses, tmp_path):
    told = Witnesses(
        run_id=witnesses.run_id,
        directory=tmp_path,
        gate=Gate(0, 1),
        buffer_stats=broken,
        generators=broken,
        learners=broken,
        versions=broken,
    )
    page = render(await gather("asked for", told))
    assert page.count("RuntimeError: broken") == 4 and "accepted 0" in page


async def test_a_buffer_that_hangs_and_swallows_its_cancellation_does_not_hold_the_report(witnesses, monkeypatch):
    monkeypatch.setattr(stall_report, "PIECE_S", 0.05)
    end = asyncio.Event()

    async def hangs():
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue

    started = time.monotonic()
    found = await gather("asked for", Witnesses(**{**vars(witnesses), "buffer_stats": hangs}))
    assert found.buffer == Unknown("no answer within 0 s")
    assert time.monotonic() - started < 10
    end.set()


async def test_reports_are_numbered_and_earlier_ones_stay(witnesses, tmp_path):
    assert [await report(f"reason {number}", witnesses) for number in (1, 2)] == [
        "see stall_report.txt",
        "see stall_report_2.txt",
    ]
    assert "reason 1" in (tmp_path / "stall_report.txt").read_text()
    assert "reason 2" in (tmp_path / "stall_report_2.txt").read_text()


async def test_a_report_that_cannot_be_written_is_a_sentence_and_no_error(witnesses, tmp_path):
    told = Witnesses(**{**vars(witnesses), "directory": tmp_path / "gone"})
    assert "there is no stall report: FileNotFoundError" in await report("asked for", told)
