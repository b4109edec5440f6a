"""This file tests that a delta, written by the learner's half, gives a real engine the weights of the new version."""

from __future__ import annotations

import pathlib

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from learners.weight_sender import SharedMemoryFiles, Written
from rl.weight_file import Planned
from rl.weights import WeightUpdate, WeightUpdateError, combined

NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def write(files: SharedMemoryFiles, version: int, tensors: dict[str, torch.Tensor]) -> WeightUpdate:
    plan = [Planned(name, str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in tensors.items()]
    outgoing = files.begin(version, plan)
    for name, tensor in tensors.items():
        outgoing.add(name, tensor)
    written: Written = files.finish(outgoing)
    canary = {"canary_token_ids": (1, 2), "canary_logprobs": (-1.0,)}
    return WeightUpdate(**msgspec.structs.asdict(written), **canary, backend="shared_memory", node="the learner's")


async def test_a_delta_gives_what_the_whole_version_gives_and_a_spoilt_one_nothing(engine, model_dir, tmp_path):
    prompt = tuple(range(100, 140))
    weights = load_file(pathlib.Path(model_dir) / "model.safetensors")
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    changed[NORM] *= 1.5
    changed[EMBEDDING][:200] *= 1.1  # the output head's weights, too
    files = SharedMemoryFiles("delta-on-an-engine", 1, "auto")
    files.directory = tmp_path
    version = engine.version
    base = write(files, version + 1, weights)
    assert base.for_holder(None, "another") is base
    await engine.load(base)
    before = await engine.score(prompt)
    update = write(files, version + 2, changed)
    fitting = update.for_holder(base, "another")
    assert fitting.path == update.delta_path and update.delta_bytes < update.num_bytes / 100

    spoilt = msgspec.structs.replace(fitting.tensors[0], digest="spoilt")
    with pytest.raises(WeightUpdateError, match="other bytes than were sent"):
        await engine.load(msgspec.structs.replace(fitting, tensors=(spoilt, *fitting.tensors[1:])))
    assert engine.version == version + 1 and await engine.score(prompt) == before

    receipt = await engine.load(fitting)
    assert combined(receipt.tensors) == update.digest and engine.version == version + 2
    by_delta = await engine.score(prompt)
    await engine.load(msgspec.structs.replace(update, version=version + 3))
    assert await engine.score(prompt) == by_delta != before
    await engine.load(msgspec.structs.replace(base, version=version + 4))
    assert await engine.score(prompt) == before
