"""This file puts learner ranks into Ray actors, one process each, makes them move in lockstep, and replaces them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import socket
import time
from typing import Any

import msgspec
import ray
from ray.exceptions import LocalRayletDiedError, NodeDiedError, RayActorError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from learners.learner import Fetch, Learner, LearnerSettings
from learners.rank_watch import OnEvent, Rank, RankWatch
from rl.buffer import PayloadReader
from rl.orders import PartStatus, StepOrder, StepReport
from rl.part_killer import kill_part, marks_of
from rl.parts import LearnersLost
from rl.process_guard import MARK
from rl.weights import NcclGroup, WeightUpdate

CLOSE_SECONDS = 20.0
KILL_SECONDS = 30.0
GRACE_SECONDS = 1.0  # ray.kill has asked the rank to end
DEATHS = (RayActorError, NodeDiedError, WorkerCrashedError, LocalRayletDiedError)
# A step frees and takes the same gigabytes again. By default glibc returns them to the kernel each time, and a tenth of
# a CPU step goes into page faults; it reads these only when a process starts.
KEEP_FREED_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592",
}
# What a rank answers while it trains; everything else runs in one thread, in the order in which it was asked.
BESIDE_TRAINING = {"beats": 1, "files": 2}


class FleetSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every rank of a run is built from; num_cpus and num_gpus are what Ray reserves for each.

    A rank that gives no sign of life for heartbeat_deadline_s counts as hung; reconnect_deadline_s is how long it
    looks for a Redis that is gone.
    """

    learner: LearnerSettings
    redis_url: str
    log_folder: str
    num_cpus: int
    num_gpus: int
    heartbeat_deadline_s: float = 60.0
    reconnect_deadline_s: float = 60.0


class LearnerProcess:
    """One rank in a process of its own; its output goes to logs/learner_N.log."""

    def __init__(self, log_path: str) -> None:
        file = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        self._learner: Learner | None = None
        self._doing = ("nothing", time.monotonic())

    def identify(self) -> tuple[str, int]:
        """The node and the process it runs in."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def free_port(self) -> tuple[str, int]:
        """This node's address and a port of it that is free now."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def start(self, settings: FleetSettings, rendezvous: str, rank: int, world_size: int) -> None:
        """Load the policy and meet the other ranks."""
        self._doing = ("starting", time.monotonic())
        node = ray.get_runtime_context().get_node_id()
        learner = msgspec.structs.replace(settings.learner, rendezvous=rendezvous, node=node)
        self._learner = Learner(learner, rank, world_size, self._fetch(settings))
        self._doing = ("nothing", time.monotonic())

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the rank."""
        assert self._learner is not None, "start the rank first"
        self._doing = (method, time.monotonic())
        try:
            return getattr(self._learner, method)(*arguments)
        finally:
            self._doing = ("nothing", time.monotonic())

    @ray.method(concurrency_group="beats")
    def beat(self) -> str:
        """A sign of life: what the rank does, and for how long."""
        what, since = self._doing
        return what if what in ("nothing", "starting") else f"{what} for {time.monotonic() - since:.1f} s"

    @ray.method(concurrency_group="files")
    def finish_save(self) -> None:
        """Wait until a save is on disk, while training goes on."""
        assert self._learner is not None, "start the rank first"
        self._learner.finish_save()

    @ray.method(concurrency_group="files")
    def payload(self, path: str) -> bytes:
        """The bytes of a weight update, for a node that does not see this one's shared memory."""
        return read_payload(path)

    def _fetch(self, settings: FleetSettings) -> Fetch:
        return PayloadReader(settings.redis_url, settings.learner.run_id, settings.reconnect_deadline_s).fetch


class LearnerFleet:
    """All ranks of a run. A call is made on every rank, and the first rank to fail fails it.

    When a rank dies or hangs, every call raises LearnersLost until `restart`.
    """

    def __init__(self, settings: FleetSettings, ranks: int, on_event: OnEvent, process: type[LearnerProcess]) -> None:
        """Starts nothing: see `start`."""
        self._settings = settings
        self._count = ranks
        self._on_event = on_event
        self._remote = ray.remote(concurrency_groups=BESIDE_TRAINING)(process)
        self._attempt = 0
        self._version = 0
        self._watch = RankWatch((), settings.heartbeat_deadline_s, DEATHS, on_event)
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        settings: FleetSettings,
        ranks: int,
        on_event: OnEvent = lambda kind, **facts: None,
        process: type[LearnerProcess] = LearnerProcess,
    ) -> LearnerFleet:
        """Start the ranks side by side. Raises what the first failing one raised; the others are then killed."""
        fleet = cls(settings, ranks, on_event, process)
        try:
            await fleet._start_ranks()
        except BaseException:
            await fleet._end_ranks("the ranks did not start")
            raise
        return fleet

    async def step(self, order: StepOrder) -> StepReport:
        """One optimizer step on all ranks; the report is rank 0's."""
        report = (await self._all("step", order))[0]
        self._version = report.version
        return report

    async def publish(self, version: int) -> WeightUpdate:
        """Gather the weights; rank 0 describes what it wrote down."""
        update = (await self._all("publish", version))[0]
        self._version = version
        return update

    async def begin_save(self, folder: str, export: bool) -> None:
        """Copy the state aside. It is written to `folder`/state, and the whole model to `folder`/export, from then on.

        One save at a time: the next may begin when finish_save has returned or raised.
        """
        await self._all("begin_save", folder, export)

    async def finish_save(self) -> None:
        """Wait until what begin_save began is on disk. Raises OSError on a full disk; training may go on then."""
        await self._watch.all("finish_save", [rank.actor.finish_save.remote() for rank in self._ranks], settle=True)

    async def load(self, folder: str) -> None:
        """Go on from a checkpoint that was saved by any number of ranks."""
        await self._all("load", os.path.join(folder, "state"))

    async def restart(self) -> None:
        """New processes at the starting weights, at a new rendezvous, when the old ones are gone, whatever their state.

        Versions that the old ones left in shared memory stay until they are overtaken. Raises LearnersLost where a new
        one dies before it has started; `restart` may be called again.
        """
        began = time.monotonic()
        killed = await self._end_ranks("the learner ranks are being restarted")
        self._attempt += 1
        self._version = 0
        await self._start_ranks()
        pids = [rank.pid for rank in self._ranks]
        seconds = time.monotonic() - began
        self._on_event("learners_restarted", restarts=self._attempt, killed=killed, pids=pids, seconds=seconds)

    def describe(self) -> list[PartStatus]:
        """Every rank as it was last heard."""
        return self._watch.describe(self._version, self._attempt)

    async def free_port(self) -> tuple[str, int]:
        """An address and a free port of rank 0's node, for others to meet it at."""
        return (await self._watch.all("free_port", [self._ranks[0].actor.free_port.remote()]))[0]

    async def join(self, group: NcclGroup) -> None:
        """Have rank 0 meet the engines of the nccl backend."""
        await self._watch.all("join", [self._ranks[0].actor.call.remote("join", group)])

    async def send(self, version: int) -> None:
        """Broadcast a published version over nccl; the generators must be updating at the same time."""
        await self._watch.all("send", [self._ranks[0].actor.call.remote("send", version)])

    def payload(self, update: WeightUpdate) -> Any:
        """A reference, in Ray's object store, to the bytes of an update in the shared memory of the node it is on.

        A task reads them, because the rank that wrote them may be gone.
        """
        return _on_node(read_payload, update.node).remote(update.path)

    async def close(self) -> None:
        """Remove what the run left in shared memory, and end the ranks."""
        if not self._watch.over:
            calls = [rank.actor.call.remote("close") for rank in self._ranks]
            with contextlib.suppress(TimeoutError, LearnersLost):  # inside a collective that lost its peer: killed now
                await asyncio.wait_for(self._watch.all("close", calls), CLOSE_SECONDS)
        await self._end_ranks("the run has ended")

    @property
    def _ranks(self) -> tuple[Rank, ...]:
        return self._watch.ranks

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        self._watch.check()
        return await self._watch.all(method, [rank.actor.call.remote(method, *arguments) for rank in self._ranks])

    async def _start_ranks(self) -> None:
        settings = self._settings
        ranks = [self._new_rank(number) for number in range(self._count)]
        self._watch = watch = RankWatch(ranks, settings.heartbeat_deadline_s, DEATHS, self._on_event)
        identities = await watch.all("identify", [rank.actor.identify.remote() for rank in ranks])
        for rank, (node, pid) in zip(ranks, identities, strict=True):
            rank.node, rank.pid, rank.heard = node, pid, time.monotonic()
        self._listening = asyncio.create_task(watch.listen())
        address, port = await self.free_port()
        rendezvous = f"tcp://{address}:{port}"
        starts = [rank.actor.start.remote(settings, rendezvous, rank.number, self._count) for rank in ranks]
        await watch.all("start", starts)

    def _new_rank(self, number: int) -> Rank:
        settings = self._settings
        part = f"learner-{number}-{self._attempt}"
        log = str(pathlib.Path(settings.log_folder) / f"learner_{number}.log")
        marks = {MARK: settings.learner.run_id, **marks_of(part)}
        actor = self._remote.options(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            max_restarts=0,
            runtime_env={"env_vars": KEEP_FREED_MEMORY | marks},
        ).remote(log)
        return Rank(number=number, actor=actor, part=part, log=log)

    async def _end_ranks(self, reason: str) -> list[int]:
        """Return when no process of the group is left, whom it had to kill by signal; stopped ones too."""
        self._watch.end(reason)
        if self._listening is not None:
            self._listening.cancel()
        for rank in self._ranks:
            ray.kill(rank.actor)
        killed = await asyncio.gather(*(self._kill(rank) for rank in self._ranks))
        return sorted(pid for pids in killed for pid in pids)

    async def _kill(self, rank: Rank) -> list[int]:
        here = ray.get_runtime_context().get_node_id()
        alive = {node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}
        run_id = self._settings.learner.run_id
        killed: list[int] = []
        for node in alive & {rank.node} if rank.node else alive:  # a node that is gone took its processes along
            if node == here:
                killed += await asyncio.to_thread(kill_part, run_id, rank.part, KILL_SECONDS, GRACE_SECONDS)
            else:
                killed += await _on_node(kill_part, node).remote(run_id, rank.part, KILL_SECONDS, GRACE_SECONDS)
        return killed


def read_payload(path: str) -> bytes:
    """The bytes of a weight update on this node."""
    return pathlib.Path(path).read_bytes()


def _on_node(function: Any, node: str) -> Any:
    """A Ray task that runs on this node, beside whatever is reserved there."""
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=affinity)
