"""This file tests rl/buffer_scripts.py: any sequence of operations on a real server, against a model in Python."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections.abc import Coroutine
from typing import Any

import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from rl import buffer_scripts
from rl.buffer import Buffer, BufferRewound, MissingGroups
from rl.codec import entry_of
from rl.trajectory import DROP_REASONS, Group, GroupEntry
from tests.rl.buffer_samples import LIMITS, balance, draw_of, group_of, ids

MAX_LAG = 1
RUNS = itertools.count()
NUMBERS = some.integers(0, 15)
CHOSEN = some.lists(NUMBERS, max_size=4, unique=True)


def name(number: int) -> str:
    return f"run/{number}"


class BufferAgainstModel(RuleBasedStateMachine):
    """Does the same to a buffer and to a model of it, and compares all that can be seen after every step.

    Every operation may run twice, as it does when an answer was lost, and connections are cut at will. Where a draw is:
    drawn, waiting, leased, trained or a drop reason; nowhere, if Redis never heard of it.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.runner = asyncio.Runner()
        self.client = redis.Redis.from_url(url)
        self.run_id = f"model-{os.getpid()}-{next(RUNS)}"
        self.buffer = self.wait(Buffer.connect(url, self.run_id, LIMITS, "owner"))
        self.twice = False
        script = self.buffer._script

        async def repeating(name: str, arguments: Any) -> Any:
            answer = await script(name, arguments)
            return await script(name, arguments) if self.twice else answer

        self.buffer._script = repeating
        self.version, self.last_step, self.drawn = 0, 0, 0
        self.where: dict[int, str] = {}
        self.ended: set[int] = set()  # also those that were restored since
        self.groups: dict[int, Group] = {}
        self.waiting: list[int] = []
        self.leased: dict[int, list[int]] = {}
        self.aborted_without_tokens = 0

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.twice = False
        self.wait(self.buffer.delete_run())
        self.wait(self.buffer.close())
        self.client.close()
        self.runner.close()

    # The model

    def group(self, number: int) -> Group:
        """What is or would be published for a draw, at the version of the first time that anybody asks."""
        lengths = ((number * 7) % 5, number % 3)
        return self.groups.setdefault(number, group_of(number, self.version, lengths))

    def entry(self, number: int) -> GroupEntry:
        return entry_of(self.group(number), 1)

    def hear_of(self, number: int) -> None:
        self.drawn = max(self.drawn, number + 1)

    def is_live(self, number: int) -> bool:
        return self.where.get(number) in ("waiting", "leased")

    def unlink(self, number: int) -> None:
        if number in self.waiting:
            self.waiting.remove(number)
        self.leased = {
            step: [each for each in batch if each != number] for step, batch in self.leased.items() if batch != [number]
        }

    def end(self, number: int, stage: str) -> None:
        self.unlink(number)
        self.hear_of(number)
        self.where[number] = stage
        self.ended.add(number)

    def set_lease(self, step: int, numbers: list[int]) -> None:
        for number in numbers:
            self.unlink(number)
        for number in numbers:
            self.where[number] = "leased"
        if numbers:
            self.leased.setdefault(step, []).extend(numbers)
        self.last_step = max(self.last_step, step)

    # What may happen

    @initialize()
    def begin(self) -> None:
        self.compare()

    @rule(twice=some.booleans())
    def lose_the_next_answers(self, twice: bool) -> None:
        self.twice = twice

    @rule()
    def cut_all_connections(self) -> None:
        self.client.client_kill_filter(_type="normal", skipme=True)

    @rule()
    def train_a_step(self) -> None:
        self.version += 1

    @rule(number=NUMBERS, keep=some.booleans())
    def admit(self, number: int, keep: bool) -> None:
        self.wait(self.buffer.admit(draw_of(number), b"state" if keep else None))
        if not self.is_live(number) and number not in self.ended:
            self.where[number] = "drawn"
            self.hear_of(number)

    @rule(number=NUMBERS)
    def put(self, number: int) -> None:
        new = not self.is_live(number) and number not in self.ended
        published = self.wait(self.buffer.put(self.group(number)))
        assert published == (new and not self.twice)
        if new:
            self.hear_of(number)
            self.where[number] = "waiting"
            self.waiting.append(number)

    @rule(numbers=some.lists(NUMBERS, min_size=3, max_size=5, unique=True))
    def put_several(self, numbers: list[int]) -> None:
        for number in numbers:
            self.put(number)

    @rule(number=NUMBERS, reason=some.sampled_from(DROP_REASONS))
    def drop(self, number: int, reason: Any) -> None:
        tokens = self.group(number).num_tokens
        assert self.wait(self.buffer.drop(number, name(number), tokens, reason)) == (not self.is_live(number))
        if not self.is_live(number) and number not in self.ended:
            self.end(number, reason)

    @rule(ahead=some.integers(-1, 2), count=some.integers(1, 3), ordered=some.booleans())
    def lease(self, ahead: int, count: int, ordered: bool) -> None:
        step = max(1, self.last_step + ahead)
        work = self.buffer.lease(step, count, self.version, MAX_LAG, ordered)
        if step > self.last_step + 1:
            try:
                self.wait(work)
            except BufferRewound:
                return
            raise AssertionError("a step was skipped")
        lease = self.wait(work)
        if step in self.leased:
            assert (ids(lease.entries), lease.dropped) == ([name(number) for number in self.leased[step]], ())
            return
        stale = [number for number in self.waiting if self.version - self.groups[number].oldest_version > MAX_LAG]
        for number in stale:
            self.end(number, "stale")
        fresh = sorted(self.waiting) if ordered else list(self.waiting)
        taken = fresh[:count] if len(fresh) >= count else []
        if taken:
            self.set_lease(step, taken)
        assert ids(lease.entries) == [name(number) for number in taken]
        assert set(ids(lease.dropped)) == {name(number) for number in stale}

    @rule(step=some.integers(1, 4), numbers=some.permutations(range(16)), only_live=some.booleans())
    def lease_exactly(self, step: int, numbers: list[int], only_live: bool) -> None:
        numbers = [number for number in numbers if self.is_live(number) or not only_live][:4]
        if set(self.leased.get(step, ())) - set(numbers):
            return  # no driver leases a step's other groups while it keeps some of the first
        missing = [number for number in numbers if not self.is_live(number)]
        try:
            entries = self.wait(self.buffer.lease_exactly(step, [name(number) for number in numbers]))
        except MissingGroups as error:
            assert error.group_ids == tuple(name(number) for number in missing)
            return
        assert not missing and ids(entries) == [name(number) for number in numbers]
        self.set_lease(step, numbers)

    @rule(step=some.integers(1, 4), number=NUMBERS)
    def restore(self, step: int, number: int) -> None:
        if self.where.get(number) in DROP_REASONS:
            return  # a group of a step was never dropped
        self.wait(self.buffer.restore(step, self.group(number)))
        self.hear_of(number)
        if number not in self.leased.get(step, ()):
            self.set_lease(step, [number])

    @rule(step=some.integers(1, 4))
    def release(self, step: int) -> None:
        batch = self.leased.get(step, [])
        assert self.wait(self.buffer.release(step)) == [name(number) for number in batch]
        for number in batch:
            self.unlink(number)
            self.where[number] = "waiting"
        self.waiting += batch

    @rule(numbers=CHOSEN, step=some.integers(0, 1))
    def commit(self, numbers: list[int], step: int) -> None:
        self.wait(self.buffer.commit([self.entry(number) for number in numbers], self.last_step + step))
        self.last_step += step
        for number in numbers:
            if self.is_live(number) or number not in self.ended:
                self.end(number, "trained")

    @rule(step=some.integers(1, 5))
    def confirm_leases(self, step: int) -> None:
        self.wait(self.buffer.confirm_leases(step))
        self.last_step = max(self.last_step, step)

    @rule(reason=some.sampled_from(DROP_REASONS))
    def drop_waiting(self, reason: Any) -> None:
        dropped = self.wait(self.buffer.drop_waiting(reason))
        assert ids(dropped) == [name(number) for number in self.waiting]
        for number in list(self.waiting):
            self.end(number, reason)

    @rule(next_draw=some.integers(0, 12))
    def write_off(self, next_draw: int) -> None:
        floor = self.floor()
        lost = [number for number in range(floor, next_draw) if number not in self.where]
        assert self.wait(self.buffer.write_off(next_draw)) == len(lost)
        for number in lost:
            self.end(number, "aborted")
            self.groups[number] = group_of(number, self.version, (0,))

    # What must hold

    def floor(self) -> int:
        return next(number for number in itertools.count() if number not in self.ended)

    @invariant()
    def compare(self) -> None:
        stats = self.wait(self.buffer.stats())
        balance(stats)
        for stage, shown in (("waiting", "buffered"), ("leased", "leased"), ("trained", "trained")):
            groups = [self.group(number) for number, where in self.where.items() if where == stage]
            assert getattr(stats, f"{shown}_groups") == len(groups), stage
            assert getattr(stats, f"{shown}_tokens") == sum(group.num_tokens for group in groups), stage
        for reason in DROP_REASONS:
            groups = [self.group(number) for number, where in self.where.items() if where == reason]
            assert stats.dropped[reason] == (len(groups), sum(group.num_tokens for group in groups)), reason
        nowhere = sum(self.where.get(number, "drawn") == "drawn" for number in range(self.drawn))
        assert (stats.drawn, stats.in_flight) == (self.drawn, nowhere)

    @invariant()
    def compare_holdings(self) -> None:
        holdings = self.wait(self.buffer.holdings())
        assert ids(holdings.waiting) == [name(number) for number in self.waiting]
        leased = [(name(number), step) for step, batch in sorted(self.leased.items()) for number in batch]
        assert list(holdings.leased.items()) == leased
        live = [number for number in self.where if self.is_live(number)]
        assert self.wait(self.buffer.fetch([name(number) for number in live])) == [self.groups[each] for each in live]
        unfinished = sorted(number for number, where in self.where.items() if where == "drawn")
        assert self.wait(self.buffer.drawn()) == tuple(draw_of(number) for number in unfinished)

    @invariant()
    def nothing_is_remembered_of_what_ended_below_the_floor(self) -> None:
        keys = {part: f"slipstream:{{{self.run_id}}}:{part}" for part in buffer_scripts.KEYS}
        floor = self.floor()
        assert int(self.client.hget(keys["counters"], "floor") or 0) == floor
        assert {int(each) for each in self.client.smembers(keys["ended"])} == {e for e in self.ended if e > floor}
        live = sum(self.is_live(number) for number in self.where)
        assert self.client.hlen(keys["entries"]) == self.client.hlen(keys["payloads"]) == live
        assert self.client.zcard(keys["versions"]) == self.client.zcard(keys["waiting"]) == len(self.waiting)


def test_any_sequence_of_operations_repeated_or_not_leaves_what_the_model_says(redis_url: str) -> None:
    run_state_machine_as_test(
        lambda: BufferAgainstModel(redis_url),
        settings=settings(
            max_examples=40,
            phases=[Phase.generate, Phase.shrink],
            stateful_step_count=40,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_scripts_neither_flush_nor_trim_nor_expire_nor_search_the_database() -> None:
    scripts = " ".join(body for name, body in vars(buffer_scripts).items() if name.isupper() and isinstance(body, str))
    commands = set(re.findall(r"(?:call|in_slices|gather)\('([A-Z]+)'", scripts))
    assert {"HSET", "HDEL", "ZADD", "ZREM", "SADD", "SREM"} <= commands, "the pattern finds commands"
    reads = "HGET HMGET HGETALL HEXISTS ZCARD ZRANGE ZRANGEBYSCORE ZSCORE ZMSCORE SISMEMBER LRANGE TYPE TIME"
    writes = "HSET HSETNX HDEL ZADD ZREM SADD SREM RPUSH DEL SET"
    assert commands <= {*reads.split(), *writes.split()}, "each touches a key of the run, by name, and only that"
