"""This file tests learners/advantages.py: what the formulas promise; test_oracles.py compares the values."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.advantages import ADVANTAGES, EPSILON, dr_grpo, grpo, max_rl, reinforce_pp, rloo

each_estimator = pytest.mark.parametrize("estimator", ADVANTAGES.values(), ids=ADVANTAGES)

reward = st.one_of(st.none(), st.integers(0, 64).map(lambda value: value / 64))
batches = st.lists(st.lists(reward, min_size=1, max_size=6), min_size=1, max_size=4)


def close(found, expected, **tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert [value is None for value in ours] == [value is None for value in theirs]
        for own, their in zip(ours, theirs, strict=True):
            assert own is None or own == pytest.approx(their, **({"rel": 1e-9, "abs": 1e-12} | tolerance))


def informs(group) -> bool:
    return len({value for value in group if value is not None}) > 1


def test_grpo_centres_and_scales_by_the_population_deviation():
    expected = [value / (0.5 + EPSILON) for value in (-0.5, 0.5, 0.5, -0.5)]
    assert grpo([(0.0, 1.0, 1.0, 0.0)])[0] == pytest.approx(expected)


def test_rloo_compares_with_the_mean_of_the_others():
    rewards = (0.25, 1.0, 0.5)
    assert rloo([rewards])[0] == pytest.approx([own - (sum(rewards) - own) / 2 for own in rewards])


def test_max_rl_weighs_rare_successes_more():
    assert max_rl([(1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0)]) == [
        (3.0, -1.0, -1.0, -1.0),
        pytest.approx((1 / 3, 1 / 3, 1 / 3, -1.0)),
    ]


def test_max_rl_does_not_turn_around_where_the_mean_is_negative():
    assert max_rl([(-1.0, 0.0)]) == [(0.0, 0.0)]


def test_reinforce_pp_compares_answers_across_groups():
    easy, hard = reinforce_pp([(1.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
    assert easy[0] == hard[0] and easy[2] == hard[2]


@settings(max_examples=60, deadline=None)
@given(batches, st.randoms(use_true_random=False))
def test_the_order_of_answers_and_of_groups_changes_no_bit(batch, rng):
    places = [rng.sample(range(len(group)), len(group)) for group in batch]
    order = rng.sample(range(len(batch)), len(batch))
    for estimator in ADVANTAGES.values():
        straight = estimator(batch)
        shuffled = estimator([[batch[g][i] for i in places[g]] for g in order])
        assert shuffled == [tuple(straight[g][i] for i in places[g]) for g in order]


@settings(max_examples=60, deadline=None)
@given(batches)
def test_a_failure_has_no_advantage_and_no_share_in_its_siblings(batch):
    scored = [[value for value in group if value is not None] for group in batch]
    for estimator in ADVANTAGES.values():
        found = estimator(batch)
        assert [[v is None for v in group] for group in found] == [[v is None for v in group] for group in batch]
        assert [tuple(v for v in group if v is not None) for group in found] == estimator(scored)


@settings(max_examples=60, deadline=None)
@given(batches)
def test_groups_without_a_difference_are_zero_and_change_nothing_for_the_others(batch):
    for estimator in ADVANTAGES.values():
        found = estimator(batch)
        alone = iter(estimator([group for group in batch if informs(group)]))
        for group, values in zip(batch, found, strict=True):
            assert values == (next(alone) if informs(group) else tuple(None if r is None else 0.0 for r in group))


@settings(max_examples=60, deadline=None)
@given(batches, st.integers(-8, 8))
def test_adding_to_every_reward_changes_nothing_but_for_max_rl(batch, shift):
    shifted = [[None if value is None else value + shift for value in group] for group in batch]
    for name, estimator in ADVANTAGES.items():
        if name != "max_rl":
            close(estimator(shifted), estimator(batch))


@settings(max_examples=60, deadline=None)
@given(batches, st.sampled_from((0.25, 2.0, 16.0)))
def test_scaling_rewards_scales_advantages_or_leaves_them_alone(batch, factor):
    scaled = [[None if value is None else value * factor for value in group] for group in batch]
    for name, estimator in ADVANTAGES.items():
        expected = estimator(batch)
        if name in ("dr_grpo", "rloo"):
            expected = [[None if value is None else value * factor for value in group] for group in expected]
        # the epsilon beside a deviation, 1/64 of a reward or more here, does not scale
        close(estimator(scaled), expected, rel=1e-2 if name not in ("dr_grpo", "rloo", "max_rl") else 1e-9)


@settings(max_examples=60, deadline=None)
@given(batches)
def test_advantages_sum_to_zero(batch):
    for name, estimator in ADVANTAGES.items():
        for group in [sum(estimator(batch), ())] if name == "reinforce_pp" else estimator(batch):
            assert sum(value for value in group if value is not None) == pytest.approx(0, abs=1e-9)


@each_estimator
@pytest.mark.parametrize("same", [0.1, 1 / 3, 1e-9, 7.7])
@pytest.mark.parametrize("count", [1, 3, 7, 10])
def test_equal_rewards_give_exactly_zero_although_their_computed_mean_is_rounded(estimator, same, count):
    assert estimator([(same,) * count]) == [(0.0,) * count]


def test_rewards_that_differ_by_less_than_fp32_can_tell_still_inform():
    low, high = dr_grpo([(1.0, 1.0 + 1e-12)])[0]
    assert low < 0 < high


@each_estimator
def test_a_group_of_failures_has_no_advantages(estimator):
    assert estimator([(None, None), (), (1.0, 0.0)])[:2] == [(None, None), ()]


@each_estimator
def test_a_batch_of_nothing_is_nothing(estimator):
    assert estimator([]) == []
