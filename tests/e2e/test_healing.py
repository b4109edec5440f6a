"""One real run through the death of its engine, its Redis, a rank and its driver, beside one that is left in peace."""

from __future__ import annotations

import os
import time

import pytest

from tests.chaos.audit import audit, batches
from tests.chaos.faults import Fault
from tests.chaos.schedule import Patient

SETTINGS = ("staleness.max_lag=0", "learner.ranks=1", "run.steps=4", "evaluation.every_steps=99")


@pytest.mark.timeout(900)
def test_whatever_dies_the_run_goes_on_and_learns_what_it_would_have_learnt(rl):
    calm = rl("run", "smoke", *SETTINGS)
    assert calm.finish() == 0, calm.output.read_text()
    patient = Patient(rl("run", "smoke", *SETTINGS), rl)
    patient.suffer([Fault("redis", 1), Fault("engine", 1), Fault("rank", 2)])
    nothing_survives_its_driver(patient.run)
    directory = patient.run.directory
    healed = rl("resume", str(directory), path=directory)
    assert healed.finish() == 0, healed.output.read_text()

    found = audit(directory, max_lag=0)
    assert not found.problems
    assert found.steps == 4 and found.groups == 8 and found.aborted == 0
    assert batches(directory) == batches(calm.directory), "the same batches, and the same losses"
    assert set(calm.metrics["policy/lag_max/versions"]) == {0}

    kinds = {event["event"] for event in healed.events_of_all_kinds()}
    assert {"redis_revived", "generator_joined", "learners_lost", "rollback", "resume"} <= kinds
    healed.await_no_family()


def nothing_survives_its_driver(run) -> None:
    """Kill the driver without warning: its processes and its shared memory are gone in half a minute."""
    assert len(run.family()) > 5
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 30
    run.await_no_family(30)
    while left := [name for name in os.listdir("/dev/shm") if run.directory.name in name]:
        assert time.monotonic() < deadline, f"still in shared memory: {left}"
        time.sleep(0.1)  # the guard removes them after the last process has ended
