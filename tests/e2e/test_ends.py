"""However a run ends, it says how, leaves nothing alive, and can be resumed: real signals on real processes."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.chaos.audit import audit

LONG = ("run.steps=200", "learner.ranks=1", "evaluation.every_steps=1000", "checkpoint.every_steps=1")


def test_the_first_ctrl_c_stops_with_a_checkpoint_and_exit_status_0(rl):
    run = rl("run", "smoke", *LONG, "checkpoint.every_steps=1000")
    run.await_condition("a step", lambda: run.events("step"))
    run.press_ctrl_c()
    assert run.finish(120) == 0, run.output.read_text()
    assert run.outcome["status"] == "stopped"
    assert run.events("checkpoint")[-1]["step"] == run.outcome["step"] >= 1
    run.await_no_family(1)


def test_generators_come_and_go_by_request_sigterm_stops_the_run_and_a_past_step_can_be_made_again(rl):
    run = rl("run", "smoke", *LONG)
    run.await_condition("a step", lambda: run.events("step"))
    assert command("scale", run.directory, "generators=2") == 0
    (joined,) = run.await_condition("a second generator", lambda: run.events("generator_joined"))
    assert joined["generator"] == 1
    assert command("scale", run.directory, "generators=0") == 2
    assert command("scale", run.directory, "generators=1") == 0
    run.await_condition("its leave", lambda: run.events("generator_left"))
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(120) == 0, run.output.read_text()
    assert run.outcome["status"] == "stopped"
    run.await_no_family(1)
    assert audit(run.directory, max_lag=2, finished=False).problems == []
    assert command("replay", run.directory, "--step", "1") == 0
    assert command("scale", run.directory, "generators=2") == 2, "nobody is there to ask"


def command(name: str, *arguments: object) -> int:
    """Run another `rl` command; returns its exit status."""
    words = [sys.executable, "-m", "rl.cli", name, *map(str, arguments)]
    return subprocess.run(words, timeout=180, check=False).returncode
