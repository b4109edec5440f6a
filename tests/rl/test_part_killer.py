"""One part's processes end, whatever state they are in, and nobody else's: real processes, real signals."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys

import psutil
import pytest

from rl.part_killer import (
    PART,
    kill_part,
    marks_of,
    part_pids,
    part_segments,
    remove_generator_files,
    remove_segments,
)
from rl.process_guard import MARK

PARENT = """
import subprocess, sys
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True).wait()
"""
SHARING = """
from multiprocessing import shared_memory
import time
block = shared_memory.SharedMemory(create=True, size=64)
print("up", block.name, flush=True)
time.sleep(600)
"""


@pytest.fixture
def run_id():
    return secrets.token_hex(8)


def start(run_id: str, part: str, code: str = PARENT) -> tuple[subprocess.Popen, str]:
    environment = {**os.environ, MARK: run_id, **marks_of(part)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("up")
    return process, line.removeprefix("up").strip()


def test_a_part_ends_with_all_that_it_started_also_what_is_stopped(run_id):
    process, _ = start(run_id, "generator-1-0")
    (child,) = psutil.Process(process.pid).children()
    os.kill(child.pid, signal.SIGSTOP)
    assert kill_part(run_id, "generator-1-0", 10) == sorted([process.pid, child.pid])
    assert part_pids(run_id, "generator-1-0") == [] and process.wait(timeout=10) == -signal.SIGKILL


def test_other_parts_and_other_runs_are_left_alone(run_id):
    others = [start(run_id, "generator-1-1")[0], start(run_id + "0", "generator-1-0")[0]]
    assert kill_part(run_id, "generator-1-0", 10) == []
    assert all(process.poll() is None for process in others)
    kill_part(run_id, "generator-1-1", 10)
    kill_part(run_id + "0", "generator-1-0", 10)
    for process in others:
        process.wait(timeout=10)


def test_shared_memory_of_killed_processes_is_freed_by_their_tracker(run_id):
    process, name = start(run_id, "generator-2-0", SHARING)
    assert part_segments(run_id, "generator-2-0") == [f"/dev/shm/{name}"] and os.path.exists(f"/dev/shm/{name}")
    kill_part(run_id, "generator-2-0", 10)
    assert not os.path.exists(f"/dev/shm/{name}")
    process.wait(timeout=10)


def test_shared_memory_that_no_tracker_is_left_for_is_removed_by_its_name(run_id):
    process, name = start(run_id, "generator-2-1", SHARING)
    segments = part_segments(run_id, "generator-2-1")
    (tracker,) = psutil.Process(process.pid).children()
    tracker.kill()  # as Ray does with the group of a dead worker
    kill_part(run_id, "generator-2-1", 10)
    assert os.path.exists(f"/dev/shm/{name}")
    remove_segments([*segments, "/dev/shm/psm_gone"])
    assert not os.path.exists(f"/dev/shm/{name}")
    process.wait(timeout=10)


def test_a_process_title_does_not_hide_the_marks(run_id):
    code = "import setproctitle, time; setproctitle.setproctitle('x' * 200); print('up', flush=True); time.sleep(600)"
    process, _ = start(run_id, "generator-3-0", code)
    assert kill_part(run_id, "generator-3-0", 10) == [process.pid]
    process.wait(timeout=10)


def test_who_does_not_end_is_named(run_id, monkeypatch):
    process, _ = start(run_id, "generator-4-0")
    monkeypatch.setattr("signal.pidfd_send_signal", lambda pidfd, number: None)
    with pytest.raises(TimeoutError, match=rf"generator-4-0: processes \[{process.pid}, \d+\] still run 0 s after"):
        kill_part(run_id, "generator-4-0", 0.0)
    monkeypatch.undo()
    kill_part(run_id, "generator-4-0", 10)
    process.wait(timeout=10)


def test_only_the_files_of_that_generator_are_removed(tmp_path):
    names = {
        f"slipstream-{run}-generator-{index}-version-{version}.safetensors"
        for run, index, version in (("a", 1, 7), ("a", 1, 8), ("a", 11, 7), ("a[b]", 1, 7))
    }
    for name in names:
        (tmp_path / name).touch()
    remove_generator_files(str(tmp_path), "a", 1)
    left = {path.name for path in tmp_path.iterdir()}
    assert names - left == {f"slipstream-a-generator-1-version-{version}.safetensors" for version in (7, 8)}


def test_the_mark_is_the_one_that_is_looked_for():
    assert marks_of("generator-0-0")[PART] == "generator-0-0"
