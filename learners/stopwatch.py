"""This file accounts for a rank's time: seconds by activity, handed over once."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up wall seconds by activity. On CUDA it waits for the device, or launches would be all that it counts."""

    def __init__(self, device: str) -> None:
        self._synchronises = device == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Count the time inside as this activity."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._synchronises:
                torch.cuda.synchronize()
            self._seconds[activity] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Everything counted since the last call."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
