"""`rl plan` on guesses, files and runs: what it prints, and what it refuses."""

from __future__ import annotations

import time

import pytest
from typer.testing import CliRunner

from rl.cli import application
from rl.plan_command import Asked
from tests.rl.planner_samples import finished_run


def plan(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(application, ["plan", *arguments], env={"COLUMNS": "120"})
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_without_a_run_it_guesses_and_says_so():
    start = time.monotonic()
    status, output = plan("arithmetic", "model.device=cpu", "--devices", "4")
    assert status == 0, output
    assert "guessed; measure with: rl run CONFIG run.steps=6" in output
    assert "best splits of 4 cores" in output and "bottleneck" in output and "max_lag 0" in output
    assert "generators.count=" in output
    assert time.monotonic() - start < 30, "it takes one or two seconds on an idle machine"


def test_on_gpus_the_device_and_the_number_are_chosen():
    status, output = plan("gsm8k_gpu", "learner.groups_per_step=16", "--devices", "8", "--gpu", "a100")
    assert status == 0, output
    assert "A100, 1,500 million" in output and "best splits of 8 devices" in output


def test_from_a_run_it_shows_how_near_the_prediction_comes_and_keeps_the_costs(tmp_path):
    directory, written = finished_run(tmp_path, varied=False), tmp_path / "costs.json"
    overrides = ("arithmetic", "model.device=cpu")
    status, output = plan(*overrides, "--from", str(directory.path), "--write", str(written))
    assert status == 0, output
    for expected in ("fitted to 28 steps of a_run", "measured", "predicted", "trajectories/s", "points"):
        assert expected in output
    status, again = plan(*overrides, "--costs", str(written))
    assert status == 0 and "fitted to 28 steps of a_run" in again
    assert again.splitlines()[2:8] == output.splitlines()[2:8]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--from", "no_such_run"], "no_such_run"),
        (["--costs", "none.json"], "none.json does not exist"),
        (["--costs", "a.json", "--from", "b"], "give one of them"),
        (["staleness.max_lagg=1"], "max_lag"),
        (["model.device=cuda", "--gpu", "z80"], "a100, h100, h200"),
        (["model.device=cuda", "generators.tensor_parallel=8", "--devices", "4"], "ask for 9 or more"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_fix(arguments, expected):
    status, output = plan("arithmetic", *arguments)
    assert status == 2 and expected in " ".join(output.split())


def test_a_guess_goes_by_one_device_where_none_is_named():
    assert Asked().gpu == "h100"
