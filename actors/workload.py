"""This file counts what one generator has in hand, since when, and how much of its working time it had nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Workload:
    """Requests in hand and idle time. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: dict[object, tuple[float, int]] = {}
        self._working = False
        self._counted_to = clock()
        self._working_s = 0.0
        self._idle_s = 0.0

    @property
    def in_hand(self) -> int:
        """Draws or prompts that are being answered."""
        return sum(count for _, count in self._requests.values())

    @property
    def oldest_s(self) -> float:
        """Age of the request that has waited longest; 0 if there is none."""
        return self._clock() - min((since for since, _ in self._requests.values()), default=self._clock())

    @contextlib.contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Have `count` draws or prompts in hand."""
        self._count()
        key = object()
        self._requests[key] = (self._clock(), count)
        try:
            yield
        finally:
            self._count()
            del self._requests[key]

    def set_working(self, working: bool) -> None:
        """Only working time counts: a generator that is down is not idle."""
        self._count()
        self._working = working

    def take_times(self) -> tuple[float, float]:
        """Seconds of idle and of working time since the last call."""
        self._count()
        times = self._idle_s, self._working_s
        self._idle_s = self._working_s = 0.0
        return times

    def _count(self) -> None:
        now = self._clock()
        if self._working:
            self._working_s += now - self._counted_to
            if not self._requests:
                self._idle_s += now - self._counted_to
        self._counted_to = now
