"""This file measures the buffer: publish, lease, fetch and commit, next to the raw client moving the same bytes.

Run it as `python tests/benchmarks/bench_buffer.py`; it starts a server of its own (appendfsync everysec) and prints
markdown. Raw is XADD for every group, then XRANGE and XDEL for every batch: the least that could hold, list, read and
free the bytes, without leases, counters, idempotence or order of draws. Both use one process, the same client library
and the same batches, and take turns; medians are shown. "bytes" moves encoded groups, "groups" also encodes and decodes
them, as every run does. redis-benchmark, where it is on PATH, says what the server does for a client written in C.
"""

from __future__ import annotations

import asyncio
import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rl.buffer import Buffer, BufferLimits, described
from rl.codec import decode_group, encode_group
from rl.embedded_redis import EmbeddedRedis
from rl.trajectory import Group
from tests.benchmarks.report import options
from tests.rl.buffer_samples import group_of

SIZES = {"4 KB": (8, 40, 960), "64 KB": (8, 720, 320), "1 MB": (16, 5600, 48)}  # completions, tokens of each, groups
PRODUCERS = (1, 4, 16)
BATCH, ROUNDS = 16, 9
LIMITS = BufferLimits(max_bytes=1 << 31, max_groups=1 << 16)
Publish = Callable[[int], Awaitable[object]]
Consume = Callable[[int, int], Awaitable[object]]


class Slipstream:
    """A run's buffer; `codec` says whether groups are encoded and decoded, or only their bytes moved."""

    def __init__(self, buffer: Buffer, groups: Sequence[Group], codec: bool) -> None:
        self.buffer, self.groups, self.codec = buffer, groups, codec
        self.encoded = [described(group, encode_group(group)) for group in groups]

    async def publish(self, number: int) -> None:
        if self.codec:
            await self.buffer.put(self.groups[number])
        else:
            await self.buffer._run("PUT", *self.encoded[number])

    async def consume(self, step: int, count: int) -> None:
        entries = (await self.buffer.lease(step, count, version=0, max_lag=0)).entries
        group_ids = [entry.group_id for entry in entries]
        if self.codec:
            assert len(await self.buffer.fetch(group_ids)) == count
        else:
            assert len(await self.buffer._command("HMGET", self.buffer._keys["payloads"], *group_ids)) == count
        await self.buffer.commit(entries)


class Raw:
    """The same bytes through the same connections, in one stream."""

    def __init__(self, buffer: Buffer, groups: Sequence[Group], codec: bool) -> None:
        self.client, self.groups, self.codec = buffer._link.client, groups, codec
        self.encoded = [encode_group(group) for group in groups]

    async def publish(self, number: int) -> None:
        payload = encode_group(self.groups[number]) if self.codec else self.encoded[number]
        await self.client.execute_command("XADD", "raw", "*", "group", payload)

    async def consume(self, step: int, count: int) -> None:
        found = await self.client.xrange("raw", count=count)
        assert len(found) == count
        if self.codec:
            assert all([decode_group(fields[b"group"]) for _, fields in found])
        await self.client.execute_command("XDEL", "raw", *(identity for identity, _ in found))


async def seconds_of(contestant: Slipstream | Raw, producers: int) -> tuple[float, float]:
    """To publish all groups with so many producers at once, and to take them all out again, batch by batch."""
    count = len(contestant.groups)

    async def produce(first: int) -> None:
        for number in range(first, count, producers):
            await contestant.publish(number)

    start = time.perf_counter()
    await asyncio.gather(*(produce(first) for first in range(producers)))
    middle = time.perf_counter()
    for step in range(count // BATCH):
        await contestant.consume(step + 1, BATCH)
    return middle - start, time.perf_counter() - middle


async def compare(url: str, size: str, producers: int, codec: bool) -> None:
    """One row: both contestants in turn, a few rounds after one that does not count."""
    completions, tokens, count = SIZES[size]
    groups = [group_of(number, lengths=(tokens,) * completions) for number in range(count)]
    megabytes = len(encode_group(groups[0])) * count / 1e6
    taken: dict[type, list[tuple[float, float]]] = {Raw: [], Slipstream: []}
    for attempt in range(ROUNDS + 1):
        for kind in (Raw, Slipstream):
            buffer = await Buffer.connect(url, f"bench-{attempt}", LIMITS)
            seconds = await seconds_of(kind(buffer, groups, codec), producers)
            if attempt:
                taken[kind].append(seconds)
            await buffer.delete_run()
            await buffer.close()
    cells, rates = [], {}
    for kind in (Raw, Slipstream):
        publishing, consuming = (statistics.median(column) for column in zip(*taken[kind], strict=True))
        whole = statistics.median(sum(pair) for pair in taken[kind])
        rates[kind] = count / whole
        cells.append(
            f"{count / publishing:.0f} | {count / consuming:.0f} | {count / whole:.0f} | {megabytes / whole:.0f}"
        )
    what = "groups" if codec else "bytes"
    print(f"| {size} | {producers} | {what} | {' | '.join(cells)} | {rates[Slipstream] / rates[Raw]:.2f} |", flush=True)


async def data_bytes(buffer: Buffer) -> int:
    """What the server's data takes, once it has freed and written what it still had to."""
    while True:
        info = await buffer._link.client.info()
        if not (info["lazyfree_pending_objects"] or info["aof_buffer_length"] or info["aof_rewrite_in_progress"]):
            return info["used_memory_dataset"]


async def memory(url: str) -> None:
    """What groups cost while they are held: the server's memory must grow in proportion to their number."""
    print("\n| group | held | payload, MB | memory above empty, MB | bytes per group beyond its payload |")
    print("|---|---|---|---|---|")
    for size, (completions, tokens, _) in SIZES.items():
        payload = len(encode_group(group_of(0, lengths=(tokens,) * completions)))
        buffer = await Buffer.connect(url, "memory", LIMITS)
        empty, held = await data_bytes(buffer), 0
        for more in (100, 100, 200, 400):
            for number in range(held, held + more):
                await buffer.put(group_of(number, lengths=(tokens,) * completions))
            held += more
            grown = await data_bytes(buffer) - empty
            beyond = (grown - payload * held) / held
            print(f"| {size} | {held} | {payload * held / 1e6:.1f} | {grown / 1e6:.1f} | {beyond:.0f} |", flush=True)
        await buffer.delete_run()
        await buffer.close()


def redis_benchmark(server: EmbeddedRedis) -> None:
    """SET and GET of the same sizes by the server's own measuring client."""
    binary = shutil.which("redis-benchmark")
    if binary is None:
        print("\nredis-benchmark is not on PATH (apt-get install redis-tools), so the server alone was not measured")
        return
    print("\n| size | clients | SET/s | GET/s | SET and GET, MB/s |\n|---|---|---|---|---|")
    password = server.url.partition("@")[0].rpartition(":")[2]
    for size, (completions, tokens, count) in SIZES.items():
        payload = len(encode_group(group_of(0, lengths=(tokens,) * completions)))
        for clients in PRODUCERS:
            words = ["-p", server.port, "-a", password, "-c", clients, "-d", payload, "-n", 8 * count, "-t", "set,get"]
            told = subprocess.run(
                [binary, *map(str, words), "--csv"], capture_output=True, text=True, check=True, timeout=300
            )
            rates = {row[0]: float(row[1]) for row in csv.reader(told.stdout.splitlines()) if row[0] in ("SET", "GET")}
            both = 1 / (1 / rates["SET"] + 1 / rates["GET"])
            print(f"| {size} | {clients} | {rates['SET']:.0f} | {rates['GET']:.0f} | {both * payload / 1e6:.0f} |")


async def main(server: EmbeddedRedis, quick: bool) -> None:
    """Every size with every number of producers, then memory; --quick one size, and neither memory nor the server."""
    print("| group | producers | moves | raw: publish/s | consume/s | both, groups/s | MB/s ", end="")
    print("| slipstream: publish/s | consume/s | both, groups/s | MB/s | of raw |\n|" + "---|" * 12)
    for codec in (False, True):
        for size in ("64 KB",) if quick else SIZES:
            for producers in (4,) if quick else PRODUCERS:
                await compare(server.url, size, producers, codec)
    if not quick:
        await memory(server.url)
        redis_benchmark(server)


if __name__ == "__main__":
    arguments = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedRedis.start(directory)
        try:
            asyncio.run(main(server, arguments.quick))
        finally:
            server.stop()
