"""This file tests learners/logprobs.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from learners import logprobs
from learners.logprobs import CHUNK_TOKENS, head_logprobs


def inputs(count: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(count)
    hidden_NH = torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VH = torch.randn(11, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_NH, weight_VH, torch.randint(0, 11, (count,), generator=generator)


def test_values_and_gradients_equal_those_of_plain_autograd_over_several_chunks():
    hidden, weight, targets = inputs(2 * CHUNK_TOKENS["cpu"] + 3)
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
    hidden, weight, targets = inputs(CHUNK_TOKENS["cpu"] + 5)
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


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returns, forward and backward."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return found


def blocks_of_tokens(monkeypatch, count, itemsize=8, vocabulary=11):
    monkeypatch.setattr(logprobs, "KEPT_BYTES", count * itemsize * vocabulary)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_logits_that_are_not_kept_give_the_same_log_probabilities_and_gradients(monkeypatch, entropy_gradient):
    hidden, weight, targets = inputs(300)
    upstream = torch.linspace(-1, 2, 300, dtype=torch.float64)

    def everything():
        found = head_logprobs(hidden, weight, targets, 0.7, entropy_gradient)
        loss = (found[0] * upstream).sum() + (0.3 * (found[1] * upstream.flip(0)).sum() if entropy_gradient else 0)
        return *(each.detach() for each in found), *torch.autograd.grad(loss, (hidden, weight))

    kept = everything()
    for count in (1, 70, 128, 299):
        blocks_of_tokens(monkeypatch, count)
        torch.testing.assert_close(everything(), kept, rtol=1e-12, atol=1e-12)


def test_a_bf16_weight_gradient_is_summed_over_blocks_without_rounding_each_sum(monkeypatch):
    hidden, weight, targets = inputs(512, torch.bfloat16)
    exact_hidden, exact_weight = (each.detach().double().requires_grad_() for each in (hidden, weight))
    exact = torch.autograd.grad(head_logprobs(exact_hidden, exact_weight, targets, 1.0)[0].sum(), exact_weight)[0]

    def error():
        found = torch.autograd.grad(head_logprobs(hidden, weight, targets, 1.0)[0].sum(), weight)[0]
        return ((found.double() - exact).norm() / exact.norm()).item()

    kept = error()
    blocks_of_tokens(monkeypatch, 16, itemsize=2)
    assert error() < 1.2 * kept


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_no_tensor_grows_with_tokens_times_vocabulary(monkeypatch, entropy_gradient):
    """1,000 words, 16 numbers each; a table of the logits of 4,096 tokens would take 8 MB in bf16."""
    vocabulary, width = 1000, 16
    blocks_of_tokens(monkeypatch, 100, itemsize=2, vocabulary=vocabulary)
    largest = {}
    for count in (512, 4096):
        hidden = torch.randn(count, width).bfloat16().requires_grad_()
        weight = torch.randn(vocabulary, width).bfloat16().requires_grad_()
        with LargestTensor() as seen:
            found = head_logprobs(hidden, weight, torch.arange(count) % vocabulary, 1.0, entropy_gradient)
            (found[0].sum() + (found[1].sum() if entropy_gradient else 0)).backward()
        largest[count] = seen.bytes
    assert largest[512] == largest[4096] <= CHUNK_TOKENS["cpu"] * vocabulary * 4
