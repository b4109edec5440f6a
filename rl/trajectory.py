"""This file defines what flows through the system: Prompt, Completion, Trajectory, Group, and what is told about them.

Every type is frozen and holds facts only. Advantages, lags and ratios are derived where they are used, so that an
estimator can change without new rollouts. `rl/codec.py` puts these types on the wire.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

OVERLONG = "overlong"  # the reward part that penalises length: the only one that no reward function gives
FinishReason = Literal["stop", "length", "abort"]
DropReason = Literal["stale", "zero_advantage", "reward_failure", "aborted", "surplus", "oversize"]
DROP_REASONS: tuple[DropReason, ...] = (
    "stale",
    "zero_advantage",
    "reward_failure",
    "aborted",
    "surplus",
    "oversize",
)


class TextPart(msgspec.Struct, frozen=True, tag="text"):
    """One piece of text inside a message; the tag leaves room for other kinds of content, such as images."""

    text: str


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    parts: tuple[TextPart, ...]

    @property
    def text(self) -> str:
        """The message as plain text: its text parts joined."""
        return "".join(part.text for part in self.parts)


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One task instance, rendered and tokenized.

    prompt_id is unique and reproducible: the same source, level and index give the same prompt in any run.
    columns are handed to reward functions as keyword arguments and must survive msgpack.
    token_ids is the chat template's rendering with the generation prompt, [P].
    """

    prompt_id: str
    source: str
    level: str
    messages: tuple[Message, ...]
    reference: str | None
    columns: dict[str, Any]
    token_ids: tuple[int, ...]


class VersionSpan(msgspec.Struct, frozen=True):
    """Tokens start..end (end exclusive) of a completion were sampled under policy `version`, says the engine."""

    version: int
    start: int
    end: int


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine returned for one prompt, once.

    token_ids [T], logprobs [T] (nats, under the sampling distribution), spans cover exactly 0..T.

    Raises ValueError where the three disagree: a fill value is never written.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"a completion has {len(self.token_ids)} tokens but {len(self.logprobs)} log-probs")
        edges = [span.start for span in self.spans] + [len(self.token_ids)]
        ends = [0] + [span.end for span in self.spans]
        if edges != ends:
            raise ValueError(f"version spans {self.spans} do not cover the completion's {len(self.token_ids)} tokens")

    @property
    def oldest_version(self) -> int:
        """The oldest policy version among the sampled tokens."""
        return min(span.version for span in self.spans)


class RewardPart(msgspec.Struct, frozen=True, kw_only=True):
    """What one reward said of one completion: a value, or the kind and message of its failure, never both.

    weight is its factor in the sum; what earlier versions archived has none.
    """

    name: str
    value: float | None
    failure: str | None = None
    message: str = ""
    reward_version: str = ""
    seconds: float = 0.0
    weight: float | UnsetType = UNSET  # left out where it is not set, so that older archives keep their digests


def score_of(reward: float | None, parts: Sequence[RewardPart]) -> float | None:
    """A reward without the penalty for length, which says nothing of whether the answer is right: for pass rates."""
    if reward is None or all(part.name != OVERLONG for part in parts):
        return reward
    return weighted_sum([part for part in parts if part.name != OVERLONG])


def weighted_sum(parts: Sequence[RewardPart]) -> float | None:
    """The sum of weight times value, or None where a part that counts failed: a failure is never a number."""
    weights = [1.0 if part.weight is UNSET else part.weight for part in parts]
    counting = [(weight, part.value) for weight, part in zip(weights, parts, strict=True) if weight != 0.0]
    values = [weight * value for weight, value in counting if value is not None]
    return math.fsum(values) if len(values) == len(counting) else None


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
    """A completion and its judgement. reward is None where a reward failed: a failure is never a number."""

    completion: Completion
    reward: float | None
    parts: tuple[RewardPart, ...]


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The trajectories of one draw of one prompt: the unit of publication, lease and drop.

    draw counts the prompts drawn in this run from 0; group_id derives from run, draw and prompt, so that publishing
    the same draw twice is recognised. finished_at is in seconds since the epoch.
    """

    group_id: str
    draw: int
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    finished_at: float

    @property
    def oldest_version(self) -> int:
        """The oldest policy version among all sampled tokens of the group; its lag is counted from here."""
        return min(trajectory.completion.oldest_version for trajectory in self.trajectories)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of the group, prompts not counted."""
        return sum(len(trajectory.completion.token_ids) for trajectory in self.trajectories)

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """The stored rewards, [G]; None where judging failed."""
        return tuple(trajectory.reward for trajectory in self.trajectories)

    @property
    def scores(self) -> tuple[float | None, ...]:
        """The rewards without a penalty for length, [G]."""
        return tuple(score_of(trajectory.reward, trajectory.parts) for trajectory in self.trajectories)


class GroupEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What the buffer's stream says of a group without its payload: enough to plan a batch and to bound its lag.

    completion_tokens [G] are the lengths and rewards [G] the stored rewards, from which every rank derives the same
    advantages before it has fetched a payload.
    """

    group_id: str
    draw: int
    prompt_id: str
    source: str
    level: str
    oldest_version: int
    prompt_tokens: int
    completion_tokens: tuple[int, ...]
    rewards: tuple[float | None, ...]
    payload_bytes: int
    finished_at: float

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of the group."""
        return sum(self.completion_tokens)

    @property
    def scored(self) -> tuple[bool, ...]:
        """Which trajectories have a reward, [G]."""
        return tuple(reward is not None for reward in self.rewards)


class GroupReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a generator tells the driver of a finished group: published (dropped is None) or dropped for a reason.

    The driver never sees token payloads. seconds maps an activity (sample, judge, publish) to its wall time.
    completion_tokens counts what was sampled, also of answers that were cut off. first_answers is how many answers
    were sampled before it was known whether there would be more; None where all were sampled at once. ledger is how the
    generator spent its wall time since its report before, in seconds by activity.
    """

    group_id: str
    draw: int
    prompt_id: str
    source: str
    level: str
    dropped: DropReason | None
    rewards: tuple[float | None, ...]
    parts: tuple[tuple[RewardPart, ...], ...]
    completion_tokens: tuple[int, ...]
    truncated: int
    oldest_version: int
    newest_version: int
    seconds: dict[str, float]
    generator: int
    first_answers: int | None = None
    ledger: dict[str, float] = {}

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of the group."""
        return sum(self.completion_tokens)

    @property
    def scores(self) -> tuple[float | None, ...]:
        """The rewards without a penalty for length, one for each answer that was judged or tried to."""
        return tuple(score_of(reward, parts) for reward, parts in zip(self.rewards, self.parts, strict=True))
