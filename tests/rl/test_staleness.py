"""This file tests the bound of the lag, over random interleavings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.staleness import Gate

ACTIONS = ("admit", "publish", "drop_running", "drop_accepted", "train", "confirm")


class Group:
    def __init__(self, admitted_at: int) -> None:
        self.oldest_version = admitted_at


class Loop:
    """The least loop around a gate: one list per place where a group can be. `pick` chooses among running groups."""

    def __init__(self, max_lag: int, groups_per_step: int) -> None:
        self.gate = Gate(max_lag, groups_per_step)
        self.running: list[Group] = []
        self.buffered: list[Group] = []
        self.version = self.confirmed = 0
        self.trained_lags: list[int] = []
        self.drawn = self.dropped = 0

    def act(self, action: str, pick: int) -> None:
        if action == "admit" and self.gate.room(self.confirmed) > 0:
            self.gate.admit()
            self.running.append(Group(self.confirmed))
            self.drawn += 1
        elif action == "publish" and self.running:
            self.buffered.append(self.running.pop(pick % len(self.running)))
            self.gate.publish()
        elif action == "drop_running" and self.running:
            self.running.pop(pick % len(self.running))
            self.gate.drop_running()
            self.dropped += 1
        elif action == "drop_accepted" and self.buffered:
            self.buffered.pop(pick % len(self.buffered))
            self.gate.drop_accepted()
            self.dropped += 1
        elif action == "train":
            self.train()
        elif action == "confirm" and self.confirmed < self.version:
            self.confirmed += 1

    def train(self) -> None:
        size = self.gate.groups_per_step
        if len(self.buffered) >= size:
            batch, self.buffered = self.buffered[:size], self.buffered[size:]
            self.trained_lags += [self.gate.lag(self.version, group.oldest_version) for group in batch]
            self.version += 1

    def drop_stale(self) -> None:
        fresh = [group for group in self.buffered if self.gate.is_fresh(self.version, group.oldest_version)]
        self.dropped += len(self.buffered) - len(fresh)
        self.gate.drop_accepted(len(self.buffered) - len(fresh))
        self.buffered = fresh

    def check_balance(self) -> None:
        assert self.drawn == len(self.trained_lags) + self.dropped + len(self.running) + len(self.buffered)
        assert self.gate.running == len(self.running)
        assert self.gate.accepted == len(self.trained_lags) + len(self.buffered)
        ahead = len(self.running) + len(self.buffered)
        assert ahead <= (self.gate.max_lag + 1) * self.gate.groups_per_step
        if not self.running and len(self.buffered) < self.gate.groups_per_step:
            assert self.gate.room(self.version) > 0, "nothing runs, no batch is there, and nothing may be drawn"


loops = st.builds(Loop, max_lag=st.integers(0, 3), groups_per_step=st.integers(1, 3))
schedules = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 20)), max_size=200)


@settings(max_examples=300, deadline=None)
@given(loop=loops, schedule=schedules)
def test_the_quota_alone_bounds_the_lag_when_groups_are_consumed_in_order_of_admission(loop: Loop, schedule) -> None:
    for action, pick in schedule:
        loop.act(action, 0 if action == "publish" else pick)
        loop.check_balance()
    assert all(0 <= lag <= loop.gate.max_lag for lag in loop.trained_lags)


@settings(max_examples=300, deadline=None)
@given(loop=loops, schedule=schedules)
def test_with_the_check_at_consumption_the_lag_is_bounded_in_any_order_of_finishing(loop: Loop, schedule) -> None:
    for action, pick in schedule:
        loop.drop_stale()
        loop.act(action, pick)
        loop.check_balance()
    assert all(0 <= lag <= loop.gate.max_lag for lag in loop.trained_lags)


def test_without_the_check_a_group_that_is_overtaken_exceeds_the_bound() -> None:
    loop = Loop(max_lag=1, groups_per_step=1)
    for action, pick in [("admit", 0), ("admit", 0), ("publish", 1), ("train", 0), ("confirm", 0)] + [
        ("admit", 0),
        ("publish", 1),
        ("train", 0),
        ("confirm", 0),
    ]:
        loop.act(action, pick)
    slow = loop.running[0]
    assert loop.gate.lag(loop.version, slow.oldest_version) == 2
    assert not loop.gate.is_fresh(loop.version, slow.oldest_version)


@settings(max_examples=100, deadline=None)
@given(loop=st.builds(Loop, max_lag=st.just(0), groups_per_step=st.integers(1, 4)), schedule=schedules)
def test_max_lag_zero_trains_only_on_the_current_version(loop: Loop, schedule) -> None:
    for action, pick in schedule:
        loop.act(action, pick)
    assert set(loop.trained_lags) <= {0}


def test_a_round_opens_only_when_nothing_runs_and_refills_what_was_dropped() -> None:
    gate = Gate(max_lag=0, groups_per_step=3)
    assert gate.round_open(0) and gate.room(0) == 3
    for _ in range(3):
        gate.admit()
    gate.publish()
    gate.drop_running()
    assert not gate.round_open(0), "one group still runs"
    gate.publish()
    assert gate.round_open(0) and gate.room(0) == 1
    gate.admit()
    gate.publish()
    assert not gate.round_open(0), "the batch is full"
    assert gate.round_open(1)


def test_dropped_groups_give_their_capacity_back() -> None:
    gate = Gate(max_lag=2, groups_per_step=4)
    for _ in range(12):
        gate.admit()
    assert gate.room(0) == 0
    gate.drop_running()
    gate.publish()
    gate.drop_accepted()
    assert gate.room(0) == 2


def test_a_resumed_gate_has_the_room_of_the_one_before_it() -> None:
    gate = Gate(max_lag=1, groups_per_step=2)
    gate.admit()
    gate.admit()
    gate.publish()
    resumed = Gate(max_lag=1, groups_per_step=2)
    resumed.admit()  # the draw that was left unfinished
    resumed.resume(accepted=1)
    assert (resumed.accepted, resumed.running, resumed.room(0)) == (1, 1, gate.room(0))


def test_publishing_what_was_never_admitted_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="never admitted"):
        Gate(max_lag=0, groups_per_step=1).publish()
