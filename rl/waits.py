"""This file gives every wait a name and a deadline, so that a stuck run says what it waits for, and from whom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


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


async def within(awaitable: Awaitable[T], seconds: float, what: str, whom: str = "") -> T:
    """Await for at most `seconds`; the awaitable is cancelled when they have passed.

    Raises:
        WaitExpired: naming what was awaited, from whom and for how long. A TimeoutError that the awaitable raised
            itself passes through unchanged: it is that part's own error.
    """
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            return await awaitable
    except TimeoutError:
        if deadline.expired():
            raise WaitExpired(what, whom, seconds) from None
        raise
