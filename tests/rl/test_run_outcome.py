"""outcome.json and the exit status."""

import json

from rl.recorder import RunDirectory
from rl.run_outcome import Outcome, write_outcome


def test_an_error_is_told_with_its_type_message_place_and_traceback(tmp_path):
    try:
        raise RuntimeError("the engine died")
    except RuntimeError as error:
        error.add_note("in sampling")
        outcome = Outcome.of_error("failed", error, step=3)
    write_outcome(RunDirectory(tmp_path), outcome)
    told = json.loads((tmp_path / "outcome.json").read_text())
    assert told["status"] == "failed" and told["step"] == 3
    assert told["first_error"]["message"] == "the engine died" and told["first_error"]["where"] == "in sampling"
    assert "test_run_outcome.py" in told["first_error"]["traceback"]


def test_the_exit_status_is_0_only_for_an_end_that_somebody_wanted():
    statuses = {status: Outcome(status=status).exit_status for status in ("finished", "stopped", "failed", "refused")}
    assert statuses == {"finished": 0, "stopped": 0, "failed": 1, "refused": 2}


def test_an_error_that_ray_wrapped_is_told_as_itself_with_the_remote_traceback():
    class Wrapped(RuntimeError):
        cause = ValueError("the fact, the value, the fix")

    outcome = Outcome.of_error("failed", Wrapped("forty lines of remote traceback"))
    assert outcome.first_error.type == "ValueError" and outcome.first_error.message == "the fact, the value, the fix"
    assert "forty lines" not in outcome.summary and "forty lines" in outcome.first_error.traceback
