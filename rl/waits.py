"""This file gives every wait a name and a deadline, so that a stuck run says what it waits for, and from whom.

Waits that last are listed in `WAITS`: a stall report (rl/stall_report.py) shows what the whole driver waits for, not
only the one wait that expired first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
SLICES = 20


class WaitExpired(RuntimeError):
    """A named wait passed its deadline."""

    def __init__(self, what: str, whom: str, seconds: float) -> None:
        peer = f" from {whom}" if whom else ""
        super().__init__(
            f"waited {seconds:.0f} s for {what}{peer}, which is the deadline; see logs/ of the run for the peer"
        )
        self.what = what
        self.whom = whom
        self.seconds = seconds


@dataclass(frozen=True, eq=False)  # two waits with the same words are still two
class Wait:
    """One wait that lasts: for what, from whom ("" if nobody is named), since when (monotonic), its deadline."""

    what: str
    whom: str
    since: float
    seconds: float

    def age_s(self, now: float) -> float:
        """Seconds it has lasted at the monotonic moment `now`."""
        return now - self.since


class Waits:
    """The waits of one process that last at this moment."""

    def __init__(self) -> None:
        self._pending: dict[Wait, None] = {}  # in the order in which they began

    @contextmanager
    def listed(self, what: str, whom: str, seconds: float) -> Iterator[Wait]:
        """List a wait while the block runs."""
        wait = Wait(what, whom, time.monotonic(), seconds)
        self._pending[wait] = None
        try:
            yield wait
        finally:
            del self._pending[wait]

    def pending(self) -> list[Wait]:
        """The waits that last, the oldest first."""
        return list(self._pending)


WAITS = Waits()


async def within(awaitable: Awaitable[T], seconds: float, what: str, whom: str = "", waits: Waits = WAITS) -> T:
    """Await for at most `seconds`, listed in `waits`; the awaitable is cancelled when they have passed.

    Raises:
        WaitExpired: naming what was awaited, from whom and for how long. A TimeoutError that the awaitable raised
            itself passes through unchanged: it is that part's own error.
    """
    deadline = asyncio.timeout(seconds)
    try:
        with waits.listed(what, whom, seconds):
            async with deadline:
                return await awaitable
    except TimeoutError:
        if deadline.expired():
            raise WaitExpired(what, whom, seconds) from None
        raise


class Silent(RuntimeError):
    """No answer came in time."""


async def answered(call: Awaitable[T], seconds: float) -> T:
    """The answer of a call, or Silent after `seconds` in which this process itself was awake.

    The time is counted in slices: a caller that was stopped (Ctrl-Z, a debugger) or starved itself must not blame the
    other for it, and finds on waking that one slice has passed, however long it slept.
    """
    task = asyncio.ensure_future(call)
    try:
        for _ in range(SLICES):
            done, _ = await asyncio.wait({task}, timeout=seconds / SLICES)
            if done:
                return task.result()
        raise Silent(f"no answer for {seconds:.3g} s")
    finally:
        task.cancel()
