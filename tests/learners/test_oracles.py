"""This file compares every advantage, loss, aggregation, mask and penalty with its oracles: fp64, relative 1e-9."""

from __future__ import annotations

import functools
from typing import get_args

import numpy as np
import pytest
import torch

from learners.advantages import ADVANTAGES
from learners.aggregations import AGGREGATIONS
from learners.algorithms import find_algorithm
from learners.losses import TokenLosses, Tokens
from rl.algorithm_config import PRESETS, AdvantageName, AggregationName, AlgorithmSection, RatioMask, ReferenceKl
from tests.learners import algorithms_page, oracles, oracles_literal
from tests.learners.oracles_batch import (
    MAX_TOKENS,
    Batch,
    lengths_of,
    per_token,
    random_batch,
    rewards_of,
    tokens_of,
)

SEEDS = (0, 1, 2)
same = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-15)

each_objective = pytest.mark.parametrize("oracle", oracles.OBJECTIVES, ids=lambda oracle: oracle.title)
each_advantage = pytest.mark.parametrize("oracle", oracles.ADVANTAGES, ids=lambda o: f"{o.name} {o.kind}")
each_seed = pytest.mark.parametrize("seed", SEEDS)


def computed(section: AlgorithmSection, batch: Batch) -> tuple[Tokens, TokenLosses, torch.Tensor]:
    """The batch through find_algorithm, as the learner goes: advantages, prepare, objective, weights."""
    algorithm = find_algorithm(section)
    advantages = algorithm.advantage(rewards_of(batch))
    tokens = tokens_of(batch, advantages)
    if algorithm.prepare is not None:
        tokens = tokens_of(batch, advantages, algorithm.prepare(tokens.log_ratio_N.detach()))
    weight_N = per_token(batch, algorithm.aggregation(lengths_of(batch), MAX_TOKENS))
    return tokens, algorithm.objective(tokens), weight_N


@each_seed
@each_objective
def test_an_objective_has_the_value_and_the_gradient_of_its_oracle(oracle, seed):
    batch = random_batch(seed)
    value, gradient = oracle.expected(batch)
    tokens, losses, weight_N = computed(oracle.section, batch)
    scalar = (weight_N * losses.loss_N).sum()
    scalar.backward()
    same(scalar.item(), value)
    same(tokens.logprobs_N.grad.numpy(), gradient)


@each_objective
def test_an_objective_has_the_loss_of_its_formula_at_every_token(oracle):
    batch = random_batch(3)
    _, losses, _ = computed(oracle.section, batch)
    same(losses.loss_N.detach().numpy(), oracles_literal.token_losses(oracle.section, batch))


@each_objective
def test_an_oracle_sees_tokens_that_are_cut_and_tokens_that_are_not(oracle):
    cut = [
        losses.clipped_N | losses.masked_N
        for _, losses, _ in (computed(oracle.section, random_batch(s)) for s in SEEDS)
    ]
    assert torch.cat(cut).any() and not torch.cat(cut).all()


@each_objective
def test_the_entropy_bonus_pulls_on_every_token_that_is_not_left_out(oracle):
    tokens, losses, weight_N = computed(oracle.section, random_batch(0))
    (weight_N * losses.loss_N).sum().backward()
    coefficient = oracle.section.entropy_coefficient
    if not coefficient:
        assert tokens.entropy_N.grad is None
    else:
        out_N = tokens.truncated_N if oracle.section.mask_truncated else torch.zeros_like(tokens.truncated_N)
        same(tokens.entropy_N.grad, -coefficient * weight_N * ~out_N)


@each_seed
@each_advantage
def test_an_estimator_has_the_advantages_of_its_oracle(oracle, seed):
    batch = random_batch(seed)
    ours = [value for group in ADVANTAGES[oracle.name](rewards_of(batch)) for value in group]
    same(np.array(ours) * oracle.factor(batch), oracle.expected(batch))


@each_seed
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_an_aggregation_has_the_weights_of_its_nested_means(name, seed):
    lengths = lengths_of(random_batch(seed))
    same(AGGREGATIONS[name](lengths, MAX_TOKENS), oracles_literal.weights(name, lengths, MAX_TOKENS))


def test_every_name_has_an_oracle():
    sections = [oracle.section for oracle in oracles.OBJECTIVES]
    assert {section.name for section in sections} == set(PRESETS)
    assert {section.loss.name for section in sections} == set(oracles_literal.FORMULAS)
    assert {type(section.loss) for section in sections} == set(
        get_args(AlgorithmSection.model_fields["loss"].annotation)
    )
    assert {section.aggregation for section in sections} == set(get_args(AggregationName))
    assert {section.kl.estimator for section in sections if section.kl} == set(
        get_args(ReferenceKl.model_fields["estimator"].annotation)
    )
    assert {section.mask.level for section in sections if section.mask} == set(
        get_args(RatioMask.model_fields["level"].annotation)
    )
    assert {oracle.name for oracle in oracles.ADVANTAGES} == set(get_args(AdvantageName))


def test_the_page_of_algorithms_is_what_the_code_says():
    written = algorithms_page.PAGE.read_text(encoding="utf-8")
    assert written == algorithms_page.page(), "docs/algorithms.md is stale; run make docs"


def test_every_row_of_the_page_names_its_oracle():
    rows = [line for line in algorithms_page.page().splitlines() if line.startswith("| `")]
    names = {*PRESETS, *ADVANTAGES, *AGGREGATIONS, *oracles_literal.FORMULAS}
    assert names <= {row.split("`")[1] for row in rows}
    assert all(oracles.FORMULA in row or "TRL" in row.split("|")[-2] for row in rows)
