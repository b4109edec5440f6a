"""The four loops of rl/run.py over a real buffer and fake engines: bounds, balance, order, stops and failures."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets

import pytest

from rl import checkpoints
from rl.buffer import Buffer, BufferLimits
from rl.config import EvaluationSection
from rl.parts import LearnersLost
from rl.recorder import RunDirectory
from rl.resume import take_up
from rl.run import Run
from rl.weights import WeightUpdateError
from tests.fakes import make_run

LIMITS = BufferLimits(max_bytes=1 << 20, max_groups=1000)


@pytest.fixture
async def buffer(redis_url, request):
    run_id = f"run-{secrets.token_hex(4)}"
    connected = await Buffer.connect(redis_url, run_id, LIMITS)
    connected.run_id = run_id
    yield connected
    await connected.delete_run()
    await connected.close()


async def test_a_run_makes_all_its_steps_within_the_lag_bound_and_nothing_vanishes(buffer, tmp_path):
    run = make_run(tmp_path / "r", buffer, steps=20)
    assert await run.main() == "finished"
    assert len(run.parts.learners.batches) == 20
    assert max(run.parts.learners.lags) <= 2
    counts = await buffer.stats()
    assert counts.in_flight == 0
    assert counts.trained_groups == 40
    assert counts.drawn == 40 + sum(groups for groups, _ in counts.dropped.values())


@pytest.mark.parametrize("every_steps", [2, 3])
async def test_weights_that_are_delivered_every_few_steps_stall_nothing_and_bound_the_lag(
    buffer, tmp_path, every_steps
):
    run = make_run(tmp_path / "r", buffer, steps=11, max_lag=2)
    evaluation = EvaluationSection(every_steps=5, prompts_per_level=2)
    run = Run(dataclasses.replace(run.plan, weights_every_steps=every_steps, evaluation=evaluation), run.parts)
    async with asyncio.timeout(60):
        assert await run.main() == "finished"
    assert len(run.parts.learners.batches) == 11 and max(run.parts.learners.lags) <= 2
    due = {2: [0, 2, 4, 5, 7, 9, 10, 11], 3: [0, 3, 5, 8, 10, 11]}
    assert run.parts.generators.updates == due[every_steps]


async def test_with_max_lag_0_two_runs_train_on_the_same_batches_in_the_order_of_the_draws(redis_url, tmp_path):
    batches = []
    for name in ("one", "two"):
        buffer = await Buffer.connect(redis_url, f"{name}-{secrets.token_hex(4)}", LIMITS)
        run = make_run(tmp_path / name, buffer, max_lag=0, rewards=lambda draw: (0.0, float(draw % 3 > 0)))
        assert await run.main() == "finished"
        assert set(run.parts.learners.lags) == {0}
        batches.append(run.parts.learners.batches)
        await buffer.close()
    assert batches[0] == batches[1]
    assert all(list(batch) == sorted(batch) for batch in batches[0])


async def test_a_dropped_group_gives_its_capacity_back_and_its_reason_is_counted(buffer, tmp_path):
    run = make_run(tmp_path / "r", buffer, rewards=lambda draw: (0.0, float(draw % 2)))
    assert await run.main() == "finished"
    counts = await buffer.stats()
    assert counts.dropped["zero_advantage"][0] >= 10
    assert counts.trained_groups == 12


async def test_the_first_failure_ends_the_run_and_is_the_one_reported(buffer, tmp_path):
    run = make_run(tmp_path / "r", buffer, fail_at=3)
    with pytest.raises(RuntimeError, match="the engine died") as caught:
        await run.main()
    assert caught.value.__notes__ == ["in sampling"]


async def test_altered_weights_stop_the_run_with_the_name_of_the_parameter(buffer, tmp_path):
    run = make_run(tmp_path / "r", buffer)
    run.parts.generators.corrupt = True
    with pytest.raises(WeightUpdateError, match="weight"):
        await run.main()


async def test_a_curriculum_without_signal_stops_the_run_with_the_pass_rates(buffer, tmp_path):
    run = make_run(tmp_path / "r", buffer, rewards=lambda draw: (0.0, 0.0))
    with pytest.raises(ValueError, match="sums"):
        await run.main()


async def test_a_reward_that_keeps_failing_stops_the_run_and_is_named(buffer, tmp_path):
    run = make_run(tmp_path / "r", buffer, steps=100, rewards=lambda draw: (None, 0.0, 1.0))
    with pytest.raises(ValueError, match="reward answer failed .* timeout"):
        await run.main()


async def resumed(directory, buffer, steps: int = 9, **settings):
    """A second run on what a first one left."""
    checkpoints_folder = RunDirectory(directory).checkpoints
    folder, manifest = checkpoints.newest_checkpoint(checkpoints_folder, directory.name)
    run = make_run(directory, buffer, steps=steps, start_step=manifest.step, **settings)
    await take_up(run.parts, run.sampler, run.saver, manifest)
    await run.parts.learners.load(str(folder))
    return run


async def ended_well(run, buffer, steps: int = 9) -> None:
    """The run made its steps, and everything it ever drew is accounted for."""
    assert await run.main() == "finished"
    counts = await buffer.stats()
    assert counts.trained_groups == 2 * steps and counts.in_flight == 0 == counts.leased_groups
    assert counts.drawn == 2 * steps + sum(groups for groups, _ in counts.dropped.values())
    steps_seen = [json.loads(line)["step"] for line in metrics_file(run).read_text().splitlines()]
    assert steps_seen == list(range(1, steps + 1))
    archive = run.parts.archive
    trained = [group.group_id for step in archive.steps() for group in archive.read(step)]
    assert len(trained) == len(set(trained)) == 2 * steps


def metrics_file(run):
    return run.parts.recorder.directory.path / "metrics.jsonl"


async def test_a_stop_writes_a_checkpoint_and_a_resumed_run_ends_with_all_steps(buffer, tmp_path):
    run = make_run(tmp_path / buffer.run_id, buffer, steps=9)
    original = run.parts.learners.step

    async def step_then_stop(order):
        report = await original(order)
        if order.step == 3:
            run.stop_requested.set()
        return report

    run.parts.learners.step = step_then_stop
    assert await run.main() == "stopped"
    again = await resumed(tmp_path / buffer.run_id, buffer)
    assert again.plan.start_step == 3 and again.parts.learners.version == 3
    await ended_well(again, buffer)


async def test_after_a_crash_the_batches_of_unsaved_steps_come_back_in_order(buffer, tmp_path):
    run = make_run(tmp_path / buffer.run_id, buffer, steps=9)
    original = run.parts.learners.step

    async def crash_at_step_6(order):
        if order.step == 6:
            raise RuntimeError("the driver crashed")
        return await original(order)

    run.parts.learners.step = crash_at_step_6
    with pytest.raises(RuntimeError, match="the driver crashed"):
        await run.main()
    ledger = run.parts.recorder.read_ledger()
    again = await resumed(tmp_path / buffer.run_id, buffer)
    assert again.plan.start_step == 4
    await ended_well(again, buffer)
    first = [f"{buffer.run_id}/{draw:08d}" for batch in again.parts.learners.batches[:2] for draw in batch]
    assert tuple(first) == ledger[5] + ledger[6]


async def test_what_was_being_sampled_at_a_crash_is_sampled_by_the_resumed_run_under_its_own_id(buffer, tmp_path):
    run = make_run(tmp_path / buffer.run_id, buffer, steps=9, fail_at=14)
    with pytest.raises(RuntimeError, match="the engine died"):
        await run.main()
    lost = await buffer.drawn()
    assert any(draw.draw == 14 for draw in lost)
    again = await resumed(tmp_path / buffer.run_id, buffer)
    await ended_well(again, buffer)
    assert {draw.draw for draw in lost} <= again.parts.generators.sampled.keys()
    assert (await buffer.stats()).dropped["aborted"] == (0, 0)


async def test_lost_learners_go_back_to_the_newest_checkpoint_and_get_the_very_batches_again(buffer, tmp_path):
    run = make_run(tmp_path / buffer.run_id, buffer, steps=9)
    learners = run.parts.learners
    learners.lose_at = {4, 6}
    await ended_well(run, buffer)
    assert learners.restarts == 2
    made = [(index, batch) for index, batch in enumerate(learners.batches)]
    assert len(made) == 9 + 1 + 1, "steps 3 and 5 were made twice"
    assert learners.batches[2] == learners.batches[3] and learners.batches[5] == learners.batches[6]
    rolled_back = [event for event in events(run) if event["event"] == "rollback"]
    assert [(event["from_step"], event["to_step"]) for event in rolled_back] == [(3, 2), (5, 4)]


async def test_learners_lost_before_any_checkpoint_begin_again_at_version_0(buffer, tmp_path):
    run = make_run(tmp_path / buffer.run_id, buffer, steps=4)
    run.parts.learners.lose_at = {2}
    await ended_well(run, buffer, steps=4)
    assert run.parts.learners.batches[0] == run.parts.learners.batches[1]


async def test_learners_lost_while_a_checkpoint_is_written_leave_the_one_before(buffer, tmp_path):
    run = make_run(tmp_path / buffer.run_id, buffer, steps=4)
    learners = run.parts.learners
    original = learners.begin_save

    async def begin_save(folder, export):
        learners.losing_save = folder.endswith("step_000004") and learners.restarts == 0
        await original(folder, export)

    learners.begin_save = begin_save
    await ended_well(run, buffer, steps=4)
    assert learners.restarts == 1
    assert learners.batches[2:4] == learners.batches[4:6]


async def test_learners_that_keep_dying_at_one_step_end_the_run_with_the_reason(buffer, tmp_path):
    run = make_run(tmp_path / buffer.run_id, buffer, steps=4)

    async def step(order):
        raise LearnersLost("learner rank 0 died of a bad batch")

    run.parts.learners.step = step
    with pytest.raises(RuntimeError, match="3 times without a new step .* died of a bad batch"):
        await run.main()
    assert run.parts.learners.restarts == 2


async def test_with_copies_in_memory_fewer_steps_are_made_again(buffer, tmp_path, monkeypatch):
    monkeypatch.setattr("rl.saving.SHARED_MEMORY", tmp_path / "memory")
    run = make_run(tmp_path / buffer.run_id, buffer, steps=8, saving={"every_steps": 8, "memory_every_steps": 1})
    run.parts.learners.lose_at = {6}
    await ended_well(run, buffer, steps=8)
    assert len(run.parts.learners.batches) == 8
    assert len(list((tmp_path / "memory").glob("*/step_*"))) == 1


def events(run):
    return [json.loads(line) for line in (run.parts.recorder.directory.path / "events.jsonl").read_text().splitlines()]


async def test_evaluations_frame_the_run_and_carry_one_version_each(buffer, tmp_path):
    run = make_run(tmp_path / "r", buffer, steps=4)
    await run.main()
    rows = [json.loads(line) for line in (tmp_path / "r" / "evaluations.jsonl").read_text().splitlines()]
    assert rows[0]["version"] == 0
    assert rows[-1]["version"] == 4


async def test_the_run_directory_holds_a_line_per_step_and_the_archive_every_trained_group(buffer, tmp_path):
    import pandas

    run = make_run(tmp_path / "r", buffer, steps=4)
    await run.main()
    metrics = pandas.read_json(tmp_path / "r" / "metrics.jsonl", lines=True)
    assert list(metrics["step"]) == [1, 2, 3, 4]
    archived = pandas.concat(pandas.read_parquet(path) for path in sorted((tmp_path / "r" / "archive").iterdir()))
    assert archived["group"].nunique() == 8 and set(archived["step"]) == {1, 2, 3, 4}
    shown = pandas.read_json(tmp_path / "r" / "rollouts" / "step_000001.jsonl", lines=True)
    assert {"prompt", "completion", "reward", "versions"} <= set(shown.columns)
