"""This file tests learners/policy_health.py and learners/stopwatch.py."""

from __future__ import annotations

import math

import pytest
import torch

from learners.policy_health import LAG_BUCKETS, TokenFacts, by_lag, distance_to_reference, health, objective
from learners.stopwatch import Stopwatch
from rl.metrics import merge


def facts(log_ratios, lags=None, advantages=None, losses=None, **columns):
    zeros = torch.zeros(len(log_ratios), dtype=torch.float64)

    def column(values):
        return zeros if values is None else torch.tensor(values, dtype=torch.float64)

    return TokenFacts(
        logprobs_N=torch.tensor(log_ratios, dtype=torch.float64) - 1,
        behaviour_N=zeros - 1,
        entropy_N=zeros + 0.5,
        lags_N=column(lags),
        advantages_N=column(advantages),
        clipped_N=column(columns.get("clipped")),
        masked_N=column(columns.get("masked")),
        loss_N=column(losses),
        reference_N=column(columns.get("reference")),
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
    assert value["learner/computed/tokens"] == 4 and value["learner/useful/tokens"] == 2


def test_the_distance_to_the_reference_is_k3_and_nothing_where_they_agree():
    found = distance_to_reference(facts([0.0, 0.0], reference=[-1.0, -1.0 + math.log(2)]))
    assert found["policy/kl_to_reference/nats"].value == pytest.approx((2 - 1 - math.log(2)) / 2)


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


def test_the_objective_is_the_sum_of_weighted_losses_in_whatever_order_the_tokens_come():
    losses = [1e16, 0.1, -1e16, 0.2, -0.6]
    found = objective(facts([0.0] * 5, losses=losses))
    assert found["learner/loss"].value == math.fsum(losses) == pytest.approx(-0.3)
    assert found["learner/loss_abs"].value == math.fsum(map(abs, losses))
    assert objective(facts([0.0] * 5, losses=losses[::-1])) == found


def test_an_objective_that_is_not_finite_is_not_a_number():
    found = objective(facts([0.0] * 2, losses=[math.inf, -math.inf]))
    assert math.isnan(found["learner/loss"].value)


def test_a_useful_token_has_an_advantage_and_is_not_masked():
    found = health(facts([0.0] * 4, advantages=[1, -1, 0, 1], masked=[0, 1, 1, 0], clipped=[1, 0, 0, 0]))
    assert found["learner/useful/tokens"].value == 2 and found["learner/computed/tokens"].value == 4
    assert found["policy/mask_fraction"].value == 0.5 and found["policy/clip_fraction"].value == 0.25


def test_every_lag_has_one_bucket():
    for lag in range(40):
        holding = [name for name, low, high in LAG_BUCKETS if low <= lag <= high]
        assert len(holding) == 1, lag
        first, last = (*holding[0].rstrip("+").split("-"), holding[0].rstrip("+"))[:2]
        assert int(first) <= lag and (holding[0].endswith("+") or lag <= int(last))


def test_distances_of_a_lag_are_those_of_its_tokens_alone_and_a_lag_without_tokens_has_none():
    log_ratios, lags = [0.1, -0.4, 0.7, 0.2, -0.3, 1.0], [0, 3, 4, 0, 4, 100]
    clipped, masked = [0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 1, 1]
    found = by_lag(facts(log_ratios, lags=lags, clipped=clipped, masked=masked))
    assert {name.split("/")[2] for name in found} == {"0", "3-4", "17+"}
    for bucket, indices in {"0": [0, 3], "3-4": [1, 2, 4], "17+": [5]}.items():
        alone = health(facts(*([values[i] for i in indices] for values in (log_ratios, lags)))).items()
        for what in ("logprob_gap_mean/nats", "effective_sample_fraction", "kl_to_behaviour/nats"):
            expected = dict(alone)[f"policy/{what}"].value
            assert found[f"policy/by_lag/{bucket}/{what}"].value == pytest.approx(expected, rel=1e-12)
        ratios = [math.exp(log_ratios[i]) for i in indices]
        kl = sum(r - 1 - math.log(r) for r in ratios) / len(ratios)
        assert found[f"policy/by_lag/{bucket}/kl_to_behaviour/nats"].value == pytest.approx(kl)
        for what, values in {"clip_fraction": clipped, "mask_fraction": masked}.items():
            expected = sum(values[i] for i in indices) / len(indices)
            assert found[f"policy/by_lag/{bucket}/{what}"].value == pytest.approx(expected)
        assert found[f"policy/by_lag/{bucket}/token_fraction"].value == pytest.approx(len(indices) / 6)


def test_the_distances_of_all_lags_together_are_those_of_the_batch():
    log_ratios, lags = [0.1, -0.4, 0.7, 0.2, -0.3], [0, 1, 1, 5, 9]
    found = health(facts(log_ratios, lags=lags, masked=[1, 0, 1, 0, 0]))
    for what in ("logprob_gap_mean/nats", "kl_to_behaviour/nats", "mask_fraction"):
        parts = merge({what: metric} for name, metric in found.items() if "by_lag" in name and name.endswith(what))
        assert parts[what].value == pytest.approx(found[f"policy/{what}"].value)
        assert parts[what].weight == found[f"policy/{what}"].weight == 5
    fractions = [metric for name, metric in found.items() if name.endswith("token_fraction")]
    assert sum(metric.value for metric in fractions) == pytest.approx(1.0)
    assert {metric.weight for metric in fractions} == {5.0}  # of all tokens, so that steps of unlike size merge right
