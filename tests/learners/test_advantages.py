"""This file tests learners/advantages.py."""

from __future__ import annotations

import pytest

from learners.advantages import EPSILON, dr_grpo, grpo, rloo


def test_grpo_centres_and_scales_by_the_population_deviation():
    assert grpo((0.0, 1.0, 1.0, 0.0)) == pytest.approx([value / (0.5 + EPSILON) for value in (-0.5, 0.5, 0.5, -0.5)])


def test_rloo_compares_with_the_mean_of_the_others():
    rewards = (0.25, 1.0, 0.5)
    literal = [own - (sum(rewards) - own) / 2 for own in rewards]
    assert rloo(rewards) == pytest.approx(literal)


@pytest.mark.parametrize("estimator", [grpo, dr_grpo, rloo])
def test_a_failure_has_no_advantage_and_no_share_in_the_mean(estimator):
    with_failure = estimator((0.0, None, 1.0, 0.5))
    assert with_failure[1] is None
    assert tuple(value for value in with_failure if value is not None) == estimator((0.0, 1.0, 0.5))


@pytest.mark.parametrize("estimator", [grpo, dr_grpo, rloo])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e-9, 7.7])
@pytest.mark.parametrize("count", [1, 3, 7, 10])
def test_equal_rewards_give_exactly_zero_although_their_computed_mean_is_rounded(estimator, reward, count):
    assert estimator((reward,) * count) == (0.0,) * count


def test_rewards_that_differ_by_less_than_fp32_can_tell_still_inform():
    low, high = dr_grpo((1.0, 1.0 + 1e-12))
    assert low < 0 < high


@pytest.mark.parametrize("estimator", [grpo, dr_grpo, rloo])
def test_a_group_of_failures_has_no_advantages(estimator):
    assert estimator((None, None)) == (None, None)
