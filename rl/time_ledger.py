"""This file accounts for the wall time of one role: every second belongs to exactly one activity, or is idle."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

IDLE = "idle"


class TimeLedger:
    """Seconds by activity that sum to the wall time, also where activities overlap: the earliest in `order` counts.

    A generator samples and judges at once; its time is then sampling, since judging alone would not keep it busy.
    `clock` is monotonic, in seconds.
    """

    def __init__(self, order: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        assert IDLE not in order, "idle is what is left"
        self._order = tuple(order)
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._counted_to = clock()

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Count the time inside as this activity; any number may run at once."""
        assert activity in self._order, f"{activity} is none of {self._order}"
        self._count()
        self._running[activity] += 1
        try:
            yield
        finally:
            self._count()
            self._running[activity] -= 1

    def take(self) -> dict[str, float]:
        """Seconds by activity since the last call, idle included; they sum to the wall time between the calls."""
        self._count()
        taken, self._seconds = self._seconds, {}
        return taken

    def _count(self) -> None:
        now = self._clock()
        activity = next((each for each in self._order if self._running[each]), IDLE)
        self._seconds[activity] = self._seconds.get(activity, 0.0) + now - self._counted_to
        self._counted_to = now


def added(ledgers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sum of several ledgers, by activity."""
    sums: dict[str, float] = {}
    for ledger in ledgers:
        for activity, seconds in ledger.items():
            sums[activity] = sums.get(activity, 0.0) + seconds
    return sums


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each activity's share of the whole, largest first; nothing where no time has passed."""
    whole = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: (-item[1], item[0]))
    return {activity: each / whole for activity, each in ordered} if whole > 0 else {}
