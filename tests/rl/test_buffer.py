"""This file tests rl/buffer.py against a real server: nothing is lost, doubled or mixed up."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import redis

from rl.buffer import (
    Buffer,
    BufferLimits,
    BufferRewound,
    BufferUnavailable,
    MissingGroups,
    OversizeGroup,
    PayloadReader,
)
from rl.codec import entry_of
from rl.embedded_redis import EmbeddedRedis
from tests.rl.buffer_samples import LIMITS, admit, balance, draw_of, group_of, ids, publish

RUNS = itertools.count()


@pytest.fixture
def run_id() -> str:
    return f"test-{os.getpid()}-{next(RUNS)}"


@pytest.fixture
async def buffer(redis_url: str, run_id: str):
    buffer = await Buffer.connect(redis_url, run_id, LIMITS)
    yield buffer
    await buffer.delete_run()
    await buffer.close()


@pytest.fixture
def server(tmp_path: Path):
    server = EmbeddedRedis.start(tmp_path)
    yield server
    server.stop()


async def test_a_group_goes_from_draw_to_commit_and_is_counted_at_each_stage(buffer: Buffer) -> None:
    group = group_of(0, lengths=(4, 6))
    await admit(buffer, 0, 1)
    assert (await buffer.stats()).in_flight == 2
    assert await buffer.put(group)
    stats = await buffer.stats()
    assert (stats.in_flight, stats.buffered_groups, stats.buffered_tokens) == (1, 1, 10)
    assert stats.buffered_bytes > 0 and stats.oldest_age_s >= 0
    lease = await buffer.lease(1, 1, version=0, max_lag=0)
    assert ids(lease.entries) == ["run/0"] and lease.entries[0].completion_tokens == (4, 6)
    assert await buffer.fetch(["run/0"]) == [group]
    stats = await buffer.stats()
    assert (stats.buffered_groups, stats.buffered_bytes, stats.leased_groups, stats.leased_tokens) == (0, 0, 1, 10)
    await buffer.commit(lease.entries)
    stats = await buffer.stats()
    assert (stats.leased_groups, stats.leased_bytes, stats.trained_groups, stats.trained_tokens) == (0, 0, 1, 10)
    balance(stats)


async def test_a_draw_is_kept_until_its_group_is_put_or_dropped(buffer: Buffer) -> None:
    await admit(buffer, 2, 0, 1, 0)
    assert await buffer.drawn() == (draw_of(0), draw_of(1), draw_of(2))
    await buffer.put(group_of(1))
    await buffer.drop(2, "run/2", 7, "zero_advantage")
    assert ids(await buffer.drawn()) == ["run/0"]
    await admit(buffer, 1, 2)  # a repetition that comes late
    assert ids(await buffer.drawn()) == ["run/0"]
    assert ((await buffer.stats()).drawn, (await buffer.stats()).in_flight) == (3, 1)


async def test_the_sampling_state_is_replaced_whole_alone_or_with_a_draw(buffer: Buffer) -> None:
    assert await buffer.read_state() is None
    await buffer.keep_state(b"first")
    await buffer.admit(draw_of(0), b"second")
    assert await buffer.read_state() == b"second"
    await buffer.admit(draw_of(1))
    assert await buffer.read_state() == b"second"


async def test_publication_is_idempotent_whatever_became_of_the_group(buffer: Buffer) -> None:
    await publish(buffer, group_of(0))
    assert not await buffer.put(group_of(0))
    entries = (await buffer.lease(1, 1, version=0, max_lag=0)).entries
    assert not await buffer.put(group_of(0))
    await buffer.commit(entries)
    assert not await buffer.put(group_of(0))
    assert await buffer.drop(1, "run/1", 5, "zero_advantage")
    assert await buffer.drop(1, "run/1", 5, "zero_advantage")
    assert not await buffer.put(group_of(1))
    stats = await buffer.stats()
    assert (stats.trained_groups, stats.dropped["zero_advantage"], stats.buffered_groups) == (1, (1, 5), 0)


async def test_a_published_group_is_not_dropped_by_whoever_samples_its_draw_again(buffer: Buffer) -> None:
    await publish(buffer, group_of(0))
    assert not await buffer.drop(0, "run/0", 5, "aborted")
    entries = (await buffer.lease(1, 1, version=0, max_lag=0)).entries
    assert not await buffer.drop(0, "run/0", 5, "aborted")
    await buffer.commit(entries)
    assert await buffer.drop(0, "run/0", 5, "aborted"), "it has ended, and nothing more is to do"
    stats = await buffer.stats()
    assert (stats.trained_groups, stats.dropped["aborted"]) == (1, (0, 0))


async def test_simultaneous_publications_of_one_group_leave_one(buffer: Buffer) -> None:
    published = await asyncio.gather(*(buffer.put(group_of(0)) for _ in range(20)))
    assert sorted(published) == [False] * 19 + [True]
    assert (await buffer.stats()).buffered_groups == 1


async def test_leases_come_in_order_of_publication_and_only_whole(buffer: Buffer) -> None:
    await publish(buffer, group_of(2), group_of(0), group_of(1))
    assert (await buffer.lease(1, 4, version=0, max_lag=0)).entries == ()
    assert ids((await buffer.lease(1, 2, version=0, max_lag=0)).entries) == ["run/2", "run/0"]
    assert (await buffer.lease(2, 2, version=0, max_lag=0)).entries == ()
    assert ids((await buffer.lease(2, 1, version=0, max_lag=0)).entries) == ["run/1"]


async def test_ordered_leases_take_the_lowest_draws_in_order(buffer: Buffer) -> None:
    await publish(buffer, *(group_of(draw) for draw in (10, 3, 9, 2, 4)))
    lease = await buffer.lease(1, 3, version=0, max_lag=0, ordered=True)
    assert ids(lease.entries) == ["run/2", "run/3", "run/4"]
    assert await buffer.fetch(["run/9"]) == [group_of(9)]
    await buffer.commit(lease.entries)
    assert ids((await buffer.lease(2, 2, version=0, max_lag=0, ordered=True)).entries) == ["run/9", "run/10"]


async def test_a_step_that_has_a_batch_gets_the_same_again(buffer: Buffer) -> None:
    await publish(buffer, *(group_of(draw) for draw in range(5)))
    first = await buffer.lease(1, 2, version=0, max_lag=0)
    second = await buffer.lease(2, 2, version=1, max_lag=1)
    assert (await buffer.lease(1, 2, version=9, max_lag=0)).entries == first.entries
    assert (await buffer.lease(2, 2, version=1, max_lag=1)).entries == second.entries
    holdings = await buffer.holdings()
    assert ids(holdings.waiting) == ["run/4"]
    assert list(holdings.leased.items()) == [("run/0", 1), ("run/1", 1), ("run/2", 2), ("run/3", 2)]


async def test_a_step_beyond_the_next_tells_that_redis_was_rewound_and_nothing_is_done(buffer: Buffer) -> None:
    await publish(buffer, group_of(0), group_of(1))
    await buffer.lease(1, 1, version=0, max_lag=0)
    with pytest.raises(BufferRewound, match="last leased for step 1, and step 2 has been leased"):
        await buffer.lease(3, 1, version=9, max_lag=0)
    assert ids((await buffer.holdings()).waiting) == ["run/1"]
    await buffer.lease_exactly(2, ["run/1"])
    assert (await buffer.lease(3, 1, version=2, max_lag=0)).entries == ()
    await buffer.commit([entry_of(group_of(5), 1)], step=3)
    assert (await buffer.lease(4, 1, version=2, max_lag=0)).entries == (), "a commit tells of its step as well"


async def test_groups_beyond_the_lag_bound_are_dropped_and_counted_even_without_a_lease(buffer: Buffer) -> None:
    await publish(buffer, group_of(0, version=1, lengths=(5,)), group_of(1, version=3), group_of(2, version=2))
    lease = await buffer.lease(1, 3, version=4, max_lag=2)
    assert (lease.entries, ids(lease.dropped)) == ((), ["run/0"])
    assert ids((await buffer.lease(1, 2, version=4, max_lag=2)).entries) == ["run/1", "run/2"]
    stats = await buffer.stats()
    assert stats.dropped["stale"] == (1, 5)
    balance(stats)
    with pytest.raises(MissingGroups, match="run/0 are not in the buffer"):
        await buffer.fetch(["run/1", "run/0"])


async def test_a_lease_repeated_for_its_lost_answer_tells_again_what_it_dropped(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish(buffer, group_of(0), group_of(1, version=5), group_of(2))
    script, lost = buffer._script, []

    async def losing(name, arguments):
        answer = await script(name, arguments)
        if name in ("LEASE", "DROP_WAITING") and name not in lost:
            lost.append(name)
            raise redis.ConnectionError("the answer was lost")
        return answer

    monkeypatch.setattr(buffer, "_script", losing)
    lease = await buffer.lease(1, 1, version=5, max_lag=0)
    assert (ids(lease.entries), ids(lease.dropped)) == (["run/1"], ["run/0", "run/2"])
    assert (await buffer.lease(1, 1, version=5, max_lag=0)).dropped == (), "another call is not a repetition"
    await publish(buffer, group_of(3))
    assert ids(await buffer.drop_waiting("surplus")) == ["run/3"]
    assert (lost, buffer.reconnects) == (["LEASE", "DROP_WAITING"], 2)


async def test_a_client_killed_between_lease_and_commit_loses_nothing(
    buffer: Buffer, redis_url: str, run_id: str
) -> None:
    await publish(buffer, *(group_of(draw) for draw in range(4)))
    script = (
        "import asyncio, os, signal, sys\n"
        "from rl.buffer import Buffer, BufferLimits\n"
        "async def main():\n"
        "    buffer = await Buffer.connect(sys.argv[1], sys.argv[2], BufferLimits(1 << 20, 99))\n"
        "    assert len((await buffer.lease(1, 3, version=0, max_lag=0)).entries) == 3\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    killed = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script, redis_url, run_id], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (await buffer.holdings()).leased == {"run/0": 1, "run/1": 1, "run/2": 1}
    lease = await buffer.lease(1, 3, version=0, max_lag=0)
    assert ids(lease.entries) == ["run/0", "run/1", "run/2"]
    await buffer.commit(lease.entries)
    assert (await buffer.stats()).trained_groups == 3


async def test_redelivery_keeps_the_order_asked_for_and_takes_waiting_groups_too(buffer: Buffer) -> None:
    await publish(buffer, *(group_of(draw) for draw in range(4)))
    await buffer.lease(1, 2, version=0, max_lag=0)
    again = await buffer.lease_exactly(1, ["run/3", "run/1", "run/0"])
    assert ids(again) == ["run/3", "run/1", "run/0"]
    assert (await buffer.lease(1, 3, version=0, max_lag=0)).entries == again
    assert (await buffer.stats()).leased_groups == 3
    assert await buffer.lease_exactly(2, ["run/1"]) == again[1:2], "the last word decides the step"
    assert list((await buffer.holdings()).leased.items()) == [("run/3", 1), ("run/0", 1), ("run/1", 2)]
    balance(await buffer.stats())


async def test_redelivery_names_what_is_gone_and_changes_nothing(buffer: Buffer) -> None:
    await publish(buffer, group_of(0), group_of(1))
    await buffer.lease(1, 1, version=0, max_lag=0)
    with pytest.raises(MissingGroups, match="groups run/8, run/9 are not in the buffer.*restore them") as told:
        await buffer.lease_exactly(2, ["run/0", "run/8", "run/1", "run/9"])
    assert told.value.group_ids == ("run/8", "run/9")
    assert (await buffer.holdings()).leased == {"run/0": 1}


async def test_commits_are_idempotent_and_count_what_redis_has_lost(buffer: Buffer) -> None:
    await publish(buffer, group_of(0), group_of(1), group_of(2))
    entries = (await buffer.lease(1, 2, version=0, max_lag=0)).entries
    await buffer.commit((*entries, *entries))
    await buffer.commit(entries)
    stats = await buffer.stats()
    assert (stats.trained_groups, stats.sampled_tokens) == (2, 15)
    waiting = (await buffer.holdings()).waiting
    await buffer.commit(waiting)  # Redis lost the lease
    await admit(buffer, 3)
    lost = entry_of(group_of(4, lengths=(7,)), 100)
    await buffer.commit([lost])  # Redis lost the group, and the admission of another
    await buffer.commit([lost])
    stats = await buffer.stats()
    assert (stats.drawn, stats.trained_groups, stats.trained_tokens, stats.in_flight) == (5, 4, 22, 1)
    assert (stats.buffered_groups, stats.buffered_bytes, stats.leased_bytes) == (0, 0, 0)
    assert not await buffer.put(group_of(4))
    balance(stats)


async def test_a_restored_group_is_leased_and_the_counters_stay_balanced(buffer: Buffer) -> None:
    await publish(buffer, *(group_of(draw) for draw in range(4)))
    lease = await buffer.lease(1, 2, version=0, max_lag=0)
    await buffer.commit(lease.entries)
    await buffer.restore(1, group_of(1))  # committed by a checkpoint that is damaged
    await buffer.restore(1, group_of(0))
    await buffer.restore(2, group_of(2))  # waiting: its lease was lost
    await buffer.restore(2, group_of(9))  # lost with its draw
    await buffer.restore(2, group_of(2))
    stats = await buffer.stats()
    assert (stats.drawn, stats.in_flight, stats.trained_groups, stats.leased_groups) == (10, 5, 0, 4)
    balance(stats)
    assert ids((await buffer.lease(1, 2, version=9, max_lag=0)).entries) == ["run/1", "run/0"]
    again = (await buffer.lease(2, 2, version=2, max_lag=9)).entries
    assert ids(again) == ["run/2", "run/9"]
    assert await buffer.fetch(["run/1", "run/9"]) == [group_of(1), group_of(9)]
    assert not await buffer.put(group_of(1))
    await buffer.commit((*lease.entries, *again))
    assert not await buffer.put(group_of(1))
    stats = await buffer.stats()
    assert (stats.trained_groups, stats.trained_tokens, stats.leased_bytes) == (4, 20, 0)
    balance(stats)


async def test_two_runs_on_one_server_never_see_each_other(redis_url: str) -> None:
    first, second = [await Buffer.connect(redis_url, run_id, LIMITS) for run_id in ("twin", "twin-2")]
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


async def test_payloads_beyond_the_caps_close_admission_until_they_are_leased(redis_url: str) -> None:
    for limits in (BufferLimits(2000, 1 << 16), BufferLimits(1 << 20, 5)):
        buffer = await Buffer.connect(redis_url, "capped", limits)
        draws = itertools.count()
        while await buffer.has_room():
            await publish(buffer, group_of(next(draws)))
        stats = await buffer.stats()
        assert stats.buffered_bytes >= 2000 or stats.buffered_groups == 5
        await buffer.lease(1, 1, version=0, max_lag=0)
        assert await buffer.has_room()
        await buffer.delete_run()
        await buffer.close()


async def test_a_group_larger_than_the_buffer_is_refused_with_its_size(redis_url: str) -> None:
    buffer = await Buffer.connect(redis_url, "oversize", BufferLimits(2000, 5))
    with pytest.raises(OversizeGroup, match="oversize: group run/99 has .* bytes, buffer.max_bytes is 2000"):
        await buffer.put(group_of(99, lengths=(500,)))
    assert await buffer.drop(99, "run/99", 500, "oversize")
    await buffer.delete_run()
    await buffer.close()


async def test_what_waits_at_the_end_is_dropped(buffer: Buffer) -> None:
    await publish(buffer, group_of(0), group_of(1))
    await admit(buffer, 2)
    await buffer.lease(1, 1, version=0, max_lag=0)
    assert ids(await buffer.drop_waiting("surplus")) == ["run/1"]
    assert await buffer.drop_waiting("surplus") == ()
    stats = await buffer.stats()
    assert (stats.dropped["surplus"], stats.leased_groups, stats.in_flight) == ((1, 5), 1, 1)
    balance(stats)


async def test_learner_ranks_read_the_same_payloads(buffer: Buffer, redis_url: str, run_id: str) -> None:
    await publish(buffer, *(group_of(draw) for draw in range(70)))
    reader = PayloadReader(redis_url, run_id)
    assert reader.fetch(["run/1", "run/0"]) == [group_of(1), group_of(0)]
    assert reader.fetch([f"run/{draw}" for draw in range(70)]) == [group_of(draw) for draw in range(70)]
    assert reader.fetch([]) == []
    with pytest.raises(MissingGroups, match="groups run/77 are not in the buffer"):
        reader.fetch(["run/77"])
    reader.close()


async def test_keys_of_another_owner_or_another_layout_are_refused_and_left_alone(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        first = await Buffer.connect(redis_url, "owned", LIMITS, owner="mine")
        await publish(first, group_of(0))
        await (await Buffer.connect(redis_url, "owned", LIMITS, owner="mine")).close()
        await (await Buffer.connect(redis_url, "owned", LIMITS)).close()
        with pytest.raises(ValueError, match=r"key slipstream:\{owned\}:counters .*belongs to another run.*run.name"):
            await Buffer.connect(redis_url, "owned", LIMITS, owner="theirs")
        client.hset("slipstream:{owned}:counters", "schema", 1)
        with pytest.raises(ValueError, match="has layout 1 where this version writes 2; nothing was touched"):
            await Buffer.connect(redis_url, "owned", LIMITS, owner="mine")
        client.hdel("slipstream:{owned}:counters", "schema")
        with pytest.raises(ValueError, match="has layout none"):
            await Buffer.connect(redis_url, "owned", LIMITS)
        assert await first.fetch(["run/0"]) == [group_of(0)]
        await first.delete_run()
        client.set("slipstream:{owned}:leased", "surprise")
        with pytest.raises(ValueError, match=r"key slipstream:\{owned\}:leased .*is a string"):
            await Buffer.connect(redis_url, "owned", LIMITS, owner="mine")
        assert client.get("slipstream:{owned}:leased") == b"surprise"
        await first.delete_run()
        await first.close()


async def test_foreign_bytes_are_refused_and_never_unpickled(buffer: Buffer, redis_url: str, run_id: str) -> None:
    await publish(buffer, group_of(0))
    with redis.Redis.from_url(redis_url) as client:
        client.hset(f"slipstream:{{{run_id}}}:payloads", "run/0", b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match="were not written by this project's codec"):
        await buffer.fetch(["run/0"])


async def test_dropped_connections_are_not_noticed(buffer: Buffer, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for draw in range(20):
            client.client_kill_filter(_type="normal", skipme=True)
            await publish(buffer, group_of(draw))
    assert (await buffer.stats()).buffered_groups == 20


async def test_a_server_killed_and_revived_has_its_groups_and_its_clients_back(server: EmbeddedRedis) -> None:
    buffer = await Buffer.connect(server.url, "run", LIMITS)
    reader = PayloadReader(server.url, "run")
    first_id = await buffer.server_id()
    await publish(buffer, *(group_of(draw, lengths=(50,)) for draw in range(20)))
    leased = (await buffer.lease(1, 5, version=0, max_lag=0)).entries
    await buffer.commit(leased[:2])
    before = await buffer.stats()
    with redis.Redis.from_url(server.url) as client:
        while client.info("persistence")["aof_buffer_length"]:  # under everysec a slow disk may hold writes back
            continue
    os.kill(server.pid, signal.SIGKILL)
    waiting = asyncio.gather(buffer.holdings(), buffer.stats())
    reading = asyncio.get_running_loop().run_in_executor(None, reader.fetch, ["run/19"])
    server._process.wait()
    server.revive()
    holdings, after = await waiting
    assert (buffer.reconnects, await buffer.server_id() != first_id) == (1, True)
    assert (after.buffered_groups, after.leased_groups, after.trained_groups) == (15, 3, 2)
    assert (after.sampled_tokens, after.buffered_bytes) == (before.sampled_tokens, before.buffered_bytes)
    assert ids(holdings.waiting) == [f"run/{draw}" for draw in range(5, 20)]
    assert (await buffer.lease(1, 3, version=0, max_lag=0)).entries == leased[2:]
    assert await reading == [group_of(19, lengths=(50,))]
    reader.close()
    await buffer.close()


async def test_a_server_that_comes_back_empty_is_told_whose_keys_it_holds(server: EmbeddedRedis) -> None:
    buffer = await Buffer.connect(server.url, "run", LIMITS, owner="mine")
    await publish(buffer, group_of(0))
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        client.client_kill_filter(_type="normal", skipme=True)
        script, failed = buffer._script, []

        async def failing(name, arguments):
            if not failed:
                failed.append(name)
                raise redis.ConnectionError("the server was away")
            return await script(name, arguments)

        buffer._script = failing
        await admit(buffer, 0)
        assert client.hget("slipstream:{run}:counters", "owner") == b"mine"
        client.hset("slipstream:{run}:counters", "owner", "theirs")
        failed.clear()
        with pytest.raises(BufferUnavailable, match="belongs to another run of the same id"):
            await admit(buffer, 1)
    await buffer.close()


async def test_a_server_gone_for_longer_than_the_deadline_stops_the_run_resumably(server: EmbeddedRedis) -> None:
    limits = msgspec.structs.replace(LIMITS, reconnect_deadline_s=0.3)
    buffer = await Buffer.connect(server.url, "run", limits)
    server.stop()
    expected = r"Redis at redis://\*\*\*@127.0.0.1.*has been away for 0 s.*start it again with its data, then resume"
    with pytest.raises(BufferUnavailable, match=expected):
        await buffer.put(group_of(0))
    reader = PayloadReader(server.url, "run", 0.2)
    with pytest.raises(BufferUnavailable, match="resume the run"):
        await asyncio.to_thread(reader.fetch, ["run/0"])
    reader.close()
    await buffer.close()


async def test_a_cancelled_call_ends_at_once_even_while_the_server_is_away(server: EmbeddedRedis) -> None:
    buffer = await Buffer.connect(server.url, "run", LIMITS)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        hanging = asyncio.create_task(buffer.put(group_of(0)))
        await asyncio.wait({hanging}, timeout=0.1)
        hanging.cancel()
        _, pending = await asyncio.wait({hanging}, timeout=10)
        assert not pending and hanging.cancelled()
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert isinstance(await buffer.put(group_of(0)), bool), "the connection is not confused by the answer it missed"
    assert (await buffer.stats()).buffered_groups == 1
    await buffer.close()


async def test_memory_returns_to_its_floor_after_commits(server: EmbeddedRedis) -> None:
    buffer = await Buffer.connect(server.url, "run", BufferLimits(1 << 30, 1 << 16))
    client = redis.Redis.from_url(server.url)

    async def cycle(step: int) -> tuple[int, int]:
        first = 100 * step
        await publish(buffer, *(group_of(draw, lengths=(2000,) * 2) for draw in range(first, first + 100)))
        full = client.info("memory")["used_memory_dataset"]
        await buffer.commit((await buffer.lease(step + 1, 100, version=0, max_lag=0)).entries)
        return full, client.info("memory")["used_memory_dataset"]

    _, floor = await cycle(0)
    for step in range(1, 5):
        full, emptied = await cycle(step)
        assert full - floor > 100 * 2 * 2000 * 9, "payloads were held"
        assert emptied - floor < 0.03 * (full - floor)
    assert not client.exists("slipstream:{run}:ended"), "ended draws are not remembered one by one"
    client.close()
    await buffer.close()


async def test_a_server_out_of_memory_fails_whole_and_can_still_commit(server: EmbeddedRedis) -> None:
    buffer = await Buffer.connect(server.url, "run", LIMITS)
    await publish(buffer, group_of(0), group_of(2))
    entries = (await buffer.lease(1, 1, version=0, max_lag=0)).entries
    await admit(buffer, 1)
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 1)
        before = await buffer.stats()
        for refused in (buffer.put(group_of(1)), buffer.admit(draw_of(3)), buffer.restore(1, group_of(4))):
            with pytest.raises(BufferUnavailable, match="refused: .*OOM"):
                await refused
        after = await buffer.stats()
        assert msgspec.structs.replace(after, oldest_age_s=0) == msgspec.structs.replace(before, oldest_age_s=0)
        await buffer.commit(entries)
        assert await buffer.drop(1, "run/1", 3, "aborted")
        assert ids((await buffer.lease(2, 1, version=1, max_lag=1)).entries) == ["run/2"]
        assert (await buffer.stats()).trained_groups == 1
    balance(await buffer.stats())
    await buffer.close()


async def test_a_server_that_would_evict_is_refused_and_one_that_forgets_is_warned_of(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        buffer = await Buffer.connect(server.url, "run", LIMITS)
        assert buffer.warning is None
        await buffer.close()
        client.config_set("appendonly", "no")
        buffer = await Buffer.connect(server.url, "run", LIMITS)
        assert buffer.warning and "appends nothing to disk" in buffer.warning and "appendonly yes" in buffer.warning
        await buffer.close()
        client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(ValueError, match="allkeys-lru and would silently evict.*set maxmemory-policy noeviction"):
            await Buffer.connect(server.url, "run", LIMITS)


async def test_a_server_that_refuses_is_named_without_its_password(redis_url: str) -> None:
    host = redis_url.partition("@")[2]
    expected = r"Redis at redis://\*\*\*@127.0.0.1:.* refused: .*password.*buffer.redis"
    with pytest.raises(ValueError, match=expected) as told:
        await Buffer.connect(f"redis://:sesame@{host}", "run", LIMITS)
    assert "sesame" not in str(told.value)
    with pytest.raises(ValueError, match="refused: .*Connect call failed"):
        await Buffer.connect("redis://127.0.0.1:1/0", "run", LIMITS, owner="mine")
    with pytest.raises(ValueError, match="is not a usable Redis URL"):
        await Buffer.connect("http://localhost", "run", LIMITS)


async def test_who_joins_a_run_waits_for_its_server_to_come_back(server: EmbeddedRedis) -> None:
    server.stop()
    joining = asyncio.create_task(Buffer.connect(server.url, "run", LIMITS))
    await asyncio.wait({joining}, timeout=0.2)
    server.revive()
    await (await joining).close()
