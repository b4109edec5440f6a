"""This file tests learners/losses.py: what the formulas promise; test_oracles.py compares values and gradients."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor

from learners import losses
from learners.losses import Loss, Tokens, second_moment_cutoff
from learners.sequences import over_sequence
from tests.learners.oracles_batch import lengths_of, random_batch, rewards_of, tokens_of

LOSSES: dict[str, Loss] = {
    "ppo_clip": functools.partial(losses.ppo_clip, clip_low=0.2, clip_high=0.2),
    "dual_clip": functools.partial(losses.ppo_clip, clip_low=0.2, clip_high=0.2, dual_clip=1.3),
    "recompute": functools.partial(losses.decoupled, anchor="recompute", clip_low=0.2, clip_high=0.2, weight_high=1.5),
    "log_linear": functools.partial(
        losses.decoupled, anchor="log_linear", clip_low=0.2, clip_high=0.2, weight_high=1.5
    ),
    "cispo": functools.partial(losses.cispo, weight_low=0.8, weight_high=1.5),
    "aipo": functools.partial(losses.aipo, weight_high=1.5),
    "tis": functools.partial(losses.tis, level="token", weight_high=1.5),
    "tis_sequence": functools.partial(losses.tis, level="sequence", weight_high=1.5),
    "icepop": functools.partial(losses.icepop, level="token", weight_low=0.7, weight_high=1.4),
    "mis": functools.partial(losses.icepop, level="sequence", weight_low=0.3, weight_high=2.0),
    "gspo": functools.partial(losses.gspo, clip_low=0.2, clip_high=0.2),
    "dppo_tv": functools.partial(losses.dppo_tv, delta=0.1, kappa=0.0),
    "m2po": losses.m2po,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def some_tokens(seed: int = 0, **changes) -> Tokens:
    batch = random_batch(seed)
    centred = [[2 * reward - 0.7 for reward in group] for group in rewards_of(batch)]
    return dataclasses.replace(tokens_of(batch, centred, cutoff=0.25), **changes)


def gradient(loss: Loss, tokens: Tokens) -> Tensor:
    (found,) = torch.autograd.grad(loss(tokens).loss_N.sum(), tokens.logprobs_N)
    return found


def at(tokens: Tokens, chosen: Tensor) -> Tokens:
    """The tokens of whole trajectories, as a micro-batch of their own."""
    parts = {name: value[chosen] for name, value in vars(tokens).items() if isinstance(value, Tensor)}
    parts["sequence_N"] = torch.unique(parts["sequence_N"], return_inverse=True)[1]
    return dataclasses.replace(tokens, **parts)


@each_loss
def test_where_the_policy_is_the_sampler_the_gradient_is_that_of_reinforce(loss):
    tokens = some_tokens()
    tokens = dataclasses.replace(tokens, behaviour_N=tokens.logprobs_N.detach().clone())
    torch.testing.assert_close(gradient(loss, tokens), -tokens.advantages_N, rtol=1e-12, atol=0)
    found = loss(tokens)
    assert not found.clipped_N.any() and not found.masked_N.any()


@each_loss
def test_a_masked_token_has_no_gradient_and_the_rest_have_one(loss):
    tokens = some_tokens()
    found, slope_N = loss(tokens), gradient(loss, tokens)
    assert (slope_N[found.masked_N] == 0).all()
    assert (slope_N[~found.masked_N & ~found.clipped_N] != 0).all()


@pytest.mark.parametrize("name", ["ppo_clip", "dual_clip", "gspo"])
def test_a_token_beyond_the_trust_region_has_no_gradient(name):
    tokens = some_tokens()
    found = LOSSES[name](tokens)
    assert found.clipped_N.any()
    assert torch.equal(gradient(LOSSES[name], tokens) == 0, found.clipped_N)


@pytest.mark.parametrize("name", ["cispo", "aipo", "tis", "recompute"])
def test_a_token_whose_weight_was_cut_keeps_its_gradient(name):
    tokens = some_tokens()
    found = LOSSES[name](tokens)
    assert found.clipped_N.any()
    assert (gradient(LOSSES[name], tokens)[found.clipped_N] != 0).all()


@each_loss
def test_splitting_a_batch_into_micro_batches_changes_neither_values_nor_gradients(loss):
    tokens = some_tokens()
    whole, slope_N = loss(tokens), gradient(loss, tokens)
    for chosen in (tokens.sequence_N % 3 == rest for rest in range(3)):
        part = loss(at(tokens, chosen))
        torch.testing.assert_close(part.loss_N, whole.loss_N[chosen], rtol=1e-12, atol=1e-15)
        assert torch.equal(part.clipped_N, whole.clipped_N[chosen])
        assert torch.equal(part.masked_N, whole.masked_N[chosen])
        (found,) = torch.autograd.grad(part.loss_N.sum(), tokens.logprobs_N)
        torch.testing.assert_close(found[chosen], slope_N[chosen], rtol=1e-12, atol=1e-15)
        assert (found[~chosen] == 0).all()


@each_loss
def test_a_micro_batch_of_no_tokens_has_no_loss(loss):
    tokens = some_tokens()
    found = loss(at(tokens, tokens.sequence_N < 0))
    assert found.loss_N.shape == found.clipped_N.shape == found.masked_N.shape == (0,)
    assert found.loss_N.sum().requires_grad


@pytest.mark.parametrize("name", ["ppo_clip", "dual_clip", "gspo", "dppo_tv", "m2po"])
def test_the_gradient_of_a_loss_without_stop_gradients_is_its_slope(name):
    tokens = some_tokens()
    loss = functools.partial(LOSSES[name], **({"kappa": 0.3} if name == "dppo_tv" else {}))
    assert torch.autograd.gradcheck(
        lambda logprobs_N: loss(dataclasses.replace(tokens, logprobs_N=logprobs_N)).loss_N, tokens.logprobs_N
    )


def test_recomputed_decoupling_is_truncated_importance_sampling_and_has_the_gradient_of_aipo():
    tokens = some_tokens()
    torch.testing.assert_close(LOSSES["recompute"](tokens).loss_N, LOSSES["tis"](tokens).loss_N)
    torch.testing.assert_close(gradient(LOSSES["recompute"], tokens), gradient(LOSSES["aipo"], tokens))


def test_log_linear_decoupling_at_lag_one_is_ppo_around_the_sampler():
    for lag in (0.0, 1.0):
        tokens = some_tokens()
        tokens = dataclasses.replace(tokens, lags_N=torch.full_like(tokens.lags_N, lag))
        torch.testing.assert_close(LOSSES["log_linear"](tokens).loss_N, LOSSES["ppo_clip"](tokens).loss_N)
        torch.testing.assert_close(gradient(LOSSES["log_linear"], tokens), gradient(LOSSES["ppo_clip"], tokens))


def test_log_linear_decoupling_lets_a_token_move_as_far_per_version():
    lag, log_ratio = 4, 4 * math.log(1.19)
    tokens = Tokens(
        logprobs_N=torch.tensor([-1.0], dtype=torch.float64, requires_grad=True),
        behaviour_N=torch.tensor([-1.0 - log_ratio], dtype=torch.float64),
        advantages_N=torch.ones(1, dtype=torch.float64),
        lags_N=torch.tensor([float(lag)], dtype=torch.float64),
        sequence_N=torch.zeros(1, dtype=torch.long),
        truncated_N=torch.zeros(1, dtype=torch.bool),
        entropy_N=torch.zeros(1, dtype=torch.float64),
    )
    assert not LOSSES["log_linear"](tokens).loss_N.isnan().any()
    assert gradient(LOSSES["log_linear"], tokens).item() == pytest.approx(-1.5 * 1.19)  # weight 1.19**3, capped at 1.5
    assert gradient(LOSSES["ppo_clip"], tokens).item() == 0


def test_a_sequence_of_one_token_makes_gspo_ppo():
    tokens = some_tokens()
    alone = dataclasses.replace(tokens, sequence_N=torch.arange(len(tokens.sequence_N)))
    torch.testing.assert_close(LOSSES["gspo"](alone).loss_N, LOSSES["ppo_clip"](alone).loss_N)


def test_a_product_of_ratios_that_overflows_is_capped_or_left_out_and_never_nan():
    count = 900
    tokens = Tokens(
        logprobs_N=torch.full((count,), -0.1, dtype=torch.float64, requires_grad=True),
        behaviour_N=torch.full((count,), -1.1, dtype=torch.float64),
        advantages_N=torch.ones(count, dtype=torch.float64),
        lags_N=torch.ones(count, dtype=torch.float64),
        sequence_N=torch.zeros(count, dtype=torch.long),
        truncated_N=torch.zeros(count, dtype=torch.bool),
        entropy_N=torch.zeros(count, dtype=torch.float64),
    )
    assert (gradient(LOSSES["tis_sequence"], tokens) == -1.5).all()
    assert (gradient(LOSSES["mis"], tokens) == 0).all()


def test_a_small_probability_may_move_by_a_factor_that_a_large_one_may_not():
    small = some_tokens(logprobs_N=torch.tensor([0.04, 0.8]).double().log().requires_grad_())
    tokens = dataclasses.replace(
        at(small, torch.tensor([0, 1])),
        behaviour_N=torch.tensor([0.01, 0.5]).double().log(),
        advantages_N=torch.ones(2).double(),
    )
    assert LOSSES["dppo_tv"](dataclasses.replace(tokens, logprobs_N=small.logprobs_N)).masked_N.tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("log_ratios", "tau", "kept"),
    [
        ([0.1, -0.1, 0.1], 0.04, 3),
        ([0.1, -0.1, 1.0], 0.04, 2),
        ([0.1, 2.0, -1.0, 0.2], 0.04, 2),
        ([1.0, -1.0], 0.04, 0),
        ([0.2, 0.2], 0.2**2, 0),  # the mean must come below tau, not to it
        ([0.0, 0.5, -0.5], 0.15, 1),  # equal tokens stay or go together
        ([], 0.04, 0),
    ],
)
def test_the_second_moment_cutoff_leaves_the_largest_out_until_the_rest_is_below_tau(log_ratios, tau, kept):
    moments = torch.tensor(log_ratios, dtype=torch.float64) ** 2
    cutoff = second_moment_cutoff(torch.tensor(log_ratios, dtype=torch.float64), tau)
    assert int((moments < cutoff).sum()) == kept


def test_sums_and_means_are_over_each_trajectory_in_whatever_order_its_tokens_lie():
    values, sequence = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([1, 0, 1, 1])
    assert over_sequence(values, sequence, "sum").tolist() == [9.0, 2.0, 9.0, 9.0]
    assert over_sequence(values, sequence, "mean").tolist() == [3.0, 2.0, 3.0, 3.0]


def test_the_batch_that_is_compared_has_answers_of_several_lengths():
    assert len({length for group in lengths_of(random_batch(0)) for length in group}) > 3
