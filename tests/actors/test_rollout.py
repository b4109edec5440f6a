from __future__ import annotations

import pytest

from actors.rollout import drop_reason, graded_of, judge_request, report_of, sample_request, trajectory_of, weighted_sum
from rewards.scorer import PartResult
from rl.orders import Draw
from rl.trajectory import Completion, Group, RewardPart, Trajectory, VersionSpan
from tests.fakes import make_group, make_prompt

DRAW = Draw(group_id="run/1", draw=1, prompt=make_prompt(), seed=9)


def completion(finish_reason="length") -> Completion:
    spans = (VersionSpan(2, 0, 1), VersionSpan(3, 1, 2))
    return Completion(text="2!", token_ids=(5, 6), logprobs=(-1.0, -2.0), spans=spans, finish_reason=finish_reason)


def test_a_draw_asks_for_a_group_with_its_own_seed():
    request = sample_request(DRAW, group_size=4, max_tokens=8, temperature=0.7)
    assert (request.request_id, request.count, request.seed) == ("run/1", 4, 9)
    assert request.token_ids == DRAW.prompt.token_ids


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
        RewardPart(name=name, value=value, failure=None if value is not None else "timeout")
        for name, value in zip("ab", values, strict=True)
    ]
    assert weighted_sum(parts, dict(zip("ab", weights, strict=True))) == expected


def test_a_judgement_keeps_kind_message_and_version_of_a_failure():
    result = PartResult(name="answer", failure="crash", message="signal 9", version="v", seconds=0.5)
    trajectory = trajectory_of(completion(), [result], {"answer": 1.0})
    assert trajectory.reward is None
    part = trajectory.parts[0]
    assert (part.value, part.failure, part.message, part.reward_version, part.seconds) == (
        None,
        "crash",
        "signal 9",
        "v",
        0.5,
    )


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
    assert drop_reason(make_group(DRAW, rewards)) == reason


def test_a_group_with_an_aborted_answer_is_dropped_as_aborted():
    trajectories = tuple(
        Trajectory(completion=completion(finish_reason=reason), reward=reward, parts=())
        for reason, reward in (("stop", 0.0), ("abort", 1.0))
    )
    group = Group(group_id="g", draw=0, prompt=DRAW.prompt, trajectories=trajectories, finished_at=0.0)
    assert drop_reason(group) == "aborted"


def test_a_report_has_the_versions_and_lengths_but_no_tokens():
    trajectory = Trajectory(completion=completion(), reward=1.0, parts=())
    group = Group(group_id="g", draw=0, prompt=DRAW.prompt, trajectories=(trajectory,), finished_at=0.0)
    report = report_of(group, None, {"sample": 1.0}, generator=2)
    assert (report.oldest_version, report.newest_version, report.truncated, report.generator) == (2, 3, 1, 2)
    assert report.completion_tokens == (2,) and report.rewards == (1.0,)


def test_a_graded_prompt_names_every_version_that_sampled_it():
    graded = graded_of(DRAW.prompt, Trajectory(completion=completion(), reward=None, parts=()))
    assert (graded.versions, graded.num_tokens, graded.reward, graded.text) == ((2, 3), 2, None, "2!")
