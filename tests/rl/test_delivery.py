"""Which version reaches the generators, and when its arrival is believed: the broadcast loop over fakes."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import msgspec
import pytest

from rl.config import EvaluationSection
from rl.delivery import Delivery
from rl.parts import LearnersLost
from rl.weights import WeightUpdateError
from tests.fakes import make_run


@pytest.fixture
async def run(tmp_path):
    return make_run(tmp_path / "r", buffer=None)


async def until_delivered(delivery: Delivery, version: int) -> None:
    loop = asyncio.create_task(delivery.loop())
    await delivery.until_delivered(version)
    loop.cancel()


def verified(run) -> list[dict]:
    path = run.parts.recorder.directory.path / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["event"] == "weights_verified"]


async def test_a_version_that_was_overtaken_while_the_engines_were_held_is_skipped(run):
    async with run.shared.engines:
        for version in range(3):
            run.parts.learners.version = version
            await run.delivery.offer(version)
    await until_delivered(run.delivery, 2)
    assert run.parts.generators.updates == [2] and run.shared.sampling_version == 2


async def test_of_every_third_step_the_weights_are_offered_and_before_each_evaluation_and_at_the_end(run):
    evaluation = EvaluationSection(every_steps=5)
    plan = dataclasses.replace(run.plan, weights_every_steps=3, evaluation=evaluation)
    delivery, offered = Delivery(plan, run.parts, run.shared), []
    await delivery.offer(0)
    for version in range(1, 7):
        run.parts.learners.version = version
        await delivery.offer_if_due(version)
        offered.append(delivery.offered.version)
    assert plan.run.steps == 6 and offered == [0, 0, 3, 3, 5, 6]


async def test_versions_made_again_after_a_rollback_are_not_sent_until_they_catch_up(run):
    run.parts.learners.version = 3
    await run.delivery.offer(3)
    await until_delivered(run.delivery, 3)
    for version in (1, 2, 3):
        run.parts.learners.version = version
        await run.delivery.offer_if_due(version)
    await asyncio.wait_for(until_delivered(run.delivery, 3), 5)
    run.parts.learners.version = 4
    await run.delivery.offer_if_due(4)
    await until_delivered(run.delivery, 4)
    assert run.parts.generators.updates[0] == 3 and set(run.parts.generators.updates) == {3, 4}


async def test_weights_that_come_again_under_their_version_say_whether_they_are_as_before(run):
    for _ in range(2):
        await run.delivery.offer(0)
        loop = asyncio.create_task(run.delivery.loop())
        await run.shared.changed.wait()  # set once the version is concluded
        run.shared.changed.clear()
        loop.cancel()
    assert "as_before" not in verified(run)[0] and verified(run)[1]["as_before"] is True


async def test_a_frozen_sender_is_refused_but_not_a_generator_that_joins_at_the_same_version(run):
    await run.delivery.offer(0)
    await until_delivered(run.delivery, 0)
    update = run.delivery.offered
    (receipt,) = await run.parts.generators.update(update)
    assert run.delivery.verify(update, receipt) == 0.0
    frozen = msgspec.structs.replace(update, version=1)
    (receipt,) = await run.parts.generators.update(frozen)
    with pytest.raises(WeightUpdateError, match="the sender is frozen"):
        run.delivery.verify(frozen, receipt)


async def test_what_was_moved_is_told_with_the_event_and_in_the_metrics(run):
    assert run.delivery.metrics() == {}
    await run.delivery.offer(0)
    await until_delivered(run.delivery, 0)
    assert verified(run)[0]["transport"] == "dense" and run.delivery.metrics()["weights/update/bytes"].value == 2
    run.parts.learners.version = 1
    await run.delivery.offer(1)
    run.delivery.offered = msgspec.structs.replace(run.delivery.offered, delta_path="/nowhere", delta_bytes=1)
    await until_delivered(run.delivery, 1)
    told = verified(run)[1]
    assert (told["transport"], told["bytes"], told["delta_bytes"]) == ("delta", 2, 1)
    assert run.delivery.metrics()["weights/update/bytes"].value == 1


async def test_no_generator_being_there_does_not_hold_a_version_up(run):
    async def nobody(update):
        return []

    run.parts.generators.update = nobody
    await run.delivery.offer(0)
    await until_delivered(run.delivery, 0)
    assert verified(run)[0]["generators"] == [] and verified(run)[0]["canary_gap_nats"] is None


async def test_a_sender_that_dies_in_the_transfer_is_told_to_the_training_loop_and_not_to_the_crew(run):
    async def broken(update):
        raise LearnersLost("learner rank 0 died while sending")

    run.parts.generators.update = broken
    await run.delivery.offer(0)
    loop = asyncio.create_task(run.delivery.loop())
    with pytest.raises(LearnersLost, match="while sending"):
        await run.delivery.until_delivered(0)
    assert not loop.done()
    loop.cancel()
