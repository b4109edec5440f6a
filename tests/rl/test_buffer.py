"""This file tests rl/buffer.py against a real server: nothing is lost, doubled or mixed up."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from rl.buffer import Buffer, BufferUnavailable, OversizeGroup, PayloadReader, check_server, masked
from rl.embedded_redis import EmbeddedRedis
from tests.rl.buffer_samples import balance, group_of, ids, publish

CAP = 1 << 20
RUNS = itertools.count()


@pytest.fixture
async def buffer(redis_url: str):
    buffer = await Buffer.connect(redis_url, f"test-{os.getpid()}-{next(RUNS)}", CAP)
    yield buffer
    await buffer.delete_run()
    await buffer.close()


async def test_a_group_goes_from_draw_to_commit_and_is_counted_at_each_stage(buffer: Buffer) -> None:
    group = group_of(0, lengths=(4, 6))
    assert await buffer.admit() == 0 and await buffer.admit() == 1
    assert (await buffer.stats()).in_flight == 2
    assert await buffer.put(group)
    stats = await buffer.stats()
    assert (stats.in_flight, stats.buffered_groups, stats.buffered_tokens) == (1, 1, 10)
    assert stats.buffered_bytes > 0 and stats.oldest_age_s >= 0
    lease = await buffer.lease(1, version=0, max_lag=0)
    assert ids(lease.entries) == ["run/0"] and lease.entries[0].completion_tokens == (4, 6)
    assert await buffer.fetch(["run/0"]) == [group]
    stats = await buffer.stats()
    assert (stats.buffered_groups, stats.buffered_bytes, stats.leased_groups, stats.leased_tokens) == (0, 0, 1, 10)
    await buffer.commit(["run/0"])
    stats = await buffer.stats()
    assert (stats.leased_groups, stats.leased_bytes, stats.trained_groups, stats.trained_tokens) == (0, 0, 1, 10)
    balance(stats)


async def test_publication_is_idempotent_whatever_became_of_the_group(buffer: Buffer) -> None:
    await publish(buffer, group_of(0))
    assert not await buffer.put(group_of(0))
    await buffer.lease(1, version=0, max_lag=0)
    assert not await buffer.put(group_of(0))
    await buffer.commit(["run/0"])
    assert not await buffer.put(group_of(0))
    assert not await buffer.drop("run/0", 5, "aborted")
    assert await buffer.drop("run/1", 5, "zero_advantage")
    assert not await buffer.drop("run/1", 5, "zero_advantage")
    assert not await buffer.put(group_of(1))
    stats = await buffer.stats()
    assert (stats.trained_groups, stats.dropped["zero_advantage"], stats.buffered_groups) == (1, (1, 5), 0)


async def test_simultaneous_publications_of_one_group_leave_one(buffer: Buffer) -> None:
    published = await asyncio.gather(*(buffer.put(group_of(0)) for _ in range(20)))
    assert sorted(published) == [False] * 19 + [True]
    assert (await buffer.stats()).buffered_groups == 1


async def test_leases_come_in_order_of_publication_and_only_whole(buffer: Buffer) -> None:
    await publish(buffer, group_of(2), group_of(0), group_of(1))
    assert (await buffer.lease(4, version=0, max_lag=0)).entries == ()
    assert ids((await buffer.lease(2, version=0, max_lag=0)).entries) == ["run/2", "run/0"]
    assert (await buffer.lease(2, version=0, max_lag=0)).entries == ()
    assert ids((await buffer.lease(1, version=0, max_lag=0)).entries) == ["run/1"]


async def test_ordered_leases_take_the_lowest_draws_in_order(buffer: Buffer) -> None:
    await publish(buffer, *(group_of(draw) for draw in (10, 3, 9, 2, 4)))
    assert ids((await buffer.lease(3, version=0, max_lag=0, ordered=True)).entries) == ["run/2", "run/3", "run/4"]
    assert await buffer.fetch(["run/9"]) == [group_of(9)]
    await buffer.commit(["run/2", "run/3", "run/4"])
    assert ids((await buffer.lease(2, version=0, max_lag=0, ordered=True)).entries) == ["run/9", "run/10"]


async def test_groups_beyond_the_lag_bound_are_dropped_and_counted_even_without_a_lease(buffer: Buffer) -> None:
    await publish(buffer, group_of(0, version=1, lengths=(5,)), group_of(1, version=3), group_of(2, version=2))
    lease = await buffer.lease(3, version=4, max_lag=2)
    assert (lease.entries, ids(lease.dropped)) == ((), ["run/0"])
    assert ids((await buffer.lease(2, version=4, max_lag=2)).entries) == ["run/1", "run/2"]
    stats = await buffer.stats()
    assert stats.dropped["stale"] == (1, 5)
    balance(stats)
    with pytest.raises(ValueError, match="run/0 are not in the buffer"):
        await buffer.fetch(["run/1", "run/0"])


async def test_a_client_killed_between_lease_and_commit_loses_nothing(buffer: Buffer, redis_url: str) -> None:
    await publish(buffer, *(group_of(draw) for draw in range(4)))
    run_id = buffer._keys[0].partition("{")[2].partition("}")[0]
    script = (
        "import asyncio, os, signal, sys\n"
        "from rl.buffer import Buffer\n"
        "async def main():\n"
        "    buffer = await Buffer.connect(sys.argv[1], sys.argv[2], 1 << 20)\n"
        "    assert len((await buffer.lease(3, version=0, max_lag=0)).entries) == 3\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    killed = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script, redis_url, run_id], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert ids(await buffer.leased()) == ["run/0", "run/1", "run/2"]
    assert (await buffer.lease(2, version=0, max_lag=0)).entries == ()
    again = await buffer.lease_again(["run/2", "run/0"])
    assert ids(again) == ["run/2", "run/0"] and again == await buffer.lease_again(["run/2", "run/0"])
    assert await buffer.give_back(["run/1"]) == 1
    assert ids((await buffer.lease(2, version=0, max_lag=0)).entries) == ["run/3", "run/1"]
    await buffer.commit([f"run/{draw}" for draw in range(4)])
    assert (await buffer.stats()).trained_groups == 4


async def test_redelivery_names_what_is_not_leased(buffer: Buffer) -> None:
    await publish(buffer, group_of(0), group_of(1))
    await buffer.lease(1, version=0, max_lag=0)
    with pytest.raises(ValueError, match="groups run/1, run/9 are not leased"):
        await buffer.lease_again(["run/0", "run/1", "run/9"])


async def test_commits_are_idempotent_and_refuse_what_was_never_leased(buffer: Buffer) -> None:
    await publish(buffer, group_of(0), group_of(1), group_of(2))
    await buffer.lease(2, version=0, max_lag=0)
    with pytest.raises(ValueError, match="groups run/2 are not leased"):
        await buffer.commit(["run/0", "run/2"])
    assert (await buffer.stats()).trained_groups == 0
    await buffer.commit(["run/0", "run/0"])
    await buffer.commit(["run/0", "run/1"])
    assert (await buffer.stats()).trained_groups == 2


async def test_two_runs_on_one_server_never_see_each_other(redis_url: str) -> None:
    first, second = [await Buffer.connect(redis_url, run_id, CAP) for run_id in ("twin", "twin-2")]
    try:
        await publish(first, group_of(0))
        assert await second.put(group_of(0, lengths=(9,)))
        assert (await first.stats()).buffered_tokens == 5
        await second.delete_run()
        assert await first.fetch(["run/0"]) == [group_of(0)]
        await first.delete_run()
        with redis.Redis.from_url(redis_url) as client:
            assert not list(client.scan_iter("*twin*"))
    finally:
        await first.close()
        await second.close()


async def test_payloads_beyond_the_cap_close_admission_until_they_are_leased(redis_url: str) -> None:
    buffer = await Buffer.connect(redis_url, "capped", 2000)
    assert await buffer.has_room()
    draws = itertools.count()
    while await buffer.has_room():
        await publish(buffer, group_of(next(draws)))
    assert (await buffer.stats()).buffered_bytes >= 2000
    await buffer.lease(1, version=0, max_lag=0)
    assert await buffer.has_room()
    with pytest.raises(OversizeGroup, match="oversize: group run/99 has .* bytes, buffer.max_bytes is 2000"):
        await buffer.put(group_of(99, lengths=(500,)))
    assert await buffer.drop("run/99", 500, "oversize")
    await buffer.delete_run()
    await buffer.close()


async def test_waiting_ends_with_a_publication_and_not_before(buffer: Buffer) -> None:
    await publish(buffer, group_of(0))
    await buffer.lease(2, version=0, max_lag=0)
    assert not await buffer.wait_published(0.05), "what the lease has seen is not new"
    waiting = asyncio.create_task(buffer.wait_published(60))
    await buffer.has_room()
    assert not waiting.done()
    await publish(buffer, group_of(1))
    assert await waiting
    await publish(buffer, group_of(2))
    assert await buffer.wait_published(60), "published between two waits"
    assert not await buffer.wait_published(0.05), "told already"


async def test_what_waits_at_the_end_is_dropped_as_surplus_and_what_was_sampled_as_aborted(buffer: Buffer) -> None:
    await publish(buffer, group_of(0), group_of(1))
    await buffer.admit(3)
    await buffer.lease(1, version=0, max_lag=0)
    assert ids(await buffer.drop_buffered("surplus")) == ["run/1"]
    assert await buffer.drop_in_flight("aborted") == 3
    assert await buffer.drop_in_flight("aborted") == 0
    stats = await buffer.stats()
    assert (stats.dropped["surplus"], stats.dropped["aborted"], stats.leased_groups) == ((1, 5), (3, 0), 1)
    assert stats.in_flight == 0
    balance(stats)


async def test_learner_ranks_read_the_same_payloads(buffer: Buffer, redis_url: str) -> None:
    await publish(buffer, group_of(0), group_of(1))
    reader = PayloadReader(redis_url, buffer._keys[0].partition("{")[2].partition("}")[0])
    assert reader.fetch(["run/1", "run/0"]) == [group_of(1), group_of(0)]
    assert reader.fetch([]) == []
    with pytest.raises(ValueError, match="groups run/7 are not in the buffer"):
        reader.fetch(["run/7"])
    reader.close()


@pytest.fixture
def server(tmp_path: Path):
    server = EmbeddedRedis.start(tmp_path)
    yield server
    server.stop()


async def test_a_killed_server_has_its_groups_back_when_started_on_its_directory(tmp_path: Path) -> None:
    server = EmbeddedRedis.start(tmp_path)
    buffer = await Buffer.connect(server.url, "run", CAP)
    await publish(buffer, *(group_of(draw, lengths=(50,)) for draw in range(20)))
    leased = (await buffer.lease(5, version=0, max_lag=0)).entries
    await buffer.commit(ids(leased[:2]))
    before = await buffer.stats()
    with redis.Redis.from_url(server.url) as client:
        while client.info("persistence")["aof_buffer_length"]:  # under everysec a slow disk may hold writes back
            continue
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(BufferUnavailable, match=r"Redis at redis://\*\*\*@127.0.0.1.*resume the run"):
        await buffer.wait_published(60)
    await buffer.close()
    server.stop()
    server = EmbeddedRedis.start(tmp_path)
    try:
        buffer = await Buffer.connect(server.url, "run", CAP)
        after = await buffer.stats()
        assert (after.buffered_groups, after.leased_groups, after.trained_groups) == (15, 3, 2)
        assert (after.sampled_tokens, after.buffered_bytes) == (before.sampled_tokens, before.buffered_bytes)
        assert await buffer.lease_again(ids(leased[2:])) == leased[2:]
        assert ids((await buffer.lease(15, version=0, max_lag=0)).entries) == [f"run/{draw}" for draw in range(5, 20)]
        assert await buffer.fetch(["run/19"]) == [group_of(19, lengths=(50,))]
        await buffer.close()
    finally:
        server.stop()


async def test_memory_returns_to_its_floor_after_commits(server: EmbeddedRedis) -> None:
    buffer = await Buffer.connect(server.url, "run", 1 << 30)
    client = redis.Redis.from_url(server.url)

    async def cycle(first: int) -> tuple[int, int]:
        await publish(buffer, *(group_of(draw, lengths=(2000,) * 2) for draw in range(first, first + 100)))
        full = client.info("memory")["used_memory_dataset"]
        await buffer.commit(ids((await buffer.lease(100, version=0, max_lag=0)).entries))
        return full, client.info("memory")["used_memory_dataset"]

    _, floor = await cycle(0)
    for number in range(1, 5):
        full, emptied = await cycle(100 * number)
        assert full - floor > 100 * 2 * 2000 * 9, "payloads were held"
        assert emptied - floor < 0.03 * (full - floor)
    client.close()
    await buffer.close()


async def test_a_server_out_of_memory_fails_whole_and_can_still_commit(server: EmbeddedRedis) -> None:
    buffer = await Buffer.connect(server.url, "run", CAP)
    await publish(buffer, group_of(0))
    await buffer.lease(1, version=0, max_lag=0)
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 1)
        before = await buffer.stats()
        with pytest.raises(BufferUnavailable, match="OOM"):
            await buffer.put(group_of(1))
        assert await buffer.stats() == before
        await buffer.commit(["run/0"])
        assert (await buffer.stats()).trained_groups == 1
    await buffer.close()


async def test_a_server_that_would_evict_is_refused(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ValueError, match="allkeys-lru and would silently evict.*set maxmemory-policy noeviction"):
        await Buffer.connect(server.url, "run", CAP)


async def test_a_server_that_refuses_is_named_without_its_password(redis_url: str) -> None:
    host = redis_url.partition("@")[2]
    with pytest.raises(
        ValueError, match=r"Redis at redis://\*\*\*@127.0.0.1:.* refused: .*password.*buffer.redis"
    ) as told:
        await Buffer.connect(f"redis://:sesame@{host}", "run", CAP)
    assert "sesame" not in str(told.value)
    with pytest.raises(ValueError, match="refused: .*Connect call failed"):
        await Buffer.connect("redis://127.0.0.1:1/0", "run", CAP)
    with pytest.raises(ValueError, match="is not a Redis URL"):
        await Buffer.connect("http://localhost", "run", CAP)


def test_an_old_server_is_refused_by_its_version() -> None:
    with pytest.raises(ValueError, match="version 5.0.14; Slipstream needs 6.2"):
        check_server({"redis_version": "5.0.14"}, "redis://there")
    check_server({"redis_version": "7.0.15", "maxmemory_policy": "volatile-lru"}, "redis://there")


@pytest.mark.parametrize("url", ["redis://:pa/ss@h:1/0", "redis://u:a?b@h:1/0", "redis://h:1/0?password=a/ss"])
def test_a_shown_url_holds_no_password_even_if_malformed(url: str) -> None:
    assert "ss" not in masked(url) and "a?b" not in masked(url) and masked(url).endswith("h:1/0")
