"""This file soaks the buffer: group after group through all of its stages, while the server's memory must stay flat.

SOAK_GROUPS=1000000 pytest -s tests/chaos/test_buffer_soak.py is the long form; it prints a line every tenth.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import redis

from rl.buffer import Buffer, BufferLimits
from rl.embedded_redis import EmbeddedRedis
from tests.rl.buffer_samples import balance, draw_of, group_of

GROUPS = int(os.environ.get("SOAK_GROUPS", "5000"))
TENTHS, PRODUCERS, GROUPS_PER_STEP, STEPS_PER_CHECKPOINT, AHEAD = 10, 16, 25, 4, 200
LIMITS = BufferLimits(max_bytes=1 << 30, max_groups=1 << 16)
DRAW, GROUP = draw_of(0), group_of(0, lengths=(30, 20, 40, 10))


class Soak:
    """Producers that draw and publish, and a learner that leases, steps and commits, as fast as the server allows."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.next_draw = 0
        self.step = 0
        self.published = 0
        self.trained = 0
        self.moved = asyncio.Condition()

    async def tenth(self, groups: int) -> None:
        """So many more groups, from draw to commit, over connections of their own."""
        buffer = await Buffer.connect(self.url, "soak", LIMITS)
        until = self.next_draw + groups
        producing = [self.produce(buffer, until) for _ in range(PRODUCERS)]
        await asyncio.gather(self.learn(buffer, until), *producing)
        await buffer.close()

    async def produce(self, buffer: Buffer, until: int) -> None:
        while self.next_draw < until:
            number, self.next_draw = self.next_draw, self.next_draw + 1
            async with self.moved:
                await self.moved.wait_for(lambda number=number: number < self.trained + AHEAD)
            group_id = f"run/{number:08d}"
            await buffer.admit(msgspec.structs.replace(DRAW, group_id=group_id, draw=number))
            assert await buffer.put(msgspec.structs.replace(GROUP, group_id=group_id, draw=number))
            self.published += 1
            async with self.moved:
                self.moved.notify_all()

    async def learn(self, buffer: Buffer, until: int) -> None:
        unsaved = []
        async for entries in self.batches(buffer, until):
            unsaved += entries
            self.trained += len(entries)
            if self.step % STEPS_PER_CHECKPOINT == 0 or self.trained == until:
                await buffer.commit(unsaved, self.step)
                unsaved.clear()

    async def batches(self, buffer: Buffer, until: int) -> AsyncIterator[tuple]:
        while self.trained < until:
            async with self.moved:
                await self.moved.wait_for(lambda: self.published >= self.trained + GROUPS_PER_STEP)
            lease = await buffer.lease(self.step + 1, GROUPS_PER_STEP, version=0, max_lag=0)
            assert len(lease.entries) == GROUPS_PER_STEP
            self.step += 1
            yield lease.entries
            async with self.moved:
                self.moved.notify_all()


def settled(client: redis.Redis) -> dict:
    """What INFO says once the log is written, no rewrite is under way, and every other connection is gone.

    The slow log is emptied: on a busy machine it fills up to its 128 entries, whose arguments count as memory.
    """
    client.slowlog_reset()
    while True:
        info = client.info()
        if not (info["aof_buffer_length"] or info["aof_rewrite_in_progress"] or info["connected_clients"] > 1):
            return info


@pytest.mark.timeout(3600)
async def test_memory_stays_flat_however_many_groups_pass_through(tmp_path: Path) -> None:
    assert GROUPS % (TENTHS * GROUPS_PER_STEP) == 0, f"SOAK_GROUPS must be a multiple of {TENTHS * GROUPS_PER_STEP}"
    server = await asyncio.to_thread(EmbeddedRedis.start, tmp_path)
    client = redis.Redis.from_url(server.url)
    try:
        soak, used, began = Soak(server.url), [], time.monotonic()
        for _ in range(TENTHS):
            await soak.tenth(GROUPS // TENTHS)
            slow = client.slowlog_len()
            info = await asyncio.to_thread(settled, client)
            used.append(info["used_memory"])
            print(
                f"{soak.trained:>8} groups, {time.monotonic() - began:6.1f} s: used_memory {used[-1]:>9} bytes, "
                f"peak {info['used_memory_peak']:>9}, resident {info['used_memory_rss']:>9}, {slow} slow calls"
            )
        assert abs(used[-1] - used[1]) <= 0.02 * used[1], used
        buffer = await Buffer.connect(server.url, "soak", LIMITS)
        stats = await buffer.stats()
        balance(stats)
        assert (stats.drawn, stats.trained_groups, stats.in_flight) == (GROUPS, GROUPS, 0)
        assert set(client.keys("*soak*")) == {b"slipstream:{soak}:counters"}, "nothing else is left"
        await buffer.close()
    finally:
        client.close()
        server.stop()
