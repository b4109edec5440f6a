"""This file carries a real run through a seeded schedule of faults, each when the one before has healed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos.audit import rows
from tests.chaos.faults import Fault, strike
from tests.run_process import RunProcess

HEAL_DEADLINE_S = 300.0
HANG_S = 12.0  # longer than a test's heartbeat deadline
MOMENTS_S = 4.0  # a fault falls anywhere within the first seconds of a step
HEALED_BY = {
    "engine": "generator_joined",
    "actor": "generator_joined",
    "rank": "rollback",
    "redis": "reconciled",
    "driver": "resume",
}


def seeded(seed: int, kinds: tuple[str, ...], first_step: int = 1) -> list[Fault]:
    """One fault of each kind named, a step or two apart, at a moment of its step that the seed decides."""
    rng, step, faults = random.Random(seed), first_step, []
    for kind in kinds:
        name, _, number = kind.partition("/")
        stopped = number == "stop"
        faults.append(
            Fault(
                kind=name,
                after_step=step,
                number=signal.SIGSTOP if stopped else signal.SIGKILL,
                continue_after_s=HANG_S if stopped and name == "redis" else None,
                delay_s=rng.uniform(0.0, MOMENTS_S),
                choice=rng.random(),
            )
        )
        step += rng.choice((1, 1, 2))
    return faults


@dataclass
class Patient:
    """A run under treatment; its process changes when its driver is killed and it is resumed."""

    run: RunProcess
    start: Callable[..., RunProcess]
    healed: list[tuple[str, float]] = field(default_factory=list)  # fault -> seconds until the run was whole again
    struck: list[float] = field(default_factory=list)  # moments, in seconds since 1970

    def suffer(self, faults: list[Fault]) -> None:
        """Strike one fault after the other, each once the run is whole again and has come far enough."""
        for fault in faults:
            self.run.await_condition(f"step {fault.after_step}", lambda fault=fault: self._steps() >= fault.after_step)
            time.sleep(fault.delay_s)  # the moment is part of the fault
            self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        sign = HEALED_BY[fault.kind]
        before, struck = len(self.run.events(sign)), time.time()
        self.struck.append(struck)
        if fault.kind == "driver":
            self.run.process.kill()
            self.run.process.wait()
            directory = self.run.directory
            self.run = self.start("resume", str(directory), path=directory)
        else:
            strike(self.run.directory.name, fault)
        if fault.continue_after_s is None or fault.kind != "redis":
            what = f"{sign} after {fault}"
            self.run.await_condition(what, lambda: len(self.run.events(sign)) > before, HEAL_DEADLINE_S)
            self.healed.append((str(fault), self.run.events(sign)[-1]["time"] - struck))

    def _steps(self) -> int:
        path = self.run.directory / "metrics.jsonl"
        return rows(path)[-1]["step"] if path.exists() and path.read_text().strip() else 0
