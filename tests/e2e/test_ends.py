"""However a run ends, it says how, leaves nothing alive, and can be resumed: real signals on real processes."""

from __future__ import annotations

import os

LONG = ("run.steps=200", "learner.ranks=1", "evaluation.every_steps=1000", "checkpoint.every_steps=1")


def test_the_first_ctrl_c_stops_with_a_checkpoint_and_exit_status_0(rl):
    run = rl("run", "smoke", *LONG, "checkpoint.every_steps=1000")
    run.await_condition("a step", lambda: run.events("step"))
    run.press_ctrl_c()
    assert run.finish(120) == 0, run.output.read_text()
    assert run.outcome["status"] == "stopped"
    assert run.events("checkpoint")[-1]["step"] == run.outcome["step"] >= 1
    run.await_no_family(1)


def test_nothing_survives_a_driver_that_was_killed_without_warning(rl):
    run = rl("run", "smoke", *LONG)
    run.await_condition("verified weights", lambda: run.events("weights_verified"))
    assert len(run.family()) > 5
    run.process.kill()
    run.process.wait()
    run.await_no_family(30)
    assert not [name for name in os.listdir("/dev/shm") if run.directory.name in name]
