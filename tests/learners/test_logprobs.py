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


def test_the_entropy_carries_no_gradient_unless_asked():
    assert not head_logprobs(*inputs(4), 1.0)[1].requires_grad
    assert head_logprobs(*inputs(4), 1.0, entropy_gradient=True)[1].requires_grad


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.6)])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
def test_the_gradient_of_entropy_and_log_probability_together_is_that_of_plain_autograd(shares, temperature):
    hidden, weight, targets = inputs(CHUNK_TOKENS + 5)
    plain = ((hidden @ weight.T) / temperature).log_softmax(-1)
    expected = (plain.gather(1, targets[:, None])[:, 0], -(plain.exp() * plain).sum(-1))
    found = head_logprobs(hidden, weight, targets, temperature, entropy_gradient=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    sums = [
        shares[0] * (logprobs * upstream).sum() + shares[1] * (entropy * upstream.flip(0)).sum()
        for logprobs, entropy in (found, expected)
    ]
    ours, theirs = (torch.autograd.grad(total, (hidden, weight)) for total in sums)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_an_entropy_that_no_loss_uses_leaves_the_gradient_of_the_log_probabilities_alone():
    hidden, weight, targets = inputs(9)
    gradients = [
        torch.autograd.grad(head_logprobs(hidden, weight, targets, 0.7, asked)[0].sum(), (hidden, weight))
        for asked in (False, True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_probabilities_sum_to_one_under_the_temperature(temperature):
    hidden, weight, _ = inputs(1)
    every = torch.arange(11)
    logprobs, _ = head_logprobs(hidden.expand(11, 5), weight, every, temperature)
    assert logprobs.exp().sum().item() == pytest.approx(1.0)
