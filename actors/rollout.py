"""This file holds what is pure about a rollout: what is asked, how judgements become a reward, why a group drops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from actors.engine import SampleRequest
from rewards.scorer import JudgeRequest, PartResult
from rl.orders import Draw, Graded
from rl.trajectory import Completion, DropReason, Group, GroupReport, Prompt, RewardPart, Trajectory


def sample_request(draw: Draw, group_size: int, max_tokens: int, temperature: float) -> SampleRequest:
    """What a draw asks of the engine."""
    return SampleRequest(
        request_id=draw.group_id,
        token_ids=draw.prompt.token_ids,
        count=group_size,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=draw.seed,
    )


def judge_request(prompt: Prompt, completion: Completion, rewards: tuple[str, ...]) -> JudgeRequest:
    """What a completion asks of the scorer. A reward sees the last message: the question without its surroundings."""
    return JudgeRequest(
        prompt=prompt.messages[-1].text,
        completion=completion.text,
        reference=prompt.reference,
        columns=prompt.columns,
        rewards=rewards,
    )


def weighted_sum(parts: Sequence[RewardPart], weights: Mapping[str, float]) -> float | None:
    """The reward of a trajectory, or None where a part that counts failed: a failure is never a number."""
    counting = [part for part in parts if weights[part.name] != 0.0]
    values = [weights[part.name] * part.value for part in counting if part.value is not None]
    return math.fsum(values) if len(values) == len(counting) else None


def trajectory_of(completion: Completion, results: Sequence[PartResult], weights: Mapping[str, float]) -> Trajectory:
    """A judged completion."""
    parts = tuple(
        RewardPart(
            name=result.name,
            value=result.value,
            failure=result.failure,
            message=result.message,
            reward_version=result.version,
            seconds=result.seconds,
        )
        for result in results
    )
    return Trajectory(completion=completion, reward=weighted_sum(parts, weights), parts=parts)


def drop_reason(group: Group) -> DropReason | None:
    """Why nothing can be learnt from a group, or None.

    A group teaches by the differences between its rewards: fewer than two of them are none, and equal ones cancel.
    """
    if any(trajectory.completion.finish_reason == "abort" for trajectory in group.trajectories):
        return "aborted"
    rewards = [reward for reward in group.rewards if reward is not None]
    if len(rewards) < 2:
        return "reward_failure"
    return "zero_advantage" if len(set(rewards)) == 1 else None


def report_of(group: Group, dropped: DropReason | None, seconds: dict[str, float], generator: int) -> GroupReport:
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
