"""This file tests learners/aggregations.py: what weighs the same; test_oracles.py compares the values."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.aggregations import AGGREGATIONS, constant_length, prompt_mean, sequence_mean, token_mean

LENGTHS = [[2, 8], [5, 5, 5]]
batches = st.lists(st.lists(st.integers(1, 20), max_size=5), min_size=1, max_size=4).filter(any)


def shares(weights, lengths):
    """What each answer weighs as a whole."""
    return [[weight * n for weight, n in zip(*group, strict=True)] for group in zip(weights, lengths, strict=True)]


def test_token_mean_weighs_every_token_alike():
    assert token_mean(LENGTHS, 20) == [[1 / 25] * 2, [1 / 25] * 3]


def test_sequence_mean_weighs_every_answer_alike():
    assert shares(sequence_mean(LENGTHS, 20), LENGTHS) == [pytest.approx([0.2] * 2), pytest.approx([0.2] * 3)]


def test_prompt_mean_weighs_every_prompt_alike_and_tokens_within_it():
    assert [sum(group) for group in shares(prompt_mean(LENGTHS, 20), LENGTHS)] == pytest.approx([0.5, 0.5])
    assert prompt_mean(LENGTHS, 20)[0] == [0.05, 0.05]


def test_constant_length_weighs_a_token_the_same_however_long_its_answer():
    assert constant_length(LENGTHS, 20) == [[1 / 100] * 2, [1 / 100] * 3]


def test_a_group_without_a_scored_answer_is_no_prompt():
    for aggregation in AGGREGATIONS.values():
        assert aggregation([[], *LENGTHS], 20) == [[], *aggregation(LENGTHS, 20)]


def test_an_empty_batch_and_an_empty_answer_divide_by_nothing():
    for aggregation in AGGREGATIONS.values():
        assert aggregation([[]], 20) == [[]]
        assert len(aggregation([[0]], 20)[0]) == 1


@settings(max_examples=50, deadline=None)
@given(batches)
def test_the_weights_of_all_tokens_sum_to_one_and_to_no_more_at_constant_length(lengths):
    for name, aggregation in AGGREGATIONS.items():
        total = sum(map(sum, shares(aggregation(lengths, 20), lengths)))
        assert total <= 1 + 1e-12 if name == "constant_length" else total == pytest.approx(1, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(batches, st.randoms(use_true_random=False))
def test_an_answer_weighs_the_same_wherever_it_stands(lengths, rng):
    order = rng.sample(range(len(lengths)), len(lengths))
    for aggregation in AGGREGATIONS.values():
        straight = aggregation(lengths, 20)
        assert aggregation([lengths[g][::-1] for g in order], 20) == [straight[g][::-1] for g in order]
