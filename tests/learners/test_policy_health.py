"""This file tests learners/policy_health.py and learners/stopwatch.py."""

from __future__ import annotations

import math

import pytest
import torch

from learners.policy_health import TokenFacts, health, objective
from learners.stopwatch import Stopwatch


def facts(log_ratios, lags=None, advantages=None, losses=None):
    zeros = torch.zeros(len(log_ratios), dtype=torch.float64)
    return TokenFacts(
        logprobs_N=torch.tensor(log_ratios, dtype=torch.float64) - 1,
        behaviour_N=zeros - 1,
        entropy_N=zeros + 0.5,
        lags_N=zeros if lags is None else torch.tensor(lags, dtype=torch.float64),
        advantages_N=zeros if advantages is None else torch.tensor(advantages, dtype=torch.float64),
        clipped_N=zeros,
        loss_N=zeros if losses is None else torch.tensor(losses, dtype=torch.float64),
    )


def test_the_metrics_are_their_formulas():
    ratios = [2.0, 0.5, 1.0, 1.0]
    found = health(facts([math.log(r) for r in ratios], lags=[0, 1, 2, 1], advantages=[1, 0, -1, 0]))
    value = {name: metric.value for name, metric in found.items()}
    assert value["policy/logprob_gap_mean/nats"] == pytest.approx(math.log(2) / 2)
    assert value["policy/logprob_gap_max/nats"] == pytest.approx(math.log(2))
    assert value["policy/ratio_mean"] == pytest.approx(4.5 / 4)
    assert value["policy/effective_sample_fraction"] == pytest.approx(4.5**2 / (4 * 6.25))
    assert value["policy/kl_to_behaviour/nats"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 4)
    assert value["policy/lag_mean/versions"] == 1.0 and value["policy/lag_max/versions"] == 2.0
    assert value["learner/trained/tokens"] == 4 and value["learner/useful/tokens"] == 2


def test_an_unmoved_policy_has_no_gap_and_a_full_sample():
    value = {name: metric.value for name, metric in health(facts([0.0] * 5)).items()}
    assert value["policy/logprob_gap_max/nats"] == 0 and value["policy/kl_to_behaviour/nats"] == 0
    assert value["policy/effective_sample_fraction"] == 1.0


def test_the_current_gap_is_over_tokens_of_the_current_version():
    assert facts([0.5, 0.1, 0.3], lags=[1, 0, 0]).current_gap() == pytest.approx(0.2)
    assert facts([0.5], lags=[1]).current_gap() is None


def test_a_stopwatch_hands_its_seconds_over_once_and_counts_what_raised():
    stopwatch = Stopwatch("cpu")
    with pytest.raises(KeyError), stopwatch.measure("forward"):
        raise KeyError
    assert stopwatch.take()["forward"] >= 0
    assert stopwatch.take() == {}


def test_the_objective_is_the_normalised_sum_in_whatever_order_the_tokens_come():
    losses = [1e16, 0.1, -1e16, 0.2, -0.6]
    found = objective(facts([0.0] * 5, losses=losses), 2.0)
    assert found["learner/loss"].value == math.fsum(losses) / 2 == pytest.approx(-0.15)
    assert found["learner/loss_abs"].value == pytest.approx(1e16)
    assert objective(facts([0.0] * 5, losses=losses[::-1]), 2.0) == found


def test_an_objective_that_is_not_finite_is_not_a_number():
    found = objective(facts([0.0] * 2, losses=[math.inf, -math.inf]), 2.0)
    assert math.isnan(found["learner/loss"].value)
