from __future__ import annotations

import itertools
import math

import msgspec
import pytest

from actors.rollout import (
    drop_reason,
    further_request,
    graded_of,
    judge_request,
    overlong_part,
    report_of,
    reward_parts,
    sample_request,
    trajectory_of,
    wants_more,
)
from rewards.scorer import PartResult
from rl.config import Overlong
from rl.orders import Draw
from rl.trajectory import Completion, Group, RewardPart, Trajectory, VersionSpan, score_of, weighted_sum
from tests.fakes import make_group, make_prompt

DRAW = Draw(group_id="run/1", draw=1, prompt=make_prompt(), seed=9)


def completion(finish_reason="length") -> Completion:
    spans = (VersionSpan(2, 0, 1), VersionSpan(3, 1, 2))
    return Completion(text="2!", token_ids=(5, 6), logprobs=(-1.0, -2.0), spans=spans, finish_reason=finish_reason)


def test_a_draw_asks_for_a_group_with_its_own_seed():
    request = sample_request(DRAW, count=4, max_tokens=8, temperature=0.7)
    assert (request.request_id, request.count, request.seed) == ("run/1", 4, 9)
    assert request.token_ids == DRAW.prompt.token_ids


def test_a_draw_that_is_believed_to_take_long_asks_to_start_first_where_lengths_decide():
    draw = msgspec.structs.replace(DRAW, expected_tokens=120.7)
    arrival, first = (sample_request(draw, 4, 8, 0.7, longest_first) for longest_first in (False, True))
    assert (arrival.priority, first.priority) == (0, -120)
    assert further_request(first, group_size=6).priority == -120


def test_the_rest_of_a_group_has_an_id_and_a_seed_that_no_draw_has():
    first = sample_request(DRAW, count=2, max_tokens=8, temperature=0.7)
    rest = further_request(first, group_size=6)
    assert (rest.request_id, rest.count, rest.seed) == ("run/1/further", 4, (1 << 31) + 9)
    assert (rest.token_ids, rest.max_tokens, rest.temperature) == (first.token_ids, 8, 0.7)


def test_a_reward_is_asked_about_the_question_and_gets_reference_and_columns():
    request = judge_request(DRAW.prompt, completion(), ("answer",))
    assert (request.prompt, request.completion, request.reference) == ("1 + 1 = ?", "2!", "2")


@pytest.mark.parametrize(
    "values, weights, expected",
    [
        ((1.0, 0.5), (1.0, 2.0), 2.0),
        ((1.0, None), (1.0, 2.0), None),
        ((1.0, None), (1.0, 0.0), 1.0),
    ],
)
def test_the_reward_is_a_weighted_sum_unless_a_part_that_counts_failed(values, weights, expected):
    parts = [
        RewardPart(name=name, value=value, failure=None if value is not None else "timeout", weight=weight)
        for name, value, weight in zip("ab", values, weights, strict=True)
    ]
    assert weighted_sum(parts) == expected


def test_a_judgement_keeps_kind_message_and_version_of_a_failure():
    result = PartResult(name="answer", failure="crash", message="signal 9", version="v", seconds=0.5)
    (part,) = reward_parts([result], {"answer": 2.0})
    assert trajectory_of(completion(), (part,)).reward is None
    told = (part.value, part.failure, part.message, part.reward_version, part.seconds, part.weight)
    assert told == (None, "crash", "signal 9", "v", 0.5, 2.0)


@pytest.mark.parametrize(
    "num_tokens, penalty", [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (120, -1.0)]
)
def test_length_costs_nothing_then_ever_more_and_all_of_it_where_an_answer_is_cut_off(num_tokens, penalty):
    part = overlong_part(num_tokens, 100, Overlong(soft_tokens=20, weight=0.5))
    assert part.value == pytest.approx(penalty) and (part.name, part.weight) == ("overlong", 0.5)


def test_the_penalty_counts_in_the_reward_and_not_in_the_score():
    parts = reward_parts([PartResult(name="answer", value=0.1), PartResult(name="format", value=0.2)],
                         {"answer": 1.0, "format": 3.0})  # fmt: skip
    reward = trajectory_of(completion(), (*parts, overlong_part(100, 100, Overlong(soft_tokens=20, weight=0.5)))).reward
    assert reward == math.fsum((0.1, 3.0 * 0.2, -0.5))
    assert score_of(reward, (*parts, overlong_part(100, 100, Overlong(soft_tokens=20)))) == weighted_sum(parts)
    assert score_of(0.7, parts) == 0.7 and score_of(None, ()) is None


def test_a_group_that_differs_by_length_alone_is_trained_though_its_scores_are_equal():
    lengths, overlong = (10, 100), Overlong(soft_tokens=20)
    judged = reward_parts([PartResult(name="answer", value=1.0)], {"answer": 1.0})
    trajectories = [trajectory_of(completion(), (*judged, overlong_part(each, 100, overlong))) for each in lengths]
    group = msgspec.structs.replace(make_group(DRAW, ()), trajectories=tuple(trajectories))
    assert drop_reason(trajectories) is None and wants_more(trajectories)
    assert group.rewards == (1.0, 0.0) and group.scores == (1.0, 1.0)
    assert report_of(group, None, {}, 0).scores == (1.0, 1.0)


@pytest.mark.parametrize(
    "rewards, reason",
    [
        ((0.0, 1.0), None),
        ((None, 0.0, 1.0), None),
        ((1.0, 1.0), "zero_advantage"),
        ((1.0, None, 1.0), "zero_advantage"),
        ((None, None), "reward_failure"),
        ((None, 1.0), "reward_failure"),
    ],
)
def test_a_group_is_dropped_when_its_rewards_show_no_difference(rewards, reason):
    trajectories = make_group(DRAW, rewards).trajectories
    assert drop_reason(trajectories) == reason and wants_more(trajectories) == (reason is None)


@pytest.mark.parametrize("pass_rate", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("first", [2, 3, 4])
def test_what_two_stages_bias_is_what_the_docstring_says(first, pass_rate):
    """All groups of a one-parameter policy that passes with a logistic probability, weighted by how likely they are."""
    size, p, q = 4, pass_rate, 1.0 - pass_rate
    gradient = p * q  # of the pass rate in the logit, where grad log pi is R - p
    terms = [0.0] * size
    for rewards in itertools.product((0.0, 1.0), repeat=size):
        if not wants_more(make_group(DRAW, rewards[:first]).trajectories):
            continue
        likely = math.prod(p if reward else q for reward in rewards)
        for index, reward in enumerate(rewards):
            advantage = reward - (sum(rewards) - reward) / (size - 1)
            terms[index] += likely * advantage * (reward - p)
    further = 1 - p**first - q**first
    conditioned = 1 - (size - first) / (size - 1) * (p ** (first - 1) * q + q ** (first - 1) * p)
    assert terms[:first] == pytest.approx([conditioned * gradient] * first)
    assert terms[first:] == pytest.approx([further * gradient] * (size - first))


def test_a_group_with_an_aborted_answer_is_dropped_as_aborted():
    trajectories = tuple(
        Trajectory(completion=completion(finish_reason=reason), reward=reward, parts=())
        for reason, reward in (("stop", 0.0), ("abort", 1.0))
    )
    assert drop_reason(trajectories) == "aborted" and not wants_more(trajectories)


def test_a_report_has_the_versions_and_lengths_but_no_tokens():
    trajectory = Trajectory(completion=completion(), reward=1.0, parts=())
    group = Group(group_id="g", draw=0, prompt=DRAW.prompt, trajectories=(trajectory,), finished_at=0.0)
    report = report_of(group, None, {"sample": 1.0}, generator=2)
    assert (report.oldest_version, report.newest_version, report.truncated, report.generator) == (2, 3, 1, 2)
    assert report.completion_tokens == (2,) and report.rewards == (1.0,)


def test_a_graded_prompt_names_every_version_that_sampled_it():
    graded = graded_of(DRAW.prompt, Trajectory(completion=completion(), reward=None, parts=()))
    assert (graded.versions, graded.num_tokens, graded.reward, graded.text) == ((2, 3), 2, None, "2!")
