"""This file is the life of one generator, as the fleet sees it from outside, over any number of processes.

    starting -> joining -> working -> dead -> starting ...     dead too often -> quarantined
                                   -> leaving -> left

Joining is loading the newest weights and having them verified. The last look at what is newest and the change to
working happen in one turn of the event loop, so a working member never holds older weights than the fleet was told of.
A life ends when any of four hears of it: a call, the standing watch over the engine's processes, the heartbeat, or the
start and join themselves. Its processes are gone before the next life begins: two engines would not fit the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Protocol

import msgspec

from actors.board import Board
from actors.engine import EngineDied
from actors.workload import Workload
from rl.crew import together
from rl.orders import Draw, PartStatus
from rl.waits import Silent, WaitExpired, answered, within
from rl.weights import UpdateReceipt, WeightUpdate

BEATS_PER_DEADLINE = 10
KILL_SECONDS = 30.0
CLOSE_SECONDS = 30.0

State = Literal["starting", "joining", "working", "dead", "quarantined", "leaving", "left"]
Clock = Callable[[], float]


class MemberDied(RuntimeError):
    """A generator is gone: its engine, its actor or its node died or hung. What it had in hand must be given away."""


class _Left(Exception):
    """A generator that was asked to leave has finished what it had in hand."""


DEATHS = (MemberDied, EngineDied)


class MemberProcess(Protocol):
    """One attempt at a generator: an actor with everything it started, on one node."""

    async def start(self) -> str:
        """Bring the generator up; returns the id of its node."""
        ...

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of actors.generator.Generator. Raises MemberDied or EngineDied where it is dead."""
        ...

    async def kill(self, deadline_s: float) -> None:
        """End every process of this attempt, started or not; returns when they are gone, else raises TimeoutError."""
        ...


Launch = Callable[[int, int], MemberProcess]  # of an index and an attempt, counted from 0


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How patient the fleet is. heartbeat_deadline_s must be longer than an engine is busy with one thing at most."""

    max_restarts: int
    heartbeat_deadline_s: float
    start_deadline_s: float
    leave_deadline_s: float


class Member:
    """One generator. `live` is its life and is owned by the fleet; everything else asks or calls."""

    def __init__(self, index: int, launch: Launch, board: Board, pace: Pace, clock: Clock = time.monotonic) -> None:
        self.index = index
        self.name = f"generator {index}"
        self.state: State = "starting"
        self.workload = Workload(clock)
        self.node = ""
        self.held: WeightUpdate | None = None
        self.restarts = 0
        self.detail = ""
        self.has_worked = False
        self._launch, self._board, self._pace, self._clock = launch, board, pace, clock
        self._pids: tuple[int, ...] = ()
        self._attempt = 0
        self._fruitless = 0  # lives in a row that ended without a finished group
        self._leaving = asyncio.Event()
        self._began = self._last_beat = self._died_at = clock()
        self._process: MemberProcess | None = None
        self._started = asyncio.Event()
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    # What the fleet asks

    @property
    def attempt(self) -> int:
        """Which life this is, counted from 0."""
        return self._attempt

    @property
    def is_active(self) -> bool:
        """Whether it works or may come to work: neither quarantined nor leaving."""
        return self.state in ("starting", "joining", "working", "dead")

    def status(self) -> PartStatus:
        """How it stands."""
        return PartStatus(
            name=self.name,
            state=self.state,
            node=self.node,
            pids=self._pids,
            version=self.held.version if self.held else 0,
            heartbeat_age_s=self._clock() - self._last_beat,
            in_hand=self.workload.in_hand,
            oldest_request_s=self.workload.oldest_s,
            restarts=self.restarts,
            detail=self.detail,
        )

    async def sample(self, method: str, hand: Sequence[Any], *arguments: Any) -> Any:
        """Have a hand of draws or prompts answered; raises MemberDied with the hand unanswered."""
        try:
            expected = [each.expected_tokens if isinstance(each, Draw) else 0.0 for each in hand]
            with self.workload.holding(len(hand), sum(expected) if all(expected) else 0.0):
                answer = await self.call(method, hand[0] if method == "rollout" else hand, *arguments)
            if isinstance(hand[0], Draw):
                self._fruitless = 0
            return answer
        finally:
            self._board.ring()

    async def take(self, update: WeightUpdate) -> UpdateReceipt:
        """Load an update; whoever called verifies the receipt."""
        fitting = update.for_holder(self.held, self.node)
        receipt = await self.call("update", fitting, self._board.payload(fitting, self.node))
        self.held = update
        self._board.ring()
        return receipt

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call the generator. Raises MemberDied as soon as anything has found it dead."""
        assert self._process is not None
        death = self._death
        task = asyncio.ensure_future(self._process.call(method, *arguments))
        try:
            await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        except DEATHS as error:
            if death is self._death:  # not a late word about an earlier life
                self._die(str(error))
            raise MemberDied(f"{self.name}: {error}") from error
        finally:
            task.cancel()
        raise MemberDied(f"{self.name}: {death.result()}")

    # Its life

    async def begin(self) -> None:
        """The first start of a run, before there are weights: raises what failed, so that a bad config is told."""
        self._new_life()
        await self._start()
        self._become("working")

    async def live(self) -> None:
        """Start, join, work and die, again and again, until it left or is quarantined."""
        while True:
            if self._process is None:
                self._new_life()
            await self._one_life()
            await (self.close() if self._leaving.is_set() else self.kill())
            if self._leaving.is_set():
                self._become("left")
                self._tell("generator_left", reason=self.detail, seconds=self._age_s)
                return
            self._fruitless += 1
            if not self.has_worked or self._fruitless > self._pace.max_restarts:
                self._become("quarantined", self.detail)
                self._tell("generator_quarantined", reason=self.detail, restarts=self.restarts, seconds=self._age_s)
                return
            self.restarts += 1
            self._attempt += 1

    def leave(self) -> None:
        """Ask it to finish what it has in hand, for so long at most, and to end."""
        self._leaving.set()
        self._become("leaving", "finishes what it has in hand")

    async def close(self) -> None:
        """End its processes, politely first; nobody may watch over them any more."""
        if self._process is not None and self._started.is_set() and not self._death.done():
            with contextlib.suppress(Exception):  # what does not end by itself is killed next
                await within(self._process.call("close"), CLOSE_SECONDS, f"{self.name} to close")
        await self.kill()

    async def kill(self) -> None:
        """End its processes; a process that cannot be ended is told of, and the run goes on."""
        if not self._death.done():
            self._death.set_result("it was ended")
        if self._process is None:
            return
        try:
            await within(self._process.kill(KILL_SECONDS), 2 * KILL_SECONDS, f"the processes of {self.name} to end")
        except (TimeoutError, WaitExpired) as error:
            self._tell("generator_not_gone", reason=str(error), seconds=KILL_SECONDS)
        self._process = None
        self._pids = ()

    @property
    def _age_s(self) -> float:
        return self._clock() - self._began

    def _new_life(self) -> None:
        self._began = self._last_beat = self._clock()
        self.held = None
        self._started = asyncio.Event()
        self._death = asyncio.get_running_loop().create_future()
        self._become("starting", f"attempt {self._attempt + 1}" + (f", after: {self.detail}" if self.detail else ""))
        self._process = self._launch(self.index, self._attempt)

    async def _one_life(self) -> None:
        try:
            await together(
                self._rise(), self._watch(), self._beat(), self._leave_when_asked(), self._end_when_found_dead()
            )
        except MemberDied as death:
            self._die(str(death))
        except _Left:
            if self.workload.in_hand and not self._death.done():
                self._death.set_result("it left before it had finished")

    def _die(self, reason: str) -> None:
        """Take note of a death, once: no new work from this moment on, and whoever waits for an answer is told."""
        if self._death.done():
            return
        self._died_at = self._clock()
        self._death.set_result(reason)
        self._become("dead", reason)
        self._tell("generator_died", reason=reason, seconds=self._age_s, in_hand=self.workload.in_hand)

    async def _start(self) -> None:
        assert self._process is not None
        self.node = await within(self._process.start(), self._pace.start_deadline_s, f"{self.name} to start", "Ray")
        self._last_beat = self._clock()
        self._started.set()

    async def _rise(self) -> None:
        """Start and join; `begin` has done so at the first start of a run."""
        if self._started.is_set():
            return
        try:
            await self._start()
        except Exception as error:  # whatever hinders a start is the reason of this life's end
            raise MemberDied(f"it did not start: {type(error).__name__}: {error}") from error
        if self._attempt:
            self._tell("generator_restarted", reason=self.detail, seconds=self._age_s)
        gap = None
        while self.held is not (update := self._board.newest):
            assert update is not None, "the newest update is never forgotten"
            self._become("joining", f"loads version {update.version}")
            gap = await self._join(update)
        self._become("working")
        version = self.held.version if self.held else 0
        down_s = self._clock() - self._died_at if self._attempt else None
        facts = {"version": version, "canary_gap_nats": gap, "down_s": down_s}
        self._tell("generator_joined", reason=f"it works, at version {version}", seconds=self._age_s, **facts)

    async def _join(self, update: WeightUpdate) -> float | None:
        """Load and verify an update, or see it overtaken; a failure that a newer update cannot mend is a death."""
        if update.path is None:  # over nccl nothing comes before the next broadcast
            while self.held is not update and self._board.newest is update:
                await self._board.change()
            return None
        try:
            return self._board.hooks.verify(update, await self.take(update))
        except FileNotFoundError:  # the learners have gone on, and will say with what
            while self._board.newest is update:
                await self._board.change()
        except MemberDied:
            raise
        except Exception as error:  # of one that does not work yet, any failure is its own and not the run's
            if self._board.newest is update:
                raise MemberDied(f"it did not join with version {update.version}: {error}") from error
        return None

    async def _watch(self) -> NoReturn:
        """Hear of the end of the actor or of an engine's process, though nobody has asked it for anything."""
        await self._started.wait()
        await self.call("watch")
        raise MemberDied("its watch over the engine ended")

    async def _beat(self) -> None:
        """Hear of a hang: ask for a sign of life, through actor and engine down to the workers and back."""
        await self._started.wait()
        deadline_s = self._pace.heartbeat_deadline_s
        while True:
            try:
                # The actor gives up on its engine a little earlier, so that it can still say who is silent.
                self._pids = await answered(self.call("beat", 0.9 * deadline_s), deadline_s)
            except Silent as silence:
                raise MemberDied(f"it hangs: {silence} to a heartbeat (monitoring.heartbeat_deadline_s)") from silence
            self._last_beat = self._clock()
            await asyncio.sleep(deadline_s / BEATS_PER_DEADLINE)

    async def _end_when_found_dead(self) -> NoReturn:
        raise MemberDied(await asyncio.shield(self._death))

    async def _leave_when_asked(self) -> NoReturn:
        await self._leaving.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pace.leave_deadline_s):
                while self.workload.in_hand:
                    await self._board.change()
        self.detail = "it was asked to" + (f" and left {self.workload.in_hand} undone" if self.workload.in_hand else "")
        raise _Left

    def _become(self, state: State, detail: str = "") -> None:
        """Change state, and ring; one that was asked to leave stays leaving until it left."""
        self.state = "leaving" if self._leaving.is_set() and state != "left" else state
        self.detail = detail or (self.detail if state == "left" else "")
        self.workload.set_working(self.state == "working")
        self.has_worked = self.has_worked or self.state == "working"
        self._board.ring()

    def _tell(self, kind: str, reason: str, seconds: float, **facts: Any) -> None:
        facts = {"seconds": seconds, **facts}
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in facts.items()}
        reason = f"{self.name}: {reason}"
        self._board.hooks.on_event(kind, generator=self.index, attempt=self._attempt, reason=reason, **rounded)
