"""This file defines what the driver asks of generators and learners, and what they answer, without payloads."""

from __future__ import annotations

import msgspec

from rl.guardrails import Trip
from rl.metrics import Metrics
from rl.trajectory import GroupEntry, Prompt, RewardPart

COMPUTED_TOKENS = "learner/computed/tokens"  # of one step: those that went through the model


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """One permitted draw: sample a group for this prompt. seed decides the sampling, whichever engine does it.

    expected_tokens is how long all its answers together are believed to be (rl/lengths.py); 0 where nobody knows.
    """

    group_id: str
    draw: int
    prompt: Prompt
    seed: int
    expected_tokens: float = 0.0


class Graded(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out prompt, answered once and judged. reward is None where judging failed."""

    source: str
    level: str
    prompt_id: str
    reward: float | None
    parts: tuple[RewardPart, ...]
    versions: tuple[int, ...]
    num_tokens: int
    text: str


class StepOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Train optimizer step `step` on these groups, in this order, with a policy that is at `version`.

    first asks for the log-probability gate before the optimizer moves (invariant 6 of ARCHITECTURE.md).
    """

    step: int
    version: int
    entries: tuple[GroupEntry, ...]
    first: bool


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an optimizer step did: the new version, its metrics, a digest of the batch, seconds by activity.

    trips are the guardrails that lowered or skipped it.
    """

    step: int
    version: int
    metrics: Metrics
    batch_digest: str
    num_tokens: int
    seconds: dict[str, float]
    trips: tuple[Trip, ...] = ()

    @property
    def has_gradient(self) -> bool:
        """Whether anything of the batch was computed; without it, no mean over tokens is reported."""
        computed = self.metrics.get(COMPUTED_TOKENS)
        return computed is None or computed.value > 0


class PartStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the fleets as its owner sees it, for stall reports and dashboards.

    state is starting, joining, working, dead, quarantined or leaving; detail says what it does, or why it is gone.
    pids are its processes on `node`; in_hand counts its requests, the oldest of which has waited oldest_request_s.
    """

    name: str
    state: str
    node: str
    pids: tuple[int, ...]
    version: int
    heartbeat_age_s: float
    in_hand: int
    oldest_request_s: float
    restarts: int
    detail: str
