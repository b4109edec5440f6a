"""This file tests learners/losses.py and learners/algorithms.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learners.algorithms import ALGORITHMS, BatchSize, constant_length, find_algorithm, token_mean
from learners.losses import Tokens, cispo


def test_the_cispo_gradient_is_the_written_out_formula():
    rng = np.random.default_rng(0)
    logits_NV, targets_N = rng.normal(size=(50, 7)) * 2, rng.integers(0, 7, 50)
    behaviour_N, advantages_N, cap = rng.normal(size=50) - 2, rng.normal(size=50), 1.5

    probabilities_NV = np.exp(logits_NV) / np.exp(logits_NV).sum(1, keepdims=True)
    ratio_N = probabilities_NV[np.arange(50), targets_N] / np.exp(behaviour_N)
    assert (ratio_N > cap).any() and (ratio_N < cap).any()
    weight_N = np.minimum(ratio_N, cap) * advantages_N
    # d log softmax(z)[target] / dz = onehot(target) - softmax(z)
    expected_NV = -weight_N[:, None] * (np.eye(7)[targets_N] - probabilities_NV)

    logits = torch.tensor(logits_NV, requires_grad=True)
    logprobs_N = logits.log_softmax(-1)[torch.arange(50), torch.tensor(targets_N)]
    losses = cispo(Tokens(logprobs_N, torch.tensor(behaviour_N), torch.tensor(advantages_N)), cap)
    losses.loss_N.sum().backward()
    np.testing.assert_allclose(logits.grad.numpy(), expected_NV, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(losses.clipped_N.numpy(), ratio_N > cap)


def test_a_token_above_the_cap_keeps_its_gradient():
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    tokens = Tokens(logprobs, torch.tensor([-9.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64))
    cispo(tokens, 5.0).loss_N.sum().backward()
    assert logprobs.grad.item() == -10.0


def test_normalisers_count_what_they_say():
    size = BatchSize(num_tokens=30, num_trajectories=4, max_tokens=20)
    assert (token_mean(size), constant_length(size)) == (30.0, 80.0)


def test_an_unknown_algorithm_is_refused_with_the_nearest_name():
    assert find_algorithm("cispo") is ALGORITHMS["cispo"]
    with pytest.raises(ValueError, match=r"algorithm.name is 'cipso'.*did you mean 'cispo'"):
        find_algorithm("cipso")
