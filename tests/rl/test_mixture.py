"""This file tests whose turn it is: weights hold over any window, poor sources lend, and none starves."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.mixture import Mixture

WEIGHTS = {"sums": 3.0, "products": 1.0, "divisors": 0.5}
signal_values = st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.9, 1.0])


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
    signals=st.lists(st.lists(signal_values, min_size=5, max_size=5), min_size=1, max_size=40),
    start=st.integers(0, 50),
    length=st.integers(1, 150),
)
@settings(max_examples=60, deadline=None)
def test_turns_follow_the_weights_over_any_window_whoever_then_lends_them(weights, signals, start, length) -> None:
    names = [f"source{index}" for index in range(len(weights))]
    mixture = Mixture(dict(zip(names, weights, strict=True)), 0.75)
    turns = [
        mixture.next(dict(zip(names, signals[number % len(signals)], strict=False))) for number in range(start + length)
    ]
    owners = [turn.lender or turn.source for turn in turns[start:]]
    for name, weight in zip(names, weights, strict=True):
        assert abs(owners.count(name) - length * weight / sum(weights)) <= len(weights)


@given(
    flexibility=st.sampled_from([0.0, 0.5, 0.75, 0.9]),
    signals=st.lists(st.lists(signal_values, min_size=3, max_size=3), min_size=1, max_size=40),
    start=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_no_source_starves_whatever_the_others_promise(flexibility, signals, start) -> None:
    mixture = Mixture(WEIGHTS, flexibility)
    drawn = [
        mixture.next(dict(zip(WEIGHTS, signals[number % len(signals)], strict=True))).source
        for number in range(start + 400)
    ][start:]
    for source, weight in WEIGHTS.items():
        share = weight / sum(WEIGHTS.values())
        assert drawn.count(source) >= (400 * share - len(WEIGHTS)) * (1 - flexibility) - 1


def test_a_source_with_less_than_half_to_teach_lends_by_the_weights_of_the_others() -> None:
    mixture = Mixture({"sums": 3.0, "products": 1.0, "divisors": 4.0}, 0.75)
    turns = [mixture.next({"sums": 0.9, "products": 0.6, "divisors": 0.3}) for _ in range(800)]
    lent = [turn.source for turn in turns if turn.lender == "divisors"]
    assert len(lent) == pytest.approx(300, abs=2), "three quarters of its 400 turns"
    assert lent.count("sums") == pytest.approx(225, abs=2) and lent.count("products") == pytest.approx(75, abs=2)


def test_nobody_lends_where_all_are_alike() -> None:
    mixture = Mixture(WEIGHTS, 0.75)
    assert all(mixture.next(dict.fromkeys(WEIGHTS, 0.01)).lender is None for _ in range(100))


def test_a_state_saved_midway_continues_with_the_same_turns() -> None:
    signals = {"sums": 0.1, "products": 0.9, "divisors": 0.8}
    mixture, restored = Mixture(WEIGHTS, 0.75), Mixture(WEIGHTS, 0.75)
    for _ in range(37):
        mixture.next(signals)
    restored.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    assert [mixture.next(signals) for _ in range(100)] == [restored.next(signals) for _ in range(100)]
