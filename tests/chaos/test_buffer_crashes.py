"""This file crashes drivers and servers over the buffer at seeded points, and audits what was trained in the end."""

from __future__ import annotations

import asyncio
import os
import pathlib
import random
import signal

import pytest

from rl.buffer import Buffer, BufferStats
from rl.embedded_redis import EmbeddedRedis
from tests.chaos.buffer_driver import GROUPS_PER_STEP, MAX_LAG, STEPS, Crash, Disk, Driver, Fuse, number_of
from tests.rl.buffer_samples import LIMITS, balance

SHORTEST_RUN = 110  # points that every run passes, whatever its seed
POINTS_PER_BLOCK = 25


async def run_to_the_end(url: str, run_id: str, disk: Disk, fuse: Fuse, seed: int) -> tuple[BufferStats, int]:
    """Drivers one after the other, each with connections of its own, until one ends by itself; and how many crashed."""
    for life in range(1000):
        buffer = await Buffer.connect(url, run_id, LIMITS, owner="mine")
        driver = Driver(buffer, disk, fuse, seed * 1000 + life)
        try:
            await driver.take_up()
            await driver.train()
            stats = await buffer.stats()
            await buffer.delete_run()
            return stats, life
        except Crash:
            continue
        finally:
            await buffer.close()
    raise AssertionError("no driver came through")


def audit(disk: Disk, stats: BufferStats) -> None:
    """0 lost, 0 trained twice, 0 over the lag bound, and every batch redelivered as it was."""
    trained = [name for batch in disk.saved for name in batch]
    assert [len(batch) for batch in disk.saved] == [GROUPS_PER_STEP] * STEPS
    assert len(set(trained)) == len(trained), "trained twice"
    balance(stats)
    dropped = sum(groups for groups, _ in stats.dropped.values())
    assert (stats.in_flight, stats.buffered_groups, stats.leased_groups) == (0, 0, 0), "lost"
    assert stats.drawn == stats.trained_groups + dropped and stats.trained_groups == len(trained)
    untrained = disk.acknowledged - set(trained)
    assert len(untrained) <= sum(stats.dropped[reason][0] for reason in ("stale", "surplus")) + disk.written_off
    assert set(map(number_of, trained)) <= set(range(stats.drawn))
    for step, groups in disk.archive.items():
        assert tuple(group.group_id for group in groups) == disk.saved[step - 1]
        assert all(step - 1 - group.oldest_version <= MAX_LAG for group in groups), "over the lag bound"
        if step not in disk.voided:
            assert set(disk.attempts[step]) == {disk.ledger[step]}, "redelivered otherwise"


@pytest.mark.parametrize("block", range(8))
async def test_drivers_crashing_anywhere_lose_nothing_and_train_nothing_twice(redis_url: str, block: int) -> None:
    crashes = 0
    for seed in range(block * POINTS_PER_BLOCK, (block + 1) * POINTS_PER_BLOCK):
        choice, disk = random.Random(seed), Disk()
        first = choice.randrange(1, SHORTEST_RUN)
        points = {first, first + choice.randrange(1, 40)} if seed % 3 == 0 else {first}  # the second may hit a resume
        crashes += (await crash_and_audit(redis_url, disk, points, seed))[1]
    assert crashes >= POINTS_PER_BLOCK, "every seed had its crash"


async def crash_and_audit(url: str, disk: Disk, points: set[int], seed: int) -> tuple[BufferStats, int]:
    """One run with crashes of the driver alone: Redis loses nothing, so nothing may be given up either."""

    def blow() -> None:
        raise Crash

    stats, crashes = await run_to_the_end(url, f"crash-{os.getpid()}-{seed}", disk, Fuse(points, blow), seed)
    audit(disk, stats)
    assert not disk.voided and not disk.written_off
    return stats, crashes


class Server:
    """An embedded server that is killed, forgets the end of its log, and is started again at once."""

    def __init__(self, folder: pathlib.Path, seed: int) -> None:
        self.redis = EmbeddedRedis.start(folder)
        self.log = folder / "appendonly.aof"
        self.random = random.Random(seed)
        self.sizes = [self.log.stat().st_size]
        self.kills = 0

    def note(self) -> None:
        """Remember how long the log was: under everysec it may be cut back to what it was a second ago."""
        self.sizes.append(self.log.stat().st_size)

    def kill(self) -> None:
        """SIGKILL, lose up to the last 12 operations (even the middle of one), and answer again."""
        os.kill(self.redis.pid, signal.SIGKILL)
        self.redis._process.wait()
        kept = self.sizes[-1 - min(self.random.randrange(13), len(self.sizes) - 1)]
        os.truncate(self.log, min(self.log.stat().st_size, kept + self.random.choice((0, 1, 40))))
        self.redis.revive()
        self.kills += 1


class NotingFuse(Fuse):
    """A fuse that also writes down the length of the log at every point."""

    def __init__(self, points: set[int], server: Server, also_the_driver: bool) -> None:
        def blow() -> None:
            server.kill()
            if also_the_driver:
                raise Crash

        super().__init__(points, blow)
        self.server = server

    def point(self) -> None:
        self.server.note()
        super().point()


@pytest.mark.parametrize("also_the_driver", [False, True], ids=["server", "server_and_driver"])
@pytest.mark.parametrize("seed", range(5))
async def test_a_server_killed_anywhere_loses_at_most_its_last_second_and_trains_nothing_twice(
    tmp_path: pathlib.Path, seed: int, also_the_driver: bool
) -> None:
    server = await asyncio.to_thread(Server, tmp_path, seed)
    try:
        choice, disk = random.Random(1000 + seed), Disk()
        points = {choice.randrange(20, SHORTEST_RUN) for _ in range(2)}
        fuse = NotingFuse(points, server, also_the_driver)
        stats, _ = await run_to_the_end(server.redis.url, "run", disk, fuse, seed)
        assert server.kills == len(points)
        audit(disk, stats)
        assert also_the_driver or not disk.written_off, "the driver knows every draw"
    finally:
        server.redis.stop()
