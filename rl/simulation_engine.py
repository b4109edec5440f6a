"""This file simulates one generator: an engine that decodes n sequences at once in steps of a + b * n seconds.

Between two events n does not change, so the tokens of every sequence in flight grow by one rate. The engine keeps how
many tokens a sequence would have by now that had begun with it, `progress`; a sequence ends when that has grown by its
length. An event is thus the end of a sequence, and not a token.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

NEARLY = 1e-6  # of a token: what rounding may leave of a sequence that has ended


@dataclass(slots=True, eq=False)
class SimulatedGroup:
    """A group from its draw to its end. `lengths` are those of its answers, `left` those that are not sampled yet."""

    draw: int
    admitted_version: int
    lengths: tuple[int, ...]
    teaches: bool  # whether its rewards differ
    oldest_version: int = -1
    left: int = 0
    asked: int = 0
    tokens: int = 0
    version_tokens: float = 0.0  # sum over its tokens of the version that each was sampled with
    is_cut: bool = False


@dataclass(slots=True)
class EngineCosts:
    """Seconds of one engine step with n sequences in flight: fixed_s + sequence_s * n; and of a prompt's prefill."""

    fixed_s: float
    sequence_s: float
    prefill_s: float = 0.0


@dataclass(slots=True, eq=False)
class SimulatedEngine:
    """A generator's engine, and what its generator has in hand. Times are seconds of the simulated clock."""

    index: int
    costs: EngineCosts
    max_sequences: int
    version: int = 0
    in_hand: int = 0  # groups being sampled, judged or published
    judging: int = 0
    slowdown: float = 1.0
    stamp: int = 0  # of the event that it waits for: an older one is void
    is_sampling: bool = False
    idle_s: float = 0.0
    in_flight: int = 0  # sequences that are decoded together now
    sequence_s: float = 0.0  # in_flight, integrated over time
    tokens: int = 0
    further: list[SimulatedGroup] = field(default_factory=list)  # whose first answers differ: the rest is due
    to_judge: deque[SimulatedGroup] = field(default_factory=deque)
    _waiting: deque[tuple[SimulatedGroup, int]] = field(default_factory=deque)
    _running: list[tuple[float, int, float, SimulatedGroup]] = field(default_factory=list)  # a heap by end
    _begun: int = 0
    _progress: float = 0.0
    _counted_to: float = 0.0
    _stalled_until: float = 0.0
    _marks: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])  # progress at which a version began

    def advance(self, now: float) -> None:
        """Count the time up to now."""
        start = max(self._counted_to, min(self._stalled_until, now))
        self.sequence_s += self.in_flight * (now - self._counted_to)
        if now > start:
            if self.in_flight:
                self._progress += (now - start) / self._step_s()
            elif self.in_hand == 0:
                self.idle_s += now - start
        self._counted_to = now

    def next_end(self) -> float | None:
        """When the next sequence ends if nothing changes."""
        self._forget_cut()
        if not self._running:
            return None
        left = max(0.0, self._running[0][0] - self._progress)
        return max(self._counted_to, self._stalled_until) + left * self._step_s()

    def ask(self, group: SimulatedGroup, count: int) -> None:
        """Sample the next `count` answers of a group."""
        lengths = group.lengths[group.asked : group.asked + count]
        group.asked += count
        group.left = count
        self._waiting.extend((group, length) for length in lengths)
        self._fill()

    def ended(self) -> list[SimulatedGroup]:
        """The groups whose last asked answer has ended by now."""
        done = []
        while self._running and self._running[0][0] <= self._progress + NEARLY:
            end, _, begin, group = heapq.heappop(self._running)
            if group.is_cut:
                continue
            self.in_flight -= 1
            self._count(group, begin, end)
            group.left -= 1
            if not group.left:
                done.append(group)
        self._fill()
        return done

    def stall(self, seconds: float) -> None:
        """Sample nothing for so long: a prefill, or a weight update."""
        self._stalled_until = max(self._stalled_until, self._counted_to) + seconds

    def load(self, version: int, pause_s: float) -> None:
        """Have tokens from here on stamped with another version, after a pause."""
        self.stall(pause_s)
        self.version = version
        self._marks.append((self._progress, version))
        del self._marks[:-64]  # more versions than any answer spans

    def cut(self, group: SimulatedGroup) -> None:
        """Abort a group that is being sampled; its tokens up to now are counted."""
        for _, _, begin, each in self._running:
            if each is group:
                self._count(group, begin, self._progress)
                self.in_flight -= 1
        self._waiting = deque(pair for pair in self._waiting if pair[0] is not group)
        group.is_cut = True
        self._fill()

    def _step_s(self) -> float:
        return (self.costs.fixed_s + self.costs.sequence_s * self.in_flight) * self.slowdown

    def _fill(self) -> None:
        while self._waiting and self.in_flight < self.max_sequences:
            group, length = self._waiting.popleft()
            if group.oldest_version < 0:
                group.oldest_version = self.version
                self.stall(self.costs.prefill_s)
            self._begun += 1
            self.in_flight += 1
            heapq.heappush(self._running, (self._progress + length, self._begun, self._progress, group))

    def _forget_cut(self) -> None:
        while self._running and self._running[0][3].is_cut:
            heapq.heappop(self._running)

    def _count(self, group: SimulatedGroup, begin: float, end: float) -> None:
        """Count an answer's tokens, each with the version that it was sampled with."""
        tokens = round(end - begin)
        self.tokens += tokens
        group.tokens += tokens
        upper = end
        for mark, version in reversed(self._marks):
            lower = max(mark, begin)
            if upper > lower:
                group.version_tokens += version * (upper - lower)
                upper = lower
            if mark <= begin:
                break
