"""This file tests learners/rank_watch.py: a failure is heard at once, a death everywhere, and silence is a death."""

from __future__ import annotations

import asyncio

import pytest

from learners.rank_watch import Rank, RankWatch
from rl.parts import LearnersLost


class Dead(Exception):
    """What Ray raises where a process is gone."""


class Handle:
    """An actor handle whose sign of life is scripted."""

    def __init__(self) -> None:
        self.alive, self.silent = True, False
        self.beat_twice = asyncio.Event()
        self.beats = 0

    @property
    def beat(self):
        return self

    async def remote(self) -> str:
        self.beats += 1
        if self.beats == 2:
            self.beat_twice.set()
        if self.silent:
            await asyncio.Event().wait()
        if not self.alive:
            raise Dead("the actor died.\nA long explanation")
        return "step for 3.0 s"


class Group:
    """Two scripted ranks and their watch."""

    def __init__(self, deadline_s: float = 0.2) -> None:
        self.events: list[tuple] = []
        self.handles = [Handle(), Handle()]
        ranks = [
            Rank(
                number=n,
                actor=handle,
                part=f"learner-{n}-0",
                log=f"logs/learner_{n}.log",
                node="abcdefghij",
                pid=40 + n,
            )
            for n, handle in enumerate(self.handles)
        ]
        self.watch = RankWatch(ranks, deadline_s, (Dead,), lambda kind, **facts: self.events.append((kind, facts)))


@pytest.fixture
def group():
    return Group()


async def answer(value):
    return value


async def fail(error):
    raise error


async def forever():
    await asyncio.Event().wait()


async def test_every_rank_answers_in_order(group):
    assert await group.watch.all("step", [answer("a"), answer("b")]) == ["a", "b"]
    assert await group.watch.all("send", [answer("rank 0 alone")]) == ["rank 0 alone"]


async def test_a_rank_that_fails_is_heard_while_its_peer_hangs_in_a_collective(group):
    with pytest.raises(ValueError, match="the gate is closed"):
        await group.watch.all("step", [forever(), fail(ValueError("the gate is closed"))])
    group.watch.check()  # an error is not a death


async def test_a_call_that_settles_raises_only_when_all_have_answered(group):
    slow = asyncio.Event()
    saving = asyncio.ensure_future(
        group.watch.all("finish_save", [fail(OSError("disk full")), slow.wait()], settle=True)
    )
    await asyncio.wait({saving, asyncio.ensure_future(asyncio.sleep(0))}, return_when=asyncio.FIRST_COMPLETED)
    assert not saving.done()
    slow.set()
    with pytest.raises(OSError, match="disk full"):
        await saving


async def test_the_death_of_one_rank_ends_every_pending_and_every_later_call(group):
    saving = asyncio.ensure_future(group.watch.all("finish_save", [forever(), forever()], settle=True))
    with pytest.raises(
        LearnersLost, match=r"learner rank 1 \(pid 41 on node abcdefgh\) died \(Dead: the actor died\.\)"
    ):
        await group.watch.all("step", [forever(), fail(Dead("the actor died.\nA long explanation"))])
    with pytest.raises(LearnersLost, match="see logs/learner_1.log"):
        await saving
    with pytest.raises(LearnersLost):
        await group.watch.all("step", [asyncio.Future(), asyncio.Future()])
    assert [kind for kind, _ in group.events] == ["learner_rank_lost"]
    assert group.events[0][1]["rank"] == 1 and group.events[0][1]["pid"] == 41


async def test_an_error_that_a_peers_death_caused_is_told_as_that_death(group):
    group.handles[1].alive = False
    with pytest.raises(LearnersLost, match="learner rank 1"):
        await group.watch.all("step", [fail(RuntimeError("Connection closed by peer")), forever()])


async def test_a_rank_that_gives_no_sign_of_life_is_lost_although_nobody_calls_it(group):
    group.handles[0].silent = True
    await asyncio.wait_for(group.watch.listen(), 10)
    with pytest.raises(LearnersLost, match=r"rank 0 .* no sign of life for 0.2 s \(monitoring.heartbeat_deadline_s\)"):
        group.watch.check()
    assert [status.state for status in group.watch.describe(3, 1)] == ["dead", "dead"]


async def test_a_rank_that_answers_is_described_with_what_it_does_and_what_it_was_asked(group):
    listening = asyncio.ensure_future(group.watch.listen())
    for handle in group.handles:
        await handle.beat_twice.wait()
    pending = asyncio.ensure_future(group.watch.all("step", [forever(), forever()]))
    await asyncio.sleep(0)
    status = group.watch.describe(version=3, restarts=1)[1]
    assert (status.name, status.state, status.pids, status.in_hand) == ("learner rank 1", "working", (41,), 1)
    assert (status.version, status.restarts) == (3, 1)
    assert status.detail == "step for 3.0 s, asked for step" and status.heartbeat_age_s < 1
    for task in (listening, pending):
        task.cancel()


async def test_a_group_that_is_ended_says_why_to_who_waits(group):
    waiting = asyncio.ensure_future(group.watch.all("step", [forever(), forever()]))
    await asyncio.sleep(0)
    group.watch.end("the learner ranks are being restarted")
    with pytest.raises(LearnersLost, match="are being restarted"):
        await waiting
    assert group.watch.over and not group.events
