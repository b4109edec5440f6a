"""This file judges completions with reward plugins, in killable child processes, from an asyncio loop.

    judge_group -> pins the version of each file-based reward -> one job per completion and reward
                -> waits for a free slot -> Load if new -> Job -> Started -> [clock of timeout_s] -> Finished

A child that times out, crashes or runs out of memory costs one completion its part and is replaced at once. Every
judgement is a PartResult: a value, or the kind of a failure, never both.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from rewards.base import FailureKind
from rewards.child_handle import Child, ChildLost
from rewards.loading import content_version, resolve
from rewards.wire import Finished, Job, Load, Loaded

LOAD_DEADLINE_S = 120.0
START_DEADLINE_S = 60.0  # from sending a job to its execution: an interpreter coming up on a loaded machine


class RewardSpec(msgspec.Struct, frozen=True):
    """Which reward to use and how. timeout_s counts from the start of execution, per completion."""

    use: str
    timeout_s: float = 10.0
    params: dict[str, Any] = {}


class JudgeRequest(msgspec.Struct, frozen=True):
    """One completion to judge. rewards are names of the Scorer's rewards; columns must survive msgpack."""

    prompt: str
    completion: str
    reference: str | None
    columns: dict[str, Any]
    rewards: tuple[str, ...]


class PartResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one reward said of one completion: value, or the failure's kind and message.

    version is the hash of the reward's source that judged. seconds is execution, queue_seconds the wait before it.
    """

    name: str
    value: float | None = None
    failure: FailureKind | None = None
    message: str = ""
    version: str = ""
    seconds: float = 0.0
    queue_seconds: float = 0.0
    parts: dict[str, float] = {}
    extra: dict[str, Any] = {}


class _Source:
    """Where one reward comes from, and the content of its file when it was last seen to change."""

    def __init__(self, name: str, spec: RewardSpec) -> None:
        self._name = name
        self._spec = spec
        self._path = resolve(spec.use).path
        self._seen: tuple[int, int, int] | None = None
        self.load = Load((name, ""), spec.use, spec.params, None)
        self.refresh()

    def refresh(self) -> Load:
        """The Load for the reward as it is now. A file that is gone, as while an editor saves, changes nothing."""
        if self._path is None:
            return self.load
        with contextlib.suppress(OSError):
            stat = self._path.stat()
            if self._seen != (seen := (stat.st_mtime_ns, stat.st_size, stat.st_ino)):
                source = self._path.read_bytes()
                self.load = Load((self._name, content_version(source)), self._spec.use, self._spec.params, source)
                self._seen = seen
        return self.load


class _Slot:
    """A place for one child; the child in it may be dead until the slot is used again."""

    def __init__(self, child: Child) -> None:
        self.child = child


class Scorer:
    """Judges with `workers` child processes. Usable between start() and close(), on one event loop.

    memory_bytes bounds the private memory of each child: beyond it a reward gets a MemoryError.
    """

    def __init__(self, rewards: Mapping[str, RewardSpec], workers: int, memory_bytes: int = 4 << 30) -> None:
        self._specs = dict(rewards)
        self._workers = workers
        self._memory_bytes = memory_bytes
        self._sources: dict[str, _Source] = {}
        self._hung_imports: dict[tuple[str, str], str] = {}
        self._slots: list[_Slot] = []
        self._free: asyncio.Queue[_Slot] = asyncio.Queue()
        self._closed = False

    async def start(self) -> None:
        """Starts the children and imports every reward in each.

        Raises ValueError, with all children gone, where a reward is not found, does not import or refuses its params.
        """
        self._sources = {name: _Source(name, spec) for name, spec in self._specs.items()}
        try:
            for _ in range(self._workers):
                self._slots.append(_Slot(await Child.start(self._memory_bytes)))
            await asyncio.gather(*(self._load_all(slot.child) for slot in self._slots))
        except BaseException:
            await self.close()
            raise
        for slot in self._slots:
            self._free.put_nowait(slot)

    async def judge(self, request: JudgeRequest) -> tuple[PartResult, ...]:
        """One completion's parts, in the order of request.rewards."""
        return (await self.judge_group([request]))[0]

    async def judge_group(self, requests: Sequence[JudgeRequest]) -> tuple[tuple[PartResult, ...], ...]:
        """The parts of each request, all judged by the rewards as they are now: an edited file is picked up here."""
        assert not self._closed, "the scorer is closed"
        loads = {name: self._sources[name].refresh() for name in {name for each in requests for name in each.rewards}}
        jobs = [self._judge_part(request, loads[name]) for request in requests for name in request.rewards]
        parts = iter(await asyncio.gather(*jobs))
        return tuple(tuple(next(parts) for _ in request.rewards) for request in requests)

    async def close(self) -> None:
        """Kills the children and waits until they are reaped; a second call does no harm."""
        self._closed = True
        await asyncio.gather(*(slot.child.gone() for slot in self._slots))

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the live children."""
        return tuple(slot.child.pid for slot in self._slots if slot.child.alive)

    async def _judge_part(self, request: JudgeRequest, load: Load) -> PartResult:
        arrived = time.perf_counter()
        name, version = load.key
        job = Job(load.key, request.prompt, request.completion, request.reference, request.columns)
        async with self._free_slot() as slot:
            executing = time.perf_counter()
            try:
                loaded = await self._load(slot.child, load)
                version = loaded.version
                await slot.child.started(job, START_DEADLINE_S)
                executing = time.perf_counter()
                finished = await slot.child.finished(self._specs[name].timeout_s)
            except ChildLost as lost:
                finished = Finished(None, lost.kind, str(lost), time.perf_counter() - executing)
                await self._renew(slot)
        fields = {field: getattr(finished, field) for field in Finished.__struct_fields__}
        return PartResult(name=name, version=version, queue_seconds=executing - arrived, **fields)

    @contextlib.asynccontextmanager
    async def _free_slot(self) -> AsyncIterator[_Slot]:
        """The next free slot with a live child in it, kept for the block."""
        slot = await self._free.get()
        try:
            await self._renew(slot)
            yield slot
        except BaseException:
            slot.child.kill()  # it may be in the middle of a job whose caller is gone
            raise
        finally:
            self._free.put_nowait(slot)

    async def _renew(self, slot: _Slot) -> None:
        """Puts a new child where the old one died; it imports a reward when that is first asked for."""
        if not slot.child.alive:
            await slot.child.gone()
            if not self._closed:
                slot.child = await Child.start(self._memory_bytes)
        if self._closed:
            slot.child.kill()
            raise RuntimeError("the reward scorer was closed while it judged")

    async def _load(self, child: Child, load: Load) -> Loaded:
        """The reward loaded in this child; ChildLost of kind import where it does not import."""
        if load.key in self._hung_imports:
            raise ChildLost("import", self._hung_imports[load.key])
        try:
            loaded = await child.load(load, LOAD_DEADLINE_S)
        except ChildLost as lost:
            if load.key[1]:  # not again with this content; a module may import once its surroundings are mended
                self._hung_imports[load.key] = str(lost)
            raise ChildLost("import", str(lost)) from lost
        if loaded.error:
            raise ChildLost("import", loaded.error)
        return loaded

    async def _load_all(self, child: Child) -> None:
        for name, source in self._sources.items():
            try:
                await self._load(child, source.load)
            except ChildLost as lost:
                raise ValueError(
                    f"reward {name!r} ({self._specs[name].use}) does not load in a child process: {lost}; "
                    "correct its file or params, or install what it imports"
                ) from lost
