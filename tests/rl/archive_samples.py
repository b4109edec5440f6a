"""This file holds groups with everything in them that an archive could lose."""

from __future__ import annotations

from rl.trajectory import Completion, Group, Message, Prompt, RewardPart, TextPart, Trajectory, VersionSpan


def rich_prompt(index: int = 0) -> Prompt:
    """A conversation of two turns, with nested columns."""
    return Prompt(
        prompt_id=f"sums/easy/{index}",
        source="sums",
        level="easy",
        messages=(
            Message("system", (TextPart("Be brief."),)),
            Message("user", (TextPart("1 + "), TextPart("1 = ?\n\u00e9\u4f60\U0001f600"))),
        ),
        reference=None if index % 2 else "2",
        columns={"entry": {"operands": [1, 1.5, None, True], "big": 2**63 - 1}, "empty": [], "": ""},
        token_ids=(1, 2, 3 + index),
    )


def rich_answer(reward: float | None, version: int = 0, length: int = 4) -> Trajectory:
    """An answer over two versions whose log-probabilities have no short decimal form."""
    parts = (
        RewardPart(name="format", value=0.1 + 0.2, reward_version="f1", seconds=1 / 3, weight=1 / 7),
        RewardPart(
            name="answer",
            value=reward,
            failure="timeout" if reward is None else None,
            message="took 10 s" if reward is None else "",
            reward_version="a7",
        ),
    )
    completion = Completion(
        text=f"The answer is {length}.\n",
        token_ids=tuple(range(10, 10 + length)),
        logprobs=tuple(-(at + 1) / 3 for at in range(length)),
        spans=(VersionSpan(version, 0, 1), VersionSpan(version + 1, 1, length)),
        finish_reason="length" if length > 4 else "stop",
    )
    return Trajectory(completion=completion, reward=reward, parts=parts)


def rich_group(
    draw: int, rewards: tuple[float | None, ...] = (1.0, None, 1 / 3), version: int = 0, prompt: int | None = None
) -> Group:
    """The group of a draw; its answers begin under `version` and end under the next."""
    return Group(
        group_id=f"run-1/{draw:08d}",
        draw=draw,
        prompt=rich_prompt(draw if prompt is None else prompt),
        trajectories=tuple(rich_answer(reward, version, 4 + at) for at, reward in enumerate(rewards)),
        finished_at=1.75e9 + draw / 3,
    )
