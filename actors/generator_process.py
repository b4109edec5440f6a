"""This file puts a generator into a Ray actor: the process with all that it starts, and its end, on whatever node."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine import EngineDied, EngineSettings
from actors.generator import Generator, GeneratorSettings
from actors.member import MemberDied
from rewards.scorer import RewardSpec, Scorer
from rl.buffer import Buffer, BufferLimits
from rl.part_killer import PART, kill_part, marks_of, part_segments, remove_generator_files, remove_segments
from rl.process_guard import MARK

GRACE_S = 1.0  # ray.kill has asked the actor to end
CONCURRENT_CALLS = 10_000  # a generator has as many draws in hand as the gate lets in
ACTOR_IS_GONE = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
NODE_IS_GONE = (RayActorError, WorkerCrashedError, NodeDiedError, TaskUnschedulableError)


class FleetSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every generator of a run is built from; num_cpus and num_gpus are what Ray reserves for each.

    heartbeat_deadline_s is the silence after which one counts as hung. leave_deadline_s is how long one that was asked
    to leave may finish what it has in hand.
    """

    engine: EngineSettings
    generator: GeneratorSettings
    rewards: dict[str, RewardSpec]
    reward_workers: int
    redis_url: str
    limits: BufferLimits
    log_folder: str
    num_cpus: int
    num_gpus: int
    max_restarts: int
    heartbeat_deadline_s: float
    start_deadline_s: float
    leave_deadline_s: float = 120.0


class GeneratorProcess:
    """One generator in a process of its own; its output goes to logs/generator_N.log."""

    def __init__(self, log_path: str) -> None:
        log_to(log_path)
        self._generator: Generator | None = None

    async def place(self) -> str:
        """The id of the node it runs on, before anything is started there."""
        return ray.get_runtime_context().get_node_id()

    async def start(self, settings: FleetSettings, index: int) -> list[str]:
        """Start engine, scorer and connection; returns the shared memory that they would leave if they were killed."""
        self._generator = await self.build(settings, index)
        return await asyncio.to_thread(part_segments, settings.generator.run_id, os.environ[PART])

    async def build(self, settings: FleetSettings, index: int) -> Generator:
        """The generator with its parts; all of them or none are left running."""
        from actors.vllm_engine import VllmEngine

        async with contextlib.AsyncExitStack() as unless_all_start:
            scorer = Scorer(settings.rewards, settings.reward_workers)
            unless_all_start.push_async_callback(scorer.close)
            await scorer.start()
            buffer = await Buffer.connect(settings.redis_url, settings.generator.run_id, settings.limits)
            unless_all_start.push_async_callback(buffer.close)
            by_priority = settings.generator.order == "longest_first"
            engine = await VllmEngine.start(
                msgspec.structs.replace(settings.engine, name=f"generator {index}", by_priority=by_priority)
            )
            unless_all_start.pop_all()
        return Generator(engine, scorer, buffer, settings.generator, index)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the generator."""
        assert self._generator is not None, "start the generator first"
        return await getattr(self._generator, method)(*arguments)


class RayProcess:
    """One attempt at a generator, as actors.member.MemberProcess asks for it. Its actor is created at once."""

    def __init__(
        self, settings: FleetSettings, index: int, attempt: int, actor: type[GeneratorProcess] = GeneratorProcess
    ) -> None:
        self._settings = settings
        self._index = index
        self._part = f"generator-{index}-{attempt}"
        self._node: str | None = None
        self._segments: list[str] = []
        run_id = settings.generator.run_id
        options = {
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "max_concurrency": CONCURRENT_CALLS,
            "max_restarts": 0,
            # In the environment that the process is executed with: what is set later, /proc does not show.
            "runtime_env": {"env_vars": {MARK: run_id, **marks_of(self._part)}},
        }
        log = pathlib.Path(settings.log_folder) / f"generator_{index}.log"
        self._actor: Any = ray.remote(actor).options(**options).remote(str(log))

    async def start(self) -> str:
        """Bring the generator up; returns the id of its node."""
        with _deaths_told():
            self._node = node = await self._actor.place.remote()
            self._segments = await self._actor.start.remote(self._settings, self._index)
        return node

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the generator."""
        with _deaths_told():
            return await self._actor.call.remote(method, *arguments)

    async def kill(self, deadline_s: float) -> None:
        """End the actor and all it started, on its node, and remove the files it left; TimeoutError if one stays."""
        ray.kill(self._actor)  # frees what Ray reserved, also where the actor is not placed yet
        settings = self._settings.generator
        marks = (settings.run_id, self._part, deadline_s)
        arguments = (*marks, settings.shared_memory, self._index, self._segments)
        if self._node in (None, ray.get_runtime_context().get_node_id()):
            await asyncio.to_thread(_clear_away, *arguments)
            return
        there = NodeAffinitySchedulingStrategy(self._node, soft=False)
        with contextlib.suppress(*NODE_IS_GONE):  # and with it everything that ran there
            await ray.remote(_clear_away).options(num_cpus=0, scheduling_strategy=there).remote(*arguments)


def log_to(path: str) -> None:
    """Send this process's output, and that of every process it starts, to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _clear_away(
    run_id: str, part: str, deadline_s: float, shared_memory: str, index: int, segments: Sequence[str]
) -> None:
    kill_part(run_id, part, deadline_s, GRACE_S)
    remove_segments(segments)
    remove_generator_files(shared_memory, run_id, index)


@contextlib.contextmanager
def _deaths_told() -> Iterator[None]:
    """Turn Ray's words for a death into ours: plain ones. Another error that the actor raised passes through."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, EngineDied):  # Ray's own text is a page of traceback, the same each time
            raise EngineDied(str(error.cause)) from error
        raise
    except ACTOR_IS_GONE as error:
        raise MemberDied(_first_line(error)) from error


def _first_line(error: RayError) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
