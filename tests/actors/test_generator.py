from __future__ import annotations

import asyncio
import itertools
import os
import pathlib
import time
from collections.abc import Iterator

import msgspec
import pytest

from actors.engine import EngineDied
from actors.generator import Generator
from actors.rollout import FURTHER_SEEDS
from rl.config import Overlong
from rl.orders import Draw
from rl.time_ledger import added
from rl.trajectory import Group
from rl.weights import NcclGroup, TensorDigest, WeightUpdate, WeightUpdateError, combined, verify
from tests.fakes import make_prompt
from tests.fakes_engine import FakeBuffer, FakeEngine, FakeScorer, generator_settings, until

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


async def test_a_group_of_equal_rewards_counts_in_its_batch_where_they_are_kept(engine, buffer, tmp_path):
    generator = two_stages(engine, buffer, tmp_path, zero_advantage="keep")
    engine.answer = lambda request, index: "x" if request.seed % FURTHER_SEEDS == 1 else "7"
    whole, failed = [await generator.rollout(make_draw(number)) for number in range(2)]
    assert whole.dropped is None and whole.rewards == (0.0,) * 5 and len(buffer.groups) == 1
    assert failed.dropped == "reward_failure" and len(failed.rewards) == 2


async def test_an_engine_is_told_what_takes_longest_only_where_that_decides_the_order(engine, buffer, tmp_path):
    draw = msgspec.structs.replace(make_draw(), expected_tokens=99.5)
    for order in ("arrival", "longest_first"):
        await two_stages(engine, buffer, tmp_path, order=order, first_answers=None).rollout(draw)
    assert [request.priority for request in engine.requests] == [0, -99]


async def test_reports_account_for_every_second_of_the_generator_once(generator, engine):
    began = time.monotonic()
    engine.hold.clear()
    rollouts = [asyncio.create_task(generator.rollout(make_draw(number))) for number in range(2)]
    await until(lambda: len(engine.requests) == 2)
    await generator.update(make_update(1))
    engine.hold.set()
    reports = [await rollout for rollout in rollouts]
    await generator.evaluate([make_prompt()], 0.0, 8, seed=3)
    reports.append(await generator.rollout(make_draw(2)))
    seconds = added([report.ledger for report in reports])
    assert set(seconds) <= {"update", "sample", "judge", "publish", "idle"} and seconds["update"] > 0
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - began, abs=0.05)


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


# Two stages


def two_stages(engine, buffer, tmp_path, **changes) -> Generator:
    """Groups of five, of which two answers come first."""
    settings = generator_settings(str(tmp_path))
    settings = msgspec.structs.replace(settings, **{"group_size": 5, "first_answers": 2} | changes)
    return Generator(engine, FakeScorer(), buffer, settings, index=1)


def by_draw(answers: dict[int, str]):
    """Answers of the first stage by draw; the second stage's are all wrong."""
    return lambda request, index: "0" if "further" in request.request_id else answers[request.seed][index]


async def test_first_answers_that_agree_end_a_group_and_are_all_that_is_paid(engine, buffer, tmp_path):
    generator = two_stages(engine, buffer, tmp_path)
    engine.answer = by_draw({0: "77"})
    report = await generator.rollout(make_draw())
    assert (report.dropped, report.rewards, report.num_tokens) == ("zero_advantage", (0.0, 0.0), 2)
    assert [request.count for request in engine.requests] == [2] and not buffer.groups


async def test_first_answers_that_differ_bring_the_rest_and_the_whole_group_is_published(engine, buffer, tmp_path):
    generator = two_stages(engine, buffer, tmp_path)
    engine.answer = by_draw({0: "27"})
    report = await generator.rollout(make_draw())
    assert report.dropped is None and report.rewards == (2.0, 0.0, 0.0, 0.0, 0.0) == buffer.groups[0].rewards
    assert [request.count for request in engine.requests] == [2, 3] and report.first_answers == 2
    assert len({request.request_id for request in engine.requests}) == 2 == len({r.seed for r in engine.requests})


@pytest.mark.parametrize("answers", ["xx", "x2"])
async def test_first_answers_that_could_not_be_judged_end_a_group_as_reward_failure(engine, buffer, tmp_path, answers):
    generator = two_stages(engine, buffer, tmp_path)
    engine.answer = by_draw({0: answers})
    assert (await generator.rollout(make_draw())).dropped == "reward_failure" and len(engine.requests) == 1


async def test_the_second_stage_of_a_round_is_one_round_of_those_that_go_on(engine, buffer, tmp_path):
    generator, rounds = two_stages(engine, buffer, tmp_path), []
    sample_round = engine.sample_round

    async def sample_and_note(requests):
        rounds.append([request.request_id for request in requests])
        return await sample_round(requests)

    engine.sample_round = sample_and_note
    engine.answer = by_draw({0: "27", 1: "77", 2: "72"})
    reports = await generator.rollout_round([make_draw(number) for number in range(3)])
    assert [report.dropped for report in reports] == [None, "zero_advantage", None]
    assert rounds == [["run/0", "run/1", "run/2"], ["run/0/further", "run/2/further"]]
    assert [len(report.rewards) for report in reports] == [5, 2, 5] and len(buffer.groups) == 2
    assert all(report.seconds["sample"] > 0 for report in reports)


async def published_by_a_round(folder, turns: Iterator[int]) -> list[Group]:
    """What a round of six brings into the buffer, where judging the next group takes the next number of turns.

    The engine answers by seed and by the order in which it was asked, which decides a real one's batches.
    """
    engine, buffer = FakeEngine(), FakeBuffer()
    engine.answer = lambda request, index: f"{(request.seed + engine.requests.index(request) + index) % 3}"
    generator = two_stages(engine, buffer, folder)
    judge = generator._scorer.judge_group

    async def judge_at_leisure(requests):
        for _ in range(next(turns)):
            await asyncio.sleep(0)
        return await judge(requests)

    generator._scorer.judge_group = judge_at_leisure
    reports = await generator.rollout_round([make_draw(number) for number in range(6)])
    assert 0 < len(buffer.groups) < len(reports)
    groups = sorted(buffer.groups, key=lambda group: group.draw)
    return [msgspec.structs.replace(group, finished_at=0.0) for group in groups]


async def test_a_round_in_two_stages_is_the_same_to_the_last_bit_however_long_judging_takes(tmp_path):
    evenly, unevenly = itertools.repeat(0), itertools.cycle([9, 2, 5, 0])
    assert await published_by_a_round(tmp_path, evenly) == await published_by_a_round(tmp_path, unevenly)


# Long tails


async def in_the_engine(engine: FakeEngine, request_id: str) -> None:
    await until(lambda: request_id in [request.request_id for request in engine.requests])


async def test_a_group_that_began_too_long_ago_is_aborted_in_the_engine_and_told_as_stale(generator, engine, buffer):
    engine.hold.clear()
    engine.version = 3
    old = asyncio.create_task(generator.rollout(make_draw(0)))
    await in_the_engine(engine, "run/0")
    engine.version = 4
    young = asyncio.create_task(generator.rollout(make_draw(1)))
    await in_the_engine(engine, "run/1")
    await generator.cut_tails(4)
    report = await old
    assert (report.dropped, report.num_tokens, report.oldest_version) == ("stale", 3, 3)
    assert report.rewards == (None, None, None) and "judge" not in report.seconds
    engine.hold.set()
    assert (await young).dropped is None and [group.draw for group in buffer.groups] == [1]


async def test_a_group_is_cut_in_its_second_stage_too_with_what_it_had(engine, buffer, tmp_path):
    generator = two_stages(engine, buffer, tmp_path)
    engine.answer = by_draw({0: "27"})
    judge = generator._scorer.judge_group

    async def judge_and_hold(requests):
        engine.hold.clear()
        return await judge(requests)

    generator._scorer.judge_group = judge_and_hold
    rollout = asyncio.create_task(generator.rollout(make_draw()))
    await in_the_engine(engine, "run/0/further")
    await generator.cut_tails(1)
    report = await rollout
    assert (report.dropped, report.num_tokens, report.rewards) == ("stale", 5, (2.0, 0.0, None, None, None))
    assert "run/0/further" in engine.aborted


@pytest.mark.parametrize("answers, reason", [("27", "stale"), ("77", "zero_advantage")])
async def test_a_group_that_is_cut_while_it_is_judged_goes_no_further(engine, buffer, tmp_path, answers, reason):
    generator = two_stages(engine, buffer, tmp_path)
    engine.answer = by_draw({0: answers})
    judge = generator._scorer.judge_group

    async def judge_and_cut(requests):
        await generator.cut_tails(1)
        return await judge(requests)

    generator._scorer.judge_group = judge_and_cut
    report = await generator.rollout(make_draw())
    assert report.dropped == reason and len(engine.requests) == 1 and not buffer.groups


async def test_cutting_when_nothing_is_too_old_leaves_the_engine_alone(generator, engine):
    await generator.cut_tails(0)
    assert (await generator.rollout(make_draw())).dropped is None and not engine.aborted


# Length


async def test_length_is_penalised_in_rollouts_and_not_in_evaluations(engine, buffer, tmp_path):
    overlong = Overlong(soft_tokens=4, weight=0.5)
    generator = two_stages(engine, buffer, tmp_path, first_answers=None, overlong=overlong)  # max_tokens is 8
    engine.answer = lambda request, index: "7" * (4 + index)
    report = await generator.rollout(make_draw())
    assert report.rewards == (0.0, -0.125, -0.25, -0.375, -0.5) and report.scores == (0.0,) * 5
    assert [part.name for part in report.parts[1]] == ["answer", "overlong"] and report.dropped is None
    (graded,) = await generator.evaluate([make_prompt()], 0.0, 8, seed=3)
    assert [part.name for part in graded.parts] == ["answer"]
