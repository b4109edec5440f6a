"""This file measures the buffer: publish, lease and commit, next to raw commands for the same bytes and client.

Run it as `python tests/benchmarks/bench_buffer.py`; it starts a server of its own and prints a markdown table. "raw" is
SET and XADD in one pipeline per group, then GET, then XDEL and DEL: the least that could hold, list and free the bytes.
Both encode before and decode after, because a learner needs groups and not bytes.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rl.buffer import Buffer
from rl.codec import decode_group, encode_entry, encode_group, entry_of
from rl.embedded_redis import EmbeddedRedis
from rl.trajectory import Group
from tests.rl.buffer_samples import group_of

SIZES = {"4 KB": (8, 40, 400), "64 KB": (8, 720, 150), "1 MB": (16, 5600, 16)}  # completions, tokens of each, groups
PRODUCERS = (1, 16)
BATCH = 8
Phases = tuple[Callable[[Group], Awaitable[object]], Callable[[Sequence[Group]], Awaitable[object]]]


def slipstream(buffer: Buffer) -> Phases:
    """Publish one group; lease, fetch and commit a batch."""

    async def consume(batch: Sequence[Group]) -> None:
        lease = await buffer.lease(len(batch), version=0, max_lag=0)
        group_ids = [entry.group_id for entry in lease.entries]
        assert len(await buffer.fetch(group_ids)) == len(batch)
        await buffer.commit(group_ids)

    return buffer.put, consume


def raw(buffer: Buffer) -> Phases:
    """The same bytes through the same client, without leases, counters or idempotence."""
    client = buffer._client

    async def publish(group: Group) -> None:
        payload = encode_group(group)
        pipeline = client.pipeline(transaction=False)
        pipeline.set(f"raw:{group.group_id}", payload)
        pipeline.xadd("raw", {"entry": encode_entry(entry_of(group, len(payload)))})
        await pipeline.execute()

    async def consume(batch: Sequence[Group]) -> None:
        keys = [f"raw:{group.group_id}" for group in batch]
        listed = await client.xrange("raw", count=len(batch))
        assert len([decode_group(payload) for payload in await client.mget(keys)]) == len(batch)
        pipeline = client.pipeline(transaction=False)
        pipeline.xdel("raw", *(identity for identity, _ in listed))
        pipeline.delete(*keys)
        await pipeline.execute()

    return publish, consume


async def measure(phases: Phases, groups: Sequence[Group], producers: int) -> tuple[float, float]:
    """Seconds to publish all groups with so many producers at once, and seconds to take them all out again."""
    publish, consume = phases

    async def produce(share: Sequence[Group]) -> None:
        for group in share:
            await publish(group)

    start = time.perf_counter()
    await asyncio.gather(*(produce(groups[first::producers]) for first in range(producers)))
    middle = time.perf_counter()
    for first in range(0, len(groups), BATCH):
        await consume(groups[first : first + BATCH])
    return middle - start, time.perf_counter() - middle


async def main(url: str) -> None:
    """All sizes and numbers of producers, the two contestants taking turns."""
    print("| group | producers | | publish groups/s | MB/s | consume groups/s | MB/s | both, of raw |")
    print("|---|---|---|---|---|---|---|---|")
    for size, (completions, tokens, count) in SIZES.items():
        groups = [group_of(draw, lengths=(tokens,) * completions) for draw in range(count)]
        megabytes = len(encode_group(groups[0])) / 1e6
        for producers in PRODUCERS:
            best: dict[str, tuple[float, float]] = {}
            for attempt in range(3):
                buffer = await Buffer.connect(url, f"bench-{attempt}", 1 << 30)
                for name, contestant in (("raw", raw), ("slipstream", slipstream)):
                    taken = await measure(contestant(buffer), groups, producers)
                    best[name] = min(best.get(name, taken), taken, key=sum)
                await buffer.delete_run()
                await buffer.close()
            for name, (publishing, consuming) in best.items():
                share = sum(best["raw"]) / (publishing + consuming)
                cells = [f"{count / s:.0f} | {megabytes * count / s:.0f}" for s in (publishing, consuming)]
                print(f"| {size} | {producers} | {name} | {cells[0]} | {cells[1]} | {share:.2f} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedRedis.start(directory)
        try:
            asyncio.run(main(server.url))
        finally:
            server.stop()
