"""A group leaves Redis when a checkpoint that holds its step is whole, and not a moment earlier."""

from __future__ import annotations

import secrets

import pytest

from rl import checkpoints
from rl.buffer import Buffer, BufferLimits
from rl.saving import copies_folder
from tests.fakes import make_group, make_report, make_run
from tests.rl.rewinding import Rewinding

LIMITS = BufferLimits(max_bytes=1 << 20, max_groups=1000)


@pytest.fixture
async def trained(redis_url, tmp_path):
    """A run that has trained step 1 on two groups, saved nothing, and the state of Redis before them."""
    run_id = f"run-{secrets.token_hex(4)}"
    buffer = await Buffer.connect(redis_url, run_id, LIMITS)
    run = make_run(tmp_path / run_id, buffer)
    run.before = Rewinding(redis_url, run_id)
    for _ in range(2):
        group = make_group(await run.sampler._next(), (0.0, 1.0))
        await buffer.put(group)
        await run.sampler._absorb(make_report(group))
    run.leased_only = Rewinding(redis_url, run_id)
    entries = (await buffer.lease(1, 2, version=0, max_lag=2)).entries
    run.sampler.leased(entries)
    run.group_ids = [entry.group_id for entry in entries]
    await run._archive(1, run.group_ids)
    run.saver.trained(1, entries)
    run.shared.step = run.parts.learners.version = 1
    yield run
    await buffer.delete_run()
    await buffer.close()


async def test_groups_are_committed_once_the_marker_of_their_checkpoint_is_written(trained):
    folder = checkpoints.folder_of(trained.parts.recorder.directory.checkpoints, 1)
    commit, marked = trained.parts.buffer.commit, []

    async def watched(entries):
        marked.append(checkpoints.read_manifest(folder) is not None)
        await commit(entries)

    trained.parts.buffer.commit = watched
    await trained.saver.save(1)
    assert (await trained.parts.buffer.stats()).leased_groups == 2, "training goes on before the groups are let go"
    await trained.saver.settle()
    counts = await trained.parts.buffer.stats()
    assert marked == [True] and (counts.leased_groups, counts.trained_groups) == (0, 2)
    assert trained.saver.steps == ()


async def test_learners_that_die_while_saving_leave_no_checkpoint_and_every_lease(trained):
    trained.parts.learners.losing_save = True
    await trained.saver.save(1)
    await trained.saver.settle()
    assert checkpoints.whole_checkpoints(trained.parts.recorder.directory.checkpoints) == []
    assert (await trained.parts.buffer.stats()).leased_groups == 2 and trained.saver.steps == (1,)


async def test_the_manifest_holds_what_decides_the_following_draws(trained):
    await trained.saver.save(1)
    await trained.saver.settle()
    _, manifest = checkpoints.newest_checkpoint(trained.parts.recorder.directory.checkpoints)
    assert manifest.state["next_draw"] == 2
    assert set(manifest.state) == {"next_draw", "prompts", "curriculum", "lengths", "seen"}


async def test_a_batch_that_redis_lost_comes_back_from_the_archive_in_its_order(trained):
    trained.before.turn_back()
    entries = await trained.saver.redeliver(1, trained.group_ids[::-1])
    assert [entry.group_id for entry in entries] == trained.group_ids[::-1]
    groups = await trained.parts.buffer.fetch(trained.group_ids)
    assert groups == trained.parts.archive.read(1)
    counts = await trained.parts.buffer.stats()
    assert (counts.leased_groups, counts.drawn, counts.in_flight) == (2, 2, 0)


async def test_a_batch_that_nobody_has_is_none(trained):
    trained.before.turn_back()
    trained.parts.archive.path_of(1).unlink()
    assert await trained.saver.redeliver(1, trained.group_ids) is None


async def test_a_lease_that_redis_lost_is_taken_again_before_another_step_can_have_the_groups(trained):
    trained.leased_only.turn_back()
    assert len((await trained.parts.buffer.holdings()).waiting) == 2
    await trained.saver.reconcile()
    assert (await trained.parts.buffer.holdings()).leased == dict.fromkeys(trained.group_ids, 1)


async def test_a_commit_that_redis_lost_is_made_again(trained):
    await trained.saver.save(1)
    await trained.saver.settle()
    trained.leased_only.turn_back()
    await trained.saver.reconcile()
    counts = await trained.parts.buffer.stats()
    assert (counts.trained_groups, counts.buffered_groups) == (2, 0)


async def test_a_copy_in_memory_lets_go_of_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("rl.saving.SHARED_MEMORY", tmp_path / "memory")
    await trained.saver.copy(1)
    await trained.saver.settle()
    copies = copies_folder(trained.plan.run_id)
    assert checkpoints.newest_checkpoint(copies)[1].step == 1
    assert (await trained.parts.buffer.stats()).leased_groups == 2
