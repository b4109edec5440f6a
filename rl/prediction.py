"""This file says what a simulation is asked, Setting, and what it answers, Prediction."""

from __future__ import annotations

import msgspec


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What of a configuration decides its pace. waits_for_delivery is how nccl updates: the learners take part."""

    generators: int
    ranks: int
    max_sequences: int
    group_size: int
    max_tokens: int
    groups_per_step: int
    max_lag: int
    judge_workers: int = 1
    update_every_steps: int = 1
    first_answers: int | None = None
    keep_zero_advantage: bool = False
    cut_tails: bool = False
    waits_for_delivery: bool = False

    def __post_init__(self) -> None:
        if self.max_lag + 1 < self.update_every_steps:
            raise ValueError(
                f"weights.every_steps {self.update_every_steps} with staleness.max_lag {self.max_lag}: the gate would "
                f"close before the next delivery; raise max_lag to {self.update_every_steps - 1} or deliver more often"
            )


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """How a run goes, after its first steps. Idle shares are of wall time; a generator is idle with nothing in hand.

    overlap is the share of time in which both sides computed. lag_mean counts every trained token, lag_oldest_mean the
    oldest of each group, as the bound does. The last five count groups from the start, to balance.
    """

    step_s: float
    step_p90_s: float
    trajectories_per_s: float
    sampled_tokens_per_s: float
    sequences_mean: float
    learner_idle: float
    generator_idle: float
    overlap: float
    lag_mean: float
    lag_oldest_mean: float
    lag_max: int
    stale_groups: int
    zero_advantage_groups: int
    drawn: int
    trained: int
    waiting: int
    running: int

    @property
    def bottleneck(self) -> str:
        """The side that the other waits for."""
        difference = self.learner_idle - self.generator_idle
        if abs(difference) < 0.05:
            return "neither: both wait alike"
        return "generators: the learner waits for groups" if difference > 0 else "learner: the gate keeps generators"
