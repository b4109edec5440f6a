"""This file tests held-out scores and their intervals."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.evaluation import Evaluation, score_of, summarise, wilson_interval
from rl.orders import Graded


def graded(source: str, level: str, reward: float | None, versions: tuple[int, ...] = (3,)) -> Graded:
    return Graded(
        source=source,
        level=level,
        prompt_id=f"{source}/{level}/held_out-0",
        reward=reward,
        parts=(),
        versions=versions,
        num_tokens=5,
        text="7",
    )


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals_agree_with_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(total=st.integers(1, 300), data=st.data())
def test_a_wilson_interval_holds_the_share_and_mirrors(total: int, data) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_proportion_is_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} correct of {total}"):
        wilson_interval(correct, total)


def test_binary_rewards_get_a_wilson_interval() -> None:
    score = score_of([1.0, 0.0, 1.0, 1.0])
    assert (score.correct, score.total, score.mean) == (3, 4, 0.75)
    assert (score.low, score.high) == wilson_interval(3, 4)


def test_graded_rewards_get_a_normal_interval_around_their_mean() -> None:
    score = score_of([0.5, 1.0, 0.0, 0.5])
    assert score.mean == 0.5 and score.correct == 1
    assert score.high - 0.5 == pytest.approx(1.959964 * (1 / 6) ** 0.5 / 2)
    assert 0.5 - score.low == pytest.approx(score.high - 0.5)


def test_a_failed_judgement_is_counted_and_is_never_a_number() -> None:
    score = score_of([1.0, None, 1.0])
    assert (score.total, score.failed, score.mean) == (2, 1, 1.0)
    nothing = score_of([None, None])
    assert (nothing.total, nothing.failed, nothing.mean, nothing.low, nothing.high) == (0, 2, None, None, None)


def test_one_graded_reward_claims_no_interval() -> None:
    assert score_of([0.5]).low is None


def test_scores_are_kept_apart_by_source_and_level_and_pooled_overall() -> None:
    answers = [graded("sums", "easy", 1.0), graded("sums", "hard", 0.0), graded("gcd", "easy", 0.0)]
    evaluation = summarise(20, 3, [*answers, graded("sums", "easy", 0.0)])
    found = {(entry.source, entry.level): (entry.score.correct, entry.score.total) for entry in evaluation.scores}
    assert found == {("sums", "easy"): (1, 2), ("sums", "hard"): (0, 1), ("gcd", "easy"): (0, 1)}
    assert (evaluation.step, evaluation.version, evaluation.overall.mean) == (20, 3, 0.25)
    assert evaluation.metrics()["evaluation/score/sums/easy"].value == 0.5
    assert evaluation.metrics()["evaluation/score/overall"].value == 0.25


@pytest.mark.parametrize("versions", [(3, 4), (4,)])
def test_an_evaluation_carries_exactly_one_policy_version(versions: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sums/easy/held_out-0 was answered under .* evaluation is of version 3"):
        summarise(1, 3, [graded("sums", "easy", 1.0, versions)])


def test_an_evaluation_is_a_line_of_json_and_back() -> None:
    evaluation = summarise(1, 3, [graded("sums", "easy", 1.0), graded("sums", "hard", None)])
    assert msgspec.json.decode(msgspec.json.encode(evaluation), type=Evaluation) == evaluation
