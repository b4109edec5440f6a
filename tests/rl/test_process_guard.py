"""No process of a run survives it, even where the driver is killed: real processes, real SIGKILL."""

import os
import secrets
import signal
import subprocess
import sys

import psutil

from rl.process_guard import MARK, ProcessGuard, marked_processes, sweep

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
DRIVER = """
import subprocess, sys, time
from rl.process_guard import ProcessGuard
guard = ProcessGuard(sys.argv[1])
grandchild = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).wait()"
child = subprocess.Popen([sys.executable, "-c", grandchild], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""


def start(run_id, code):
    environment = {**os.environ, MARK: run_id}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    return process


def test_a_process_that_ignores_the_polite_signal_is_killed_and_named():
    run_id = secrets.token_hex(8)
    process = start(run_id, STUBBORN)
    killed = sweep(run_id, grace_s=0.2)
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert killed and killed[0].startswith(f"{process.pid} ")


def test_another_runs_processes_are_left_alone():
    mine, other = secrets.token_hex(8), secrets.token_hex(8)
    process = start(other, STUBBORN)
    sweep(mine, grace_s=0.1)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_driver_killed_without_warning_takes_its_grandchildren_along():
    run_id = secrets.token_hex(8)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, run_id], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "up\n"
    family = psutil.Process(driver.pid).children(recursive=True)
    marked = marked_processes(run_id)
    assert marked
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and not marked_processes(run_id)


def test_after_a_quiet_end_the_guard_itself_is_gone():
    guard = ProcessGuard(secrets.token_hex(8))
    assert guard.close() == []
    assert guard._guard.returncode == 0
    assert MARK not in os.environ
