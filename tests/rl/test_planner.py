"""The search finds the split that the costs ask for, and advice says only what would help."""

from __future__ import annotations

import msgspec
import pytest

from rl.planner import Pool, advice, best_splits, estimate_s, mean_length, predict, setting_of, synchronous
from rl.planner_fit import fit, read_steps
from rl.planner_validation import Compared, compare
from tests.rl.planner_samples import KNOWN, STEPS, config, finished_run

SETTING = setting_of(config())


class TestBestSplits:
    def test_both_sides_get_what_their_work_takes(self):
        setting = msgspec.structs.replace(SETTING, groups_per_step=32, max_lag=2)
        slow_learner = msgspec.structs.replace(KNOWN, learner_token_s=0.03, zero_advantage_share=0.0)
        slow_engine = msgspec.structs.replace(KNOWN, learner_token_s=0.0005)
        pool = Pool(devices=16)
        assert best_splits(setting, slow_learner, pool)[0].setting.ranks >= 10
        assert best_splits(setting, slow_engine, pool)[0].setting.generators >= 12

    def test_the_best_come_first_and_fit_the_pool(self):
        pool = Pool(devices=24, per_generator=4, least_ranks=3)
        options = best_splits(SETTING, KNOWN, pool)
        seconds = [option.prediction.step_s for option in options]
        assert seconds == sorted(seconds)
        for option in options:
            assert option.setting.generators * 4 + option.setting.ranks <= 24 and option.setting.ranks >= 3
            assert option.setting.ranks <= SETTING.groups_per_step, "a rank without a group has no work"

    def test_the_search_is_as_good_as_trying_all(self):
        pool = Pool(devices=12)
        tried = [
            predict(msgspec.structs.replace(SETTING, generators=generators, ranks=min(8, 12 - generators)), KNOWN)
            for generators in range(1, 12)
        ]
        best = min(option.prediction.step_s for option in tried)
        assert best_splits(SETTING, KNOWN, pool)[0].prediction.step_s <= 1.02 * best

    def test_a_pool_that_holds_no_split_is_refused_with_the_number_that_would(self):
        with pytest.raises(ValueError, match="ask for 12 or more"):
            best_splits(SETTING, KNOWN, Pool(devices=8, per_generator=8, least_ranks=4))

    def test_an_estimate_is_below_the_simulation_and_near_it_where_one_side_decides(self):
        slow = msgspec.structs.replace(KNOWN, learner_fixed_s=60.0)
        for setting in (SETTING, synchronous(SETTING)):
            estimate = estimate_s(setting, slow, mean_length(setting, slow))
            assert 0.85 < estimate / predict(setting, slow).prediction.step_s <= 1.01


class TestAdvice:
    def test_a_balanced_run_gets_none(self):
        assert advice(0.1, 0.12, 2, 2) is None
        assert advice(0.0, 0.0, 1, 1) is None

    def test_a_learner_that_waits_asks_for_more_generators(self):
        told = advice(0.67, 0.0, 1, 1)
        assert told is not None and told.startswith("learner idle 67%") and "3:1" in told and "rl plan" in told

    def test_generators_that_wait_ask_for_more_ranks(self):
        told = advice(0.0, 0.5, 4, 4)
        assert told is not None and told.startswith("generators idle 50%") and "1:2" in told

    def test_a_ratio_that_is_there_already_is_no_advice(self):
        assert advice(0.25, 0.0, 4, 3) is not None and advice(0.25, 0.0, 4, 3) != advice(0.0, 0.25, 4, 3)
        assert advice(0.6, 0.4, 2, 3) is None, "they take turns, and their work is as one to one"

    @pytest.mark.parametrize("idle", [(1.0, 0.0), (0.0, 1.0)])
    def test_a_side_that_never_worked_says_nothing_of_a_ratio(self, idle):
        assert advice(*idle, 1, 1) is None


class TestValidation:
    def test_a_run_that_went_as_simulated_is_predicted(self, tmp_path):
        directory = finished_run(tmp_path, varied=False)
        steps = read_steps(directory)
        rows = {each.what: each for each in compare(SETTING, fit(config(), directory, "cpu"), steps, True)}
        assert rows["seconds a step"].predicted == pytest.approx(rows["seconds a step"].measured, rel=0.1)
        assert rows["sampled tokens/s"].predicted == pytest.approx(rows["sampled tokens/s"].measured, rel=0.15)
        assert rows["learner idle"].predicted == pytest.approx(rows["learner idle"].measured, abs=0.08)
        assert rows["mean lag, versions"].predicted == pytest.approx(rows["mean lag, versions"].measured, abs=0.2)
        assert max(row["step"] for row in steps) == STEPS

    def test_errors_are_in_the_unit_of_the_figure(self):
        assert Compared("seconds a step", 2.0, 2.5).cells() == ("seconds a step", "2.00", "2.50", "+25.0%")
        assert Compared("learner idle", 0.2, 0.15, is_share=True).cells()[1:] == ("20.0%", "15.0%", "-5.0 points")
        assert Compared("lag", 1.0, 1.25, is_lag=True).error == "+0.25"
