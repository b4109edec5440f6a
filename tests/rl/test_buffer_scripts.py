"""This file tests rl/buffer_scripts.py: random operations on a real server against a model in plain Python."""

from __future__ import annotations

import os
import random
import re

import pytest

from rl import buffer_scripts
from rl.buffer import Buffer
from rl.trajectory import DROP_REASONS, Group
from tests.rl.buffer_samples import balance, group_of, ids


class Model:
    """What the buffer should hold, in plain Python; `act` does one random thing to both and compares the answers."""

    def __init__(self, buffer: Buffer, seed: int) -> None:
        self.buffer = buffer
        self.random = random.Random(seed)
        self.version = 0
        self.drawn = 0
        self.in_flight: list[Group] = []
        self.buffered: list[Group] = []
        self.leased: list[Group] = []
        self.trained: list[Group] = []
        self.dropped: list[tuple[str, Group]] = []

    async def act(self) -> None:
        actions = (
            [self.draw] * 4 + [self.publish] * 4 + [self.drop, self.lease, self.lease, self.commit, self.give_back]
        )
        await self.random.choice([*actions, self.repeat, self.step, self.redeliver])()

    def pick(self, groups: list[Group]) -> list[Group]:
        return self.random.sample(groups, self.random.randint(0, len(groups)))

    async def draw(self) -> None:
        assert await self.buffer.admit() == self.drawn
        lengths = tuple(self.random.randint(0, 5) for _ in range(2))
        self.in_flight.append(group_of(self.drawn, self.version, lengths))
        self.drawn += 1

    async def publish(self) -> None:
        for group in self.pick(self.in_flight)[:2]:
            assert await self.buffer.put(group)
            self.in_flight.remove(group)
            self.buffered.append(group)

    async def drop(self) -> None:
        for group in self.pick(self.in_flight)[:1]:
            reason = self.random.choice(DROP_REASONS)
            assert await self.buffer.drop(group.group_id, group.num_tokens, reason)
            self.in_flight.remove(group)
            self.dropped.append((reason, group))

    async def lease(self) -> None:
        count, ordered = self.random.randint(1, 4), self.random.random() < 0.3
        lease = await self.buffer.lease(count, self.version, max_lag=1, ordered=ordered)
        stale = [group for group in self.buffered if self.version - group.oldest_version > 1]
        self.dropped += [("stale", group) for group in stale]
        fresh = [group for group in self.buffered if group not in stale]
        if ordered and len(fresh) >= count:
            fresh.sort(key=lambda group: group.draw)
        taken = fresh[:count] if len(fresh) >= count else []
        self.buffered = fresh[len(taken) :]
        self.leased += taken
        assert (ids(lease.entries), ids(lease.dropped)) == (ids(taken), ids(stale))

    async def commit(self) -> None:
        done = self.pick(self.leased)
        await self.buffer.commit(ids(done + self.trained[-2:]))
        self.leased = [group for group in self.leased if group not in done]
        self.trained += done

    async def give_back(self) -> None:
        returned = self.pick(self.leased)[:1]
        assert await self.buffer.give_back(ids(returned)) == len(returned)
        self.leased = [group for group in self.leased if group not in returned]
        self.buffered += returned

    async def repeat(self) -> None:
        for group in self.buffered + self.leased + self.trained[-3:] + [group for _, group in self.dropped[-3:]]:
            assert not await self.buffer.put(group)
            assert not await self.buffer.drop(group.group_id, 1, "aborted")

    async def redeliver(self) -> None:
        wanted = self.pick(self.leased)
        assert ids(await self.buffer.lease_again(ids(wanted))) == ids(wanted)
        assert await self.buffer.fetch(ids(wanted)) == wanted

    async def step(self) -> None:
        self.version += 1

    async def compare(self) -> None:
        stats = await self.buffer.stats()
        balance(stats)
        for name in ("buffered", "leased", "trained"):
            groups = getattr(self, name)
            assert getattr(stats, f"{name}_groups") == len(groups)
            assert getattr(stats, f"{name}_tokens") == sum(group.num_tokens for group in groups)
        for reason in DROP_REASONS:
            groups = [group for why, group in self.dropped if why == reason]
            assert stats.dropped[reason] == (len(groups), sum(group.num_tokens for group in groups))
        assert (stats.drawn, stats.in_flight) == (self.drawn, len(self.in_flight))
        assert set(ids(await self.buffer.leased())) == set(ids(self.leased))
        assert await self.buffer.fetch(ids(self.buffered)) == self.buffered


@pytest.mark.parametrize("seed", range(6))
async def test_drawn_equals_what_became_of_it_under_any_sequence_of_operations(redis_url: str, seed: int) -> None:
    buffer = await Buffer.connect(redis_url, f"model-{os.getpid()}-{seed}", 1 << 20)
    model = Model(buffer, seed)
    for _ in range(200):
        await model.act()
        await model.compare()
    assert model.trained and model.dropped and model.version
    await buffer.delete_run()
    await buffer.close()


def test_scripts_neither_flush_nor_trim_nor_expire_nor_search_the_database() -> None:
    scripts = " ".join(body for name, body in vars(buffer_scripts).items() if name.isupper())
    commands = set(re.findall(r"redis\.p?call\('([A-Z]+)'", scripts))
    assert {"XADD", "XREADGROUP", "XACK", "XDEL", "HDEL"} <= commands, "the pattern finds commands"
    assert all(command[0] in "XH" for command in commands - {"TIME"}), "only the run's own streams and hashes"
    assert not commands & {"XTRIM"} and "MAXLEN" not in scripts
