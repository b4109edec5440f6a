"""Costs are read, guessed and fitted: what is wrong with them is said, and what a run was made with comes out again."""

from __future__ import annotations

import json
import random

import pytest

from rl.planner_costs import Costs, Lengths, dump_costs, load_costs
from rl.planner_fit import fit, fit_engine, read_steps
from rl.planner_guess import DEVICES, guess, guess_for, least_ranks, step_ratio
from tests.rl.planner_samples import KNOWN, config, finished_run, row, write_run

RATIO = step_ratio("cpu")


class TestCosts:
    def test_a_file_gives_back_what_was_written(self, tmp_path):
        path = tmp_path / "costs.json"
        path.write_text(dump_costs(KNOWN))
        assert load_costs(str(path)) == KNOWN

    def test_a_yaml_file_may_leave_out_what_costs_nothing(self, tmp_path):
        path = tmp_path / "costs.yaml"
        path.write_text(
            "engine_fixed_s: 1\nengine_sequence_s: 0.5\nlearner_fixed_s: 2\nlearner_token_s: 0\n"
            "lengths: {mean_tokens: 30}\n"
        )
        found = load_costs(str(path))
        assert found.judge_s == 0 and found.contention == 1 and found.engine_tokens_per_s(2) == pytest.approx(1.0)

    @pytest.mark.parametrize(
        "content, expected",
        [
            ("engine_fixed_s: 1", "engine_sequence_s"),
            ("[1, 2", "costs.yaml"),
            ("engine_step_s: 1", "engine_step_s"),
            ("just text", "Expected `object`"),
        ],
    )
    def test_a_file_that_is_no_costs_is_refused_with_what_is_wrong(self, tmp_path, content, expected):
        path = tmp_path / "costs.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match="docs/planner.md") as refused:
            load_costs(str(path))
        assert expected in str(refused.value)

    def test_a_missing_file_is_told_with_how_to_make_one(self, tmp_path):
        with pytest.raises(ValueError, match="--write"):
            load_costs(str(tmp_path / "none.json"))

    @pytest.mark.parametrize(
        "changes",
        [{"judge_s": -1.0}, {"zero_advantage_share": 1.0}, {"contention": 0.5}, {"pause_s": float("nan")}],
        ids=lambda changes: next(iter(changes)),
    )
    def test_what_no_run_could_cost_is_refused(self, tmp_path, changes):
        path = tmp_path / "costs.json"
        path.write_text(json.dumps(json.loads(dump_costs(KNOWN)) | changes))
        with pytest.raises(ValueError, match=next(iter(changes))):
            load_costs(str(path))


class TestLengths:
    def test_measured_groups_stay_together_and_are_capped(self):
        lengths = Lengths(groups=((1, 2), (90, 100)))
        drawn = {lengths.draw(random.Random(seed), 2, 95) for seed in range(20)}
        assert drawn == {(1, 2), (90, 95)}

    def test_a_lognormal_has_its_mean_and_its_cap(self):
        lengths = Lengths(mean_tokens=100, sigma=0.5)
        drawn = lengths.draw(random.Random(0), 20_000, 10_000)
        assert sum(drawn) / len(drawn) == pytest.approx(100, rel=0.02)
        assert max(lengths.draw(random.Random(0), 1000, 120)) == 120

    def test_neither_is_refused(self):
        with pytest.raises(ValueError, match="mean_tokens"):
            Lengths()
        with pytest.raises(ValueError, match="empty group"):
            Lengths(groups=((),))


class TestFit:
    def test_a_and_b_come_back_from_engines_that_were_filled_differently(self):
        points = [(n, 0.031 + 0.0028 * n) for n in (4, 9, 20, 33, 60)]
        assert fit_engine(points, RATIO) == pytest.approx((0.031, 0.0028))

    def test_noise_around_one_point_is_not_taken_for_a_line(self):
        chance = random.Random(3)
        points = [(16 + chance.gauss(0, 1), 0.076 + chance.gauss(0, 0.004)) for _ in range(40)]
        fixed_s, sequence_s = fit_engine(points, RATIO)
        assert fixed_s == pytest.approx(0.031, rel=0.1) and sequence_s == pytest.approx(0.0028, rel=0.1)

    def test_neither_is_negative(self):
        assert fit_engine([(10, 0.01), (20, 0.03), (40, 0.08)], RATIO)[0] == 0.0
        falling = fit_engine([(10, 0.08), (20, 0.05), (40, 0.03)], RATIO)
        assert min(falling) > 0

    @pytest.mark.parametrize("varied", [True, False])
    def test_a_run_gives_back_the_costs_that_it_was_made_with(self, tmp_path, varied):
        found = fit(config(), finished_run(tmp_path, varied), "cpu")
        near = pytest.approx(KNOWN.engine_fixed_s, rel=0.05)
        assert found.engine_fixed_s == near and found.engine_sequence_s == pytest.approx(0.0028, rel=0.05)
        for name in (
            "learner_fixed_s",
            "learner_token_s",
            "publish_s",
            "between_s",
            "prepare_s",
            "pause_s",
            "confirm_s",
        ):
            assert getattr(found, name) == pytest.approx(getattr(KNOWN, name)), name
        assert (found.prepare_s, found.confirm_s) == pytest.approx((KNOWN.prepare_s, KNOWN.confirm_s))
        assert found.zero_advantage_share == pytest.approx(0.4, abs=0.08)
        assert found.lengths.groups == KNOWN.lengths.groups * 3
        assert "28 steps of a_run" in found.origin

    def test_lengths_are_scaled_to_all_that_was_sampled_as_dropped_groups_are_not_kept(self, tmp_path):
        rows = [row(step, config(), 16.0) | {"sampling/completion_length/tokens": 6.0} for step in range(1, 6)]
        assert fit(config(), write_run(tmp_path, rows), "cpu").lengths.mean == pytest.approx(6.0, rel=0.05)

    def test_without_kept_answers_their_mean_is_what_there_is(self, tmp_path):
        directory = finished_run(tmp_path, varied=False)
        next(directory.path.glob("rollouts/*.jsonl")).unlink()
        assert fit(config(), directory, "cpu").lengths == Lengths(mean_tokens=KNOWN.lengths.mean)

    def test_a_wait_for_a_place_in_the_engine_is_no_slow_engine(self, tmp_path):
        settings = config("generators.max_sequences=16")
        step = row(1, config(), 16.0)
        twice = {name: 2 * step[name] for name in ("generator/sequences/mean", "generator/engine_step/s")}
        rows = [step | twice | {"step": number} for number in range(1, 8)]
        found = fit(settings, write_run(tmp_path, rows), "cpu")
        assert found.engine_tokens_per_s(16) == pytest.approx(KNOWN.engine_tokens_per_s(16), rel=0.02)

    def test_a_run_that_is_too_short_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="has 3 steps.*run.steps=6"):
            read_steps(write_run(tmp_path, [row(step, config(), 16.0) for step in (1, 2, 3)]))

    def test_a_run_of_an_earlier_version_is_refused_with_what_it_lacks(self, tmp_path):
        rows = [row(step, config(), 16.0) for step in range(1, 6)]
        for each in rows:
            del each["generator/engine_step/s"], each["learner/seconds/lease"]
        with pytest.raises(ValueError, match="lacks generator/engine_step/s, learner/seconds/lease"):
            read_steps(write_run(tmp_path, rows))


class TestGuess:
    def test_the_core_of_the_table_is_the_one_that_was_measured(self):
        found = guess(config(), "cpu")
        assert found.engine_tokens_per_s(16) == pytest.approx(210, rel=0.1)
        assert found.engine_tokens_per_s(64) == pytest.approx(305, rel=0.1)
        assert "guessed; measure with: rl run CONFIG run.steps=6" in found.origin

    def test_more_devices_are_faster_though_not_by_their_number(self):
        def costs(engine_devices: int) -> Costs:
            lengths = Lengths(mean_tokens=1000)
            return guess_for(70 * 10**9, DEVICES["h100"], lengths, 500, 8, engine_devices)

        gain = costs(8).engine_tokens_per_s(64) / costs(1).engine_tokens_per_s(64)
        assert 4 < gain < 8

    def test_a_model_that_nobody_knows_cannot_be_guessed(self):
        with pytest.raises(ValueError, match="--costs"):
            guess(config("model.path=somebody/something"), "cpu")

    def test_large_models_need_ranks_for_their_state(self):
        assert least_ranks(135 * 10**6, DEVICES["h100"]) == 1
        assert least_ranks(405 * 10**9, DEVICES["h100"]) == 114
