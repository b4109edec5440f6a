"""This file makes sure that no process of a run survives it: it finds them by a mark in their environment.

Every process that a run starts, however deep, inherits the variable MARK with the run's id. At the end the driver
sweeps. Should the driver itself be killed, a guard process that holds the other end of a pipe notices and sweeps.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import psutil

MARK = "SLIPSTREAM_RUN_ID"
GRACE_SECONDS = 5.0


def marked_processes(run_id: str, spare: frozenset[int] = frozenset()) -> list[psutil.Process]:
    """Living processes that carry the run's mark, without those in `spare`; zombies are their parents' business."""
    found = []
    for process in psutil.process_iter():
        if process.pid in spare:
            continue
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == run_id:
                found.append(process)
    return found


def sweep(run_id: str, spare: frozenset[int] = frozenset(), grace_s: float = GRACE_SECONDS) -> list[str]:
    """Ask what is left of the run to end, and kill what has not ended after `grace_s`; returns who had to be killed."""
    leftovers = marked_processes(run_id, spare)
    for process in leftovers:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(leftovers, timeout=grace_s)
    killed = []
    for process in marked_processes(run_id, spare):  # asked anew: what was just ending may have started a child
        with contextlib.suppress(psutil.Error):
            killed.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
            process.kill()
    return killed


def remove_shared_memory(run_id: str) -> None:
    """Remove weight updates and copies of the policy that a killed learner left; their names carry the run's id."""
    for folder in (pathlib.Path("/dev/shm"), pathlib.Path(tempfile.gettempdir())):
        for path in folder.glob(f"slipstream-{glob.escape(run_id)}-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class ProcessGuard:
    """Marks this process as the driver of a run, and leaves a guard behind that outlives it by seconds."""

    def __init__(self, run_id: str, lock: int | None = None) -> None:
        """lock is a descriptor that the guard holds open: what it locks stays locked until the guard has swept."""
        self.run_id = run_id
        os.environ[MARK] = run_id
        clean = {name: value for name, value in os.environ.items() if name != MARK}
        # Its own session: a Ctrl-C in the terminal is for the driver, and must not end the guard first.
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "rl.process_guard", run_id, str(os.getpid())],
            stdin=subprocess.PIPE,
            env=clean,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,
        )

    def close(self) -> list[str]:
        """Sweep, then dismiss the guard; returns who had to be killed."""
        killed = sweep(self.run_id, spare=frozenset({os.getpid()}))
        remove_shared_memory(self.run_id)
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(b"done\n")
            self._guard.stdin.close()
        self._guard.wait(timeout=GRACE_SECONDS)
        os.environ.pop(MARK, None)
        return killed


@contextlib.contextmanager
def guarded(run_id: str, lock: int) -> Iterator[list[str]]:
    """Guard the processes of a run while the block runs; afterwards the list names those that had to be killed."""
    guard, killed = ProcessGuard(run_id, lock), []
    try:
        yield killed
    finally:
        killed += guard.close()


def stand_guard(run_id: str, driver: int) -> None:
    """Wait until the driver says that it has swept, or is gone without a word; then sweep in its place."""
    if sys.stdin.buffer.readline():
        return
    deadline = time.monotonic() + GRACE_SECONDS
    while psutil.pid_exists(driver) and time.monotonic() < deadline:
        time.sleep(0.1)
    sweep(run_id, spare=frozenset({os.getpid(), driver}), grace_s=GRACE_SECONDS)
    remove_shared_memory(run_id)


if __name__ == "__main__":
    stand_guard(sys.argv[1], int(sys.argv[2]))
