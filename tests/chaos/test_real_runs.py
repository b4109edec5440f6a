"""Real runs through every kind of death, at seeded moments, and then an audit of what they left: `make chaos`.

The default suite has one such run (tests/e2e/test_healing.py); these take twenty minutes.
"""

from __future__ import annotations

import statistics

import pytest

from rl.archive import Archive
from rl.recorder import RunDirectory
from tests.chaos.audit import audit, batches
from tests.chaos.faults import Fault
from tests.chaos.schedule import Patient, seeded

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]
SETTINGS = (
    "evaluation.every_steps=1000",
    "checkpoint.every_steps=3",
    "monitoring.heartbeat_deadline_s=10",
    "curriculum.max_uninformative_steps=1000",
)
KINDS = ("engine", "rank", "redis", "driver", "actor")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_loses_everything_once_keeps_every_promise(rl, seed):
    kinds = KINDS if seed == 1 else ("rank/stop", "engine/stop", "redis/stop", "driver", "rank")
    faults = seeded(seed, kinds)
    patient = Patient(rl("run", "smoke", f"run.steps={faults[-1].after_step + 3}", *SETTINGS), rl)
    patient.suffer(faults)
    assert patient.run.finish() == 0, patient.run.output.read_text()
    found = audit(patient.run.directory, max_lag=2)
    print(f"\n{found}\n" + "\n".join(f"  {seconds:6.1f} s  {fault}" for fault, seconds in patient.healed))
    assert not found.problems
    patient.run.await_no_family()


def test_with_max_lag_0_the_loss_curve_is_that_of_an_undisturbed_run(rl):
    settings = ("staleness.max_lag=0", "learner.ranks=1", "run.steps=8", *SETTINGS)
    calm = rl("run", "smoke", *settings)
    assert calm.finish() == 0, calm.output.read_text()
    patient = Patient(rl("run", "smoke", *settings), rl)
    patient.suffer(seeded(3, ("rank", "engine", "redis", "driver")))
    assert patient.run.finish() == 0, patient.run.output.read_text()
    found = audit(patient.run.directory, max_lag=0)
    undisturbed, healed = batches(calm.directory), batches(patient.run.directory)
    same = [step for step in undisturbed if undisturbed[step][0] == healed[step][0]]
    print(f"\n{found}\nsame batches in steps {same}\n{undisturbed}\n{healed}")
    assert not found.problems
    assert all(undisturbed[step][1] == pytest.approx(healed[step][1], rel=1e-6) for step in same)
    assert same == list(undisturbed), "a batch differs: the run did not sample what an undisturbed one does"


def test_how_long_it_takes_to_heal(rl):
    """Five deaths of a generator and of a rank: a table of medians, and no bound, since machines differ."""
    settings = ("checkpoint.every_steps=4", "checkpoint.memory_every_steps=1")
    patience = ("generators.max_restarts=9", "learner.max_restarts=9")
    patient = Patient(rl("run", "smoke", "run.steps=60", "learner.ranks=1", *SETTINGS, *settings, *patience), rl)
    struck = {}
    for kind in ("engine", "rank"):
        for _ in range(5):
            patient.suffer([Fault(kind, patient._steps() + 1)])
        struck[kind] = patient.struck[-5:]
    patient.suffer([])
    patient.run.await_condition("one more step", lambda: patient.run.events("step")[-1]["time"] > struck["rank"][-1])
    patient.run.press_ctrl_c()
    assert patient.run.finish() == 0, patient.run.output.read_text()
    assert not audit(patient.run.directory, max_lag=2, finished=False).problems

    joined, steps = patient.run.events("generator_joined"), patient.run.events("step")
    archive = Archive(RunDirectory(patient.run.directory))
    published = [group.finished_at for step in archive.steps() for group in archive.read(step)]
    finished = sorted([*published, *(event["time"] for event in patient.run.events("dropped"))])
    tell("SIGKILL of a generator's engine to its return, verified", struck["engine"], [e["time"] for e in joined])
    after_joining = [next(moment for moment in finished if moment > event["time"]) for event in joined]
    tell("SIGKILL of a generator's engine to its next finished group", struck["engine"], after_joining)
    tell("SIGKILL of a rank to the next step", struck["rank"], [event["time"] for event in steps])
    bare = [event["seconds"] for event in patient.run.events("learners_restarted")]
    print(f"the new rank's own start: median {statistics.median(bare):.1f} s of {[round(each, 1) for each in bare]}")


def tell(what: str, struck: list[float], moments: list[float]) -> None:
    """Print how long after each fault the first of the moments came."""
    times = [next(moment for moment in moments if moment > fault) - fault for fault in struck]
    print(f"\n{what}: median {statistics.median(times):.1f} s of {[round(each, 1) for each in times]}", end="")
