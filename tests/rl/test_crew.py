"""Tasks side by side: one owner, one first failure."""

import asyncio

import pytest

from rl.crew import Crew, together


async def test_the_main_works_result_ends_the_crew_and_the_others_are_cancelled():
    crew, ended = Crew(), []

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("forever")

    async def main():
        crew.spawn(forever(), "forever")
        await asyncio.sleep(0)
        return "done"

    assert await crew.run(main(), "main") == "done"
    assert ended == ["forever"]


async def test_the_first_failure_is_reported_with_the_name_of_its_task_not_its_consequences():
    crew, broken = Crew(), asyncio.Event()

    async def cause():
        broken.set()
        raise ValueError("the cause")

    async def consequence():
        await broken.wait()
        raise RuntimeError("a consequence")

    async def main():
        crew.spawn(consequence(), "the second")
        crew.spawn(cause(), "the first")
        await asyncio.Event().wait()

    with pytest.raises(ValueError, match="the cause") as caught:
        await crew.run(main(), "main")
    assert caught.value.__notes__ == ["in the first"]


async def test_cancelling_the_owner_cancels_every_task():
    crew, ended = Crew(), []

    async def forever(name):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    crew.spawn(forever("side"), "side")
    owner = asyncio.create_task(crew.run(forever("main"), "main"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert sorted(ended) == ["main", "side"]


async def test_a_task_that_loses_a_cancellation_is_cancelled_again():
    crew = Crew()

    async def deaf_once():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    crew.spawn(deaf_once(), "deaf once")
    assert await asyncio.wait_for(crew.run(asyncio.sleep(0, "done"), "main"), 10) == "done"


async def test_what_runs_together_gives_its_results_in_order_and_ends_with_its_first_failure():
    assert await together(asyncio.sleep(0.01, "a"), asyncio.sleep(0, "b")) == ["a", "b"]
    ended = []

    async def slow():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("slow")

    async def fails():
        await asyncio.sleep(0)
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        await together(slow(), fails())
    assert ended == ["slow"]
