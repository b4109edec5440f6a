"""This file hurts a real run: it finds each kind of process by what it calls itself, and kills or stops it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import psutil

from rl.process_guard import marked_processes

NAMES = {
    "engine": "VLLM::EngineCore",
    "actor": "ray::GeneratorProcess",
    "rank": "ray::LearnerProcess",
    "redis": "redis-server",
}


@dataclass(frozen=True)
class Fault:
    """Send a signal to one process of a kind, some moments after a step; choice in 0..1 says which of several.

    A process that is stopped and not continued after continue_after_s hangs until the run finds out.
    """

    kind: str
    after_step: int
    number: signal.Signals = signal.SIGKILL
    continue_after_s: float | None = None
    delay_s: float = 0.0
    choice: float = 0.0

    def __str__(self) -> str:
        return f"{self.number.name} to the {self.kind} {self.delay_s:.1f} s after step {self.after_step}"


def processes(run_id: str, kind: str) -> list[psutil.Process]:
    """The living processes of a kind, by number."""
    named = [process for process in marked_processes(run_id) if _title(process).startswith(NAMES[kind])]
    return sorted(named, key=lambda process: process.pid)


def strike(run_id: str, fault: Fault) -> int:
    """Send the signal; returns the pid that it hit."""
    found = processes(run_id, fault.kind)
    assert found, f"no {fault.kind} among {[_title(process) for process in marked_processes(run_id)]}"
    victim = found[int(fault.choice * len(found))]
    os.kill(victim.pid, fault.number)
    if fault.continue_after_s is not None:
        time.sleep(fault.continue_after_s)  # how long it stands still is the fault itself
        os.kill(victim.pid, signal.SIGCONT)
    return victim.pid


def _title(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
