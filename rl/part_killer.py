"""This file ends the processes of one part of a run, such as one generator, and returns when they are really gone.

A part's first process is started with the variable PART in its environment, and all that it starts inherit it. A pid
alone is never trusted: a process is held by a pidfd first and asked for its marks then, so that no signal can reach a
later process with the same pid. SIGKILL works on stopped processes too.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import re
import select
import signal
import time
from collections.abc import Sequence

import psutil

from rl.process_guard import MARK

PART = "SLIPSTREAM_PART"
# setproctitle, which vLLM calls, writes its title over the environment that /proc shows, and the marks with it; this
# variable forbids it.
KEEP_ENVIRONMENT = {"SPT_NOENV": "1"}
TRACKER = b"multiprocessing.resource_tracker"
TRACKER_SECONDS = 2.0
SEGMENTS = re.compile(rb" /dev/shm/(psm_|sem\.mp-)[^/ ]+$")


def marks_of(part: str) -> dict[str, str]:
    """What the environment of a part's first process must hold, beside the run's own mark."""
    return {PART: part, **KEEP_ENVIRONMENT}


def part_pids(run_id: str, part: str) -> list[int]:
    """Process ids of the part's living processes on this node."""
    return [pid for pid in psutil.pids() if _is_marked(pid, run_id, part)]


def kill_part(run_id: str, part: str, deadline_s: float, grace_s: float = 0.0) -> list[int]:
    """SIGKILL every process of a part, and what they start meanwhile, until none is left; returns whom it killed.

    For grace_s they are left to end by themselves: Ray, asked to end an actor, else takes its end for an accident.
    Python's resource trackers are left to end by themselves for a moment: they remove the shared memory of the others.

    Raises:
        TimeoutError: processes were still there after `deadline_s`; names them.
    """
    killed: set[int] = set()
    began = time.monotonic()
    while time.monotonic() - began < grace_s and (left := part_pids(run_id, part)):
        _end(set(left), run_id, part, None, grace_s)
    while left := part_pids(run_id, part):
        if time.monotonic() - began > deadline_s:
            raise TimeoutError(f"{part}: processes {left} still run {deadline_s:.0f} s after SIGKILL")
        trackers = {pid for pid in left if TRACKER in _read(pid, "cmdline")}
        victims = set(left) - trackers
        if victims or time.monotonic() - began > TRACKER_SECONDS:
            killed |= victims or trackers
            _end(victims or trackers, run_id, part, signal.SIGKILL)
        else:
            _end(trackers, run_id, part, None)
    return sorted(killed)


def part_segments(run_id: str, part: str) -> list[str]:
    """Files of Python's shared memory and semaphores that the part's processes hold, to be removed should they die.

    Ray kills the process group of a dead worker, and so the resource tracker that would have removed them.
    """
    held = {
        line.split(maxsplit=5)[5].decode()
        for pid in part_pids(run_id, part)
        for line in _read(pid, "maps").splitlines()
        if SEGMENTS.search(line)
    }
    return sorted(held)


def remove_segments(paths: Sequence[str]) -> None:
    """Remove what `part_segments` named, once nobody of the part is left; their names are random, and never reused."""
    for path in paths:
        pathlib.Path(path).unlink(missing_ok=True)


def remove_generator_files(folder: str, run_id: str, index: int) -> None:
    """Remove the weight updates that a killed generator was reading; those of no other run or generator."""
    name = f"slipstream-{glob.escape(run_id)}-generator-{index}-version-*"
    for file in pathlib.Path(folder).glob(name):
        file.unlink(missing_ok=True)


def _end(pids: set[int], run_id: str, part: str, number: int | None, seconds: float = TRACKER_SECONDS / 2) -> None:
    """Signal the processes, unless number is None, and wait a moment for their end."""
    with contextlib.ExitStack() as stack:
        waiting = select.poll()
        held = 0
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                stack.callback(os.close, pidfd)
                if not _is_marked(pid, run_id, part):
                    continue
                if number is not None:
                    signal.pidfd_send_signal(pidfd, number)
                waiting.register(pidfd, select.POLLIN)
                held += 1
        until = time.monotonic() + seconds
        while held and (remaining := until - time.monotonic()) > 0:
            for pidfd, _ in waiting.poll(remaining * 1000):
                waiting.unregister(pidfd)
                held -= 1


def _is_marked(pid: int, run_id: str, part: str) -> bool:
    entries = _read(pid, "environ").split(b"\0")
    return f"{MARK}={run_id}".encode() in entries and f"{PART}={part}".encode() in entries


def _read(pid: int, what: str) -> bytes:
    """A file of /proc; empty for a process that is gone, a zombie, or not ours to see."""
    try:
        return pathlib.Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""
