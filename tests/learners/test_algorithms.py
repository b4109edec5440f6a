"""This file tests learners/algorithms.py and learners/penalties.py: what stands around a loss, and who needs what."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from learners.algorithms import Algorithm, find_algorithm
from learners.losses import Tokens
from learners.penalties import DIVERGENCES, outside_band
from rl.algorithm_config import PRESETS, AlgorithmSection
from tests.learners.oracles_batch import random_batch, rewards_of, tokens_of


def algorithm(**given) -> Algorithm:
    return find_algorithm(AlgorithmSection.model_validate(given))


def some_tokens() -> Tokens:
    batch = random_batch(0)
    return tokens_of(batch, [[2 * reward - 0.7 for reward in group] for group in rewards_of(batch)])


def slope(found: Algorithm, tokens: Tokens) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(found.objective(tokens).loss_N.sum(), tokens.logprobs_N)
    return gradient


@pytest.mark.parametrize("name", PRESETS)
def test_every_name_makes_a_finite_objective(name):
    losses = algorithm(name=name).objective(some_tokens())
    assert losses.loss_N.isfinite().all() and losses.loss_N.requires_grad
    assert losses.clipped_N.dtype == losses.masked_N.dtype == torch.bool


def test_only_m2po_needs_the_whole_batch_ahead():
    assert [name for name in PRESETS if algorithm(name=name).prepare is not None] == ["m2po"]
    cutoff = algorithm(name="m2po", loss={"tau": 0.1}).prepare(torch.tensor([0.1, -3.0], dtype=torch.float64))
    assert cutoff == 9.0


def test_a_reference_and_entropys_gradient_are_asked_for_only_where_they_are_used():
    assert not algorithm().needs_reference and not algorithm().needs_entropy_gradient
    assert algorithm(kl={"coefficient": 0.1}).needs_reference
    assert algorithm(entropy_coefficient=0.1).needs_entropy_gradient
    without = dataclasses.replace(some_tokens(), reference_N=None)
    assert algorithm().objective(without).loss_N.isfinite().all()


def test_a_left_out_token_counts_for_nothing_at_all():
    found = algorithm(mask_truncated=True, kl={"coefficient": 0.3}, entropy_coefficient=0.2)
    tokens = some_tokens()
    losses = found.objective(tokens)
    losses.loss_N.sum().backward()
    assert tokens.truncated_N.any() and torch.equal(losses.masked_N, tokens.truncated_N)
    assert (losses.loss_N[tokens.truncated_N] == 0).all()
    assert (tokens.logprobs_N.grad[tokens.truncated_N] == 0).all()
    assert (tokens.entropy_N.grad[tokens.truncated_N] == 0).all()
    assert not losses.clipped_N[tokens.truncated_N].any()


def test_a_token_that_the_loss_leaves_out_is_still_pulled_to_the_reference():
    narrow = {"weight_low": 0.99, "weight_high": 1.01}
    tokens = some_tokens()
    out_N = algorithm(name="icepop", loss=narrow).objective(tokens).masked_N
    assert out_N.any()
    assert (slope(algorithm(name="icepop", loss=narrow), tokens)[out_N] == 0).all()
    pulled = slope(algorithm(name="icepop", loss=narrow, kl={"coefficient": 0.3}), tokens)
    assert (pulled[out_N] != 0).all()


def test_a_mask_leaves_whole_answers_out_by_their_product_or_mean_and_tokens_by_their_own():
    tokens = some_tokens()
    ratio_N = (tokens.logprobs_N.detach() - tokens.behaviour_N).exp()
    assert torch.equal(outside_band(tokens, "token", 0.5, 2.0), (ratio_N < 0.5) | (ratio_N > 2.0))
    for level in ("sequence", "geometric"):
        out_N = outside_band(tokens, level, 0.6, 1.6)
        assert out_N.any() and not out_N.all()
        for sequence in tokens.sequence_N.unique():
            assert len(out_N[tokens.sequence_N == sequence].unique()) == 1
    assert outside_band(tokens, "sequence", 0.6, 1.6).sum() > outside_band(tokens, "geometric", 0.6, 1.6).sum()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_estimate_is_zero_with_zero_gradient_where_the_policy_is_the_reference(name):
    logprobs = torch.tensor([-0.5, -2.0], dtype=torch.float64, requires_grad=True)
    estimate = DIVERGENCES[name](logprobs, logprobs.detach().clone())
    (gradient,) = torch.autograd.grad(estimate.sum(), logprobs)
    assert (estimate == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize(("name", "direction"), [("k1", "reverse"), ("k2", "reverse"), ("k3", "forward")])
def test_the_average_gradient_of_an_estimate_is_that_of_the_divergence_it_stands_for(name, direction):
    torch.manual_seed(0)
    logits_V = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference_V = torch.randn(7, dtype=torch.float64).log_softmax(0)
    logprobs_V = logits_V.log_softmax(0)
    average = (logprobs_V.exp().detach() * DIVERGENCES[name](logprobs_V, reference_V)).sum()
    if direction == "reverse":
        exact = (logprobs_V.exp() * (logprobs_V - reference_V)).sum()
    else:
        exact = (reference_V.exp() * (reference_V - logprobs_V)).sum()
    (found,) = torch.autograd.grad(average, logits_V, retain_graph=True)
    (expected,) = torch.autograd.grad(exact, logits_V)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    if name != "k2":  # k2's value is biased, as its inventor says
        reverse = (logprobs_V.exp() * (logprobs_V - reference_V)).sum()
        torch.testing.assert_close(average, reverse, rtol=1e-12, atol=1e-14)


def test_only_an_objective_whose_every_term_has_the_advantage_as_a_factor_skips_answers_without_one():
    def skips(**given):
        return find_algorithm(AlgorithmSection.model_validate(given)).skips_zero_advantage

    everything = {"m2po", "dppo_tv"}  # the one looks at the whole batch first, the other pulls towards what sampled
    assert {name for name in PRESETS if not skips(name=name)} >= everything
    assert all(skips(name=name) for name in ("grpo", "cispo", "gspo", "tis", "mis", "scalerl"))
    assert not skips(name="grpo", kl={"coefficient": 0.1}) and not skips(name="grpo", entropy_coefficient=0.1)


def test_answers_that_are_not_computed_have_no_advantage():
    rewards = [(0.0, 1.0, 0.5, None), (1.0, 1.0, 1.0, 1.0)]
    first, second = find_algorithm(AlgorithmSection(name="dr_grpo")).advantages(rewards)
    assert first == (-0.5, 0.5, None, None) and second == (None,) * 4
    first, second = find_algorithm(AlgorithmSection(name="m2po")).advantages(rewards)
    assert first[2] == 0.0 and first[3] is None and second == (0.0,) * 4
