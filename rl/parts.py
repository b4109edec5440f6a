"""This file says what the loops of rl/run.py join: the contracts of what they call, and the numbers they go by."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rl.accounting import RewardWatch, StepAccount
from rl.archive import Archive
from rl.buffer import Buffer
from rl.config import CheckpointSection, EvaluationSection, Guardrail, MonitoringSection, RunSection
from rl.curriculum import Curriculum
from rl.evaluation import Evaluation
from rl.metrics import Metrics
from rl.orders import Draw, Graded, PartStatus, StepOrder, StepReport
from rl.prompts import PromptSources
from rl.recorder import Recorder
from rl.staleness import Gate
from rl.trajectory import GroupReport, Prompt
from rl.weights import UpdateReceipt, WeightUpdate


class LearnersLost(RuntimeError):
    """A learner rank died or hung, and with it the group: its ranks must be restarted from a saved state."""


class GeneratorsLost(RuntimeError):
    """No generator is left that could be restarted; the message has the reason of each."""


class Generators(Protocol):
    """All engines together (actors/fleet.py). A dead or hung one is restarted behind these calls."""

    async def rollout(self, draw: Draw) -> GroupReport: ...
    async def rollout_round(self, draws: Sequence[Draw]) -> list[GroupReport]: ...
    async def cut_tails(self, oldest_version: int) -> None: ...
    async def evaluate(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Graded]: ...
    async def update(self, update: WeightUpdate) -> list[UpdateReceipt]: ...
    async def check(self) -> None: ...
    async def scale(self, count: int) -> str: ...
    def describe(self) -> list[PartStatus]: ...
    def metrics(self) -> Metrics: ...


class Learners(Protocol):
    """All learner ranks together (learners/fleet.py). Every call raises LearnersLost when a rank is gone."""

    async def step(self, order: StepOrder) -> StepReport: ...
    async def publish(self, version: int) -> WeightUpdate: ...
    async def begin_save(self, folder: str, export: bool) -> None: ...
    async def finish_save(self) -> None: ...
    async def load(self, folder: str) -> None: ...
    async def restart(self) -> None: ...
    def describe(self) -> list[PartStatus]: ...


class Progress(Protocol):
    """What a person sees while it runs (rl/terminal.py)."""

    def step(self, step: int, metrics: Metrics, evaluation: Evaluation | None) -> None: ...
    def evaluation(self, evaluation: Evaluation) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """The few numbers and sections that the loops need."""

    run: RunSection
    evaluation: EvaluationSection
    checkpoint: CheckpointSection
    deadlines: MonitoringSection
    run_id: str
    groups_per_step: int
    max_lag: int
    max_canary_gap: float
    max_buffer_bytes: int
    max_learner_restarts: int
    start_step: int
    guardrails: Mapping[str, Guardrail]
    long_tail: Literal["continue", "drop"] = "continue"
    weights_every_steps: int = 1


@dataclass(frozen=True)
class Parts:
    """Everything the loops join; rl/launch.py builds it."""

    prompts: PromptSources
    curriculum: Curriculum
    gate: Gate
    buffer: Buffer
    generators: Generators
    learners: Learners
    recorder: Recorder
    progress: Progress
    archive: Archive
    account: StepAccount
    rewards: RewardWatch
    report_stall: Callable[[str], Awaitable[None]]  # writes down how everything stands, for the reason given
    regroup: Callable[[], Awaitable[None]]  # has learners and generators meet again where weights travel by nccl
