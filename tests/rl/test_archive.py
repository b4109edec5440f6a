"""This file tests rl/archive.py: what was written comes back, and nothing damaged or foreign is taken for it."""

from __future__ import annotations

import json
import random
import shutil

import msgspec
import pandas
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings

from rl.archive import Archive
from rl.codec import encode_group
from rl.recorder import RunDirectory
from tests.rl.archive_samples import rich_group
from tests.rl.test_codec import groups

BATCH = [rich_group(7), rich_group(3, (None, None)), rich_group(5, (0.0, -1.5, 1.0))]


@pytest.fixture
def archive(tmp_path):
    directory = RunDirectory(tmp_path / "run-1")
    directory.create()
    return Archive(directory)


def test_groups_come_back_exactly_and_in_the_order_of_their_batch(archive):
    archive.write(4, BATCH)
    assert archive.read(4) == BATCH
    assert archive.holds(4) and archive.steps() == [4] and not archive.holds(5)
    assert not list(archive.folder.glob("*.partial"))


@given(group=groups())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_group_comes_back_exactly(archive, group):
    archive.write(1, [group])
    assert encode_group(archive.read(1)[0]) == encode_group(group)


def test_a_log_probability_that_is_not_a_number_is_kept_as_it_is(archive):
    answer = rich_group(1).trajectories[0]
    completion = msgspec.structs.replace(answer.completion, logprobs=(float("nan"), float("-inf"), -0.0, -5e-324))
    group = msgspec.structs.replace(
        rich_group(1), trajectories=(msgspec.structs.replace(answer, completion=completion),)
    )
    archive.write(1, [group])
    assert encode_group(archive.read(1)[0]) == encode_group(group)


def test_a_step_written_again_has_the_same_bytes(archive):
    archive.write(2, BATCH)
    before = archive.path_of(2).read_bytes()
    archive.write(2, BATCH)
    assert archive.path_of(2).read_bytes() == before


def test_people_read_it_with_pandas(archive):
    archive.write(4, BATCH)
    rows = pandas.read_parquet(archive.path_of(4))
    assert len(rows) == 8 and set(rows["step"]) == {4} and list(rows["group"].unique()) == [g.group_id for g in BATCH]
    row = rows.iloc[0]
    assert row["prompt"] == "Be brief.\n1 + 1 = ?\n\u00e9\u4f60\U0001f600" and row["source"] == "sums"
    assert list(row["token_ids"]) == [10, 11, 12, 13] and row["logprobs"][0] == -1 / 3
    assert row["completion"] == "The answer is 4.\n" and json.loads(row["reward_versions"])["answer"] == "a7"
    assert pandas.isna(rows.iloc[1]["reward"]) and json.loads(rows.iloc[1]["failures"]) == {"answer": "timeout"}


def test_a_step_without_any_reward_has_the_columns_of_every_other(archive):
    archive.write(1, BATCH)
    archive.write(2, [rich_group(1, (None, None))])
    schemas = [pyarrow.parquet.read_schema(archive.path_of(step)).remove_metadata() for step in (1, 2)]
    assert schemas[0] == schemas[1]


def test_columns_alone_can_be_searched(archive):
    archive.write(4, BATCH)
    rows = archive.columns(4, "group", "prompt_id")
    assert len(rows) == 8 and rows[0] == {"group": "run-1/00000007", "prompt_id": "sums/easy/7"}


def test_a_missing_step_is_named_with_what_there_is(archive):
    with pytest.raises(ValueError, match=r"step_000001.parquet does not exist.*no step is archived yet"):
        archive.read(1)
    archive.write(2, BATCH)
    archive.write(3, BATCH)
    with pytest.raises(ValueError, match=r"step_000009.parquet does not exist.*steps 2 to 3"):
        archive.read(9)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_told_and_left_as_it_is(archive, share):
    archive.write(4, BATCH)
    path = archive.path_of(4)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"step_000004.parquet is damaged.*Other steps are unharmed.*Restore it"):
        archive.read(4)
    assert path.stat().st_size == int(share * len(whole))
    archive.write(4, BATCH)
    assert archive.read(4) == BATCH


def test_any_damaged_byte_is_noticed_or_changes_nothing(archive):
    archive.write(1, BATCH[:1])
    path = archive.path_of(1)
    whole = path.read_bytes()
    rng = random.Random(0)
    noticed = 0
    for _ in range(400):
        at, damaged = rng.randrange(len(whole)), bytearray(whole)
        damaged[at] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert archive.read(1) == BATCH[:1], at
        except ValueError as error:
            assert path.name in str(error)
            noticed += 1
    assert noticed > 200


def test_rows_that_were_edited_are_noticed(archive):
    archive.write(1, BATCH)
    table = pyarrow.parquet.read_table(archive.path_of(1))
    at = table.schema.get_field_index("reward")
    edited = table.set_column(at, table.schema.field(at), [pyarrow.array([9.0] * len(table))])
    pyarrow.parquet.write_table(edited, archive.path_of(1))
    with pytest.raises(ValueError, match="not those that were written"):
        archive.read(1)
    pyarrow.parquet.write_table(table.slice(0, 3), archive.path_of(1))
    with pytest.raises(ValueError, match="its 3 rows are not those"):
        archive.read(1)


def test_another_run_or_another_step_is_refused(archive, tmp_path):
    other = RunDirectory(tmp_path / "run-2")
    other.create()
    archive.write(1, BATCH)
    shutil.copy(archive.path_of(1), Archive(other).path_of(1))
    with pytest.raises(ValueError, match="holds step 1 of run run-1, not step 1 of run run-2"):
        Archive(other).read(1)
    shutil.copy(archive.path_of(1), archive.path_of(2))
    with pytest.raises(ValueError, match="holds step 1 of run run-1, not step 2"):
        archive.columns(2, "group")


def test_a_file_of_something_else_is_refused(archive):
    pandas.DataFrame({"a": [1]}).to_parquet(archive.path_of(1))
    with pytest.raises(ValueError, match="not written by this project's archive"):
        archive.read(1)


def test_a_later_schema_is_refused_by_its_number(archive):
    archive.write(1, BATCH)
    table = pyarrow.parquet.read_table(archive.path_of(1))
    later = table.replace_schema_metadata({**table.schema.metadata, b"slipstream_schema": b"2"})
    pyarrow.parquet.write_table(later, archive.path_of(1))
    with pytest.raises(ValueError, match="schema 2, this version reads 1"):
        archive.read(1)


def test_a_full_disk_leaves_the_old_file_whole(archive, monkeypatch):
    archive.write(1, BATCH)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("os.fsync", full)
        archive.write(1, BATCH[:1])
    assert archive.read(1) == BATCH
