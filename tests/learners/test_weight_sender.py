"""This file tests learners/weight_sender.py."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.kept_weights import KeptWeights
from learners.weight_sender import (
    Outgoing,
    SharedMemoryFiles,
    Written,
    digest_tensors,
    fill,
    gather_weights,
    plan_weights,
)
from rl.weight_file import Planned
from rl.weights import combined, digest_of
from tests.learners.tiny import save_tiny_llama


def files_in(directory, transport="dense", run_id="test") -> SharedMemoryFiles:
    files = SharedMemoryFiles(run_id, 1, transport)
    files.directory = directory
    return files


@pytest.fixture
def files(tmp_path):
    return files_in(tmp_path, run_id=f"test-{tmp_path.name}")


def write(files: SharedMemoryFiles, version: int, tensors: dict[str, torch.Tensor]) -> Written:
    plan = [Planned(name, str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in tensors.items()]
    outgoing = files.begin(version, plan)
    for name, tensor in tensors.items():
        outgoing.add(name, tensor)
    return files.finish(outgoing)


def versions(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two versions that differ in few values, one tensor being larger than a delta's stride and one unchanged."""
    torch.manual_seed(seed)
    first = {"large": torch.randn(300, 500).bfloat16(), "same": torch.randn(7).bfloat16(), "scalar": torch.tensor(2.0)}
    second = {name: tensor.clone() for name, tensor in first.items()}
    second["large"][[0, 3, 299], [5, 0, 499]] += 1.0
    second["scalar"] += 1.0
    return first, second


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_travels_once_and_an_untied_one_too(tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path, tied=tied))
    tensors = dict(gather_weights(model, torch.bfloat16, keep=True))
    assert ("lm_head.weight" in tensors) is not tied
    assert "model.embed_tokens.weight" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert dict(gather_weights(model, torch.bfloat16, keep=False)) == {}


def test_a_model_that_is_written_while_it_is_gathered_is_in_the_file_as_it_was(tmp_path, files):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "model"))
    outgoing = files.begin(1, plan_weights(model, torch.bfloat16))
    fill(outgoing, model, torch.bfloat16)
    assert [file.suffix for file in files.directory.glob("*v1-*")] == [".partial"], "named before it is complete"
    written = files.finish(outgoing)
    tensors = dict(gather_weights(model, torch.bfloat16, keep=True))
    read = load_file(written.path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in read)
    assert written.tensors == digest_tensors(tensors) and written.digest == combined(written.tensors)
    assert written.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    fill(None, model, torch.bfloat16)


def test_digests_are_of_the_bytes_that_a_reader_of_the_file_gets(files):
    tensors = {"b": torch.randn(3, 2).bfloat16(), "a": torch.tensor(2.0)}
    written = write(files, 1, tensors)
    assert digest_tensors(load_file(written.path)) == digest_tensors(tensors) == written.tensors
    raw = bytes(tensors["b"].view(torch.uint8).flatten().tolist())
    assert written.tensors[1].digest == digest_of(raw)
    assert written.tensors[1].dtype == "bfloat16" and written.tensors[1].shape == (3, 2)


def test_without_a_file_the_tensors_stay_in_memory_by_sorted_name():
    outgoing = Outgoing(4)
    outgoing.add("b", torch.ones(2))
    outgoing.add("a", torch.zeros(1))
    written = outgoing.finish()
    assert list(outgoing.tensors) == ["a", "b"] and written.tensors == digest_tensors(outgoing.tensors)
    assert (written.version, written.path, written.num_bytes) == (4, None, 12)


def test_what_the_writer_met_is_raised_when_all_has_been_gathered(files):
    outgoing = files.begin(1, [Planned("a", "float32", (1,))])
    for name in "bcdefghi":
        outgoing.add(name, torch.ones(1))
    with pytest.raises(KeyError, match="b"):
        files.finish(outgoing)
    assert not list(files.directory.glob("*.safetensors"))


@pytest.mark.parametrize("transport", ["auto", "delta"])
def test_a_delta_makes_the_new_version_of_the_one_before_to_the_last_bit(tmp_path, transport):
    files, kept = files_in(tmp_path, transport), KeptWeights()
    first, second = versions()
    base, new = write(files, 1, first), write(files, 2, second)
    assert base.delta_path is None and new.path is not None
    assert (new.base_version, new.base_digest) == (1, base.digest)
    assert new.delta_bytes < new.num_bytes / 100 and os.path.getsize(new.delta_path) < new.delta_bytes + 1000
    kept.keep(base.digest, kept.read(base.path).tensors)
    read = kept.read(new.delta_path)
    assert read.keep and digest_tensors(read.tensors) == new.tensors == digest_tensors(second)
    assert digest_tensors(kept.read(base.path).tensors) == base.tensors, "the kept version must stay as it was"


def test_auto_sends_no_delta_that_is_no_smaller_and_dense_never_one(tmp_path):
    torch.manual_seed(0)
    for transport, expected in (("auto", False), ("delta", True), ("dense", False)):
        files = files_in(tmp_path / transport, transport)
        files.directory.mkdir()
        write(files, 1, {"a": torch.randn(1000).bfloat16()})
        assert (write(files, 2, {"a": torch.randn(1000).bfloat16()}).delta_path is not None) is expected


def test_a_version_that_is_written_again_has_no_base(tmp_path):
    files = files_in(tmp_path, "delta")
    first, second = versions()
    write(files, 1, first)
    assert write(files, 1, second).delta_path is None


def test_shared_memory_that_cannot_hold_three_versions_is_not_used():
    assert str(SharedMemoryFiles("test", 1 << 60).directory) == tempfile.gettempdir()


def test_two_versions_stay_and_none_after_the_run(tmp_path):
    files = files_in(tmp_path, "delta")
    written = [write(files, version, {"a": torch.tensor(float(version))}) for version in range(9, 13)]
    kept = [path for each in written[-2:] for path in (each.path, each.delta_path)]
    assert sorted(str(file) for file in files.directory.iterdir()) == sorted(kept)
    stranger = files_in(tmp_path, run_id="another")
    theirs = write(stranger, 1, {"a": torch.tensor(1.0)}).path
    (tmp_path / written[0].path.replace(".safetensors", ".partial")).write_bytes(b"killed while writing")
    files.remove()
    assert [str(file) for file in files.directory.iterdir()] == [theirs]
