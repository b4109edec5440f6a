"""This file tests learners/blocks.py: what is computed again, or compiled, is the same."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from learners.blocks import BlockOptions
from learners.layouts import pack
from learners.model import join_ranks, load_policy
from tests.learners.test_layouts import share_of
from tests.learners.tiny import random_group, save_tiny_llama


@pytest.fixture(scope="module")
def model_of_two_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    join_ranks(f"file://{folder}/rendezvous", 0, 1, "cpu", 60.0)
    yield save_tiny_llama(folder)
    dist.destroy_process_group()


def policy_with(model_dir, **options):
    return load_policy(model_dir, "cpu", torch.float64, torch.float64, options=BlockOptions(**options))


def step_of(policy):
    """Log-probabilities and gradients of two groups, and how many bytes the forward pass kept for the backward."""
    packed = pack([share_of(random_group(index)) for index in range(2)], version=1)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs_N, _ = policy(*packed.inputs, 0.8)
    (logprobs_N * packed.advantages_N).sum().backward()
    gradients = {name: each.grad.full_tensor() for name, each in policy.named_parameters()}
    return logprobs_N.detach(), gradients, sum(kept.values())


def test_activations_computed_again_give_the_same_bits_from_less_memory(model_of_two_layers):
    logprobs, gradients, kept = step_of(policy_with(model_of_two_layers))
    again, same, less = step_of(policy_with(model_of_two_layers, checkpoint_activations=True))
    assert torch.equal(again, logprobs) and all(torch.equal(same[name], each) for name, each in gradients.items())
    assert less < kept / 3


@pytest.mark.skipif(not os.environ.get("RUN_SLOW"), reason="compiles for a minute; RUN_SLOW=1 runs it")
def test_compiled_blocks_give_the_same_gradient(model_of_two_layers):
    logprobs, gradients, _ = step_of(policy_with(model_of_two_layers))
    for options in ({}, {"checkpoint_activations": True}, {"packing": "per_answer"}):
        found, compiled, _ = step_of(policy_with(model_of_two_layers, compile=True, **options))
        torch.testing.assert_close(found, logprobs, rtol=1e-6, atol=1e-6)  # Llama's norms compute in fp32
        torch.testing.assert_close(compiled, gradients, rtol=1e-4, atol=1e-6)


def test_names_stay_so_that_checkpoints_and_weight_updates_do_not_tell(model_of_two_layers):
    plain = policy_with(model_of_two_layers)
    changed = policy_with(model_of_two_layers, checkpoint_activations=True, compile=True)
    assert dict(plain.named_parameters()).keys() == dict(changed.named_parameters()).keys()
    assert plain.state_dict().keys() == changed.state_dict().keys()
