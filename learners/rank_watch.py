"""This file notices that a learner rank died or hangs, and tells it to every call that waits for the ranks.

A rank's peers may stand in a collective until its deadline, minutes later; nobody waits for them. And a rank may fail
only because its peer died a moment ago: before its error is believed, all ranks must give a sign of life.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rl.orders import PartStatus
from rl.parts import LearnersLost
from rl.waits import Silent, answered

T = TypeVar("T")
OnEvent = Callable[..., None]
MAX_PAUSE_S = 5.0


@dataclass(eq=False)
class Rank:
    """One process of the group as the driver sees it. part is its mark, doing what it said at its last sign of life."""

    number: int
    actor: Any
    part: str
    log: str
    node: str = ""
    pid: int = 0
    doing: str = "starting"
    heard: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """What people call it."""
        return f"learner rank {self.number}"


class RankWatch:
    """One group of ranks from start to end. A lost rank is the end of the group."""

    def __init__(
        self,
        ranks: Sequence[Rank],
        deadline_s: float,
        deaths: tuple[type[BaseException], ...],
        on_event: OnEvent,
    ) -> None:
        """deaths are the errors by which a call says that its process is gone."""
        self.ranks = tuple(ranks)
        self._deadline_s = deadline_s
        self._deaths = deaths
        self._on_event = on_event
        self._lost: LearnersLost | None = None
        self._ended = asyncio.Event()
        self._calls: dict[object, tuple[str, float]] = {}

    async def all(self, what: str, calls: Sequence[Awaitable[T]], settle: bool = False) -> list[T]:
        """The answers to these calls, one of each rank from the first on.

        The first failure is raised at once; with settle only when all have answered, for calls that all come to an end.
        Raises LearnersLost as soon as any rank is gone.
        """
        tasks = [asyncio.ensure_future(self._answer(rank, call)) for rank, call in zip(self.ranks, calls, strict=False)]
        ended = asyncio.ensure_future(self._ended.wait())
        pending = set(tasks)
        try:
            with self._listed(what):
                while pending:
                    self.check()
                    done, _ = await asyncio.wait({*pending, ended}, return_when=asyncio.FIRST_COMPLETED)
                    pending -= done
                    if not settle and any(task.exception() for task in done - {ended}):
                        break
                failure = next((error for task in tasks if task.done() and (error := task.exception())), None)
                if failure is not None:
                    await self._believe(ended)
                    raise failure
                self.check()
                return [task.result() for task in tasks]
        finally:
            for task in (*tasks, ended):
                task.cancel()

    @property
    def over(self) -> bool:
        """Whether the group has ended."""
        return self._lost is not None

    def check(self) -> None:
        """Raise LearnersLost if the group has ended."""
        if self._lost is not None:
            raise LearnersLost(*self._lost.args)  # a new one for each call: an exception carries one traceback

    def end(self, reason: str) -> None:
        """Have every call that waits, and every later one, raise LearnersLost."""
        if self._lost is None:
            self._lost = LearnersLost(reason)
            self._ended.set()

    async def listen(self) -> None:
        """Ask every rank for signs of life until one is lost."""
        await asyncio.gather(*(self._listen(rank) for rank in self.ranks))

    def describe(self, version: int, restarts: int) -> list[PartStatus]:
        """Every rank as it was last heard."""
        now = time.monotonic()
        oldest = max((now - since for _, since in self._calls.values()), default=0.0)
        return [
            PartStatus(
                name=rank.name,
                state="dead" if self._lost else "starting" if rank.doing == "starting" else "working",
                node=rank.node,
                pids=(rank.pid,) if rank.pid else (),
                version=version,
                heartbeat_age_s=now - rank.heard,
                in_hand=int(bool(self._calls)),
                oldest_request_s=oldest,
                restarts=restarts,
                detail=str(self._lost) if self._lost else self._activity(rank),
            )
            for rank in self.ranks
        ]

    def _activity(self, rank: Rank) -> str:
        """What it said it did, and what it was asked for since."""
        asked = " and ".join(what for what, _ in self._calls.values())
        return f"{rank.doing}, asked for {asked}" if asked else rank.doing

    @contextmanager
    def _listed(self, what: str):
        call = object()
        self._calls[call] = (what, time.monotonic())
        try:
            yield
        finally:
            del self._calls[call]

    async def _answer(self, rank: Rank, call: Awaitable[T]) -> T:
        try:
            return await call
        except self._deaths as error:
            self._lose(rank, f"died ({_first_line(error)})")
            raise

    async def _believe(self, ended: asyncio.Future[Any]) -> None:
        """Raise LearnersLost where the failure of one rank is the death of another, which Ray tells a moment later."""
        signs = asyncio.gather(*(self._hear(rank) for rank in self.ranks))
        await asyncio.wait({signs, ended}, return_when=asyncio.FIRST_COMPLETED)
        signs.cancel()
        self.check()

    async def _listen(self, rank: Rank) -> None:
        while self._lost is None:
            await self._hear(rank)
            await asyncio.sleep(min(MAX_PAUSE_S, self._deadline_s / 6))

    async def _hear(self, rank: Rank) -> None:
        """One sign of life, or the end of the group."""
        try:
            rank.doing = await answered(rank.actor.beat.remote(), self._deadline_s)
            rank.heard = time.monotonic()
        except Silent:
            self._lose(rank, f"gave no sign of life for {self._deadline_s:g} s (monitoring.heartbeat_deadline_s)")
        except self._deaths as error:
            self._lose(rank, f"died ({_first_line(error)})")

    def _lose(self, rank: Rank, how: str) -> None:
        if self._lost is not None:
            return
        doing = self._activity(rank)
        self.end(f"{rank.name} (pid {rank.pid} on node {rank.node[:8]}) {how}; it last did: {doing}; see {rank.log}")
        facts = {"rank": rank.number, "pid": rank.pid, "node": rank.node, "doing": doing, "log": rank.log}
        self._on_event("learner_rank_lost", how=how, **facts)


def _first_line(error: BaseException) -> str:
    """Ray explains at length; the kind and the first sentence say enough."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
