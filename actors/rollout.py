"""This file holds what is pure about a rollout: what is asked, how judgements become a reward, why a group drops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from actors.engine import SampleRequest
from rewards.scorer import JudgeRequest, PartResult
from rl.config import Overlong
from rl.orders import Draw, Graded
from rl.trajectory import (
    OVERLONG,
    Completion,
    DropReason,
    Group,
    GroupReport,
    Prompt,
    RewardPart,
    Trajectory,
    weighted_sum,
)

FURTHER_SEEDS = 1 << 31  # draws have seeds below it, so that no second stage repeats the first of any draw


def sample_request(
    draw: Draw, count: int, max_tokens: int, temperature: float, longest_first: bool = False
) -> SampleRequest:
    """What a draw asks of the engine, first."""
    return SampleRequest(
        request_id=draw.group_id,
        token_ids=draw.prompt.token_ids,
        count=count,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=draw.seed,
        priority=-int(draw.expected_tokens) if longest_first else 0,
    )


def further_request(first: SampleRequest, group_size: int) -> SampleRequest:
    """What is asked to complete a group whose first answers differ: the rest of it, with a seed of its own."""
    return msgspec.structs.replace(
        first,
        request_id=further_id(first.request_id),
        count=group_size - first.count,
        seed=first.seed + FURTHER_SEEDS,
    )


def further_id(group_id: str) -> str:
    """The request id of a group's second stage."""
    return f"{group_id}/further"


def judge_request(prompt: Prompt, completion: Completion, rewards: tuple[str, ...]) -> JudgeRequest:
    """What a completion asks of the scorer. A reward sees the last message: the question without its surroundings."""
    return JudgeRequest(
        prompt=prompt.messages[-1].text,
        completion=completion.text,
        reference=prompt.reference,
        columns=prompt.columns,
        rewards=rewards,
    )


def overlong_part(num_tokens: int, max_tokens: int, overlong: Overlong) -> RewardPart:
    """The soft punishment of length: DAPO, arXiv 2503.14476, equation 13, with L tokens, L_max and L_cache.

        0                                  where L <= L_max - L_cache
        (L_max - L_cache - L) / L_cache    up to L_max, where an answer is cut off and gets -1

    L_max is rollout.max_tokens and L_cache is rewards.overlong.soft_tokens. Rewards may differ by it alone, and then
    the group is worth training on, though its answers are all right or all wrong: it teaches length.
    """
    over = num_tokens - (max_tokens - overlong.soft_tokens)
    value = -min(1.0, over / overlong.soft_tokens) if over > 0 else 0.0
    return RewardPart(name=OVERLONG, value=value, weight=overlong.weight)


def reward_parts(results: Sequence[PartResult], weights: Mapping[str, float]) -> tuple[RewardPart, ...]:
    """What the scorer said, with each reward's factor in the sum."""
    return tuple(
        RewardPart(
            name=result.name,
            value=result.value,
            failure=result.failure,
            message=result.message,
            reward_version=result.version,
            seconds=result.seconds,
            weight=weights[result.name],
        )
        for result in results
    )


def trajectory_of(completion: Completion, parts: tuple[RewardPart, ...]) -> Trajectory:
    """A judged completion."""
    return Trajectory(completion=completion, reward=weighted_sum(parts), parts=parts)


def unjudged(completion: Completion) -> Trajectory:
    """A completion of a group that was cut off: it is not worth a judge's time."""
    return Trajectory(completion=completion, reward=None, parts=())


def is_aborted(completions: Iterable[Completion]) -> bool:
    """Whether the engine was told, or forced, to stop before all of them had ended."""
    return any(completion.finish_reason == "abort" for completion in completions)


def drop_reason(trajectories: Sequence[Trajectory], keep_equal: bool = False) -> DropReason | None:
    """Why nothing can be learnt from a group of these, or None.

    A group teaches by the differences between its rewards: fewer than two of them are none, and equal ones cancel;
    keep_equal (rollout.zero_advantage) has the latter count in their batch all the same.
    """
    if is_aborted(trajectory.completion for trajectory in trajectories):
        return "aborted"
    rewards = [trajectory.reward for trajectory in trajectories if trajectory.reward is not None]
    if len(rewards) < 2:
        return "reward_failure"
    return "zero_advantage" if len(set(rewards)) == 1 and not keep_equal else None


def wants_more(first: Sequence[Trajectory], keep_equal: bool = False) -> bool:
    """Whether the rest of a group is sampled, now that its first answers are judged: where their rewards differ.

    A group that is kept also if its rewards are equal is always completed, and then nothing below biases anything.

    Where fewer than two of them could be judged, nothing shows that they do; and a judge that fails on a prompt once
    fails on its other answers as a rule. The group is then dropped as reward_failure, with nothing more paid for it.

    What this decision biases. Let n of G answers come first, D be the event that their rewards differ, and A_i be R_i
    minus the mean of the other G-1 (with the group's mean it is the same times (G-1)/G).

    - The other G-n answers are draws of the policy like any, independent of D. The expectation of A_i grad log pi over
      them is P(D) times the true gradient: their baseline is not biased. For rewards of 0 and 1 with pass rate
      p = 1-q, P(D) = 1 - p^n - q^n.
    - The first n are conditioned on D: among them are a right and a wrong answer more often than the policy gives
      them. For rewards of 0 and 1 their expected term still points along the true gradient, with the factor
      1 - (G-n)/(G-1) (p^(n-1) q + q^(n-1) p); for more values of the reward it need not point there.
    - So, for rewards of 0 and 1, a prompt's expected gradient keeps its direction and gets shorter, the more so the
      nearer p is to 0 or 1. What is lost are the groups whose first answers agree and whose others would not have;
      a group sampled in one stage is dropped only where it adds nothing.
    - Dividing by a group's standard deviation is biased in one stage already, and differently in two.

    The mean over the answers of kept groups is no pass rate either: GroupReport.first_answers says which answers were
    sampled whatever the rewards. A belief that counts passes and failures may count all answers.
    """
    return drop_reason(first, keep_equal) is None


def report_of(
    group: Group,
    dropped: DropReason | None,
    seconds: dict[str, float],
    generator: int,
    first_answers: int | None = None,
    ledger: dict[str, float] | None = None,
) -> GroupReport:
    """What the driver is told of a group. Its versions are -1 where not one token was sampled."""
    completions = [trajectory.completion for trajectory in group.trajectories]
    versions = [span.version for completion in completions for span in completion.spans]
    return GroupReport(
        group_id=group.group_id,
        draw=group.draw,
        prompt_id=group.prompt.prompt_id,
        source=group.prompt.source,
        level=group.prompt.level,
        dropped=dropped,
        rewards=group.rewards,
        parts=tuple(trajectory.parts for trajectory in group.trajectories),
        completion_tokens=tuple(len(completion.token_ids) for completion in completions),
        truncated=sum(completion.finish_reason == "length" for completion in completions),
        oldest_version=min(versions, default=-1),
        newest_version=max(versions, default=-1),
        seconds=seconds,
        generator=generator,
        first_answers=first_answers,
        ledger=ledger or {},
    )


def graded_of(prompt: Prompt, trajectory: Trajectory) -> Graded:
    """A held-out prompt with its answer's judgement."""
    completion = trajectory.completion
    return Graded(
        source=prompt.source,
        level=prompt.level,
        prompt_id=prompt.prompt_id,
        reward=trajectory.reward,
        parts=trajectory.parts,
        versions=tuple(sorted({span.version for span in completion.spans})),
        num_tokens=len(completion.token_ids),
        text=completion.text,
    )
