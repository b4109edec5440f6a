"""This file tests beliefs: evidence fades by version, partial credit counts, a signal is what groups showed."""

from __future__ import annotations

import random

import pytest

from rl.beliefs import REMEMBERED_GROUPS, Belief, BucketBeliefs, Feedback, informative_probability
from rl.curriculum_config import CurriculumSection

G = 8
SECTION = CurriculumSection()


def beliefs() -> BucketBeliefs:
    return BucketBeliefs({"sums": ("easy", "hard")}, SECTION, G)


def group(pass_rate: float | None, version: int = 0, level: str = "easy", answers: int = G, informative=None):
    informs = pass_rate not in (None, 0.0, 1.0) if informative is None else informative
    return Feedback(
        source="sums", level=level, key=None, pass_rate=pass_rate, answers=answers, informative=informs, version=version
    )


@pytest.mark.parametrize(("pass_rate", "expected"), [(0.05, 0.34), (0.25, 0.90), (0.5, 0.99), (0.0, 0.0), (1.0, 0.0)])
def test_the_information_of_a_group_is_the_chance_that_its_rewards_differ(pass_rate: float, expected: float) -> None:
    assert informative_probability(pass_rate, 8) == pytest.approx(expected, abs=0.005)


def test_the_signal_of_a_belief_is_that_of_its_pass_rates_on_average() -> None:
    belief, rng = Belief(2.5, 4.0), random.Random(0)
    sampled = [informative_probability(belief.sample(rng), G) for _ in range(40_000)]
    assert belief.signal(G) == pytest.approx(sum(sampled) / len(sampled), abs=0.005)
    assert Belief(1.0, 1.0).signal(G) == pytest.approx(1 - 2 / (G + 1))


def test_an_unseen_level_may_have_any_pass_rate() -> None:
    assert beliefs().belief("sums", "easy", 5) == Belief(1.0, 1.0)


def test_evidence_fades_by_version_but_not_below_what_is_remembered() -> None:
    known = beliefs()
    for _ in range(10):
        known.add(group(0.25))
    assert known.answers("sums", "easy", 0) == pytest.approx(80)
    assert known.answers("sums", "easy", 2) == pytest.approx(80 * 0.81)
    assert known.answers("sums", "easy", 10_000) == pytest.approx(REMEMBERED_GROUPS * G)
    assert known.belief("sums", "easy", 10_000).passed == pytest.approx(1 + REMEMBERED_GROUPS * G / 4)
    known.add(group(1.0, version=10_000))
    assert known.pass_rates()["sums"]["easy"] == pytest.approx(1.0), "what is old weighs nothing against what is new"


def test_a_group_counts_with_the_answers_that_it_has_and_partial_credit_in_parts() -> None:
    known = beliefs()
    known.add(group(0.5, answers=2))
    known.add(group(0.3, answers=6))
    assert known.pass_rates()["sums"]["easy"] == pytest.approx((1.0 + 1.8) / 8)
    assert known.answers("sums", "easy", 0) == pytest.approx(8)


@pytest.mark.parametrize(("mean", "expected"), [(1.7, 1.0), (-0.2, 0.0)])
def test_a_mean_reward_outside_zero_to_one_counts_as_the_nearer_end(mean: float, expected: float) -> None:
    known = beliefs()
    known.add(group(mean))
    assert known.pass_rates()["sums"]["easy"] == expected


def test_failed_judgements_are_no_evidence() -> None:
    known = beliefs()
    known.add(group(None))
    assert known.pass_rates() == {"sums": {}} and known.metrics() == {}


def test_a_level_that_mixes_trivial_and_hopeless_prompts_promises_no_signal() -> None:
    mixed, even = beliefs(), beliefs()
    for index in range(40):
        mixed.add(group(float(index % 2)))
        even.add(group(0.5))
    assert mixed.pass_rates() == even.pass_rates()
    assert mixed.signal("sums", "easy", 0) < 0.1 < 0.95 < even.signal("sums", "easy", 0)


def test_metrics_tell_pass_rate_signal_and_share_in_band() -> None:
    known = beliefs()
    for pass_rate in (0.0, 0.125, 0.5, 0.5):
        known.add(group(pass_rate))
    metrics = {name: metric.value for name, metric in known.metrics().items()}
    assert metrics["curriculum/pass_rate/sums/easy"] == pytest.approx(1.125 / 4)
    assert metrics["curriculum/informative_fraction/sums/easy"] == 0.75
    assert metrics["curriculum/in_band_fraction/sums/easy"] == 0.5
    assert known.describe() == "sums/easy 0.28, sums/hard unseen"
