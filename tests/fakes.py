"""This file holds fakes of everything the run loops join but the buffer, which is real: no model, no Ray, no clock."""

from __future__ import annotations

import asyncio
import os
import pathlib
import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from actors.rollout import report_of
from rl.accounting import RewardWatch, StepAccount
from rl.archive import Archive
from rl.buffer import Buffer
from rl.config import CheckpointSection, EvaluationSection, Guardrail, MonitoringSection, RunSection
from rl.curriculum import Curriculum
from rl.curriculum_config import CurriculumSection
from rl.metrics import Metrics, highest, last, mean, total
from rl.orders import Draw, Graded, PartStatus, StepOrder, StepReport
from rl.parts import LearnersLost, Parts, Plan
from rl.recorder import Recorder, RunDirectory
from rl.run import Run
from rl.staleness import Gate
from rl.trajectory import (
    Completion,
    DropReason,
    Group,
    GroupReport,
    Message,
    Prompt,
    RewardPart,
    TextPart,
    Trajectory,
    VersionSpan,
)
from rl.weights import TensorDigest, UpdateReceipt, WeightUpdate, combined

LEVELS = {"sums": ("easy", "hard")}


def make_prompt(source: str = "sums", level: str = "easy", index: int = 0) -> Prompt:
    """A prompt of three tokens."""
    return Prompt(
        prompt_id=f"{source}/{level}/{index}",
        source=source,
        level=level,
        messages=(Message("user", (TextPart("1 + 1 = ?"),)),),
        reference="2",
        columns={},
        token_ids=(1, 2, 3),
    )


def make_completion(length: int = 4, version: int = 0, text: str = "2") -> Completion:
    """A completion of `length` tokens, sampled under one version."""
    return Completion(
        text=text,
        token_ids=tuple(range(10, 10 + length)),
        logprobs=(-0.5,) * length,
        spans=(VersionSpan(version, 0, length),),
        finish_reason="stop",
    )


def make_group(draw: Draw, rewards: Sequence[float | None], version: int = 0) -> Group:
    """A group with these rewards."""
    return Group(
        group_id=draw.group_id,
        draw=draw.draw,
        prompt=draw.prompt,
        trajectories=tuple(
            Trajectory(
                completion=make_completion(version=version),
                reward=reward,
                parts=(
                    RewardPart(
                        name="answer",
                        value=reward,
                        failure="timeout" if reward is None else None,
                        message="took too long" if reward is None else "",
                    ),
                ),
            )
            for reward in rewards
        ),
        finished_at=0.0,
    )


def make_report(group: Group, dropped: DropReason | None = None) -> GroupReport:
    """What a generator would report of the group."""
    return report_of(group, dropped, {"sample": 1.0}, 0)


def make_cut_report(draw: Draw, version: int) -> GroupReport:
    """What a generator would report of a group that it was told to cut off: two answers of one token each."""
    completion = msgspec.structs.replace(make_completion(1, version), finish_reason="abort")
    trajectories = (Trajectory(completion=completion, reward=None, parts=()),) * 2
    return make_report(msgspec.structs.replace(make_group(draw, ()), trajectories=trajectories), "stale")


class FakePrompts:
    """Endless prompts."""

    levels = LEVELS

    def __init__(self) -> None:
        self.drawn = 0

    def next(self, source: str, level: str, key: str | None = None) -> Prompt:
        self.drawn += 1
        return make_prompt(source, level, self.drawn)

    def held_out(self, source: str, level: str, count: int) -> list[Prompt]:
        return [make_prompt(source, level, -1 - index) for index in range(count)]

    def metrics(self) -> Metrics:
        return {"prompts/drawn": last(self.drawn)}

    def state_dict(self) -> dict:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict) -> None:
        self.drawn = state["drawn"]


class FakeGenerators:
    """Engines that answer at once, in a seeded random order, at the version they were last given.

    rewards decides a group's rewards from its draw number; fail_at raises at that draw; corrupt alters digests.
    sampled counts how often each draw was asked for. With `hold` cleared, and for an endless draw, there is no answer
    but what `cut_tails` ends; cuts has what it was asked for.
    """

    def __init__(
        self, buffer: Buffer, rewards=lambda draw: (0.0, 1.0), fail_at: int | None = None, endless: Sequence[int] = ()
    ) -> None:
        self.buffer = buffer
        self.rewards = rewards
        self.fail_at = fail_at
        self.endless = endless
        self.corrupt = False
        self.version = 0
        self.updates: list[int] = []
        self.sampled: Counter[int] = Counter()
        self.hold = asyncio.Event()
        self.hold.set()
        self.cuts: list[int] = []
        self.held: dict[int, tuple[int, asyncio.Event]] = {}
        self._rng = random.Random(0)

    async def rollout(self, draw: Draw) -> GroupReport:
        if draw.draw == self.fail_at:
            raise RuntimeError("the engine died")
        self.sampled[draw.draw] += 1
        version = self.version
        for _ in range(self._rng.randrange(5)):
            await asyncio.sleep(0)
        waits = draw.draw in self.endless or not self.hold.is_set()
        if waits and await self._is_cut(draw, version):
            return make_cut_report(draw, version)
        rewards = self.rewards(draw.draw)
        group = make_group(draw, rewards, version)
        if len(set(rewards)) == 1:
            reason = "reward_failure" if rewards[0] is None else "zero_advantage"
            return make_report(group, reason)
        await self.buffer.put(group)
        return make_report(group)

    async def _is_cut(self, draw: Draw, version: int) -> bool:
        """Wait until the hold, or this draw, ends; tells whether it was cut."""
        _, cut = self.held[draw.draw] = version, asyncio.Event()
        ends = (cut,) if draw.draw in self.endless else (self.hold, cut)
        waits = {asyncio.create_task(event.wait()) for event in ends}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self.held[draw.draw]
            for wait in waits:
                wait.cancel()
        return cut.is_set()

    async def cut_tails(self, oldest_version: int) -> None:
        self.cuts.append(oldest_version)
        for version, cut in self.held.values():
            if version < oldest_version:
                cut.set()

    async def rollout_round(self, draws: Sequence[Draw]) -> list[GroupReport]:
        reports = [await self.rollout(draw) for draw in draws]
        self._rng.shuffle(reports)
        return reports

    async def evaluate(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Graded]:
        return [
            Graded(
                source=prompt.source,
                level=prompt.level,
                prompt_id=prompt.prompt_id,
                reward=1.0,
                parts=(),
                versions=(self.version,),
                num_tokens=1,
                text="2",
            )
            for prompt in prompts
        ]

    async def update(self, update: WeightUpdate) -> list[UpdateReceipt]:
        self.version = update.version
        self.updates.append(update.version)
        tensors = update.tensors
        if self.corrupt and update.version > 0:
            tensors = tuple(TensorDigest(tensor.name, "bfloat16", (1,), "other") for tensor in tensors)
        receipt = UpdateReceipt(
            version=update.version, tensors=tensors, missing=(), canary_logprobs=(-1.0,), seconds={}, generator=0
        )
        return [receipt]

    async def check(self) -> None:
        return None

    async def scale(self, count: int) -> str:
        return f"{count} generators"

    def describe(self) -> list[PartStatus]:
        return []

    def metrics(self) -> Metrics:
        return {"generator/idle_fraction": last(0.0)}


class FakeLearners:
    """Learners that count: the version is the number of steps, the batch digest names the groups.

    lose_at holds steps at which the ranks die once, before the step is made; losing_save has the next save die.
    """

    def __init__(self, groups_per_step: int) -> None:
        self.groups_per_step = groups_per_step
        self.version = 0
        self.batches: list[tuple[int, ...]] = []
        self.lags: list[int] = []
        self.stepped = asyncio.Event()
        self.lose_at: set[int] = set()
        self.losing_save = False
        self.restarts = 0
        self.effective_sample_fraction = 1.0
        self._saving: tuple[str, int] = ("", 0)

    async def step(self, order: StepOrder) -> StepReport:
        if order.step in self.lose_at:
            self.lose_at.remove(order.step)
            raise LearnersLost("learner rank 0 died")
        assert order.version == self.version and order.step == self.version + 1
        assert len(order.entries) == self.groups_per_step
        self.version += 1
        self.batches.append(tuple(entry.draw for entry in order.entries))
        lags = [order.version - entry.oldest_version for entry in order.entries]
        self.lags += lags
        self.stepped.set()
        return StepReport(
            step=order.step,
            version=self.version,
            metrics={
                "policy/lag_mean/versions": mean(0.0),
                "policy/lag_max/versions": highest(max(lags)),
                "policy/effective_sample_fraction": mean(self.effective_sample_fraction),
                "learner/useful/tokens": total(sum(entry.num_tokens for entry in order.entries)),
            },
            batch_digest=str(self.batches[-1]),
            num_tokens=sum(entry.num_tokens for entry in order.entries),
            seconds={"step": 0.0},
        )

    async def publish(self, version: int) -> WeightUpdate:
        assert version == self.version
        tensors = (TensorDigest("weight", "bfloat16", (1,), f"digest {version}"),)
        return WeightUpdate(
            version=version,
            backend="shared_memory",
            tensors=tensors,
            digest=combined(tensors),
            canary_token_ids=(1, 2),
            canary_logprobs=(-1.0,),
            path="/nowhere",
            node="",
            num_bytes=2,
        )

    async def begin_save(self, folder: str, export: bool) -> None:
        self._saving = (folder, self.version)

    async def finish_save(self) -> None:
        if self.losing_save:
            self.losing_save = False
            raise LearnersLost("learner rank 1 died")
        folder, version = self._saving
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "weights"), "w") as file:  # noqa: ASYNC230
            file.write(str(version))

    async def load(self, folder: str) -> None:
        with open(os.path.join(folder, "weights")) as file:  # noqa: ASYNC230
            self.version = int(file.read())

    async def restart(self) -> None:
        self.restarts += 1
        self.version = 0

    def describe(self) -> list[PartStatus]:
        return []


class SilentProgress:
    """Remembers the steps that it was told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.evaluations: list[int] = []

    def step(self, step, metrics, evaluation) -> None:
        self.steps.append(step)

    def evaluation(self, evaluation) -> None:
        self.evaluations.append(evaluation.version)

    def note(self, text: str) -> None:
        return None


async def no_report(_: str) -> None:
    """Where a run would write down how it stands."""


async def no_group() -> None:
    """Where nccl would have everybody meet."""


def make_run(
    directory: pathlib.Path,
    buffer: Buffer,
    steps: int = 6,
    max_lag: int = 2,
    start_step: int = 0,
    saving: dict[str, int] | None = None,
    guardrails: dict[str, Guardrail] | None = None,
    long_tail: Literal["continue", "drop"] = "continue",
    **generators,
) -> Run:
    """A run over fakes and a real buffer: two groups of two per step, a checkpoint every second step."""
    run_directory = RunDirectory(directory)
    run_directory.create()
    plan = Plan(
        run=RunSection(name="fake", steps=steps),
        evaluation=EvaluationSection(every_steps=2, prompts_per_level=2),
        checkpoint=CheckpointSection(**({"every_steps": 2, "keep": 1} | (saving or {}))),
        deadlines=MonitoringSection(batch_deadline_s=20, group_deadline_s=20, step_deadline_s=20),
        run_id=run_directory.run_id,
        groups_per_step=2,
        max_lag=max_lag,
        max_canary_gap=0.1,
        max_buffer_bytes=1 << 20,
        max_learner_restarts=2,
        start_step=start_step,
        guardrails=guardrails or {},
        long_tail=long_tail,
    )
    parts = Parts(
        prompts=FakePrompts(),
        curriculum=Curriculum(LEVELS, {"sums": 1.0}, CurriculumSection(max_uninformative_steps=4), 2, 0),
        gate=Gate(max_lag, 2),
        buffer=buffer,
        generators=FakeGenerators(buffer, **generators),
        learners=FakeLearners(2),
        recorder=Recorder(run_directory),
        progress=SilentProgress(),
        archive=Archive(run_directory),
        account=StepAccount(2),
        rewards=RewardWatch(0.2),
        report_stall=no_report,
        regroup=no_group,
    )
    return Run(plan, parts)
