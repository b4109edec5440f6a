"""All generators as one that heals itself: routing, dealing, updates, scaling, over processes that die on demand."""

from __future__ import annotations

import asyncio
import dataclasses

import msgspec
import pytest

from actors.fleet import MAX_LOSSES, GeneratorFleet
from actors.member import Pace
from rl.metrics import values
from rl.orders import Draw
from rl.parts import GeneratorsLost
from rl.weights import NcclGroup, WeightUpdateError
from tests.fakes import make_prompt
from tests.fakes_engine import FakeProcess, World, until

PACE = Pace(max_restarts=3, heartbeat_deadline_s=60, start_deadline_s=20, leave_deadline_s=20)


def draw(number: int, expected_tokens: float = 0.0) -> Draw:
    prompt = make_prompt(index=number)
    return Draw(group_id=f"run/{number}", draw=number, prompt=prompt, seed=number, expected_tokens=expected_tokens)


@pytest.fixture
async def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
async def start(world):
    """Starts a fleet of so many; it is closed after the test, and then no process and no task may be left."""
    fleets: list[GeneratorFleet] = []

    async def start(count: int = 2, longest_first: bool = False, **pace) -> GeneratorFleet:
        fleet = GeneratorFleet(
            world.launch, msgspec.structs.replace(PACE, **pace), world.board, max_tokens=8, longest_first=longest_first
        )
        fleets.append(fleet)
        await fleet.begin(count)
        return fleet

    before = asyncio.all_tasks()
    yield start
    for fleet in fleets:
        await fleet.close()
    await until(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})
    assert all(process.killed for process in world.processes)


def states(fleet: GeneratorFleet) -> list[str]:
    return [status.state for status in fleet.describe()]


async def together_working(fleet: GeneratorFleet) -> None:
    await until(lambda: set(states(fleet)) == {"working"})


def drawn(process: FakeProcess) -> list[list[int]]:
    """The draw numbers of every round a process was asked for."""
    return [[each.draw for each in hand] for (hand,) in process.called("rollout_round")]


# Routing and dealing


async def test_a_draw_goes_to_the_generator_with_the_fewest_in_hand(world, start):
    fleet = await start()
    world.process(0).engine.hold.clear()
    busy = asyncio.create_task(fleet.rollout(draw(0)))
    await until(lambda: world.process(0).engine.requests)
    for number in (1, 2, 3):
        await fleet.rollout(draw(number))
    assert [len(world.process(index).called("rollout")) for index in (0, 1)] == [1, 3]
    world.process(0).engine.hold.set()
    assert (await busy).draw == 0


async def test_a_draw_goes_to_the_generator_with_the_fewest_tokens_to_come_where_they_are_known(world, start):
    fleet = await start()
    for index in (0, 1):
        world.process(index).engine.hold.clear()
    pending = []

    async def give(number: int, expected_tokens: float) -> list[int]:
        pending.append(asyncio.create_task(fleet.rollout(draw(number, expected_tokens))))
        await until(lambda: sum(len(world.process(index).engine.requests) for index in (0, 1)) == len(pending))
        return [len(world.process(index).engine.requests) for index in (0, 1)]

    assert await give(0, 900.0) == [1, 0]
    assert [await give(number, 300.0) for number in (1, 2, 3)] == [[1, 1], [1, 2], [1, 3]]
    assert await give(4, 0.0) == [2, 3]  # 900 tokens each
    assert await give(5, 300.0) == [3, 3], "two against three: nobody knows how long the unknown one takes"
    for index in (0, 1):
        world.process(index).engine.hold.set()
    await asyncio.gather(*pending)


async def test_a_round_is_given_in_its_order_or_with_the_longest_first_and_told_of_in_its_order(world, start):
    lengths = {0: 100.0, 1: 300.0, 2: 200.0, 3: 300.0}
    for longest_first, hands in ((False, [[0, 2], [1, 3]]), (True, [[1, 2], [3, 0]])):
        fleet = await start(longest_first=longest_first)
        reports = await fleet.rollout_round([draw(number, tokens) for number, tokens in lengths.items()])
        assert [each.draw for each in reports] == [0, 1, 2, 3]
        assert [drawn(world.process(index)) for index in (0, 1)] == [[hand] for hand in hands]


async def test_a_round_is_dealt_out_alike_every_time_and_nothing_is_lost(world, start):
    fleet = await start()
    for _ in range(2):
        reports = await fleet.rollout_round([draw(number) for number in range(5)])
        assert [each.draw for each in reports] == [0, 1, 2, 3, 4]
    assert drawn(world.process(0)) == [[0, 2, 4]] * 2


async def test_held_out_prompts_are_shared_among_all_generators(world, start):
    fleet = await start()
    graded = await fleet.evaluate([make_prompt(index=number) for number in range(4)], 0.0, 7)
    assert [each.prompt_id for each in graded] == [f"sums/easy/{number}" for number in range(4)]
    assert all(len(world.process(index).called("evaluate")) == 1 for index in (0, 1))


async def test_an_error_that_is_no_death_is_raised_and_costs_no_generator(world, start):
    fleet = await start()
    world.process(0).engine.answer = lambda request, index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        await fleet.rollout(draw(0))
    assert states(fleet) == ["working", "working"]


async def test_a_first_start_that_fails_is_raised_and_leaves_nothing_running(world, start):
    world.prepare = lambda process: setattr(process, "refusal", ValueError("no such model") if process.index else None)
    with pytest.raises(ValueError, match="no such model"):
        await start()
    assert all(process.killed for process in world.processes) and len(world.processes) == 2


# Long tails


async def test_long_tails_are_cut_wherever_they_are_and_idle_generators_are_not_asked(world, start):
    fleet = await start(3)
    for index in (0, 1):
        world.process(index).engine.hold.clear()
    rollouts = [asyncio.create_task(fleet.rollout(draw(number))) for number in range(2)]
    await until(lambda: all(world.process(index).engine.requests for index in (0, 1)))
    await fleet.cut_tails(1)
    assert [(await rollout).dropped for rollout in rollouts] == ["stale", "stale"]
    assert [world.process(index).called("cut_tails") for index in (0, 1, 2)] == [[[1]], [[1]], []]


async def test_a_draw_that_a_death_sent_to_newer_weights_is_not_cut_for_when_it_was_drawn(world, start):
    fleet = await start()
    for index in (0, 1):
        world.process(index).engine.hold.clear()
        world.process(index).engine.version = 5 * index
    rollout = asyncio.create_task(fleet.rollout(draw(0)))
    await until(lambda: world.process(0).engine.requests)
    world.process(0).vanish()
    await until(lambda: world.process(1).engine.requests)
    await fleet.cut_tails(5)
    world.process(1).engine.hold.set()
    assert (await rollout).dropped is None


async def test_a_generator_that_dies_while_its_tails_are_cut_costs_nothing_more(world, start):
    fleet = await start()
    world.process(0).engine.hold.clear()
    rollout = asyncio.create_task(fleet.rollout(draw(0)))
    await until(lambda: world.process(0).engine.requests)
    world.process(0).vanish()
    await fleet.cut_tails(1)
    assert (await rollout).dropped is None


# Deaths


async def test_the_draws_of_a_generator_that_dies_go_to_another(world, start):
    fleet = await start()
    for index in (0, 1):
        world.process(index).engine.hold.clear()
    pending = [asyncio.create_task(fleet.rollout(draw(number))) for number in range(4)]
    await until(lambda: all(len(world.process(index).engine.requests) == 2 for index in (0, 1)))
    world.process(1).engine.hold.set()
    world.process(0).vanish()
    reports = await asyncio.gather(*pending)
    assert [report.draw for report in reports] == [0, 1, 2, 3]
    assert sorted(group.group_id for group in world.buffer.groups) == [f"run/{number}" for number in range(4)]
    numbers = values(fleet.metrics())
    assert numbers["sampling/requeued/groups"] == 2 and values(fleet.metrics())["sampling/requeued/groups"] == 0
    await until(lambda: world.told("draws_requeued"))
    assert [event["groups"] for event in world.told("draws_requeued")] == [["run/0", "run/2"]]


async def test_a_draw_waits_while_no_generator_works(world, start):
    fleet = await start(1)
    world.prepare = lambda process: process.may_start.clear()
    world.process(0).vanish()
    await until(lambda: len(world.processes) == 2)
    waiting = asyncio.create_task(fleet.rollout(draw(0)))
    await until(lambda: states(fleet) == ["starting"])
    world.process(0).may_start.set()
    assert (await waiting).draw == 0
    assert values(fleet.metrics())["generators/restarts/count"] == 1


def kill_at(process: FakeProcess, group_id: str) -> None:
    """Have the engine die of one draw."""

    def answer(request, index):
        if request.request_id == group_id or group_id in request.request_id:
            process.engine.die()
            process.vanish()
        return str(index)

    process.engine.answer = answer


async def test_a_draw_that_kills_every_generator_is_given_up_and_told_of(world, start):
    world.prepare = lambda process: kill_at(process, "run/7")
    fleet = await start()
    report = await fleet.rollout(draw(7))
    assert (report.dropped, report.rewards, report.num_tokens, report.draw) == ("aborted", (), 0, 7)
    assert [event["group"] for event in world.told("poison_prompt")] == ["run/7"]
    assert len(world.told("generator_died")) == MAX_LOSSES
    assert (await fleet.rollout(draw(8))).dropped is None


async def test_a_hand_whose_generator_dies_is_sampled_again_whole_by_the_same_one(world, start):
    fleet = await start()
    world.process(1).engine.hold.clear()
    round_ = asyncio.create_task(fleet.rollout_round([draw(number) for number in range(5)]))
    await until(lambda: world.process(1).engine.requests)
    world.process(1).vanish()
    assert [report.draw for report in await round_] == [0, 1, 2, 3, 4]
    assert drawn(world.process(1)) == [[1, 3]] and world.process(1).attempt == 1
    assert [report.generator for report in await round_] == [0, 1, 0, 1, 0]
    assert drawn(world.process(0)) == [[0, 2, 4]]


async def test_a_round_begins_with_the_same_hands_while_a_generator_is_coming_back(world, start):
    fleet = await start()
    world.prepare = lambda process: process.may_start.clear()
    world.process(0).vanish()
    await until(lambda: len(world.processes) == 3)
    round_ = asyncio.create_task(fleet.rollout_round([draw(number) for number in range(4)]))
    await until(lambda: world.process(1).called("rollout_round"))
    world.process(0).may_start.set()
    assert [report.generator for report in await round_] == [0, 1, 0, 1]


async def test_the_hand_of_a_quarantined_generator_is_dealt_to_the_others(world, start):
    fleet = await start(3, max_restarts=0)
    world.process(1).engine.hold.clear()
    round_ = asyncio.create_task(fleet.rollout_round([draw(number) for number in range(6)]))
    await until(lambda: world.process(1).engine.requests)
    world.process(1).vanish()
    assert [report.generator for report in await round_] == [0, 0, 2, 0, 2, 2]
    assert states(fleet) == ["working", "quarantined", "working"]


async def test_a_poison_prompt_ends_a_round_with_its_hand_given_up(world, start):
    world.prepare = lambda process: kill_at(process, "run/2")
    fleet = await start()
    reports = await fleet.rollout_round([draw(number) for number in range(4)])
    assert [report.dropped for report in reports] == ["aborted", None, "aborted", None]


async def test_a_held_out_prompt_that_kills_every_generator_counts_as_failed_judging(world, start):
    fleet = await start()
    world.board.show(world.update(5))
    world.prepare = lambda process: kill_at(process, "sums/easy/1")
    for process in list(world.processes):
        kill_at(process, "sums/easy/1")
    graded = await fleet.evaluate([make_prompt(index=number) for number in range(2)], 0.0, 7)
    assert graded[1].reward is None and graded[1].versions == (5,) and graded[0].prompt_id == "sums/easy/0"


async def test_when_all_are_quarantined_every_call_says_why(world, start):
    fleet = await start(2, max_restarts=0)
    world.process(0).engine.hold.clear()
    world.process(1).engine.hold.clear()
    waiting = [asyncio.create_task(fleet.rollout(draw(0))), asyncio.create_task(fleet.rollout_round([draw(1)]))]
    await until(lambda: world.process(0).engine.requests)
    await fleet.check()
    for index in (0, 1):
        world.process(index).vanish()
    for call in (*waiting, fleet.check(), fleet.rollout(draw(2)), fleet.evaluate([make_prompt()], 0.0, 1)):
        with pytest.raises(GeneratorsLost, match="generator 0: the actor died; generator 1: the actor died"):
            await call


async def test_a_failure_of_the_supervision_itself_surfaces(world, start):
    fleet = await start()

    def defect(process):
        raise RuntimeError("a defect")

    world.prepare = defect
    world.process(0).vanish()
    await until(lambda: world.told("generator_died") and fleet._failure)
    with pytest.raises(RuntimeError, match="a defect") as raised:
        await fleet.check()
    assert raised.value.__notes__ == ["in the life of generator 0"]


# Updates


async def test_an_update_is_loaded_by_all_and_answered_by_all(world, start):
    fleet = await start()
    receipts = await fleet.update(world.update(1))
    assert [(receipt.generator, receipt.version) for receipt in receipts] == [(0, 1), (1, 1)]
    assert values(fleet.metrics())["weights/update/load/s"] == 0.0


async def test_an_update_does_not_wait_for_one_that_dies_in_it_nor_for_one_that_is_dead(world, start):
    fleet = await start(3)
    world.prepare = lambda process: process.may_start.clear()
    world.process(0).vanish()
    await until(lambda: len(world.processes) == 4)
    world.process(1).engine.loading.clear()
    update = asyncio.create_task(fleet.update(world.update(1)))
    await until(lambda: world.process(1).engine.updates)
    world.process(1).engine.die()
    assert [receipt.generator for receipt in await update] == [2]
    world.process(0).may_start.set()
    world.process(1).may_start.set()
    await together_working(fleet)
    assert [status.version for status in fleet.describe()] == [1, 1, 1]


async def test_an_update_drops_one_that_hangs_in_it(world, start):
    fleet = await start(heartbeat_deadline_s=0.2)
    world.process(0).engine.hang()
    assert [receipt.generator for receipt in await fleet.update(world.update(1))] == [1]
    await together_working(fleet)
    assert [status.version for status in fleet.describe()] == [1, 1]


async def test_an_update_over_which_all_die_has_no_receipts_and_is_loaded_by_who_comes_back(world, start):
    fleet = await start()
    for index in (0, 1):
        world.process(index).engine.loading.clear()
    update = asyncio.create_task(fleet.update(world.update(1)))
    await until(lambda: all(world.process(index).engine.updates for index in (0, 1)))
    for index in (0, 1):
        world.process(index).vanish()
    assert await update == []
    await together_working(fleet)
    assert [status.version for status in fleet.describe()] == [1, 1]


async def test_weights_that_a_working_generator_refuses_fail_the_update(world, start):
    fleet = await start()
    world.process(1).engine.fail_updates = 1
    with pytest.raises(WeightUpdateError, match="refused version 1"):
        await fleet.update(world.update(1))


async def test_only_a_generator_on_another_node_is_handed_the_bytes(world, start):
    fleet = await start(1)
    fleet.introduce(lambda update: f"bytes of version {update.version}".encode())
    await fleet.update(world.update(1))
    assert world.process(0).called("update")[0][1] is None
    here = msgspec.structs.replace(world.update(2), node="elsewhere")
    world.process(0)._generator._write = lambda version, payload: (
        world.folder / f"slipstream-test-v{version}.safetensors"
    )
    await fleet.update(here)
    assert world.process(0).called("update")[1][1] == b"bytes of version 2"


def over_nccl(world: World, version: int):
    return msgspec.structs.replace(world.update(version), backend="nccl", path=None)


async def test_over_nccl_the_senders_work_while_the_generators_receive(world, start):
    fleet = await start()
    sent = asyncio.Event()

    async def send(version):
        await until(lambda: all(world.process(index).called("update") for index in (0, 1)))
        sent.set()

    fleet.send = send
    for index in (0, 1):
        world.process(index).engine.loading = sent
    await fleet.join(NcclGroup(address="127.0.0.1", port=1, engines=fleet.receivers, workers=1))
    await fleet.update(over_nccl(world, 1))
    assert sent.is_set() and [world.process(index).engine.joined[1] for index in (0, 1)] == [0, 1]


async def test_over_nccl_a_change_of_members_forms_a_new_group_before_the_next_update(world, start):
    fleet = await start()
    groups = []

    async def regroup():
        groups.append(fleet.receivers)
        await fleet.join(NcclGroup(address="127.0.0.1", port=1, engines=fleet.receivers, workers=1))

    world.board.hooks = dataclasses.replace(world.board.hooks, regroup=regroup)
    for version in (1, 2):
        await fleet.update(over_nccl(world, version))
    assert groups == [2]
    world.process(0).vanish()
    await until(lambda: states(fleet) == ["joining", "working"])
    receipts = await fleet.update(over_nccl(world, 3))
    await together_working(fleet)
    assert groups == [2, 2] and [receipt.version for receipt in receipts] == [3, 3]


# Coming and going


async def test_a_newcomer_works_once_it_holds_the_newest_weights(world, start):
    fleet = await start(1)
    await fleet.update(world.update(4))
    said = await fleet.scale(3)
    assert said == "generator 1, generator 2 will start, load the newest weights, and work when those are verified"
    await together_working(fleet)
    assert [status.version for status in fleet.describe()] == [4, 4, 4]
    assert sorted(event["generator"] for event in world.told("generator_joined")) == [1, 2]
    await fleet.rollout_round([draw(number) for number in range(3)])
    assert drawn(world.process(2)) == [[2]]


async def test_the_highest_numbered_leave_and_their_numbers_are_used_again(world, start):
    fleet = await start(3)
    world.process(2).engine.hold.clear()
    pending = [asyncio.create_task(fleet.rollout(draw(number))) for number in range(3)]
    await until(lambda: world.process(2).engine.requests)
    assert await fleet.scale(1) == ("generator 1, generator 2 will end, each when it has finished what it has in hand")
    await until(lambda: states(fleet) == ["working", "leaving"])
    assert await fleet.scale(2) == ("generator 1 will start, load the newest weights, and work when those are verified")
    world.process(2).engine.hold.set()
    assert [report.dropped for report in await asyncio.gather(*pending)] == [None] * 3
    await until(lambda: states(fleet) == ["working", "working"])
    assert sorted(event["generator"] for event in world.told("generator_left")) == [1, 2]
    assert await fleet.scale(2) == "there are 2 already; nothing to do"


async def test_a_draw_in_the_hand_of_one_that_must_leave_at_last_goes_to_another(world, start):
    fleet = await start(2, leave_deadline_s=0.05)
    for index in (0, 1):
        world.process(index).engine.hold.clear()
    pending = [asyncio.create_task(fleet.rollout(draw(number))) for number in (0, 1)]
    await until(lambda: world.process(1).engine.requests)
    await fleet.scale(1)
    await until(lambda: len(world.process(0).engine.requests) == 2)
    world.process(0).engine.hold.set()
    assert [report.generator for report in await asyncio.gather(*pending)] == [0, 0]


async def test_a_newcomer_that_fails_does_not_harm_the_run_and_may_be_tried_again(world, start):
    fleet = await start(1)
    world.prepare = lambda process: setattr(process, "refusal", MemoryError("no room"))
    await fleet.scale(2)
    await until(lambda: states(fleet) == ["working", "quarantined"])
    assert (await fleet.rollout(draw(0))).dropped is None
    world.prepare = lambda process: None
    await fleet.scale(2)
    await together_working(fleet)


async def test_a_newcomer_that_is_still_starting_holds_up_no_round(world, start):
    fleet = await start(1)
    world.prepare = lambda process: process.may_start.clear()
    await fleet.scale(2)
    assert [report.generator for report in await fleet.rollout_round([draw(0), draw(1)])] == [0, 0]


async def test_a_run_without_generators_is_refused(start):
    fleet = await start(1)
    with pytest.raises(ValueError, match="cannot have 0 generators; ask for at least 1"):
        await fleet.scale(0)
    assert states(fleet) == ["working"]


async def test_closing_ends_those_that_are_starting_and_closes_the_working_politely(world, start):
    fleet = await start(1)
    world.prepare = lambda process: process.may_start.clear()
    await fleet.scale(2)
    await until(lambda: len(world.processes) == 2)
    await fleet.close()
    assert world.process(0).closed and not world.process(1).closed
    assert all(process.killed for process in world.processes) and not world.told("generator_died")


async def test_a_generator_with_nothing_in_hand_is_idle(world, start):
    fleet = await start()
    for index in (0, 1):
        world.process(index).engine.hold.clear()
    work = [asyncio.create_task(fleet.rollout(draw(number))) for number in (0, 1)]
    await until(lambda: world.process(1).engine.requests)
    fleet.metrics()
    await asyncio.sleep(0.01)
    assert values(fleet.metrics())["generator/idle_fraction"] == 0.0
    for index in (0, 1):
        world.process(index).engine.hold.set()
    await asyncio.gather(*work)
    fleet.metrics()
    await asyncio.sleep(0.01)
    numbers = values(fleet.metrics())
    assert numbers["generator/idle_fraction"] > 0.99 and numbers["generators/working/count"] == 2
