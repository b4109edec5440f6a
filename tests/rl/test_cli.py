"""The command `rl` with bad input: fact, value and fix on one screen, an exit status, and an outcome file."""

from __future__ import annotations

import asyncio
import functools
import json
import pathlib
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

from rl.cli import application, new_run_id
from rl.control import announce, ask
from rl.recorder import RunDirectory
from rl.run_outcome import Outcome, write_outcome

BAD_INPUT = {
    "unknown key": (["staleness.max_lagg=1"], "max_lag"),
    "negative lag": (["staleness.max_lag=-1"], "staleness.max_lag"),
    "lonely answers": (["rollout.group_size=1"], "rollout.group_size"),
    "missing model": (["model.path=gguf:no_such_package/x.gguf"], "no_such_package"),
    "missing reward": (["rewards.functions.correct.use=no_such_reward"], "no_such_reward"),
    "unknown dataset": (["sources.sums.dataset=chain_summ"], "chain_sum"),
    "refusing Redis": (["buffer.redis=redis://127.0.0.1:1/0"], "127.0.0.1:1"),
}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A working directory of its own: refused runs leave their outcome under runs/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("overrides, expected", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_with_an_outcome_file_and_no_child_left(outside, overrides, expected):
    result = CliRunner().invoke(application, ["run", "smoke", *overrides])
    assert result.exit_code == 2, result.output
    assert expected in result.output and "Traceback" not in result.output
    assert len(result.output.splitlines()) < 25
    (outcome,) = pathlib.Path("runs").glob("*/outcome.json")
    told = json.loads(outcome.read_text())
    assert told["status"] == "refused" and expected in told["first_error"]["message"]


def test_a_config_that_is_not_yaml_is_refused_with_the_line(outside):
    pathlib.Path("broken.yaml").write_text("run:\n  steps: [1\nmodel: {}\n")
    result = CliRunner().invoke(application, ["run", "broken.yaml"])
    assert result.exit_code == 2 and "broken.yaml" in result.output and "line" in result.output


def test_a_run_directory_that_cannot_be_made_is_refused(outside):
    pathlib.Path("file").write_text("")
    result = CliRunner().invoke(application, ["run", "smoke", "run.dir=file"])
    assert result.exit_code == 2 and "run.dir file" in result.output


def test_resuming_what_never_ran_is_refused(outside):
    result = CliRunner().invoke(application, ["resume", "nothing"])
    assert result.exit_code == 2 and "config.yaml does not exist" in result.output


@pytest.fixture
def driven(outside):
    """A run with a driver, in a thread, that allows up to four generators."""

    async def scale(request):
        if request["generators"] > 4:
            raise ValueError("4 GPUs are here")
        return f"starting up to {request['generators']} generators"

    async def drive() -> None:
        with announce(directory) as desk:
            serving = asyncio.create_task(desk.serve({"scale": scale}, lambda kind, answer: None, 0.01))
            ready.set()
            await asyncio.to_thread(done.wait)
            serving.cancel()

    directory = pathlib.Path("runs/a-run").absolute()
    directory.mkdir(parents=True)
    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(drive(),))
    thread.start()
    assert ready.wait(20)
    yield directory
    done.set()
    thread.join()


def test_scaling_a_run_under_way_prints_the_drivers_answer(driven):
    for name in ("a-run", str(driven)):
        result = CliRunner().invoke(application, ["scale", name, "generators=3"])
        assert result.exit_code == 0 and "accepted  starting up to 3 generators" in result.output
    refused = CliRunner().invoke(application, ["scale", "a-run", "generators=9"])
    assert refused.exit_code == 2 and "refused  4 GPUs are here" in refused.output


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("ranks=2", "ranks cannot be scaled while a run is under way; generators can"),
        ("generators=0", "whole number of 1 or more"),
        ("generators=-1", "whole number of 1 or more"),
        ("generators=two", "whole number of 1 or more"),
        ("generators", "whole number of 1 or more"),
        ("=3", "nothing cannot be scaled"),
    ],
)
def test_what_cannot_be_scaled_is_refused_before_the_driver_is_asked(outside, change, told):
    result = CliRunner().invoke(application, ["scale", "nothing", "--", change])
    assert result.exit_code == 2 and told in result.output


def test_a_driver_that_does_not_answer_is_no_refusal(driven, monkeypatch):
    monkeypatch.setattr("rl.control.ask", functools.partial(ask, seconds=0))
    result = CliRunner().invoke(application, ["scale", "a-run", "generators=3"])
    assert result.exit_code == 1 and "no answer" in result.output and "kill -USR1" in result.output


def test_scaling_a_run_that_has_ended_says_so(outside):
    result = CliRunner().invoke(application, ["scale", "a-run", "generators=3"])
    assert result.exit_code == 2 and "a-run is not running" in result.output
    directory = RunDirectory("runs/a-run")
    directory.create()
    write_outcome(directory, Outcome(status="finished", step=12))
    result = CliRunner().invoke(application, ["scale", "a-run", "generators=3"])
    assert result.exit_code == 2 and "not running: it is finished at step 12" in result.output


def test_check_prints_the_arithmetic_and_its_exit_status_tells_of_problems(outside):
    good = CliRunner().invoke(application, ["check", "arithmetic"])
    assert good.exit_code == 0 and "trajectories per step" in good.output
    bad = CliRunner().invoke(application, ["check", "arithmetic", "rewards.functions.correct.use=no_such_reward"])
    assert bad.exit_code == 2 and "no_such_reward" in bad.output


def test_check_does_not_print_a_password(outside):
    shown = CliRunner().invoke(application, ["check", "smoke", "buffer.redis=redis://me:secret@127.0.0.1:1/0"]).output
    assert "secret" not in shown and "redis://me:***@127.0.0.1:1/0" in shown


def test_check_needs_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from rl.cli import application;"
        "result = CliRunner().invoke(application, ['check', 'arithmetic']); assert result.exit_code == 0;"
        "heavy = {'torch', 'vllm', 'transformers', 'ray', 'reasoning_gym'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_doctor_looks_at_this_machine_and_ends_with_a_status():
    result = CliRunner().invoke(application, ["doctor", "smoke"])
    assert result.exit_code in (0, 1) and "python" in result.output


def test_two_runs_of_one_second_have_different_ids():
    assert len({new_run_id("a") for _ in range(20)}) == 20
