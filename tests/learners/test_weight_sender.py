"""This file tests learners/weight_sender.py."""

from __future__ import annotations

import hashlib
import tempfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learners.weight_sender import SharedMemoryFiles, digest_tensors, gather_weights
from tests.learners.tiny import save_tiny_llama


@pytest.fixture
def files(tmp_path):
    found = SharedMemoryFiles(f"test-{tmp_path.name}", 1)
    found.directory = tmp_path
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_travels_once_and_an_untied_one_too(tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path, tied=tied))
    tensors = dict(gather_weights(model, torch.bfloat16, keep=True))
    assert ("lm_head.weight" in tensors) is not tied
    assert "model.embed_tokens.weight" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert dict(gather_weights(model, torch.bfloat16, keep=False)) == {}


def test_digests_are_of_the_bytes_that_a_reader_of_the_file_gets(files):
    tensors = {"b": torch.randn(3, 2).bfloat16(), "a": torch.tensor(2.0)}
    read = load_file(files.write(1, tensors))
    assert digest_tensors(read) == digest_tensors(tensors)
    raw = bytes(tensors["b"].view(torch.uint8).flatten().tolist())
    assert digest_tensors(tensors)[1].digest == hashlib.blake2b(raw, digest_size=16).hexdigest()
    assert digest_tensors(tensors)[1].dtype == "bfloat16" and digest_tensors(tensors)[1].shape == (3, 2)


def test_shared_memory_that_cannot_hold_three_versions_is_not_used():
    assert str(SharedMemoryFiles("test", 1 << 60).directory) == tempfile.gettempdir()


def test_two_versions_stay_and_none_after_the_run(files):
    paths = [files.write(version, {"a": torch.tensor(float(version))}) for version in range(9, 13)]
    assert sorted(str(file) for file in files.directory.iterdir()) == sorted(paths[-2:])
    stranger = SharedMemoryFiles("another", 1)
    stranger.directory = files.directory
    theirs = stranger.write(1, {"a": torch.tensor(1.0)})
    (files.directory / paths[0].replace(".safetensors", ".partial")).write_bytes(b"killed while writing")
    files.remove()
    assert [str(file) for file in files.directory.iterdir()] == [theirs]
