"""One real run through the death of its engine, its Redis, a rank and its driver, beside one that is left in peace."""

from __future__ import annotations

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
    patient.suffer([Fault("redis", 1), Fault("engine", 1), Fault("rank", 2), Fault("driver", 3)])
    assert patient.run.finish() == 0, patient.run.output.read_text()

    found = audit(patient.run.directory, max_lag=0)
    assert not found.problems
    assert found.steps == 4 and found.groups == 8 and found.aborted == 0
    assert batches(patient.run.directory) == batches(calm.directory), "the same batches, and the same losses"
    assert set(calm.metrics["policy/lag_max/versions"]) == {0}

    kinds = {event["event"] for event in patient.run.events_of_all_kinds()}
    assert {"redis_revived", "generator_joined", "learners_lost", "rollback", "resume"} <= kinds
    patient.run.await_no_family()
