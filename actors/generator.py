"""This file is one generator: an engine that answers, a scorer that judges, and a buffer that takes what is worth it.

    Draw -> engine.sample -> scorer.judge_group -> drop reason, or buffer.put -> GroupReport

It is a plain class; `generator_process.py` puts it into a Ray actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from actors.engine import Engine, SampleRequest
from actors.rollout import drop_reason, graded_of, judge_request, report_of, sample_request, trajectory_of
from rewards.scorer import JudgeRequest, PartResult
from rl.buffer import OversizeGroup
from rl.orders import Draw, Graded
from rl.trajectory import Completion, DropReason, Group, GroupReport, Prompt, Trajectory
from rl.weights import NcclGroup, UpdateReceipt, WeightUpdate


class Judge(Protocol):
    """What a generator needs of rewards.scorer.Scorer."""

    @property
    def pids(self) -> tuple[int, ...]: ...

    async def judge_group(self, requests: Sequence[JudgeRequest]) -> tuple[tuple[PartResult, ...], ...]: ...

    async def close(self) -> None: ...


class Publisher(Protocol):
    """What a generator needs of rl.buffer.Buffer."""

    async def put(self, group: Group) -> bool: ...

    async def close(self) -> None: ...


class GeneratorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How groups are sampled and judged.

    reward_weights maps a reward to its factor in the sum, reward_names a source to the rewards that judge it.
    shared_memory is the folder that an update arriving as bytes is written to; run_id goes into the file's name.
    """

    run_id: str
    group_size: int
    max_tokens: int
    temperature: float
    reward_weights: dict[str, float]
    reward_names: dict[str, tuple[str, ...]]
    shared_memory: str = "/dev/shm"


class Generator:
    """Samples, judges and publishes groups, for any number of draws at once; updates and evaluates in between."""

    def __init__(
        self, engine: Engine, scorer: Judge, buffer: Publisher, settings: GeneratorSettings, index: int
    ) -> None:
        """Takes ownership of engine, scorer and buffer: `close` closes them."""
        self.settings = settings
        self.index = index
        self._engine = engine
        self._scorer = scorer
        self._buffer = buffer

    @property
    def version(self) -> int:
        """The policy version that new tokens are stamped with."""
        return self._engine.version

    async def rollout(self, draw: Draw) -> GroupReport:
        """Turn a draw into a published or dropped group."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "sample"):
            completions = await self._engine.sample(self._request(draw))
        return await self._conclude(draw, completions, seconds)

    async def rollout_round(self, draws: Sequence[Draw]) -> list[GroupReport]:
        """Turn draws into groups, sampled together and alike in every run of one seed."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "sample"):
            round_of_completions = await self._engine.sample_round([self._request(draw) for draw in draws])
        answered = zip(draws, round_of_completions, strict=True)
        return list(await asyncio.gather(*(self._conclude(draw, each, dict(seconds)) for draw, each in answered)))

    async def evaluate(self, prompts: Sequence[Prompt], temperature: float, max_tokens: int, seed: int) -> list[Graded]:
        """Answer and judge each prompt once, in a round. The caller pins the version: it updates nothing meanwhile."""
        requests = [
            SampleRequest(
                request_id=f"evaluation/{self._engine.version}/{number}/{prompt.prompt_id}",
                token_ids=prompt.token_ids,
                count=1,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed + number,
            )
            for number, prompt in enumerate(prompts)
        ]
        answers = await self._engine.sample_round(requests)
        judged = await asyncio.gather(
            *(self._judge(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
        )
        return [graded_of(prompt, trajectory) for prompt, (trajectory,) in zip(prompts, judged, strict=True)]

    async def join(self, group: NcclGroup, place: int) -> None:
        """Meet the sender of the nccl backend, as engine `place` of the group; the sender must be joining too."""
        await self._engine.join(group, place)

    async def update(self, update: WeightUpdate, payload: bytes | memoryview | None = None) -> UpdateReceipt:
        """Load a policy version and score the canary with it; `rl.weights.verify` judges the receipt.

        payload holds the file's bytes where update.path lies on another node. Raises WeightUpdateError, with the
        version unmoved, where the weights did not arrive whole, and FileNotFoundError where the learners have removed
        the file because they have written newer ones.
        """
        async with contextlib.AsyncExitStack() as stack:
            if payload is not None:
                path = await asyncio.to_thread(self._write, update.version, payload)
                stack.callback(path.unlink, missing_ok=True)
                update = msgspec.structs.replace(update, path=str(path))
            if update.path is not None and not await asyncio.to_thread(os.path.exists, update.path):
                raise FileNotFoundError(f"policy version {update.version} is no longer at {update.path}")
            receipt = await self._engine.load(update)
        seconds = dict(receipt.seconds)
        with _timed(seconds, "canary"):
            canary_logprobs = await self._engine.score(update.canary_token_ids)
        return UpdateReceipt(
            version=receipt.version,
            tensors=receipt.tensors,
            missing=receipt.missing,
            canary_logprobs=canary_logprobs,
            seconds=seconds,
            generator=self.index,
        )

    async def watch(self) -> None:
        """Raise EngineDied as soon as a process of the engine is gone; until then this does not return."""
        await self._engine.watch()

    async def beat(self, seconds: float) -> tuple[int, ...]:
        """A sign of life of this process and of its engine, down to the workers; returns the ids of its processes.

        Raises EngineDied where the engine is dead, or does not answer for `seconds`.
        """
        await self._engine.probe(seconds)
        return (os.getpid(), *self._engine.pids, *self._scorer.pids)

    async def close(self) -> None:
        """End the engine, the scorer's children and the buffer's connection; one failing does not keep the others."""
        results = await asyncio.gather(
            self._engine.stop(), self._scorer.close(), self._buffer.close(), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _request(self, draw: Draw) -> SampleRequest:
        return sample_request(draw, self.settings.group_size, self.settings.max_tokens, self.settings.temperature)

    async def _judge(self, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Trajectory, ...]:
        names = self.settings.reward_names[prompt.source]
        results = await self._scorer.judge_group([judge_request(prompt, each, names) for each in completions])
        weights = self.settings.reward_weights
        return tuple(trajectory_of(each, parts, weights) for each, parts in zip(completions, results, strict=True))

    async def _conclude(self, draw: Draw, completions: Sequence[Completion], seconds: dict[str, float]) -> GroupReport:
        with _timed(seconds, "judge"):
            trajectories = await self._judge(draw.prompt, completions)
        group = Group(
            group_id=draw.group_id,
            draw=draw.draw,
            prompt=draw.prompt,
            trajectories=trajectories,
            finished_at=time.time(),
        )
        dropped = drop_reason(group)
        if dropped is None:
            with _timed(seconds, "publish"):
                dropped = await self._publish(group)
        return report_of(group, dropped, seconds, self.index)

    async def _publish(self, group: Group) -> DropReason | None:
        """Put a group into the buffer; publishing it again after a lost answer changes nothing there."""
        try:
            await self._buffer.put(group)
        except OversizeGroup as error:
            logging.getLogger(__name__).warning("%s", error)  # into this generator's log, with size and fix
            return "oversize"
        return None

    def _write(self, version: int, payload: bytes | memoryview) -> pathlib.Path:
        name = f"slipstream-{self.settings.run_id}-generator-{self.index}-version-{version}.safetensors"
        path = pathlib.Path(self.settings.shared_memory) / name
        path.write_bytes(payload)
        return path


@contextlib.contextmanager
def _timed(seconds: dict[str, float], activity: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[activity] = time.perf_counter() - start
