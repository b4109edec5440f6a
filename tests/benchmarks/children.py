"""This file runs an arm of a comparison as a person would, a process of its own, and watches the memory of it all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rl.process_guard import marked_processes

LOOK_EVERY_S = 2.0
DEADLINE_S = 3600.0
SHOWN_CHARACTERS = 3000


@dataclass(frozen=True)
class Finished:
    """A child that ended well: when it was started (wall clock), its output, and the peak memory of its whole tree."""

    started: float
    output: str
    peak_bytes: int


@dataclass(frozen=True)
class FinishedRun:
    """A run of `rl` that ended well: its directory, its rows of metrics.jsonl, and how it went as a process."""

    directory: Path
    rows: tuple[dict[str, Any], ...]
    child: Finished

    @property
    def step_ends(self) -> list[float]:
        """Wall-clock time at which each step ended."""
        return [row["time"] for row in self.rows]


class MemoryWatch(threading.Thread):
    """The most memory that some processes took together; what they share counts once (proportional set size)."""

    def __init__(self, processes: Callable[[], Iterable[psutil.Process]]) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._processes = processes
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until ended."""
        while not self._ended.wait(LOOK_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, sum(proportional_bytes(each.pid) for each in self._processes()))

    def end(self) -> int:
        """Stop looking; returns the peak."""
        self._ended.set()
        self.join()
        return self.peak_bytes


def proportional_bytes(pid: int) -> int:
    """Memory of a process, with its part of what it shares; 0 where it has ended."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def end_on_sigterm() -> None:
    """Have SIGTERM end this program like an error: children have a session of their own, and would live on."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))


def run_child(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, run_id: Any = None) -> Finished:
    """Run a command to its end, with its output in `log`. run_id() names the run of `rl` whose processes count too.

    Raises:
        RuntimeError: it failed, or took longer than an hour; with the end of its output.
    """
    with log.open("w") as file:
        started = time.time()
        process = subprocess.Popen(
            list(command),
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        watch = MemoryWatch(lambda: _tree(process.pid, run_id() if run_id else None))
        watch.start()
        try:
            status = process.wait(DEADLINE_S)
        finally:
            if process.poll() is None:  # this program is ended, or the child takes for ever: show where it stood
                print(log.read_text(errors="replace")[-SHOWN_CHARACTERS:], file=sys.stderr)
                _stop(process)
            peak = watch.end()
    output = log.read_text(errors="replace")
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{output[-SHOWN_CHARACTERS:]}")
    return Finished(started, output, peak)


def _stop(process: subprocess.Popen) -> None:
    """End a child and its process group: a run of `rl` may write its checkpoint first, but not for ever."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a run's guard then ends what has left the group
        process.wait()


def run_python(program: Path, *arguments: object, log: Path) -> Finished:
    """Run a program of this folder by this interpreter."""
    return run_child([sys.executable, str(program), *map(str, arguments)], log)


def run_rl(
    config: str | Path, overrides: Iterable[str], folder: Path, env: Mapping[str, str] | None = None
) -> FinishedRun:
    """`rl run CONFIG key=value ...` to its end, its run directory below `folder`, which is made and must be empty.

    Raises RuntimeError as run_child does.
    """
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "rl.cli", "run", str(config), *overrides, f"run.dir={folder}"]

    def run_id() -> str | None:
        return next((path.name for path in folder.iterdir()), None)

    child = run_child(command, folder.with_name(f"{folder.name}.log"), env, run_id)
    (directory,) = folder.iterdir()
    return FinishedRun(directory, tuple(json_lines(directory / "metrics.jsonl")), child)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a line file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _tree(pid: int, run_id: str | None) -> list[psutil.Process]:
    """A process, what it started, and what carries the run's mark: daemons have no parent left."""
    found: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        found = {each.pid: each for each in (parent, *parent.children(recursive=True))}
    if run_id is not None:
        found |= {each.pid: each for each in marked_processes(run_id)}
    return list(found.values())
