"""This file tests actors/kept_weights.py; that a delta gives the new version is tested with its sender."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from actors.kept_weights import KeptWeights
from rl.weight_delta import BASE, GAPS, KEEP, VALUES
from rl.weights import WeightUpdateError


def array(*values: int, dtype=np.uint16) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype))


@pytest.fixture
def kept() -> KeptWeights:
    kept = KeptWeights()
    kept.keep("known", {"a": torch.zeros(2, 2).bfloat16(), "b": torch.ones(1)})
    return kept


def test_a_whole_file_says_whether_deltas_may_follow_and_outlives_its_name(tmp_path):
    for metadata, keep in ({"format": "pt"}, False), ({"format": "pt", KEEP: "true"}, True):
        path = tmp_path / f"{keep}"
        save_file({"a": torch.arange(5)}, path, metadata=metadata)
        read = KeptWeights().read(str(path))
        path.unlink()
        assert read.keep is keep and read.tensors["a"].tolist() == [0, 1, 2, 3, 4]


def test_a_delta_changes_what_it_names_and_leaves_the_rest(kept, tmp_path):
    changes = {"a" + GAPS: array(0, 2), "a" + VALUES: array(0x3F80, 0xBF80)}
    save_file(changes, tmp_path / "delta", metadata={BASE: "known"})
    read = kept.read(str(tmp_path / "delta"))
    assert read.keep and read.tensors["a"].tolist() == [[1.0, 0.0], [0.0, -1.0]]
    assert read.tensors["a"].dtype == torch.bfloat16 and read.tensors["b"].tolist() == [1.0]


@pytest.mark.parametrize(
    "changes, base, complaint",
    [
        ({}, "other", "digest other, but those kept here have known; load a whole version first"),
        ({"a" + GAPS: array(4), "a" + VALUES: array(1)}, "known", "does not fit a: a change at 4 of 4 values"),
        ({"a" + GAPS: array(0)}, "known", "does not fit a: 'a/values'"),
        (
            {"c" + GAPS: array(0), "c" + VALUES: array(1)},
            "known",
            "what the kept weights do not have: c/gaps, c/values",
        ),
    ],
)
def test_a_delta_that_does_not_fit_is_refused_and_the_kept_version_stays(kept, tmp_path, changes, base, complaint):
    save_file(changes, tmp_path / "delta", metadata={BASE: base})
    with pytest.raises(WeightUpdateError, match=complaint):
        kept.read(str(tmp_path / "delta"))
    save_file({}, tmp_path / "empty", metadata={BASE: "known"})
    assert kept.read(str(tmp_path / "empty")).tensors["a"].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_without_kept_weights_a_delta_says_what_is_missing(tmp_path):
    save_file({}, tmp_path / "delta", metadata={BASE: "x"})
    with pytest.raises(WeightUpdateError, match="those kept here have none"):
        KeptWeights().read(str(tmp_path / "delta"))
