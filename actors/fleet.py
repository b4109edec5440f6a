"""This file puts generators into Ray actors and makes all of them together look like one: route, evaluate, update."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import ray

from actors.engine import EngineSettings
from actors.generator import Generator, GeneratorSettings
from rewards.scorer import RewardSpec, Scorer
from rl.buffer import Buffer
from rl.metrics import Metrics, last
from rl.orders import Draw, Graded
from rl.trajectory import GroupReport, Prompt
from rl.weights import NcclGroup, UpdateReceipt, WeightUpdate

CLOSE_SECONDS = 30.0
CONCURRENT_CALLS = 10_000  # a generator has as many draws in hand as the gate lets in

PayloadOf = Callable[[WeightUpdate], Any]
Send = Callable[[int], Awaitable[None]]


class FleetSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every generator of a run is built from; num_cpus and num_gpus are what Ray reserves for each."""

    engine: EngineSettings
    generator: GeneratorSettings
    rewards: dict[str, RewardSpec]
    reward_workers: int
    redis_url: str
    max_bytes: int
    log_folder: str
    num_cpus: int
    num_gpus: int


class GeneratorProcess:
    """One generator in a process of its own; its output goes to logs/generator_N.log."""

    def __init__(self, log_path: str) -> None:
        log_to(log_path)
        self._generator: Generator | None = None

    async def start(self, settings: FleetSettings, index: int) -> str:
        """Start engine, scorer and connection; returns the id of the node it runs on."""
        from actors.vllm_engine import VllmEngine

        async with contextlib.AsyncExitStack() as unless_all_start:
            scorer = Scorer(settings.rewards, settings.reward_workers)
            unless_all_start.push_async_callback(scorer.close)
            await scorer.start()
            buffer = await Buffer.connect(settings.redis_url, settings.generator.run_id, settings.max_bytes)
            unless_all_start.push_async_callback(buffer.close)
            engine = await VllmEngine.start(msgspec.structs.replace(settings.engine, name=f"generator {index}"))
            self._generator = Generator(engine, scorer, buffer, settings.generator, index)
            unless_all_start.pop_all()
        return ray.get_runtime_context().get_node_id()

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the generator."""
        assert self._generator is not None, "start the generator first"
        return await getattr(self._generator, method)(*arguments)


class GeneratorFleet:
    """All generators of a run. The first failure of any is raised to whoever called."""

    def __init__(self, actors: Sequence[Any], nodes: Sequence[str], max_tokens: int) -> None:
        self._actors = list(actors)
        self._nodes = list(nodes)
        self._max_tokens = max_tokens
        self._in_hand = [0] * len(actors)
        self._idle_s = [0.0] * len(actors)
        self._idle_since: list[float | None] = [time.monotonic()] * len(actors)
        self._measured_since = time.monotonic()
        self._update_seconds: dict[str, float] = {}
        self.payload_of: PayloadOf | None = None  # the composition root says where weights come from
        self.send: Send | None = None

    @classmethod
    async def start(cls, settings: FleetSettings, count: int) -> GeneratorFleet:
        """Start `count` generators side by side. Raises what the first failing one raised, and kills the others."""
        options = {
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "max_concurrency": CONCURRENT_CALLS,
            "max_restarts": 0,
        }
        remote = ray.remote(GeneratorProcess)
        log = pathlib.Path(settings.log_folder)
        actors = [remote.options(**options).remote(str(log / f"generator_{index}.log")) for index in range(count)]
        try:
            nodes = await asyncio.gather(*(actor.start.remote(settings, index) for index, actor in enumerate(actors)))
        except BaseException:
            for actor in actors:
                ray.kill(actor)
            raise
        return cls(actors, nodes, settings.generator.max_tokens)

    async def rollout(self, draw: Draw) -> GroupReport:
        """Have the generator with the fewest draws in hand sample a group."""
        index = min(range(len(self._actors)), key=lambda each: self._in_hand[each])
        with self._working(index, 1):
            return await self._actors[index].call.remote("rollout", draw)

    async def rollout_round(self, draws: Sequence[Draw]) -> list[GroupReport]:
        """Deal draws out in turn, so that the same round reaches the same generators in every run."""
        return await self._deal("rollout_round", draws)

    async def evaluate(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Graded]:
        """Answer and judge held-out prompts, each once, over all generators."""
        return await self._deal("evaluate", prompts, temperature, self._max_tokens, seed)

    async def join(self, group: NcclGroup) -> None:
        """Have every generator meet the sender of the nccl backend."""
        await asyncio.gather(*(actor.call.remote("join", group) for actor in self._actors))

    async def update(self, update: WeightUpdate) -> list[UpdateReceipt]:
        """Load a version everywhere; to a node without the update's file its bytes go through the object store."""
        receiving = asyncio.gather(
            *(
                actor.call.remote("update", update, self._payload(update, node))
                for actor, node in zip(self._actors, self._nodes, strict=True)
            )
        )
        sending = self.send(update.version) if self.send is not None else asyncio.sleep(0)
        receipts, _ = await asyncio.gather(receiving, sending)
        self._update_seconds = receipts[0].seconds
        return receipts

    async def check(self) -> None:
        """Raise the error of a generator that can answer no more."""
        await asyncio.gather(*(actor.call.remote("check") for actor in self._actors))

    def metrics(self) -> Metrics:
        """Idle fraction since the last call, mean over generators, and the seconds of the last weight update."""
        now = time.monotonic()
        for index, since in enumerate(self._idle_since):
            if since is not None:
                self._idle_s[index] += now - since
                self._idle_since[index] = now
        wall = (now - self._measured_since) * len(self._actors)
        idle = sum(self._idle_s) / wall if wall else 0.0
        self._measured_since, self._idle_s = now, [0.0] * len(self._actors)
        update = {f"weights/update/{phase}/s": last(seconds) for phase, seconds in self._update_seconds.items()}
        return {"generator/idle_fraction": last(idle), **update}

    async def close(self) -> None:
        """End every generator's processes; one that does not answer is killed with what it started."""
        closing = asyncio.gather(*(actor.call.remote("close") for actor in self._actors), return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # the run's guard ends the processes of who did not answer
            await asyncio.wait_for(closing, CLOSE_SECONDS)
        for actor in self._actors:
            ray.kill(actor)

    def _payload(self, update: WeightUpdate, node: str) -> Any:
        if update.path is None or update.node == node:
            return None
        assert self.payload_of is not None
        return self.payload_of(update)

    async def _deal(self, method: str, items: Sequence[Any], *arguments: Any) -> list[Any]:
        count = len(self._actors)
        hands = [(index, items[index::count]) for index in range(count) if items[index::count]]
        with contextlib.ExitStack() as work:
            for index, hand in hands:
                work.enter_context(self._working(index, len(hand)))
            answers = await asyncio.gather(
                *(self._actors[index].call.remote(method, hand, *arguments) for index, hand in hands)
            )
        return [answer for hand in answers for answer in hand]

    @contextlib.contextmanager
    def _working(self, index: int, draws: int):
        """Count what a generator has in hand, and the time in which it has nothing."""
        since = self._idle_since[index]
        if since is not None:
            self._idle_s[index] += time.monotonic() - since
            self._idle_since[index] = None
        self._in_hand[index] += draws
        try:
            yield
        finally:
            self._in_hand[index] -= draws
            if not self._in_hand[index]:
                self._idle_since[index] = time.monotonic()


def log_to(path: str) -> None:
    """Send this process's output, and that of every process it starts, to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
