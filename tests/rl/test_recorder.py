"""The run directory's files."""

import json

import pytest

from rl.metrics import last
from rl.orders import Draw
from rl.recorder import Recorder, RunDirectory, archive_rows, write_atomically
from tests.fakes import make_group, make_prompt


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


def test_the_archive_keeps_token_ids_and_logprobs_and_a_failure_stays_a_failure(recorder):
    group = make_group(Draw(group_id="g", draw=0, prompt=make_prompt(), seed=1), (1.0, None))
    rows = archive_rows(group)
    assert rows[0]["token_ids"] == [10, 11, 12, 13] and rows[0]["logprobs"] == [-0.5] * 4
    assert rows[1]["reward"] is None and json.loads(rows[1]["failures"]) == {"answer": "timeout"}
    recorder.archive(1, [group])
    assert [path.name for path in recorder.directory.archive.iterdir()] == ["step_000001.parquet"]
