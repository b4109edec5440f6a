"""Every second of a role belongs to one activity."""

import pytest

from rl.time_ledger import TimeLedger, added, shares


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_seconds_sum_to_the_wall_time_and_what_is_left_is_idle(clock):
    ledger = TimeLedger(("sample", "judge"), clock)
    clock.now += 1
    with ledger.during("sample"):
        clock.now += 5
    with ledger.during("judge"):
        clock.now += 2
    taken = ledger.take()
    assert taken == {"idle": 1, "sample": 5, "judge": 2} and sum(taken.values()) == 8


def test_of_what_runs_at_once_the_first_in_order_counts(clock):
    ledger = TimeLedger(("update", "sample", "judge"), clock)
    with ledger.during("judge"), ledger.during("sample"):
        clock.now += 3
        with ledger.during("update"):
            clock.now += 1
        clock.now += 2
    assert ledger.take() == {"idle": 0, "sample": 5, "update": 1, "judge": 0}


def test_an_activity_that_runs_twice_at_once_ends_with_its_second_end(clock):
    ledger = TimeLedger(("sample",), clock)
    with ledger.during("sample"):
        with ledger.during("sample"):
            clock.now += 1
        clock.now += 1
    clock.now += 1
    assert ledger.take() == {"idle": 1, "sample": 2}


def test_what_runs_over_a_take_is_divided_between_the_two(clock):
    ledger = TimeLedger(("sample",), clock)
    with ledger.during("sample"):
        clock.now += 4
        assert ledger.take()["sample"] == 4
        clock.now += 3
    assert ledger.take()["sample"] == 3


def test_an_activity_that_fails_is_counted_all_the_same(clock):
    ledger = TimeLedger(("sample",), clock)
    with pytest.raises(ValueError), ledger.during("sample"):
        clock.now += 1
        raise ValueError
    clock.now += 1
    assert ledger.take() == {"idle": 1, "sample": 1}


def test_shares_are_of_the_whole_with_the_largest_first():
    whole = added([{"sample": 1.0, "idle": 1.0}, {"sample": 5.0, "judge": 1.0}])
    assert list(shares(whole).items()) == [("sample", 0.75), ("idle", 0.125), ("judge", 0.125)]
    assert shares({}) == {}
