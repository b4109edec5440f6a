"""This file is a driver reduced to what the buffer sees of one: it draws, publishes, leases, steps, saves, and resumes.

`Disk` is what outlives it. Every operation on either is a point at which `Fuse` may blow, before or after it: after
means that it was done and nobody heard of it. The policy is the list of batches it was trained on.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rl.buffer import Buffer, BufferRewound, MissingGroups
from rl.codec import entry_of
from rl.trajectory import Group, GroupEntry
from tests.rl.buffer_samples import draw_of, group_of, ids

STEPS, GROUPS_PER_STEP, STEPS_PER_CHECKPOINT, MAX_LAG, DRAWS_AHEAD = 6, 3, 3, 2, 7
Batch = tuple[str, ...]


class Crash(BaseException):
    """The driver is gone."""


@dataclass
class Disk:
    """Ledger, archive and newest checkpoint; and, for the audit alone, what really happened."""

    ledger: dict[int, Batch] = field(default_factory=dict)
    archive: dict[int, list[Group]] = field(default_factory=dict)
    saved: tuple[Batch, ...] = ()
    attempts: dict[int, list[Batch]] = field(default_factory=lambda: defaultdict(list))
    voided: set[int] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)
    written_off: int = 0


class Fuse:
    """Calls `blow` when as many points were passed as one of `points` says."""

    def __init__(self, points: Iterable[int], blow: Callable[[], None]) -> None:
        self.passed = 0
        self.points = set(points)
        self._blow = blow

    def point(self) -> None:
        """A place at which something may end."""
        self.passed += 1
        if self.passed in self.points:
            self.points.remove(self.passed)
            self._blow()


class Driver:
    """One process's life: `take_up`, then `train` to the end, unless it crashes."""

    def __init__(self, buffer: Buffer, disk: Disk, fuse: Fuse, seed: int) -> None:
        self.buffer, self.disk, self.fuse = buffer, disk, fuse
        self.random = random.Random(seed)
        self.policy = list(disk.saved)
        self.next_draw = 0
        self.running: list[int] = []
        self.waiting: set[str] = set()
        self.drops: list[tuple[int, str, int, Any]] = []
        self.unsaved: dict[int, tuple[GroupEntry, ...]] = {}
        self.saved: dict[int, tuple[GroupEntry, ...]] = {}
        self.planned = {step: batch for step, batch in disk.ledger.items() if step > self.step}
        self.outages = buffer.reconnects

    @property
    def step(self) -> int:
        return len(self.policy)

    async def do(self, name: str, *arguments: Any) -> Any:
        """One operation of the buffer, between two points."""
        self.fuse.point()
        answer = await getattr(self.buffer, name)(*arguments)
        self.fuse.point()
        return answer

    def write(self, place: dict[int, Any], step: int, value: Any) -> None:
        self.fuse.point()
        place[step] = value
        self.fuse.point()

    # Resuming

    async def take_up(self) -> None:
        """Start from what disk and Redis hold."""
        state = await self.do("read_state")
        for step in range(1, self.step + 1):
            self.saved[step] = tuple(entry_of(group, 0) for group in self.disk.archive[step])
            await self.do("commit", self.saved[step], step)
        for step, batch in sorted(self.planned.items()):
            await self.redeliver(step, batch)
        holdings = await self.do("holdings")
        self.waiting = set(ids(holdings.waiting))
        self.running = [draw.draw for draw in await self.do("drawn")]
        known = [*self.waiting, *holdings.leased, *(name for batch in self.disk.ledger.values() for name in batch)]
        numbers = [number_of(name) for name in known] + self.running
        self.next_draw = max(int(state or 0), *(number + 1 for number in numbers), 0)
        self.disk.written_off += await self.do("write_off", self.next_draw)

    async def redeliver(self, step: int, batch: Batch) -> tuple[GroupEntry, ...] | None:
        """The very batch of a step; from the archive what Redis lost; None where neither has it."""
        try:
            return await self.do("lease_exactly", step, batch)
        except MissingGroups as missing:
            archived = {group.group_id: group for group in self.disk.archive.get(step, ())}
            if not archived.keys() >= set(missing.group_ids):
                return None
            for name in missing.group_ids:
                await self.do("restore", step, archived[name])
        return await self.do("lease_exactly", step, batch)

    async def mend(self) -> None:
        """After an outage, and never within an operation: the books must hold what it answered."""
        while self.buffer.reconnects != self.outages:
            self.outages = self.buffer.reconnects
            await self.reconcile()

    async def reconcile(self) -> None:
        """Tell a server that came back what it may have lost."""
        for number in list(self.running):
            await self.do("admit", draw_of(number))
        for drop in list(self.drops):
            await self.do("drop", *drop)
        held = await self.do("holdings")
        for name in sorted(self.waiting - set(ids(held.waiting)) - held.leased.keys()):
            await self.sample_again(name)
        for step, entries in list(self.saved.items()):
            await self.do("commit", entries, step)
        for step, entries in list(self.unsaved.items()):
            await self.redeliver(step, tuple(ids(entries)))
        await self.do("confirm_leases", self.step)

    async def sample_again(self, name: str) -> None:
        self.waiting.discard(name)
        self.running.append(number_of(name))
        await self.do("admit", draw_of(number_of(name)))

    # Working

    async def train(self) -> None:
        """Until the last step is saved and nothing is left over."""
        while self.step < STEPS:
            await self.random.choice((self.draw, self.finish, self.finish, self.make_step))()
            await self.mend()
        while self.running:
            number = self.running[0]
            self.drops.append((number, f"run/{number}", 0, "aborted"))
            await self.do("drop", *self.drops[-1])
            self.running.remove(number)
        self.forget(await self.do("drop_waiting", "surplus"), "surplus")
        await self.mend()

    async def draw(self) -> None:
        if len(self.running) + len(self.waiting) >= DRAWS_AHEAD:
            return
        number, self.next_draw = self.next_draw, self.next_draw + 1
        self.running.append(number)
        await self.do("admit", draw_of(number), str(self.next_draw).encode())

    async def finish(self) -> None:
        if not self.running:
            return
        number = self.random.choice(self.running)
        group = group_of(number, self.step, (number % 4, 2))
        if number % 5 == 4:
            drop = (number, group.group_id, group.num_tokens, "zero_advantage")
            if await self.do("drop", *drop):
                self.drops.append(drop)
            else:
                self.waiting.add(group.group_id)
        else:
            await self.do("put", group)
            self.disk.acknowledged.add(group.group_id)
            self.waiting.add(group.group_id)
        if number in self.running:
            self.running.remove(number)

    async def make_step(self) -> None:
        step = self.step + 1
        entries = await self.batch(step)
        if not entries:
            return
        batch = tuple(ids(entries))
        self.write(self.disk.ledger, step, batch)
        try:
            groups = await self.do("fetch", batch)
        except MissingGroups:
            self.planned[step] = batch
            return
        self.policy.append(batch)
        self.disk.attempts[step].append(batch)
        self.unsaved[step] = entries
        self.waiting -= set(batch)
        self.write(self.disk.archive, step, groups)
        if step % STEPS_PER_CHECKPOINT == 0:
            await self.save()

    async def batch(self, step: int) -> tuple[GroupEntry, ...]:
        planned = self.planned.pop(step, None)
        if planned is not None:
            entries = await self.redeliver(step, planned)
            if entries:
                return entries
            await self.void(step, planned)
        try:
            lease = await self.do("lease", step, GROUPS_PER_STEP, self.step, MAX_LAG)
        except BufferRewound:
            await self.reconcile()
            return ()
        self.forget(lease.dropped, "stale")
        return lease.entries

    def forget(self, entries: Iterable[GroupEntry], reason: str) -> None:
        """These groups are dropped, and remembered as such: a server may forget both with its last second."""
        for entry in entries:
            self.waiting.discard(entry.group_id)
            self.drops.append((entry.draw, entry.group_id, entry.num_tokens, reason))

    async def void(self, step: int, planned: Batch) -> None:
        """A batch that was written down and never trained on is gone with the server's last second: make another."""
        assert not self.disk.attempts[step] or step not in self.disk.archive
        self.disk.voided.add(step)
        kept = await self.do("release", step)
        self.waiting.update(kept)
        for name in planned:
            if name not in kept:
                await self.sample_again(name)

    async def save(self) -> None:
        self.fuse.point()
        self.disk.saved = tuple(self.policy)
        self.fuse.point()
        for step, entries in list(self.unsaved.items()):
            await self.do("commit", entries, step)
            self.saved[step] = self.unsaved.pop(step)


def number_of(name: str) -> int:
    """The draw that a group id names."""
    return int(name.rpartition("/")[2])
