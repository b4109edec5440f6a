"""A run is taken up after any crash from what Redis, ledger, archive and checkpoint still hold."""

from __future__ import annotations

import json
import secrets

import pytest

from rl import checkpoints
from rl.buffer import Buffer, BufferLimits, BufferUnavailable
from rl.embedded_redis import EmbeddedRedis
from rl.recorder import RunDirectory
from rl.resume import number_of, take_up
from tests.fakes import make_group, make_run
from tests.rl.rewinding import Rewinding

LIMITS = BufferLimits(max_bytes=1 << 20, max_groups=1000)
STEPS = 9


@pytest.fixture
async def crashed(redis_url, tmp_path):
    """A run whose driver died in step 6, two steps after its newest checkpoint; the buffer and its Redis go on."""
    run_id = f"run-{secrets.token_hex(4)}"
    buffer = await Buffer.connect(redis_url, run_id, LIMITS)
    run = make_run(tmp_path / run_id, buffer, steps=STEPS)
    run.url = redis_url
    original = run.parts.learners.step

    async def crash(order):
        if order.step == 6:
            raise RuntimeError("the driver crashed")
        return await original(order)

    run.parts.learners.step = crash
    with pytest.raises(RuntimeError, match="the driver crashed"):
        await run.main()
    yield run
    await buffer.delete_run()
    await buffer.close()


async def taken_up(run, **settings):
    directory = run.parts.recorder.directory
    folder, manifest = checkpoints.newest_checkpoint(directory.checkpoints, run.plan.run_id, **settings)
    checkpoints.discard_after(directory.checkpoints, manifest.step)
    again = make_run(directory.path, run.parts.buffer, steps=STEPS, start_step=manifest.step)
    found = await take_up(again.parts, again.sampler, again.saver, manifest)
    await again.parts.learners.load(str(folder))
    return again, found


async def finishes(run) -> None:
    assert await run.main() == "finished"
    counts = await run.parts.buffer.stats()
    assert counts.trained_groups == 2 * STEPS and counts.in_flight == 0 == counts.leased_groups
    archive = run.parts.archive
    ids = [group.group_id for step in archive.steps() for group in archive.read(step)]
    assert len(ids) == len(set(ids)) == 2 * STEPS, "a group was trained twice, or lost"
    rows = (run.parts.recorder.directory.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, STEPS + 1))


async def test_with_redis_whole_nothing_is_lost_and_nothing_written_off(crashed):
    run, found = await taken_up(crashed)
    assert (found.step, found.redelivered_steps, found.written_off) == (4, 2, 0) and not found.redis_was_empty
    await finishes(run)


async def test_the_useful_share_of_a_resumed_run_counts_the_steps_that_were_kept_and_made_again_once(crashed):
    run, _ = await taken_up(crashed)
    await finishes(run)
    counts = await run.parts.buffer.stats()
    share = run.parts.recorder.read_metric("flow/useful_token_fraction")
    useful = run.parts.recorder.read_metric("learner/useful/tokens")
    assert sum(useful.values()) == counts.trained_tokens and list(share) == list(range(1, STEPS + 1))
    sampled = run.parts.recorder.read_metric("flow/tokens/sampled")
    assert share[STEPS] == sum(useful.values()) / sampled[STEPS]


async def test_with_redis_gone_the_unsaved_steps_come_from_the_archive_and_the_rest_is_drawn_anew(crashed):
    ledger = crashed.parts.recorder.read_ledger()
    Rewinding(crashed.url, crashed.plan.run_id).wipe()
    run, found = await taken_up(crashed)
    assert found.redis_was_empty
    await finishes(run)
    assert [group.group_id for group in run.parts.archive.read(5)] == list(ledger[5])


async def test_an_older_checkpoint_gets_the_steps_after_it_from_the_archive(crashed):
    directory = RunDirectory(crashed.parts.recorder.directory.path)
    older = checkpoints.folder_of(directory.checkpoints, 2)
    older.mkdir(exist_ok=True)
    (older / "weights").write_text("2")
    newest = checkpoints.newest_checkpoint(directory.checkpoints)[1]
    checkpoints.complete(older, checkpoints.Manifest(crashed.plan.run_id, 2, 2, state=newest.state))
    run, found = await taken_up(crashed, step=2)
    assert (found.step, found.redelivered_steps) == (2, 4)
    ledger = crashed.parts.recorder.read_ledger()
    await finishes(run)
    for step in (3, 4, 5, 6):
        assert [group.group_id for group in run.parts.archive.read(step)] == list(ledger[step])


async def test_a_group_published_in_the_last_moment_is_evidence_for_the_resumed_run(crashed):
    buffer = crashed.parts.buffer
    draw = crashed.sampler._draw()
    await buffer.admit(draw)
    await buffer.put(make_group(draw, (0.0, 1.0)))
    run, _ = await taken_up(crashed)
    assert draw.group_id in run.sampler.state()["seen"]
    evidence = run.parts.curriculum.state_dict()["evidence"][draw.prompt.source][draw.prompt.level]
    known = crashed.parts.curriculum.state_dict()["evidence"][draw.prompt.source][draw.prompt.level]
    assert evidence["groups"] > known["groups"]


async def test_draws_that_redis_lost_with_the_driver_are_written_off_and_their_numbers_never_used_again(crashed):
    directory = crashed.parts.recorder.directory
    far = [f"{crashed.plan.run_id}/{number:08d}" for number in (40, 41)]
    crashed.parts.recorder.ledger(7, 6, far)  # leased, and lost by Redis in the same second as the driver died
    run, found = await taken_up(crashed)
    assert run.sampler.next_draw == 42 and found.written_off > 0
    await finishes(run)
    assert not set(far) & {group.group_id for step in (7, 8, 9) for group in run.parts.archive.read(step)}
    assert directory.run_id == crashed.plan.run_id


def test_a_group_id_ends_in_the_number_of_its_draw():
    assert number_of("sums-20260101/00000042") == 42


async def test_a_redis_that_stays_away_stops_the_run_and_the_run_goes_on_when_it_is_back(tmp_path):
    server = EmbeddedRedis.start(tmp_path / "redis")
    run_id, limits = "run-1", BufferLimits(max_bytes=1 << 20, max_groups=1000, reconnect_deadline_s=0.2)
    buffer = await Buffer.connect(server.url, run_id, limits, owner="me")
    run = make_run(tmp_path / run_id, buffer, steps=STEPS)
    original = run.parts.learners.step

    async def lose_redis(order):
        if order.step == 6:
            server.stop()
        return await original(order)

    run.parts.learners.step = lose_redis
    with pytest.raises(BufferUnavailable, match="resume"):
        await run.main()
    await buffer.close()
    server.revive()
    again_buffer = await Buffer.connect(server.url, run_id, limits, owner="me")
    directory = run.parts.recorder.directory
    folder, manifest = checkpoints.newest_checkpoint(directory.checkpoints, run_id)
    again = make_run(directory.path, again_buffer, steps=STEPS, start_step=manifest.step)
    await take_up(again.parts, again.sampler, again.saver, manifest)
    await again.parts.learners.load(str(folder))
    await finishes(again)
    await again_buffer.close()
    server.stop()


async def test_a_run_of_the_same_id_from_another_directory_is_refused(redis_url):
    run_id = f"run-{secrets.token_hex(4)}"
    mine = await Buffer.connect(redis_url, run_id, LIMITS, owner="one directory")
    with pytest.raises(ValueError, match="belongs to another run of the same id; nothing was touched"):
        await Buffer.connect(redis_url, run_id, LIMITS, owner="another")
    await mine.delete_run()
    await mine.close()
