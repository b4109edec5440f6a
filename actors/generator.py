"""This file is one generator: an engine that answers, a scorer that judges, and a buffer that takes what is worth it.

    Draw -> engine.sample -> scorer.judge_group -> drop reason, or buffer.put -> GroupReport
               ^                   |
               +---- the rest -----+   in two stages: only where the rewards of the first answers differ

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
from typing import Literal, Protocol

import msgspec

from actors.engine import Engine, SampleRequest
from actors.rollout import (
    drop_reason,
    further_request,
    graded_of,
    is_aborted,
    judge_request,
    overlong_part,
    report_of,
    reward_parts,
    sample_request,
    trajectory_of,
    unjudged,
    wants_more,
)
from actors.tails import Tails
from rewards.scorer import JudgeRequest, PartResult
from rl.buffer import OversizeGroup
from rl.config import Overlong
from rl.orders import Draw, Graded
from rl.time_ledger import TimeLedger
from rl.trajectory import Completion, DropReason, Group, GroupReport, Prompt, RewardPart, Trajectory
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
    first_answers, where given, are sampled and judged before the rest of the group. overlong penalises length.
    order longest_first has the engine start what is believed to take longest, where requests wait. zero_advantage keep
    publishes a group of equal rewards like any other, so that it counts in its batch.
    shared_memory is the folder that an update arriving as bytes is written to; run_id goes into the file's name.
    """

    run_id: str
    group_size: int
    max_tokens: int
    temperature: float
    reward_weights: dict[str, float]
    reward_names: dict[str, tuple[str, ...]]
    shared_memory: str = "/dev/shm"
    first_answers: int | None = None
    overlong: Overlong | None = None
    order: Literal["arrival", "longest_first"] = "arrival"
    zero_advantage: Literal["drop", "keep"] = "drop"


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
        self._tails = Tails()
        self._ledger = TimeLedger(("update", "sample", "judge", "publish"))

    @property
    def version(self) -> int:
        """The policy version that new tokens are stamped with."""
        return self._engine.version

    async def rollout(self, draw: Draw) -> GroupReport:
        """Turn a draw into a published or dropped group.

        Where `cut_tails` gave it up meanwhile, it is dropped as stale, with the tokens that it had; what its rewards
        show for certain, that they are all equal or all failed, is still told as such.
        """
        seconds: dict[str, float] = {}
        first = self._first_request(draw)
        with self._tails.running(draw.group_id, self._engine.version) as tail:
            trajectories = await self._answer(draw, first, seconds)
            if first.count < self.settings.group_size and self._wants_more(trajectories) and not tail.is_cut:
                further = further_request(first, self.settings.group_size)
                trajectories += await self._answer(draw, further, seconds)
        dropped = self._drop_reason(trajectories)
        if tail.is_cut and dropped in (None, "aborted"):
            dropped = "stale"
        return await self._conclude(draw, trajectories, dropped, seconds)

    async def rollout_round(self, draws: Sequence[Draw]) -> list[GroupReport]:
        """Turn draws into groups, sampled together and alike in every run of one seed.

        In two stages the second is a round of all the draws that go on, which starts when every first answer is
        judged: what it holds depends on the rewards alone, and on no timing.
        """
        seconds: list[dict[str, float]] = [{} for _ in draws]
        first = [self._first_request(draw) for draw in draws]
        judged = await self._answer_round(draws, first, seconds)
        size = self.settings.group_size
        again = [at for at, each in enumerate(judged) if first[at].count < size and self._wants_more(each)]
        if again:
            further = [further_request(first[at], size) for at in again]
            more = await self._answer_round([draws[at] for at in again], further, [seconds[at] for at in again])
            for at, each in zip(again, more, strict=True):
                judged[at] += each
        answered = zip(draws, judged, seconds, strict=True)
        concluding = (self._conclude(draw, t, self._drop_reason(t), s) for draw, t, s in answered)
        return list(await asyncio.gather(*concluding))

    async def cut_tails(self, oldest_version: int) -> None:
        """Have the engine abort every group that began before `oldest_version`; their rollouts report them as stale."""
        if request_ids := self._tails.cut(oldest_version):
            await self._engine.abort(request_ids)

    async def evaluate(self, prompts: Sequence[Prompt], temperature: float, max_tokens: int, seed: int) -> list[Graded]:
        """Answer and judge each prompt once, in a round. The caller pins the version: it updates nothing meanwhile.

        Length is not penalised here: what is held out asks what the policy knows, and rewards.functions say so.
        """
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
        with self._ledger.during("sample"):
            answers = await self._engine.sample_round(requests)
        with self._ledger.during("judge"):
            judged = await asyncio.gather(
                *(self._judge(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
            )
        answered = zip(prompts, answers, judged, strict=True)
        return [graded_of(prompt, trajectory_of(answer, parts)) for prompt, (answer,), (parts,) in answered]

    async def join(self, group: NcclGroup, place: int) -> None:
        """Meet the sender of the nccl backend, as engine `place` of the group; the sender must be joining too."""
        await self._engine.join(group, place)

    async def update(self, update: WeightUpdate, payload: bytes | memoryview | None = None) -> UpdateReceipt:
        """Load a policy version and score the canary with it; `rl.weights.verify` judges the receipt.

        payload holds the file's bytes where update.path lies on another node. Raises WeightUpdateError, with the
        version unmoved, where the weights did not arrive whole, and FileNotFoundError where the learners have removed
        the file because they have written newer ones.
        """
        with self._ledger.during("update"):
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

    def _first_request(self, draw: Draw) -> SampleRequest:
        settings = self.settings
        count = settings.first_answers or settings.group_size
        longest_first = settings.order == "longest_first"
        return sample_request(draw, count, settings.max_tokens, settings.temperature, longest_first)

    def _drop_reason(self, trajectories: Sequence[Trajectory]) -> DropReason | None:
        return drop_reason(trajectories, self.settings.zero_advantage == "keep")

    def _wants_more(self, first: Sequence[Trajectory]) -> bool:
        return wants_more(first, self.settings.zero_advantage == "keep")

    async def _answer(self, draw: Draw, request: SampleRequest, seconds: dict[str, float]) -> tuple[Trajectory, ...]:
        with self._ledger.during("sample"), _timed(seconds, "sample"):
            completions = await self._engine.sample(request)
        return await self._trajectories(draw, completions, seconds)

    async def _answer_round(
        self, draws: Sequence[Draw], requests: Sequence[SampleRequest], seconds: Sequence[dict[str, float]]
    ) -> list[tuple[Trajectory, ...]]:
        with self._ledger.during("sample"), contextlib.ExitStack() as stack:
            for each in seconds:
                stack.enter_context(_timed(each, "sample"))
            answers = await self._engine.sample_round(requests)
        answered = zip(draws, answers, seconds, strict=True)
        return list(await asyncio.gather(*(self._trajectories(*each) for each in answered)))

    async def _trajectories(
        self, draw: Draw, completions: Sequence[Completion], seconds: dict[str, float]
    ) -> tuple[Trajectory, ...]:
        """Judge the answers of a draw; those of one that was cut off are not worth it."""
        if is_aborted(completions):
            return tuple(unjudged(completion) for completion in completions)
        with self._ledger.during("judge"), _timed(seconds, "judge"):
            judged = await self._judge(draw.prompt, completions)
        penalised = zip(completions, judged, strict=True)
        return tuple(trajectory_of(each, (*parts, *self._penalty(each))) for each, parts in penalised)

    async def _judge(self, prompt: Prompt, completions: Sequence[Completion]) -> list[tuple[RewardPart, ...]]:
        names = self.settings.reward_names[prompt.source]
        results = await self._scorer.judge_group([judge_request(prompt, each, names) for each in completions])
        return [reward_parts(each, self.settings.reward_weights) for each in results]

    def _penalty(self, completion: Completion) -> tuple[RewardPart, ...]:
        overlong = self.settings.overlong
        if overlong is None:
            return ()
        return (overlong_part(len(completion.token_ids), self.settings.max_tokens, overlong),)

    async def _conclude(
        self,
        draw: Draw,
        trajectories: tuple[Trajectory, ...],
        dropped: DropReason | None,
        seconds: dict[str, float],
    ) -> GroupReport:
        group = Group(
            group_id=draw.group_id,
            draw=draw.draw,
            prompt=draw.prompt,
            trajectories=trajectories,
            finished_at=time.time(),
        )
        if dropped is None:
            with self._ledger.during("publish"), _timed(seconds, "publish"):
                dropped = await self._publish(group)
        return report_of(group, dropped, seconds, self.index, self.settings.first_answers, self._ledger.take())

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
    """Add a block's wall time to an activity's: in two stages there are two of each."""
    start = time.perf_counter()
    yield
    seconds[activity] = seconds.get(activity, 0.0) + time.perf_counter() - start
