"""This file tells a slow answer from none: the patience of heartbeats and probes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")
SLICES = 20


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
