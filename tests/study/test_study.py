"""This file tests the study: its intervals, how it reads runs, and that the page says what was measured."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from learners.laboratory import Curves
from tests.study import figures, study
from tests.study.intervals import mean_interval, ratio_interval, rounded
from tests.study.lag import ARMS, experiment_of
from tests.study.page import page
from tests.study.real_model import command, main, read_run, summarise
from tests.study.teaching import compare, reached_at


class TestIntervals:
    def test_a_mean_has_the_interval_of_student(self):
        assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx([2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5])

    def test_one_value_has_no_interval(self):
        mean, *ends = mean_interval([3.0])
        assert mean == 3.0 and all(math.isnan(end) for end in ends)

    def test_a_ratio_is_of_means_and_its_bootstrap_repeats(self):
        above, below = [1.0, 2.0, 3.0, 6.0], [2.0, 4.0, 6.0, 6.0]
        assert ratio_interval(above, below)[0] == pytest.approx(12 / 18)
        assert ratio_interval(above, below) == ratio_interval(above, below)

    def test_what_is_not_finite_becomes_null_in_json(self):
        assert rounded({"a": [math.inf, np.float64(1.23456)], 4: np.int64(2)}) == {"a": [None, 1.2346], "4": 2}


class TestTokensToUniform:
    def test_the_first_point_that_is_kept_counts_and_is_interpolated(self):
        tokens, quality = np.array([0.0, 10.0, 20.0, 30.0]), np.array([0.1, 0.5, 0.2, 0.6])
        assert reached_at(tokens, quality, 0.4) == pytest.approx(25.0)
        assert reached_at(tokens, quality, 0.05) == 0.0
        assert reached_at(tokens, quality, 0.7) == math.inf

    def test_an_arm_against_itself_gains_nothing_and_needs_all_the_tokens(self):
        tokens = np.array([[0.0, 10.0, 20.0], [0.0, 8.0, 24.0]])
        quality = np.array([[0.1, 0.2, 0.3], [0.1, 0.25, 0.4]])
        curves = Curves(quality, tokens, tokens / 2, quality[..., None], np.array([-1, -1]), 0.0, 1.0, 0.0)
        found = compare(curves, curves)
        assert found["gain_over_uniform"][0] == 0
        assert found["tokens_to_uniform"]["mean"][0] == pytest.approx(1.0)
        assert found["useful_fraction"][0] == pytest.approx(0.5)


def write_run(folder, name, seed, accuracies, tokens_per_step=100.0, useful_per_step=25.0):
    directory = folder / name
    directory.mkdir()
    (directory / "config.yaml").write_text(f"run: {{seed: {seed}}}\n")
    steps = [
        {"step": step, "flow/tokens/sampled": tokens_per_step * step, "learner/useful/tokens": useful_per_step}
        for step in range(1, 2 * len(accuracies))
    ]
    scores = [
        {"version": 2 * index, "step": 2 * index + bool(index), "overall": {"mean": accuracy}}
        for index, accuracy in enumerate(accuracies)
    ]
    steps.insert(0, {**steps[-1], "learner/useful/tokens": 9e9})  # made again after a resume: the later line counts
    for file, rows in (("metrics", steps), ("evaluations", scores)):
        (directory / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


class TestTheRealModel:
    def test_a_run_is_read_as_accuracy_by_tokens(self, tmp_path):
        run = read_run(write_run(tmp_path, "uniform0", 0, [0.1, 0.2, 0.4]))
        assert run.tokens.tolist() == [0, 200, 400]
        assert run.accuracy.tolist() == [0.1, 0.2, 0.4]
        assert run.useful_fraction == pytest.approx(0.25)

    def test_a_run_without_a_curve_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="has 1 evaluations"):
            read_run(write_run(tmp_path, "short", 0, [0.1]))

    def test_arms_are_paired_by_seed(self, tmp_path):
        uniform = [read_run(write_run(tmp_path, f"u{seed}", seed, [0.1, 0.2, 0.3])) for seed in (0, 1)]
        other = [read_run(write_run(tmp_path, f"c{seed}", seed, [0.1, 0.3, 0.5], 100.0, 50.0)) for seed in (1, 0)]
        found = summarise(uniform, other)
        assert found["tokens_to_uniform"]["mean"] == pytest.approx([0.5] * 3)
        assert found["of_mean_curves"] == pytest.approx(0.5)
        assert found["useful_over_uniform"][0] == pytest.approx(2.0)
        assert found["accuracy_at_equal_tokens"]["difference"][0] == pytest.approx(0.2)
        with pytest.raises(ValueError, match="compare the same ones"):
            summarise(uniform, other[:1])

    def test_the_command_summarises_directories(self, tmp_path, capsys):
        runs = [str(write_run(tmp_path, name, 3, [0.1, 0.2])) for name in ("a", "b")]
        main(["summarise", "--uniform", runs[0], "--curriculum", runs[1]])
        assert json.loads(capsys.readouterr().out)["seeds"] == [3]

    def test_a_run_that_ended_too_early_is_compared_only_as_far_as_it_went(self, tmp_path):
        uniform = read_run(write_run(tmp_path, "uniform", 0, [0.1, 0.2, 0.3]))
        short = read_run(write_run(tmp_path, "short", 0, [0.1, 0.25]))
        found = summarise([uniform], [short])
        assert found["tokens_to_uniform"]["reached"] == 0
        assert found["of_mean_curves"] == math.inf
        assert found["ended_at"] == pytest.approx([0.5])
        assert found["equal_tokens"][0] == 200
        assert found["accuracy_at_equal_tokens"]["difference"][0] == pytest.approx(0.05)

    def test_the_arms_differ_in_the_curriculum_and_in_steps(self, tmp_path):
        one, other = (command(arm, 1, tmp_path) for arm in ("uniform", "curriculum"))
        differing = {a.partition("=")[0] for a, b in zip(one, other, strict=True) if a != b}
        assert differing == {"curriculum.name", "run.name", "run.steps"}


def test_every_arm_of_the_lag_study_is_a_valid_algorithm():
    assert {experiment_of(arm, 0.1, 1, 4).schedule for arm in ARMS} == {"stationary", "gate"}


def results():
    return {
        name: json.loads((study.RESULTS / f"{name}.json").read_text())
        for name in study.DRAWINGS
        if (study.RESULTS / f"{name}.json").exists()
    }


def test_the_page_is_what_its_json_says():
    assert (study.DOCS / "study.md").read_text() == page(results()), "run `make study ARGS=--page`"


def test_a_plot_is_the_same_every_time(tmp_path):
    lag = results()["lag"]
    for name in ("one.svg", "two.svg"):
        figures.draw_lag(lag, tmp_path / name)
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text()
