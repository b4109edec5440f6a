"""Named waits with deadlines."""

import asyncio

import pytest

from rl.waits import WaitExpired, within


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
