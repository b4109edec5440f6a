"""This file counts what one generator has in hand, since when, and how much of its working time it had nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Workload:
    """Requests in hand and idle time. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: dict[object, tuple[float, int, float]] = {}
        self._working = False
        self._counted_to = clock()
        self._working_s = 0.0
        self._idle_s = 0.0

    @property
    def in_hand(self) -> int:
        """Draws or prompts that are being answered."""
        return sum(count for _, count, _ in self._requests.values())

    @property
    def expected_tokens(self) -> float | None:
        """Tokens that all in hand are believed to take together; None where nobody knows of one."""
        expected = [tokens for _, _, tokens in self._requests.values()]
        return sum(expected) if all(expected) else None

    def load(self, in_tokens: bool) -> float:
        """What is in hand, in expected tokens, or in draws and prompts."""
        return (self.expected_tokens or 0.0) if in_tokens else self.in_hand

    @property
    def oldest_s(self) -> float:
        """Age of the request that has waited longest; 0 if there is none."""
        return self._clock() - min((since for since, _, _ in self._requests.values()), default=self._clock())

    @contextlib.contextmanager
    def holding(self, count: int, expected_tokens: float = 0.0) -> Iterator[None]:
        """Have `count` draws or prompts in hand, believed to take so many tokens together; 0 where nobody knows."""
        self._count()
        key = object()
        self._requests[key] = (self._clock(), count, expected_tokens)
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
