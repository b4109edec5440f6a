"""All ranks as one: every rank is called, the report is rank 0's, and the first failure is the fleet's."""

from __future__ import annotations

import asyncio
import socket

import pytest

from learners.fleet import LearnerFleet, LearnerProcess
from rl.orders import StepOrder


class Handle:
    """What an actor handle looks like to the fleet."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.calls: list[tuple] = []
        self.failure: Exception | None = None
        self.stuck = False

    @property
    def call(self):
        return self

    async def remote(self, method, *arguments):
        self.calls.append((method, *arguments))
        if self.failure:
            raise self.failure
        if self.stuck:
            await asyncio.Event().wait()
        return f"{method} of rank {self.rank}"


ORDER = StepOrder(step=1, version=0, entries=(), first=True)


async def test_a_step_is_made_by_every_rank_and_reported_by_rank_0():
    ranks = [Handle(0), Handle(1)]
    assert await LearnerFleet(ranks).step(ORDER) == "step of rank 0"
    assert [rank.calls for rank in ranks] == [[("step", ORDER)]] * 2


async def test_a_rank_that_fails_is_heard_while_its_peer_hangs_in_a_collective():
    ranks = [Handle(0), Handle(1)]
    ranks[0].stuck = True
    ranks[1].failure = RuntimeError("rank 1 ran out of memory")
    with pytest.raises(RuntimeError, match="rank 1 ran out of memory"):
        await asyncio.wait_for(LearnerFleet(ranks).step(ORDER), 10)


async def test_a_checkpoint_is_the_sharded_state_and_then_the_export():
    rank = Handle(0)
    await LearnerFleet([rank]).save("/checkpoints/step_1")
    assert rank.calls == [("save", "/checkpoints/step_1/state"), ("export", "/checkpoints/step_1/export")]


def test_a_rank_names_a_port_that_can_be_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("os.dup2", lambda *_: None)  # the process under test is this one: its output stays where it is
    address, port = LearnerProcess(str(tmp_path / "log")).free_port()
    with socket.socket() as probe:
        probe.bind((address, port))
