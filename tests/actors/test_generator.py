from __future__ import annotations

import asyncio
import os
import pathlib

import msgspec
import pytest

from actors.engine import EngineDied
from actors.generator import Generator
from rl.orders import Draw
from rl.weights import NcclGroup, TensorDigest, WeightUpdate, WeightUpdateError, combined, verify
from tests.fakes import make_prompt
from tests.fakes_engine import FakeBuffer, FakeEngine, FakeScorer, generator_settings

TENSORS = (TensorDigest("w", "bfloat16", (2,), "ww"),)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def buffer() -> FakeBuffer:
    return FakeBuffer()


@pytest.fixture
def generator(engine, buffer, tmp_path) -> Generator:
    return Generator(engine, FakeScorer(), buffer, generator_settings(str(tmp_path)), index=1)


def make_draw(number: int = 0) -> Draw:
    return Draw(group_id=f"run/{number}", draw=number, prompt=make_prompt(index=number), seed=number)


def make_update(version: int, path: str | None = None) -> WeightUpdate:
    return WeightUpdate(
        version=version,
        backend="shared_memory",
        tensors=TENSORS,
        digest=combined(TENSORS),
        canary_token_ids=(1, 2),
        canary_logprobs=(-1.5,),
        path=path,
        node="elsewhere",
        num_bytes=4,
    )


async def test_a_draw_becomes_a_published_group_and_a_report(generator, buffer):
    report = await generator.rollout(make_draw())
    assert report.dropped is None and report.rewards == (0.0, 0.0, 2.0)
    assert [group.group_id for group in buffer.groups] == ["run/0"]
    assert report.num_tokens == buffer.groups[0].num_tokens == 3
    assert set(report.seconds) == {"sample", "judge", "publish"} and report.generator == 1


async def test_a_group_without_signal_is_reported_and_not_published(generator, engine, buffer):
    engine.answer = lambda request, index: "7"
    report = await generator.rollout(make_draw())
    assert report.dropped == "zero_advantage" and not buffer.groups


async def test_failed_judgements_are_never_numbers(generator, engine, buffer):
    engine.answer = lambda request, index: "x" if index == 0 else str(index)
    report = await generator.rollout(make_draw())
    assert report.rewards == (None, 0.0, 2.0) and report.dropped is None
    assert report.parts[0][0].failure == "exception"


async def test_a_group_larger_than_the_buffer_is_dropped_as_oversize(generator, buffer):
    buffer.oversize = True
    assert (await generator.rollout(make_draw())).dropped == "oversize"


async def test_a_round_reports_in_the_order_of_its_draws(generator, engine):
    reports = await generator.rollout_round([make_draw(number) for number in range(4)])
    assert [report.draw for report in reports] == [0, 1, 2, 3]
    assert [request.seed for request in engine.requests] == [0, 1, 2, 3]


async def test_an_evaluation_answers_each_prompt_once_and_names_the_version(generator, engine, buffer):
    engine.version = 5
    engine.answer = lambda request, index: "2"
    graded = await generator.evaluate([make_prompt(index=0), make_prompt(index=1)], 0.0, 8, seed=3)
    assert [each.prompt_id for each in graded] == ["sums/easy/0", "sums/easy/1"]
    assert all(each.versions == (5,) and each.reward == 2.0 for each in graded)
    assert {request.count for request in engine.requests} == {1} and not buffer.groups


async def test_an_update_is_received_scored_and_verifiable(generator):
    update = make_update(4)
    receipt = await generator.update(update)
    assert generator.version == 4
    assert verify(update, receipt, None, max_canary_gap=0.0) == 0.0
    assert set(receipt.seconds) == {"pause", "load", "resume", "canary"} and receipt.generator == 1


async def test_an_update_that_arrives_as_bytes_is_read_from_a_file_that_is_gone_afterwards(generator, engine, tmp_path):
    load, seen = engine.load, []

    async def load_and_look(update):
        seen.append(await asyncio.to_thread(pathlib.Path(update.path).read_bytes))
        return await load(update)

    engine.load = load_and_look
    await generator.update(make_update(4, path="/a/path/of/another/node"), payload=memoryview(b"weights"))
    assert seen == [b"weights"] and list(tmp_path.iterdir()) == []


async def test_the_file_is_gone_also_when_the_update_failed(generator, engine, tmp_path):
    engine.fail_updates = 1
    with pytest.raises(WeightUpdateError):
        await generator.update(make_update(4), payload=b"weights")
    assert generator.version == 0 and list(tmp_path.iterdir()) == []
    await generator.update(make_update(4), payload=b"weights")
    assert generator.version == 4


async def test_altered_weights_are_found_by_whoever_verifies_the_receipt(generator, engine):
    engine.altered = (msgspec.structs.replace(TENSORS[0], digest="other"),)
    update = make_update(4)
    with pytest.raises(WeightUpdateError, match="other bytes than were sent: w"):
        verify(update, await generator.update(update), None, max_canary_gap=0.1)


async def test_the_death_of_the_engine_reaches_a_pending_rollout_the_watch_and_every_later_heartbeat(generator, engine):
    engine.hold.clear()
    pending = [asyncio.create_task(call) for call in (generator.rollout(make_draw()), generator.watch())]
    await asyncio.sleep(0)
    engine.die()
    for call in (*pending, generator.beat(10)):
        with pytest.raises(EngineDied):
            await call


async def test_a_heartbeat_names_all_processes_and_a_silent_engine(generator, engine):
    engine.pids, generator._scorer.pids = (11, 12), (13,)
    assert await generator.beat(10) == (os.getpid(), 11, 12, 13)
    engine.hang()
    with pytest.raises(EngineDied, match="hangs: no answer for 0.01 s"):
        await generator.beat(0.01)


async def test_an_update_whose_file_the_learners_removed_is_told_from_one_that_failed(generator, engine, tmp_path):
    with pytest.raises(FileNotFoundError, match="version 4 is no longer at"):
        await generator.update(make_update(4, path=str(tmp_path / "gone")))
    assert not engine.updates


async def test_closing_ends_engine_scorer_and_buffer_even_if_one_fails(generator, engine, buffer):
    async def fail() -> None:
        raise RuntimeError("would not stop")

    engine.stop = fail
    with pytest.raises(RuntimeError, match="would not stop"):
        await generator.close()
    assert buffer.closed and generator._scorer.closed


async def test_joining_hands_the_group_on_to_the_engine(generator, engine):
    group = NcclGroup(address="127.0.0.1", port=1, engines=2, workers=1)
    await generator.join(group, 0)
    assert engine.joined == (group, 0)
