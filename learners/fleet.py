"""This file puts learner ranks into Ray actors, one process each, and makes them move in lockstep."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import socket
from collections.abc import Sequence
from typing import Any

import msgspec
import ray

from learners.learner import Learner, LearnerSettings
from rl.buffer import PayloadReader
from rl.orders import StepOrder, StepReport
from rl.weights import NcclGroup, WeightUpdate

CLOSE_SECONDS = 20.0
# A step frees and takes the same gigabytes again. By default glibc returns them to the kernel each time, and a tenth of
# a CPU step goes into page faults; it reads these only when a process starts.
KEEP_FREED_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592",
}


class FleetSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every rank of a run is built from; num_cpus and num_gpus are what Ray reserves for each."""

    learner: LearnerSettings
    redis_url: str
    log_folder: str
    num_cpus: int
    num_gpus: int


class LearnerProcess:
    """One rank in a process of its own; its output goes to logs/learner_N.log."""

    def __init__(self, log_path: str) -> None:
        file = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        self._learner: Learner | None = None

    def free_port(self) -> tuple[str, int]:
        """This node's address and a port of it that is free now."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def start(self, settings: FleetSettings, rendezvous: str, rank: int, world_size: int) -> None:
        """Load the policy and meet the other ranks."""
        node = ray.get_runtime_context().get_node_id()
        learner = msgspec.structs.replace(settings.learner, rendezvous=rendezvous, node=node)
        reader = PayloadReader(settings.redis_url, settings.learner.run_id)
        self._learner = Learner(learner, rank, world_size, reader.fetch)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the rank."""
        assert self._learner is not None, "start the rank first"
        return getattr(self._learner, method)(*arguments)

    def payload(self, path: str) -> bytes:
        """The bytes of a weight update, for a node that does not see this one's shared memory."""
        return pathlib.Path(path).read_bytes()


class LearnerFleet:
    """All ranks of a run. A call is made on every rank, and the first rank to fail fails it."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)

    @classmethod
    async def start(cls, settings: FleetSettings, ranks: int) -> LearnerFleet:
        """Start the ranks side by side. Raises what the first failing one raised; the others are then killed."""
        remote = ray.remote(LearnerProcess).options(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            max_restarts=0,
            runtime_env={"env_vars": KEEP_FREED_MEMORY},
        )
        log = pathlib.Path(settings.log_folder)
        actors = [remote.remote(str(log / f"learner_{rank}.log")) for rank in range(ranks)]
        try:
            address, port = await actors[0].free_port.remote()
            rendezvous = f"tcp://{address}:{port}"
            await asyncio.gather(
                *(actor.start.remote(settings, rendezvous, rank, ranks) for rank, actor in enumerate(actors))
            )
        except BaseException:
            for actor in actors:
                ray.kill(actor)
            raise
        return cls(actors)

    async def step(self, order: StepOrder) -> StepReport:
        """One optimizer step on all ranks; the report is rank 0's."""
        return (await self._all("step", order))[0]

    async def publish(self, version: int) -> WeightUpdate:
        """Gather the weights; rank 0 describes what it wrote down."""
        return (await self._all("publish", version))[0]

    async def save(self, folder: str) -> None:
        """Write the sharded state to `folder`/state and the Hugging Face model to `folder`/export."""
        await self._all("save", os.path.join(folder, "state"))
        await self._all("export", os.path.join(folder, "export"))

    async def load(self, folder: str) -> None:
        """Go on from a checkpoint that `save` wrote."""
        await self._all("load", os.path.join(folder, "state"))

    async def free_port(self) -> tuple[str, int]:
        """An address and a free port of rank 0's node, for others to meet it at."""
        return await self._actors[0].free_port.remote()

    async def join(self, group: NcclGroup) -> None:
        """Have rank 0 meet the engines of the nccl backend."""
        await self._actors[0].call.remote("join", group)

    async def send(self, version: int) -> None:
        """Broadcast a published version over nccl; the generators must be updating at the same time."""
        await self._actors[0].call.remote("send", version)

    def payload(self, update: WeightUpdate) -> Any:
        """A reference, in Ray's object store, to the bytes of an update in rank 0's shared memory."""
        return self._actors[0].payload.remote(update.path)

    async def close(self) -> None:
        """Remove what the run left in shared memory, and end the ranks."""
        closing = asyncio.gather(*(actor.call.remote("close") for actor in self._actors), return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # a rank inside a collective that lost its peer; it is killed now
            await asyncio.wait_for(closing, CLOSE_SECONDS)
        for actor in self._actors:
            ray.kill(actor)

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return await asyncio.gather(*(actor.call.remote(method, *arguments) for actor in self._actors))
