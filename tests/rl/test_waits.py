"""Named waits with deadlines, and the list of those that last."""

import asyncio

import pytest

from rl.waits import WAITS, WaitExpired, Waits, within


async def test_a_wait_that_expires_says_for_what_from_whom_and_how_long():
    with pytest.raises(WaitExpired, match="waited 0 s for a batch from the generators"):
        await within(asyncio.Event().wait(), 0.01, "a batch", "the generators")


async def test_the_awaited_parts_own_timeout_error_passes_through():
    async def fails():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await within(fails(), 10, "anything")


async def test_what_arrives_in_time_is_returned():
    assert await within(asyncio.sleep(0, "value"), 10, "a value") == "value"


async def test_waits_are_listed_while_they_last_the_oldest_first():
    waits, arrived, left = Waits(), asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(within(arrived.wait(), 60, "step 3", "the learner ranks", waits))
    second = asyncio.create_task(within(left.wait(), 30, "a group", "its generator", waits))
    await asyncio.sleep(0)
    assert [(wait.what, wait.whom, wait.seconds) for wait in waits.pending()] == [
        ("step 3", "the learner ranks", 60),
        ("a group", "its generator", 30),
    ]
    oldest = waits.pending()[0]
    assert oldest.age_s(oldest.since + 5) == 5
    arrived.set()
    await first
    assert [wait.what for wait in waits.pending()] == ["a group"]
    left.set()
    await second
    assert waits.pending() == []


async def test_two_waits_for_the_same_are_two():
    waits = Waits()
    with waits.listed("a group", "its generator", 1), waits.listed("a group", "its generator", 1):
        assert len(waits.pending()) == 2
    assert waits.pending() == []


async def test_a_wait_leaves_the_list_however_it_ends():
    waits = Waits()
    with pytest.raises(WaitExpired):
        await within(asyncio.Event().wait(), 0.01, "nothing", waits=waits)
    assert waits.pending() == []
    task = asyncio.create_task(within(asyncio.Event().wait(), 60, "nothing", waits=waits))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waits.pending() == []


async def test_a_wait_that_names_no_list_is_in_the_list_of_the_process():
    task = asyncio.create_task(within(asyncio.Event().wait(), 60, "a sign of life"))
    await asyncio.sleep(0)
    assert "a sign of life" in [wait.what for wait in WAITS.pending()]
    task.cancel()
