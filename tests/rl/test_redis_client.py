"""This file tests rl/redis_client.py: URLs are read strictly, passwords stay hidden, lost servers are awaited."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis
import redis.exceptions

from rl import redis_client
from rl.buffer import Buffer, PayloadReader
from rl.embedded_redis import EmbeddedRedis
from rl.redis_client import BufferUnavailable, Link, Patience, check_server, is_passing, masked, parse_url
from tests.rl.buffer_samples import LIMITS, admit, group_of, ids, publish
from tests.rl.redis_servers import free_port, redis_process, tls_before, write_certificate


def test_a_plain_url_is_taken_apart() -> None:
    address = parse_url("redis://user:p%40ss%2Fword@cache.example:6380/3")
    assert address.hosts == (("cache.example", 6380),)
    assert address.login == {"username": "user", "password": "p@ss/word"} and address.db == 3
    assert parse_url("redis://h").hosts == (("h", 6379),)
    assert parse_url("redis://[::1]:7000/").hosts == (("::1", 7000),)
    assert parse_url("rediss://:pw@h?ssl_ca_certs=ca.pem&ssl_check_hostname=false").tls == {
        "ssl_ca_certs": "ca.pem",
        "ssl_check_hostname": False,
    }


def test_a_sentinel_url_names_its_guards_and_the_service() -> None:
    address = parse_url("rediss+sentinel://u:pw@a:1,b,[::2]:3/main/4?sentinel_username=g&sentinel_password=x%26y")
    assert (address.hosts, address.service, address.db) == ((("a", 1), ("b", 26379), ("::2", 3)), "main", 4)
    assert address.login == {"username": "u", "password": "pw"}
    assert address.sentinel_login == {"username": "g", "password": "x&y"}


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://h", "starts with none of redis://, rediss://"),
        ("redis://:pa/ss@h:1/0", "host or port"),
        ("redis://u:1?b@h:1/0", "do not parse"),
        ("redis://u:1?b=@h:1/0", "query parameter is unknown"),
        ("redis://u:12#34@h/0", "a # cuts it off"),
        ("redis://user@h/0", "not user:password"),
        ("redis://u:@h/0", "not user:password"),
        ("redis://h:99999/0", "host or port"),
        ("redis://a:1,b:2/0", "host or port"),
        ("redis:///0", "host or port"),
        ("redis://h/zero", "database .* not a number"),
        ("redis://[::1/0", "brackets"),
        ("redis://h/0?ssl_ca_certs=x", "allowed are none"),
        ("redis://h/0?password=pass", "query parameter is unknown"),
        ("rediss://h/0?ssl_cert_reqs=maybe", "ssl_cert_reqs must be none or optional or required"),
        ("rediss://h/0?ssl_ca_certs=", "ssl_ca_certs must be given a value"),
        ("rediss://h/0?ssl_ca_certs=a&ssl_ca_certs=b", "given twice"),
        ("redis+sentinel://h:1", "name of the Sentinel service is missing"),
    ],
)
def test_a_malformed_url_is_refused_without_a_word_of_it(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){problem}.*write redis://") as told:
        parse_url(url)
    assert not any(part in str(told.value) for part in ("pa/ss", "ss@", "1?b", "12#", "34@", "99999"))
    assert masked(url).endswith("://***")


def test_a_shown_url_holds_no_password() -> None:
    assert masked("redis://user:sesame@h:1/0") == "redis://***@h:1/0"
    assert masked("redis://h/") == "redis://h:6379/0"
    assert masked("redis+sentinel://a:1,b:2/main?sentinel_password=s@same") == "redis+sentinel://a:1,b:2/main/0"
    assert "sesame" not in repr(parse_url("rediss+sentinel://u:sesame@a/main?sentinel_password=sesame"))
    assert masked("sesame") == "?://***"


def test_an_old_server_is_refused_by_its_version() -> None:
    with pytest.raises(ValueError, match="version 5.0.14; Slipstream needs 6.2"):
        check_server({"redis_version": "5.0.14"}, "redis://there")
    check_server({"redis_version": "7.0.15", "maxmemory_policy": "volatile-lru"}, "redis://there")


def test_only_a_server_that_is_away_or_changes_its_role_is_waited_for() -> None:
    errors = redis.exceptions
    script = "Error running script: @user_script:5: -READONLY You can't write against a read only replica."
    for error in (
        redis.ConnectionError("refused"),
        redis.TimeoutError("silent"),
        redis.BusyLoadingError("Redis is loading the dataset in memory"),
        redis.ReadOnlyError("You can't write against a read only replica."),
        errors.MasterDownError("Link with MASTER is down"),
        errors.ClusterDownError("The cluster is down"),
        errors.TryAgainError("Multiple keys request during rehashing of slot"),
        redis.ResponseError("NOREPLICAS Not enough good replicas to write."),
        redis.ResponseError(script),
        OSError("no route"),
    ):
        assert is_passing(error), error
    for error in (
        redis.AuthenticationError("invalid username-password pair"),
        errors.AuthorizationError("no"),
        errors.NoPermissionError("this user has no permissions"),
        redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        redis.ResponseError("wrong number of arguments"),
        redis.DataError("defect"),
    ):
        assert not is_passing(error), error


def test_pauses_grow_to_a_bound_and_end_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(redis_client.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(redis_client.random, "uniform", lambda low, high: high)
    patience, pauses = Patience("redis://there", 10.0), []
    with pytest.raises(BufferUnavailable, match=r"has been away for 10 s.*last failed with ConnectionError: gone"):
        while True:
            pauses.append(patience.pause_s(redis.ConnectionError("gone")))
            clock[0] += pauses[-1]
    assert pauses[:8] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0] and sum(pauses) == pytest.approx(10.0)
    with pytest.raises(BufferUnavailable, match="refused: AuthenticationError: no.*nothing is lost"):
        Patience("redis://there", 10.0).pause_s(redis.AuthenticationError("no"))


async def test_one_outage_is_counted_once_and_greeted_on_the_first_repetition(redis_url: str) -> None:
    link = Link(redis_url, 20.0)
    seen: list[str] = []

    async def greet() -> None:
        seen.append("greeted")

    async def attempt() -> str:
        seen.append("tried")
        if seen.count("tried") < 3:
            raise redis.ConnectionError("away")
        return "answer"

    link.greet = greet
    assert await link.call(attempt) == "answer"
    assert seen == ["tried", "greeted", "tried", "greeted", "tried"]
    assert await link.call(attempt) == "answer"
    assert (len(seen), link.reconnects) == (6, 1)
    await link.close()


async def test_a_cancellation_that_the_library_took_for_a_timeout_is_not_lost(redis_url: str) -> None:
    link, began = Link(redis_url, 60.0), asyncio.Event()

    async def swallowing() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise redis.TimeoutError("Timeout reading") from None

    task = asyncio.create_task(link.call(swallowing))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await link.close()


async def test_a_stopped_server_is_noticed_by_its_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "ANSWER_DEADLINE_S", 0.2)
    server = EmbeddedRedis.start(tmp_path)
    buffer = await Buffer.connect(server.url, "run", msgspec.structs.replace(LIMITS, reconnect_deadline_s=0.5))
    try:
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(BufferUnavailable, match="has been away .*TimeoutError"):
            await buffer.put(group_of(0))
        os.kill(server.pid, signal.SIGCONT)
        await buffer.put(group_of(0))
        assert (await buffer.stats()).buffered_groups == 1
    finally:
        os.kill(server.pid, signal.SIGCONT)
        await buffer.close()
        server.stop()


async def test_tls_and_an_acl_user_carry_a_whole_run(redis_url: str, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    with redis.Redis.from_url(redis_url) as client:
        client.execute_command(
            "ACL", "SETUSER", "learner", "on", ">p@ss", "~slipstream:*", "+@all", "-@dangerous", "-@admin", "+info"
        )
        async with tls_before(client.connection_pool.connection_kwargs["port"], certificate, key) as port:
            url = f"rediss://learner:p%40ss@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
            buffer = await Buffer.connect(url, "over-tls", LIMITS, owner="mine")
            await publish(buffer, group_of(0, lengths=(9000,)), group_of(1))
            lease = await buffer.lease(1, 1, version=0, max_lag=0)
            assert await buffer.fetch(ids(lease.entries)) == [group_of(0, lengths=(9000,))]
            reader = PayloadReader(url, "over-tls")
            assert await asyncio.to_thread(reader.fetch, ["run/1"]) == [group_of(1)]
            reader.close()
            await buffer.commit(lease.entries)
            assert (await buffer.stats()).trained_groups == 1
            await buffer.delete_run()
            await buffer.close()

            with pytest.raises(ValueError, match="(?s)refused: .*certificate verify failed"):
                await Buffer.connect(f"rediss://learner:p%40ss@127.0.0.1:{port}/0", "over-tls", LIMITS, owner="mine")
            with pytest.raises(ValueError, match="refused: .*invalid username-password") as told:
                await Buffer.connect(url.replace("p%40ss", "wrong-word"), "over-tls", LIMITS)
            assert "wrong-word" not in str(told.value)
        client.execute_command("ACL", "SETUSER", "learner", "-evalsha")
        plain = f"redis://learner:p%40ss@{redis_url.partition('@')[2]}"
        with pytest.raises(ValueError, match="refused: .*no permissions to run the 'evalsha'"):
            await Buffer.connect(plain, "over-tls", LIMITS)
        client.execute_command("ACL", "DELUSER", "learner")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[str, int, int]]:
    """A master, its replica and a Sentinel over both: the URL, the master's process and the replica's port."""
    word, guard_word = secrets.token_hex(8), secrets.token_hex(8)
    master_port, replica_port, guard_port = free_port(), free_port(), free_port()
    both = f"requirepass {word}\nmasterauth {word}\nappendonly yes\nrepl-diskless-sync-delay 0\n"
    guard = (
        f"requirepass {guard_word}\nsentinel monitor main 127.0.0.1 {master_port} 1\nsentinel auth-pass main {word}\n"
        "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 2000\n"
    )
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(redis_process(tmp_path / "master", master_port, both))
        replicating = f"{both}replicaof 127.0.0.1 {master_port}\n"
        stack.enter_context(redis_process(tmp_path / "replica", replica_port, replicating))
        with redis.Redis(port=master_port, password=word) as client:
            while client.execute_command("WAIT", 1, 100) < 1:  # the replica is in step, and Sentinel will see it
                continue
        stack.enter_context(redis_process(tmp_path / "sentinel", guard_port, guard, "--sentinel"))
        with redis.Redis(port=guard_port, password=guard_word) as client:
            while not client.sentinel_slaves("main"):
                continue
        url = f"redis+sentinel://:{word}@127.0.0.1:1,127.0.0.1:{guard_port}/main?sentinel_password={guard_word}"
        yield url, master.pid, replica_port


async def test_a_failover_loses_at_most_what_was_not_replicated_and_trains_nothing_twice(
    guarded: tuple[str, int, int],
) -> None:
    url, master_pid, replica_port = guarded
    driver = await Buffer.connect(url, "run", LIMITS, owner="mine")
    generator = await Buffer.connect(url, "run", LIMITS)
    reader = PayloadReader(url, "run", 20.0)
    before = await driver.server_id()
    await publish(driver, *(group_of(draw) for draw in range(4)))
    trained = list((await driver.lease(1, 4, version=0, max_lag=0)).entries)
    await driver.commit(trained)

    async def produce(first: int) -> None:
        for draw in range(first, 64, 4):
            await admit(driver, draw)
            await generator.put(group_of(draw))
            if draw == 24:
                os.kill(master_pid, signal.SIGKILL)

    await asyncio.gather(*(produce(first) for first in range(4, 8)))
    assert await driver.server_id() != before and driver.reconnects >= 1 and generator.reconnects >= 1
    held = {entry.draw for entry in (await driver.holdings()).waiting}
    lost = set(range(4, 64)) - held
    assert len(lost) <= 8, "nothing but what was under way when the master died"
    for draw in sorted(lost):  # as a driver does that sees another server
        await publish(driver, group_of(draw))
    for step in range(2, 17):
        entries = (await driver.lease(step, 4, version=0, max_lag=0)).entries
        assert await asyncio.to_thread(reader.fetch, ids(entries)) == [group_of(entry.draw) for entry in entries]
        await driver.commit(entries)
        await driver.commit(entries)
        trained += entries
    assert sorted(entry.draw for entry in trained) == list(range(64)), "each exactly once"
    stats = await driver.stats()
    assert (stats.trained_groups, stats.in_flight, stats.buffered_groups) == (64, 0, 0)
    for each in (driver, generator):
        await each.close()
    reader.close()


async def test_a_sentinel_that_knows_no_such_service_is_told_apart(guarded: tuple[str, int, int]) -> None:
    url = guarded[0].replace("/main?", "/other?")
    with pytest.raises(ValueError, match="refused: .*No master found for 'other'"):
        await Buffer.connect(url, "run", LIMITS, owner="mine")
