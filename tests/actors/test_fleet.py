"""All generators as one: routing, dealing, and where an update's bytes come from. The handles are fakes, not Ray's."""

from __future__ import annotations

import asyncio

import pytest

from actors.fleet import GeneratorFleet
from rl.orders import Draw
from rl.weights import UpdateReceipt, WeightUpdate
from tests.fakes import make_group, make_prompt, make_report


class Handle:
    """What an actor handle looks like to the fleet: `handle.call.remote(method, ...)` gives an awaitable."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.calls: list[tuple] = []
        self.open = asyncio.Event()
        self.open.set()
        self.failure: Exception | None = None

    @property
    def call(self):
        return self

    async def remote(self, method, *arguments):
        self.calls.append((method, *arguments))
        await self.open.wait()
        if self.failure:
            raise self.failure
        match method:
            case "rollout":
                return report(arguments[0])
            case "rollout_round":
                return [report(draw) for draw in arguments[0]]
            case "evaluate":
                return [(self.index, prompt.prompt_id) for prompt in arguments[0]]
            case "update":
                return UpdateReceipt(
                    version=arguments[0].version,
                    tensors=(),
                    missing=(),
                    canary_logprobs=(),
                    seconds={"load": 0.5},
                    generator=self.index,
                )


def draw(number: int) -> Draw:
    return Draw(group_id=str(number), draw=number, prompt=make_prompt(index=number), seed=number)


def report(one: Draw):
    return make_report(make_group(one, (0.0, 1.0)))


def update(node: str = "learner", path: str | None = "/shared") -> WeightUpdate:
    return WeightUpdate(
        version=1,
        backend="shared_memory" if path else "nccl",
        tensors=(),
        digest="",
        canary_token_ids=(1, 2),
        canary_logprobs=(-1.0,),
        path=path,
        node=node,
        num_bytes=0,
    )


@pytest.fixture
async def handles():
    return [Handle(0), Handle(1)]


@pytest.fixture
async def fleet(handles):
    return GeneratorFleet(handles, ["learner", "elsewhere"], max_tokens=8)


async def test_a_draw_goes_to_the_generator_with_the_fewest_in_hand(fleet, handles):
    handles[0].open.clear()
    busy = asyncio.create_task(fleet.rollout(draw(0)))
    await asyncio.sleep(0)
    for number in (1, 2, 3):
        await fleet.rollout(draw(number))
    assert [len(handle.calls) for handle in handles] == [1, 3]
    handles[0].open.set()
    assert (await busy).draw == 0


async def test_a_round_is_dealt_out_alike_every_time_and_nothing_is_lost(fleet, handles):
    for _ in range(2):
        reports = await fleet.rollout_round([draw(number) for number in range(5)])
        assert sorted(each.draw for each in reports) == [0, 1, 2, 3, 4]
    assert [[each.draw for each in call[1]] for call in handles[0].calls] == [[0, 2, 4]] * 2


async def test_held_out_prompts_are_shared_among_all_generators(fleet):
    graded = await fleet.evaluate([make_prompt(index=number) for number in range(4)], 0.0, 7)
    assert {index for index, _ in graded} == {0, 1} and len(graded) == 4


async def test_only_a_generator_on_another_node_is_handed_the_bytes(fleet, handles):
    fleet.payload_of = lambda update: f"bytes of version {update.version}"
    receipts = await fleet.update(update())
    assert [receipt.generator for receipt in receipts] == [0, 1]
    assert handles[0].calls[-1][2] is None
    assert handles[1].calls[-1][2] == "bytes of version 1"


async def test_over_nccl_the_senders_work_while_the_generators_receive(fleet, handles):
    received = asyncio.Event()

    async def send(version):
        assert version == 1 and all(handle.calls for handle in handles), "the generators must be receiving"
        received.set()

    fleet.send = send
    await fleet.update(update(path=None))
    assert received.is_set()


async def test_the_first_failing_generator_fails_the_call(fleet, handles):
    handles[1].failure = RuntimeError("the engine of generator 1 died")
    with pytest.raises(RuntimeError, match="generator 1 died"):
        await fleet.rollout_round([draw(0), draw(1)])


async def test_a_generator_with_nothing_in_hand_is_idle(fleet, handles):
    fleet.metrics()
    handles[0].open.clear()
    handles[1].open.clear()
    work = [asyncio.create_task(fleet.rollout(draw(number))) for number in (0, 1)]
    await asyncio.sleep(0)
    fleet.metrics()
    await asyncio.sleep(0.01)
    assert fleet.metrics()["generator/idle_fraction"].value == 0.0
    for handle in handles:
        handle.open.set()
    await asyncio.gather(*work)
    fleet.metrics()
    await asyncio.sleep(0.01)
    assert fleet.metrics()["generator/idle_fraction"].value > 0.99
