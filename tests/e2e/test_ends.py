"""However a run ends, it says how, leaves nothing alive, and can be resumed: real signals on real processes."""

from __future__ import annotations

import os
import signal
import time

import pandas

LONG = ("run.steps=200", "learner.ranks=1", "evaluation.every_steps=1000", "checkpoint.every_steps=1")


def after_steps(run, steps: int) -> None:
    """Wait until a checkpoint of that step is complete."""
    run.await_condition(f"{steps} steps", lambda: len(run.events("checkpoint")) >= steps)


def test_a_killed_engine_ends_the_run_as_its_first_error_and_resume_carries_on(rl):
    run = rl("run", "smoke", *LONG)
    after_steps(run, 1)
    os.kill(run.engine_core(), signal.SIGKILL)
    killed_at = time.monotonic()
    assert run.finish(60) == 1
    assert time.monotonic() - killed_at < 30
    assert run.outcome["status"] == "failed" and "EngineDied" in run.outcome["first_error"]["type"]
    run.await_no_family()

    saved = run.events("checkpoint")[-1]["step"]
    config = run.directory / "config.yaml"
    config.write_text(config.read_text().replace("steps: 200", f"steps: {saved + 2}"))
    again = rl("resume", str(run.directory), path=run.directory)
    assert again.finish() == 0, again.output.read_text()
    assert again.outcome["status"] == "finished" and again.outcome["step"] == saved + 2
    archived = pandas.concat(pandas.read_parquet(path) for path in (run.directory / "archive").iterdir())
    assert set(archived["step"]) == set(range(1, saved + 3))
    assert archived.groupby("group")["step"].nunique().max() == 1, "a group was trained twice"


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
