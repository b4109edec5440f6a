"""This file tests learners/logprobs.py."""

from __future__ import annotations

import pytest
import torch

from learners.logprobs import CHUNK_TOKENS, head_logprobs


def inputs(count: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(count)
    hidden_NH = torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VH = torch.randn(11, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_NH, weight_VH, torch.randint(0, 11, (count,), generator=generator)


def test_values_and_gradients_equal_those_of_plain_autograd_over_several_chunks():
    hidden, weight, targets = inputs(2 * CHUNK_TOKENS + 3)
    plain = ((hidden @ weight.T) / 0.7).log_softmax(-1)
    expected = plain.gather(1, targets[:, None])[:, 0]
    upstream = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))

    logprobs, entropy = head_logprobs(hidden, weight, targets, 0.7)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1).detach(), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(ours, gradients, rtol=1e-12, atol=1e-12)


def test_bf16_inputs_give_fp32_log_probabilities():
    logprobs, entropy = head_logprobs(*inputs(3, torch.bfloat16), 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_no_tokens_give_zero_gradients_and_not_an_error():
    hidden, weight, targets = inputs(0)
    logprobs, _ = head_logprobs(hidden, weight, targets, 1.0)
    logprobs.sum().backward()
    assert not weight.grad.any() and hidden.grad.shape == (0, 5)


def test_the_entropy_carries_no_gradient():
    assert not head_logprobs(*inputs(4), 1.0)[1].requires_grad


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_probabilities_sum_to_one_under_the_temperature(temperature):
    hidden, weight, _ = inputs(1)
    every = torch.arange(11)
    logprobs, _ = head_logprobs(hidden.expand(11, 5), weight, every, temperature)
    assert logprobs.exp().sum().item() == pytest.approx(1.0)
