"""The run directory's files."""

import json

import pytest

from rl.evaluation import summarise
from rl.metrics import last
from rl.recorder import Recorder, RunDirectory, read_rows, rollout_rows, write_atomically
from tests.rl.archive_samples import rich_group


@pytest.fixture
def recorder(tmp_path):
    directory = RunDirectory(tmp_path / "run-1")
    directory.create()
    return Recorder(directory)


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_ledger_ignores_a_line_that_a_crash_cut(recorder):
    recorder.ledger(1, 0, ["a", "b"])
    recorder.ledger(2, 1, ["c", "d"])
    path = recorder.directory.path / "ledger.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "ver')
    assert recorder.read_ledger() == {1: ("a", "b"), 2: ("c", "d")}


def test_a_step_becomes_one_line_of_plain_numbers(recorder):
    recorder.step(1, {"reward/mean": last(0.5)})
    row = json.loads((recorder.directory.path / "metrics.jsonl").read_text())
    assert row["step"] == 1 and row["reward/mean"] == 0.5


def test_a_metric_is_read_back_by_step_where_a_step_has_it_and_a_crash_left_its_line(recorder):
    recorder.step(1, {"x": last(0.5)})
    recorder.step(2, {"y": last(1.0)})
    recorder.step(3, {"x": last(2.0)})
    cut(recorder, "metrics.jsonl", '{"step": 4, "x": 1')
    assert recorder.read_metric("x") == {1: 0.5, 3: 2.0}


def rows_of(recorder, name):
    return [row for _, row in read_rows(recorder.directory.path / name)]


def cut(recorder, name, text):
    """Leave the beginning of a line, as a crash does."""
    with (recorder.directory.path / name).open("a") as file:
        file.write(text)


def test_bytes_are_written_as_atomically_as_text(tmp_path):
    write_atomically(tmp_path / "file", b"\x00\xff")
    assert (tmp_path / "file").read_bytes() == b"\x00\xff"


def test_a_line_after_a_cut_one_is_not_lost_with_it(recorder):
    recorder.ledger(1, 0, ["a"])
    cut(recorder, "ledger.jsonl", '{"step": 2, "gro')
    recorder.ledger(2, 1, ["b"])
    recorder.ledger(3, 2, ["c"])
    assert recorder.read_ledger() == {1: ("a",), 2: ("b",), 3: ("c",)}
    recorder.step(1, {"x": last(1.0)})
    cut(recorder, "metrics.jsonl", '{"step": 2, "x"')
    recorder.step(2, {"x": last(2.0)})
    assert [row and row["x"] for row in rows_of(recorder, "metrics.jsonl")] == [1.0, None, 2.0]


def test_a_step_written_twice_into_the_ledger_counts_as_last_written(recorder):
    recorder.ledger(1, 0, ["a", "b"])
    recorder.ledger(1, 0, ["a", "c"])
    assert recorder.read_ledger() == {1: ("a", "c")}


def test_a_damaged_ledger_line_with_steps_after_it_is_told(recorder):
    recorder.ledger(1, 0, ["a"])
    cut(recorder, "ledger.jsonl", '{"step": 2, "vers\x00\x00\n')
    recorder.ledger(3, 2, ["c"])
    with pytest.raises(ValueError, match=r"ledger.jsonl has 1 unreadable line.*step 2.*step 3 came after.*backup"):
        recorder.read_ledger()


def test_a_loss_is_recorded_in_full_precision(recorder):
    recorder.step(1, {"learner/loss": last(0.1 + 0.2)})
    assert rows_of(recorder, "metrics.jsonl")[0]["learner/loss"] == 0.1 + 0.2


def test_rewinding_moves_later_rows_away_and_each_step_has_one_again(recorder):
    for step in range(1, 5):
        recorder.step(step, {"x": last(step)})
        recorder.evaluation(summarise(step, step, []))
    recorder.rewind(2)
    assert [row["step"] for row in rows_of(recorder, "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in rows_of(recorder, "evaluations.jsonl")] == [1, 2]
    recorder.step(3, {"x": last(30)})
    recorder.rewind(2)
    recorder.step(3, {"x": last(300)})
    assert [row["x"] for row in rows_of(recorder, "metrics.jsonl")] == [1, 2, 300]
    assert [row["x"] for row in rows_of(recorder, "metrics_rolled_back.jsonl")] == [3, 4, 30]
    assert [row["step"] for row in rows_of(recorder, "evaluations_rolled_back.jsonl")] == [3, 4]


def test_rewinding_where_nothing_came_later_changes_no_file(recorder):
    recorder.rewind(0)
    recorder.step(1, {"x": last(1)})
    recorder.rewind(1)
    assert {path.name for path in recorder.directory.path.iterdir() if path.is_file()} == {"metrics.jsonl"}


def test_rewinding_keeps_the_text_of_a_cut_line(recorder):
    recorder.step(1, {"x": last(1)})
    cut(recorder, "metrics.jsonl", '{"step": 2, "x"')
    recorder.rewind(1)
    assert [row["step"] for row in rows_of(recorder, "metrics.jsonl")] == [1]
    assert rows_of(recorder, "metrics_rolled_back.jsonl") == [{"unreadable": '{"step": 2, "x"'}]


def test_a_crash_while_rewinding_loses_no_row_and_doubles_none(recorder, monkeypatch):
    for step in (1, 2):
        recorder.step(step, {"x": last(step)})
    written = []

    def crashing(path, text):
        if written:
            raise OSError("killed")
        written.append(path.name)
        write_atomically(path, text)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr("rl.recorder.write_atomically", crashing)
        recorder.rewind(1)
    assert [row["x"] for row in rows_of(recorder, "metrics.jsonl")] == [1, 2]
    recorder.rewind(1)
    assert [row["x"] for row in rows_of(recorder, "metrics.jsonl")] == [1]
    assert [row["x"] for row in rows_of(recorder, "metrics_rolled_back.jsonl")] == [2]


def test_a_readable_row_shows_a_failure_as_a_failure():
    rows = rollout_rows(rich_group(1))
    assert rows[1]["reward"] is None and rows[1]["failures"] == {"answer": "timeout"}
    assert rows[0]["versions"] == [[0, 0, 1], [1, 1, 4]]
