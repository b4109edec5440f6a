"""This file holds stand-ins for what a generator is made of, and for generators themselves: scripts instead of models.

FakeEngine answers from a script; ChildEngine does too, but hangs and dies as a real child process does. FakeProcess is
a generator in this process, as the fleet sees one; FakeGeneratorProcess is one in a real Ray actor.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Callable, Sequence
from multiprocessing import shared_memory
from typing import Any

from actors.board import Board, FleetHooks
from actors.engine import EngineDied, LoadReceipt, SampleRequest
from actors.generator import Generator, GeneratorSettings
from actors.generator_process import FleetSettings, GeneratorProcess
from actors.member import MemberDied
from actors.watched_process import WatchedProcess
from rewards.scorer import JudgeRequest, PartResult
from rl.buffer import OversizeGroup
from rl.trajectory import Completion, FinishReason, Group, VersionSpan
from rl.waits import Silent, answered
from rl.weights import (
    NcclGroup,
    TensorDigest,
    UpdateReceipt,
    WeightUpdate,
    WeightUpdateError,
    combined,
    verify,
)


def scripted_completion(text: str, version: int, finish_reason: FinishReason = "stop") -> Completion:
    """A completion with one token per character; the log-probability follows from the token."""
    token_ids = tuple(ord(letter) for letter in text)
    return Completion(
        text=text,
        token_ids=token_ids,
        logprobs=tuple(-1.0 / (1 + token) for token in token_ids),
        spans=(VersionSpan(version, 0, len(token_ids)),) if token_ids else (),
        finish_reason=finish_reason,
    )


class FakeEngine:
    """Answers sample i of a request with answer(request, i), at once unless `hold` is cleared, aborted with one token.

    A request whose id ends with "endless" is answered only when it is aborted.

    Switches: fail_updates refuses that many updates, altered puts other digests into receipts, die() is a SIGKILL,
    hang() a SIGSTOP: every answer and every sign of life stays out.
    """

    def __init__(self, answer: Callable[[SampleRequest, int], str] = lambda request, index: str(index)) -> None:
        self.version = 0
        self.pids: tuple[int, ...] = ()
        self.answer = answer
        self.requests: list[SampleRequest] = []
        self.updates: list[WeightUpdate] = []
        self.joined: tuple[NcclGroup, int] | None = None
        self.fail_updates = 0
        self.altered: tuple[TensorDigest, ...] | None = None
        self.canary_logprobs: tuple[float, ...] | None = None
        self.stopped = False
        self.aborted: list[str] = []
        self._in_hand: dict[str, asyncio.Event] = {}
        self.hold = asyncio.Event()
        self.hold.set()
        self.loading = asyncio.Event()  # whether an update may go through
        self.loading.set()
        self._answering = asyncio.Event()
        self._answering.set()
        self._death = asyncio.Event()

    def die(self) -> None:
        """Everything pending and everything asked from now on raises EngineDied."""
        self._death.set()

    def hang(self) -> None:
        """Nothing is answered any more."""
        self._answering.clear()
        self.hold.clear()
        self.loading.clear()

    async def sample(self, request: SampleRequest) -> tuple[Completion, ...]:
        self.requests.append(request)
        version = self.version
        stopped = self._in_hand[request.request_id] = asyncio.Event()
        try:
            endless = request.request_id.endswith("endless")
            await self._unless_dead(*(() if endless else (self.hold,)), stopped)
        finally:
            self._in_hand.pop(request.request_id, None)
        answers = [self.answer(request, index) for index in range(request.count)]
        if stopped.is_set():
            return tuple(scripted_completion(answer[:1], version, "abort") for answer in answers)
        return tuple(scripted_completion(answer, version) for answer in answers)

    async def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            if request_id in self._in_hand:
                self._in_hand[request_id].set()

    async def sample_round(self, requests: Sequence[SampleRequest]) -> list[tuple[Completion, ...]]:
        return list(await asyncio.gather(*(self.sample(request) for request in requests)))

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        self._refuse_if_dead()
        if self.canary_logprobs is not None:
            return self.canary_logprobs
        return self.updates[-1].canary_logprobs if self.updates else (-1.0,) * (len(token_ids) - 1)

    async def join(self, group: NcclGroup, index: int) -> None:
        self.joined = group, index

    async def load(self, update: WeightUpdate) -> LoadReceipt:
        self.updates.append(update)
        await self._unless_dead(self.loading)
        if self.fail_updates > 0:
            self.fail_updates -= 1
            raise WeightUpdateError(f"the fake engine refused version {update.version}")
        self.version = update.version
        prepared = {} if update.path is None else {"prepare": 0.0}
        seconds = {**prepared, "pause": 0.0, "load": 0.0, "resume": 0.0}
        return LoadReceipt(version=update.version, tensors=self.altered or update.tensors, missing=(), seconds=seconds)

    async def watch(self) -> None:
        await self._death.wait()
        self._refuse_if_dead()

    async def probe(self, seconds: float) -> None:
        try:
            await answered(self._unless_dead(self._answering), seconds)
        except Silent as silence:
            raise EngineDied(f"engine fake hangs: {silence}") from silence

    async def stop(self) -> None:
        self.stopped = True

    async def _unless_dead(self, *events: asyncio.Event) -> None:
        """Wait for the first of the events."""
        waits = {asyncio.create_task(event.wait()) for event in (*events, self._death)}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        self._refuse_if_dead()

    def _refuse_if_dead(self) -> None:
        if self._death.is_set():
            raise EngineDied("engine fake died: the test killed it")


class ChildEngine(FakeEngine):
    """A fake engine whose core is a real child process, `cat`: a probe goes through it and back.

    It holds shared memory, as vLLM's processes do.
    """

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._core = await asyncio.create_subprocess_exec("cat", stdin=pipe, stdout=pipe)
        self._shared = shared_memory.SharedMemory(create=True, size=64)
        self._watched = WatchedProcess(self._core.pid)
        self.pids = (self._core.pid,)
        self._following = asyncio.create_task(self._follow())
        self._asking = asyncio.Lock()

    async def _follow(self) -> None:
        await self._watched.ended.wait()
        self.die()

    async def probe(self, seconds: float) -> None:
        self._refuse_if_dead()
        assert self._core.stdin is not None and self._core.stdout is not None
        async with self._asking:
            self._core.stdin.write(b"?\n")
            try:
                await answered(self._core.stdout.readline(), seconds)
            except Silent as silence:
                raise EngineDied(f"engine fake hangs: {silence}") from silence
        self._refuse_if_dead()

    async def stop(self) -> None:
        self._watched.kill()
        await self._following
        self._shared.close()
        self._shared.unlink()


class FakeScorer:
    """Gives 1.0 to the completion that is the reference, 0.0 to others, and fails on a cross."""

    pids: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.closed = False

    async def judge_group(self, requests: Sequence[JudgeRequest]) -> tuple[tuple[PartResult, ...], ...]:
        return tuple(tuple(self._part(name, request) for name in request.rewards) for request in requests)

    def _part(self, name: str, request: JudgeRequest) -> PartResult:
        if request.completion == "x":
            return PartResult(name=name, failure="exception", message="a cross")
        return PartResult(name=name, value=float(request.completion == request.reference))

    async def close(self) -> None:
        self.closed = True


class FakeBuffer:
    """Remembers what was put; refuses everything as oversize if told so."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.oversize = False
        self.closed = False

    async def put(self, group: Group) -> bool:
        if self.oversize:
            raise OversizeGroup("oversize: a test said so")
        known = group.group_id in {each.group_id for each in self.groups}
        self.groups += [] if known else [group]
        return not known

    async def close(self) -> None:
        self.closed = True


def generator_settings(shared_memory: str, run_id: str = "test") -> GeneratorSettings:
    """Groups of three, judged by one reward."""
    return GeneratorSettings(
        run_id=run_id,
        group_size=3,
        max_tokens=8,
        temperature=1.0,
        reward_weights={"answer": 2.0},
        reward_names={"sums": ("answer",)},
        shared_memory=shared_memory,
    )


class FakeProcess:
    """A generator over a FakeEngine in this process, as actors.member.MemberProcess asks for it.

    vanish() is the death of the whole actor; `refusal` is raised by start, which waits for `may_start`.
    """

    def __init__(self, engine: FakeEngine, index: int, attempt: int, buffer: FakeBuffer, node: str) -> None:
        self.engine = engine
        self.index = index
        self.attempt = attempt
        self.node = node
        self.refusal: Exception | None = None
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.killed = self.closed = False
        self.calls: list[tuple] = []
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._generator = Generator(engine, FakeScorer(), buffer, generator_settings("/nowhere"), index)

    async def start(self) -> str:
        await self.may_start.wait()
        if self.refusal:
            raise self.refusal
        return self.node

    async def call(self, method: str, *arguments):
        self.calls.append((method, *arguments))
        work = asyncio.ensure_future(getattr(self._generator, method)(*arguments))
        try:
            await asyncio.wait({work, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise MemberDied("the actor died")
            self.closed = self.closed or method == "close"
            return work.result()
        finally:
            work.cancel()

    def called(self, method: str) -> list[tuple]:
        """The arguments of every call of a method."""
        return [arguments for name, *arguments in self.calls if name == method]

    def vanish(self) -> None:
        if not self._gone.done():
            self._gone.set_result(None)

    async def kill(self, deadline_s: float) -> None:
        self.killed = True
        self.vanish()


class World:
    """What a fleet of FakeProcesses lives in: it launches them, keeps their events, and makes updates that arrive.

    prepare is called with each process before its fleet has seen it, so that a test can set its switches.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.buffer = FakeBuffer()
        self.processes: list[FakeProcess] = []
        self.events: list[dict[str, Any]] = []
        self.node = "here"
        self.prepare: Callable[[FakeProcess], None] = lambda process: None
        self.verify: Callable[[WeightUpdate, UpdateReceipt], float] = lambda update, receipt: verify(
            update, receipt, None, max_canary_gap=0.1
        )
        hooks = FleetHooks(verify=lambda *both: self.verify(*both), on_event=self._on_event)
        self.board = Board(hooks, "test")

    def launch(self, index: int, attempt: int) -> FakeProcess:
        process = FakeProcess(FakeEngine(), index, attempt, self.buffer, self.node)
        self.prepare(process)
        self.processes.append(process)
        return process

    def process(self, index: int) -> FakeProcess:
        """The latest process of a generator."""
        return [process for process in self.processes if process.index == index][-1]

    def update(self, version: int) -> WeightUpdate:
        """A policy version in a file of this node."""
        path = self.folder / f"slipstream-test-v{version}.safetensors"
        path.write_bytes(b"weights")
        tensors = (TensorDigest("w", "bfloat16", (2,), f"digest {version}"),)
        return WeightUpdate(
            version=version,
            backend="shared_memory",
            tensors=tensors,
            digest=combined(tensors),
            canary_token_ids=(1, 2),
            canary_logprobs=(-1.5,),
            path=str(path),
            node="here",
            num_bytes=7,
        )

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The facts of every event of a kind."""
        return [event for event in self.events if event["kind"] == kind]

    def _on_event(self, kind: str, **facts: Any) -> None:
        self.events.append({"kind": kind, **facts})


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Let the event loop work until something holds; TimeoutError if it does not come to hold."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


class FakeGeneratorProcess(GeneratorProcess):
    """The actor of a generator over a ChildEngine: real processes, and no model."""

    async def build(self, settings: FleetSettings, index: int) -> Generator:
        engine = ChildEngine()
        await engine.start()
        return Generator(engine, FakeScorer(), FakeBuffer(), settings.generator, index)
