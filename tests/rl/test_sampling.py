"""What the driver knows of groups that are not saved, and how it mends a Redis that lost its last second."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets

import msgspec
import pytest

from rl.buffer import Buffer, BufferLimits
from rl.crew import Crew
from rl.sampling import Sampler
from rl.shared import Shared
from rl.trajectory import RewardPart
from tests.fakes import make_group, make_report, make_run
from tests.fakes_engine import until
from tests.rl.rewinding import Rewinding

LIMITS = BufferLimits(max_bytes=1 << 20, max_groups=1000)


@pytest.fixture
async def place(redis_url, tmp_path):
    """A sampler without its loop, over a real buffer; and how to turn Redis back."""
    run_id = f"run-{secrets.token_hex(4)}"
    buffer = await Buffer.connect(redis_url, run_id, LIMITS)
    run = make_run(tmp_path / run_id, buffer)
    run.sampler.rewinding = lambda: Rewinding(redis_url, run_id)
    yield run.sampler, buffer
    await buffer.delete_run()
    await buffer.close()


async def publish(sampler: Sampler, buffer: Buffer, count: int = 1) -> list:
    """Draw groups, have them put into the buffer, and tell the sampler so."""
    groups = []
    for _ in range(count):
        draw = await sampler._next()
        group = make_group(draw, (0.0, 1.0))
        await buffer.put(group)
        await sampler._absorb(make_report(group))
        groups.append(group)
    return groups


def balanced(gate, stats) -> bool:
    return 0 <= stats.in_flight <= gate.running


async def test_a_draw_is_in_redis_before_it_is_sampled_and_leaves_with_its_group(place):
    sampler, buffer = place
    draw = await sampler._next()
    assert await buffer.drawn() == (draw,)
    await buffer.put(make_group(draw, (0.0, 1.0)))
    assert await buffer.drawn() == ()


async def test_a_published_group_that_redis_lost_is_sampled_again_under_its_own_draw(place):
    sampler, buffer = place
    await publish(sampler, buffer)
    before = sampler.rewinding()
    lost = await publish(sampler, buffer, 2)
    before.turn_back()
    assert await sampler.reconcile() == 2
    again = [await sampler._next() for _ in range(2)]
    assert [draw.group_id for draw in again] == [group.group_id for group in lost]
    gate = sampler.parts.gate
    assert (gate.accepted, gate.running) == (1, 2) and balanced(gate, await buffer.stats())


async def test_a_draw_whose_admission_redis_lost_can_still_be_published(place):
    sampler, buffer = place
    before = sampler.rewinding()
    draw = await sampler._next()
    before.turn_back()
    assert await sampler.reconcile() == 0
    assert await buffer.drawn() == (draw,)
    assert await buffer.put(make_group(draw, (0.0, 1.0)))


async def test_a_drop_that_redis_lost_is_counted_again(place):
    sampler, buffer = place
    before = sampler.rewinding()
    draw = await sampler._next()
    await sampler._absorb(make_report(make_group(draw, (1.0, 1.0)), "zero_advantage"))
    before.turn_back()
    await sampler.reconcile()
    stats = await buffer.stats()
    assert stats.dropped["zero_advantage"][0] == 1 and stats.in_flight == 0 == sampler.parts.gate.running


async def test_reconciling_with_a_redis_that_lost_nothing_changes_nothing(place):
    sampler, buffer = place
    await publish(sampler, buffer, 3)
    await sampler._next()
    before = await buffer.stats()
    assert await sampler.reconcile() == 0
    after = await buffer.stats()
    assert msgspec.structs.replace(before, oldest_age_s=0.0) == msgspec.structs.replace(after, oldest_age_s=0.0)


async def test_a_group_that_a_dead_generator_had_published_is_not_dropped_by_its_second_sampling(place):
    sampler, buffer = place
    draw = await sampler._next()
    await buffer.put(make_group(draw, (0.0, 1.0)))  # the generator dies before it can report
    await sampler._absorb(make_report(make_group(draw, (1.0, 1.0)), "zero_advantage"))
    stats, gate = await buffer.stats(), sampler.parts.gate
    assert stats.buffered_groups == 1 and stats.dropped["zero_advantage"] == (0, 0)
    assert (gate.accepted, gate.running) == (1, 0)


async def test_a_stale_group_gives_its_capacity_back_once_even_if_redis_drops_it_twice(place):
    sampler, buffer = place
    await publish(sampler, buffer)
    before = sampler.rewinding()
    for _ in range(2):
        lease = await buffer.lease(1, 1, version=9, max_lag=2)
        assert len(lease.dropped) == 1
        sampler.dropped_as_stale(lease.dropped)
        assert sampler.parts.gate.accepted == 0
        before.turn_back()


async def test_the_state_of_the_last_act_is_what_a_resumed_run_draws_from(place, tmp_path):
    sampler, buffer = place
    await publish(sampler, buffer, 3)
    again = make_run(tmp_path / "again", buffer).sampler
    again.load_state(msgspec.json.decode(await buffer.read_state()))
    assert again.state() == sampler.state() and again.next_draw == 3
    assert again.unseen(["x", *sampler.state()["seen"]]) == ["x"]


async def test_rounds_are_taken_up_whole_with_the_draws_that_were_lost(place):
    sampler, _ = place
    sampler.plan = dataclasses.replace(sampler.plan, max_lag=0)
    sampler.parts.gate.max_lag = sampler.parts.gate.allowed_lag = 0
    drawn = [await sampler._next() for _ in range(2)]
    fresh = Sampler(sampler.plan, sampler.parts, Shared(0), Crew())
    sampler.parts.gate.running = 0
    fresh.take_up([], drawn)
    assert fresh._room() == 2 and fresh._round_size() == 2
    await asyncio.wait_for(fresh._sample_round(), 10)
    assert sampler.parts.gate.accepted == 2 and fresh.next_draw == 2


@pytest.mark.parametrize("version", [0, 9])
async def test_a_group_that_is_leased_or_stale_before_its_report_comes_is_booked_once(place, version):
    sampler, buffer = place
    draw = await sampler._next()
    await buffer.put(make_group(draw, (0.0, 1.0)))  # the generator dies before it can report
    lease = await buffer.lease(1, 1, version, max_lag=2)
    sampler.dropped_as_stale(lease.dropped)
    sampler.leased(lease.entries)
    gate, accepted = sampler.parts.gate, len(lease.entries)
    assert (gate.accepted, gate.running) == (accepted, 0)
    await buffer.commit(lease.entries)
    await sampler._absorb(make_report(make_group(draw, (1.0, 1.0)), "zero_advantage"))
    assert (gate.accepted, gate.running) == (accepted, 0)
    assert (await buffer.stats()).dropped["zero_advantage"] == (0, 0)


async def test_a_stale_drop_that_redis_lost_with_the_publication_is_counted_again(place):
    sampler, buffer = place
    before = sampler.rewinding()
    await publish(sampler, buffer)
    sampler.dropped_as_stale((await buffer.lease(1, 1, version=9, max_lag=2)).dropped)
    before.turn_back()
    await sampler.reconcile()
    stats = await buffer.stats()
    assert stats.dropped["stale"][0] == 1 and stats.in_flight == 0 == sampler.parts.gate.running


# Long tails


async def test_what_would_be_stale_by_now_is_cut_once_a_step_and_gives_its_capacity_back(place):
    sampler, buffer = place
    sampler.plan = dataclasses.replace(sampler.plan, long_tail="drop")  # with a max_lag of 2
    generators, gate = sampler.parts.generators, sampler.parts.gate
    generators.hold.clear()
    rollout = asyncio.create_task(sampler._sample_group(await sampler._next()))
    await until(lambda: generators.held)
    for step in (1, 2):
        sampler._shared.step = step
        sampler._cut_long_tails()
    assert gate.running == 1
    sampler._shared.step = 3
    for _ in range(2):
        sampler._cut_long_tails()
    await rollout
    assert generators.cuts == [1] and gate.running == 0
    stats = await buffer.stats()
    assert stats.dropped["stale"] == (1, 2) and stats.sampled_tokens == 2 and stats.in_flight == 0
    assert await buffer.drawn() == ()


@pytest.mark.parametrize("settings", [{"long_tail": "continue"}, {"long_tail": "drop", "max_lag": 0}])
async def test_long_tails_go_on_where_that_is_asked_for_and_where_rounds_have_none(place, settings):
    sampler, _ = place
    sampler.plan = dataclasses.replace(sampler.plan, **settings)
    await sampler._next()
    sampler._shared.step = 9
    sampler._cut_long_tails()
    await asyncio.sleep(0)
    assert sampler.parts.generators.cuts == []


async def test_a_run_drops_its_endless_groups_and_makes_all_its_steps_without_them(redis_url, tmp_path):
    buffer = await Buffer.connect(redis_url, f"run-{secrets.token_hex(4)}", LIMITS)
    run = make_run(tmp_path / "r", buffer, steps=8, long_tail="drop", endless=(1, 5))
    assert await run.main() == "finished"
    stats = await buffer.stats()
    groups, tokens = stats.dropped["stale"]
    assert groups >= 2 and tokens >= 4 and stats.trained_groups == 16
    await buffer.delete_run()
    await buffer.close()


async def test_a_penalty_for_length_does_not_count_in_what_the_curriculum_is_told(place):
    sampler, buffer = place
    told = []
    sampler.parts.curriculum.observe = lambda *facts: told.append(facts)
    draw = await sampler._next()
    group = make_group(draw, (1.0, 1.0))
    parts = (RewardPart(name="answer", value=1.0, weight=1.0), RewardPart(name="overlong", value=-0.5, weight=1.0))
    long = msgspec.structs.replace(group.trajectories[1], reward=0.5, parts=parts)
    group = msgspec.structs.replace(group, trajectories=(group.trajectories[0], long))
    await buffer.put(group)
    await sampler._absorb(make_report(group))
    sampler.see(group)
    assert [facts[2] for facts in told] == [1.0, 1.0]


# How long answers are believed to be


async def test_a_draw_says_how_many_tokens_its_group_is_believed_to_take_and_a_restart_says_the_same(place):
    sampler, buffer = place
    first = await sampler._next()
    group = make_group(first, (0.0, 1.0))
    await sampler._absorb(make_report(group))
    state = sampler.state()
    draw = sampler._draw()
    answers = [len(trajectory.completion.token_ids) for trajectory in group.trajectories]
    believed = sampler.parts.curriculum.group_size * sum(answers) / len(answers)
    assert (first.expected_tokens, draw.expected_tokens) == (0.0, believed)
    sampler.load_state(json.loads(json.dumps(state)))
    assert sampler._draw() == draw
    assert [each.expected_tokens for each in await buffer.drawn()] == [0.0]


async def test_a_state_that_was_saved_before_lengths_were_believed_is_taken_up(place):
    sampler, _ = place
    old = {name: value for name, value in sampler.state().items() if name != "lengths"}
    sampler.load_state(old)
    assert sampler._draw().expected_tokens == 0.0


async def test_a_published_group_that_nobody_had_learnt_from_teaches_its_length_too(place):
    sampler, _ = place
    draw = await sampler._next()
    sampler.see(make_group(draw, (0.0, 1.0)))
    assert sampler._draw().expected_tokens > 0.0
