"""The four loops of rl/run.py over a real buffer and fake engines: bounds, balance, order, stops and failures."""

from __future__ import annotations

import json
import secrets

import pytest

from rl import run_state
from rl.buffer import Buffer
from rl.weights import WeightUpdateError
from tests.fakes import make_run


@pytest.fixture
async def buffer(redis_url, request):
    run_id = f"run-{secrets.token_hex(4)}"
    connected = await Buffer.connect(redis_url, run_id, 1 << 20)
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


async def test_with_max_lag_0_two_runs_train_on_the_same_batches_in_the_order_of_the_draws(redis_url, tmp_path):
    batches = []
    for name in ("one", "two"):
        buffer = await Buffer.connect(redis_url, f"{name}-{secrets.token_hex(4)}", 1 << 20)
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


async def test_a_stop_writes_a_checkpoint_and_a_resumed_run_ends_with_all_steps(buffer, tmp_path):
    run = make_run(tmp_path / "r", buffer, steps=9)
    original = run.parts.learners.step

    async def step_then_stop(order):
        report = await original(order)
        if order.step == 3:
            run.stop_requested.set()
        return report

    run.parts.learners.step = step_then_stop
    assert await run.main() == "stopped"
    folder, manifest = run_state.newest_checkpoint(run.parts.recorder.directory.checkpoints)
    assert manifest.step == 3 and (folder / "weights").read_text() == "3"

    again = make_run(tmp_path / "r", buffer, steps=9, start_step=3)
    await run_state.reconcile(buffer, again.parts.recorder, 3)
    counts = await buffer.stats()
    again.parts.gate.load_state_dict({"accepted": counts.trained_groups + counts.buffered_groups, "running": 0})
    again.parts.learners.version = 3
    assert await again.main() == "finished"
    counts = await buffer.stats()
    assert counts.trained_groups == 18 and counts.in_flight == 0


async def test_after_a_crash_the_batches_of_unsaved_steps_come_back_in_order(buffer, tmp_path):
    run = make_run(tmp_path / "r", buffer, steps=9)
    original = run.parts.learners.step

    async def crash_at_step_5(order):
        if order.step == 6:
            raise RuntimeError("the learner crashed")
        return await original(order)

    run.parts.learners.step = crash_at_step_5
    with pytest.raises(RuntimeError, match="the learner crashed"):
        await run.main()
    assert run_state.newest_checkpoint(run.parts.recorder.directory.checkpoints)[1].step == 4

    again = make_run(tmp_path / "r", buffer, steps=9, start_step=4)
    await run_state.reconcile(buffer, again.parts.recorder, 4)
    counts = await buffer.stats()
    held = counts.trained_groups + counts.buffered_groups + counts.leased_groups
    again.parts.gate.load_state_dict({"accepted": held, "running": 0})
    again.parts.learners.version = 4
    ledger = run.parts.recorder.read_ledger()
    assert await again.main() == "finished"
    first = [f"{again.plan.run_id}/{draw:08d}" for batch in again.parts.learners.batches[:2] for draw in batch]
    assert tuple(first) == ledger[5] + ledger[6]
    counts = await buffer.stats()
    assert counts.trained_groups == 18 and counts.in_flight == 0


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
