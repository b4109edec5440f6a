"""This file measures, in the laboratory, what the curriculum is worth: quality at equal sampled tokens, seed by seed.

Every arm starts from the same policies; uniform makes a number of steps, and what it sampled is the budget of the
others. A seed's useful fraction is tokens of trained groups / tokens sampled, over that budget: a trained group's
rewards differ, so that its advantages are not 0.

settings, all through the gate at the default max_lag:
short run             PACE, 24 steps: what SmolLM2 does in tests/study/real_model.py
four times as long    PACE, 96 steps: the first rungs are mastered, the next ones open
fast                  5 times PACE, 40 steps: hardly anything stays hopeless for long
nothing in common     PACE, 24 steps, each level has skills of its own: no ladder
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from learners.laboratory import Curves, Experiment, run_experiment
from learners.ladder import arithmetic_ladder
from rl.config import StalenessSection
from rl.curriculum_config import CurriculumSection
from tests.study.intervals import Interval, mean_interval, ratio_interval
from tests.study.lag import ENGINE_NOISE, PACE

SEEDS = range(16)
SETTINGS: dict[str, dict[str, Any]] = {
    "short run": {"lr": PACE, "steps": 24, "linked": True},
    "four times as long": {"lr": PACE, "steps": 96, "linked": True},
    "fast": {"lr": 5 * PACE, "steps": 40, "linked": True},
    "nothing in common": {"lr": PACE, "steps": 24, "linked": False},
}
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {"curriculum": {"name": "uniform"}},
    "band": {"curriculum": {}},
    "uniform, 4 answers first": {"curriculum": {"name": "uniform"}, "first_answers": 4},
    "band, 4 answers first": {"curriculum": {}, "first_answers": 4},
    "band from 0.05": {"curriculum": {"band_low": 0.05}},
    "band from 0.1": {"curriculum": {"band_low": 0.1}},
    "band from 0.2": {"curriculum": {"band_low": 0.2}},
    "no lending": {"curriculum": {"mixture_flexibility": 0.0}},
    "explore 0.1": {"curriculum": {"exploration_fraction": 0.1}},
}
LONGER = 2.6  # how many times uniform's steps the other arms may make before they must have spent its tokens
GRID = 41  # points of a curve, from no token to the budget

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def measure(cell: tuple[str, str]) -> Curves:
    """The curves of one setting and arm."""
    setting, arm = SETTINGS[cell[0]], ARMS[cell[1]]
    steps = setting["steps"] if cell[1] == "uniform" else int(setting["steps"] * LONGER)
    experiment = Experiment(
        curriculum=CurriculumSection(**arm["curriculum"]),
        lr=setting["lr"],
        steps=steps,
        lag=StalenessSection().max_lag,
        schedule="gate",
        first_answers=arm.get("first_answers"),
        engine_noise=ENGINE_NOISE,
    )
    return run_experiment(arithmetic_ladder(setting["linked"]), experiment, SEEDS)


def study_teaching(run: Map) -> dict[str, Any]:
    """setting -> arm -> gain, tokens to uniform's end, useful fraction, curve; each with intervals over seeds."""
    cells = [(setting, arm) for setting in SETTINGS for arm in ARMS]
    curves = dict(zip(cells, run(measure, cells), strict=True))
    table = {
        setting: {arm: compare(curves[setting, arm], curves[setting, "uniform"]) for arm in ARMS}
        for setting in SETTINGS
    }
    defaults = CurriculumSection()
    knobs = ("name", "band_low", "band_high", "exploration_fraction", "discount_per_version", "mixture_flexibility")
    return {
        "seeds": len(SEEDS),
        "max_lag": StalenessSection().max_lag,
        "settings": SETTINGS,
        "default": {name: getattr(defaults, name) for name in knobs},
        "table": table,
    }


def compare(arm: Curves, uniform: Curves) -> dict[str, Any]:
    """An arm against uniform within uniform's tokens, the same seeds paired."""
    budgets = uniform.tokens_SK[:, -1]
    gains = _at(arm.tokens_SK, arm.quality_SK, budgets) - arm.quality_SK[:, 0]
    base = uniform.quality_SK[:, -1] - uniform.quality_SK[:, 0]
    useful = _at(arm.tokens_SK, arm.useful_SK, budgets) / budgets
    useful_base = uniform.useful_SK[:, -1] / budgets
    reached = [
        reached_at(arm.tokens_SK[seed], arm.quality_SK[seed], uniform.quality_SK[seed, -1]) / budgets[seed]
        for seed in range(len(budgets))
    ]
    grid = np.linspace(0, 1, GRID)
    curve = [_at(arm.tokens_SK, arm.quality_SK, budgets * share) for share in grid]
    return {
        "tokens": mean_interval(budgets),
        "gain": mean_interval(gains),
        "gain_over_uniform": mean_interval(gains - base),
        "tokens_to_uniform": reach_interval(reached),
        "useful_fraction": mean_interval(useful),
        "useful_over_uniform": ratio_interval(useful, useful_base),
        "stopped": int((arm.stopped_S >= 0).sum()),
        "curve": [mean_interval(point) for point in curve],
    }


def reached_at(tokens: np.ndarray, quality: np.ndarray, target: float) -> float:
    """Tokens at which the quality first reaches the target and keeps it, interpolated; infinite if it never does."""
    below = np.flatnonzero(quality < target)
    if not len(below):
        return float(tokens[0])
    last = below[-1]
    if last == len(quality) - 1:
        return float("inf")
    share = (target - quality[last]) / (quality[last + 1] - quality[last])
    return float(tokens[last] + share * (tokens[last + 1] - tokens[last]))


def reach_interval(shares: Iterable[float]) -> dict[str, Any]:
    """The mean over seeds where all reach it, else the median, with how many do."""
    values = list(shares)
    reached = [value for value in values if np.isfinite(value)]
    mean: Interval | None = mean_interval(reached) if len(reached) == len(values) else None
    return {"mean": mean, "median": float(np.median(values)), "reached": len(reached), "of": len(values)}


def _at(tokens_SK: np.ndarray, values_SK: np.ndarray, where_S: np.ndarray) -> np.ndarray:
    """Each seed's value at its own number of tokens."""
    rows = zip(where_S, tokens_SK, values_SK, strict=True)
    return np.array([np.interp(where, tokens, values) for where, tokens, values in rows])
