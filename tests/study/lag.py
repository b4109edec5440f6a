"""This file measures, in the laboratory, what is left of the gain in quality when the data is k versions old.

Each arm is an algorithm at its published knobs. Three regimes, the same for all:
gentle  the pace of the default run on SmolLM2 (PACE below), four times as long: nothing saturates
tuned   as many steps as the default run, at the learning rate of TUNED_LRS that is best at lag 0 for this algorithm
stress  four times that learning rate
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from learners.laboratory import Curves, Experiment, run_experiment
from learners.ladder import arithmetic_ladder
from rl.algorithm_config import PRESETS, AlgorithmSection
from tests.study.intervals import mean_interval, ratio_interval

LAGS = (0, 1, 2, 4, 8, 16)
SEEDS = range(16)
PACE = 0.01  # 24 uniform steps gain what SmolLM2 gains in as many, within a third, at its useful fraction
TUNED_LRS = (0.05, 0.1, 0.2, 0.4)
STRESS = 4.0
ENGINE_NOISE = 0.05  # nats: what SmolLM2's runs report as policy/logprob_gap_mean
GENTLE_STEPS, TUNED_STEPS = 96, 40

MORE_ARMS: dict[str, dict[str, Any]] = {
    "decoupled, log-linear": {"name": "decoupled", "loss": {"anchor": "log_linear"}},
    "gspo, clip 0.2": {"name": "gspo", "loss": {"clip_low": 0.2, "clip_high": 0.2}},
    "cispo through the gate": {"name": "cispo"},
}
ARMS = {**{name: {"name": name} for name in PRESETS}, **MORE_ARMS}

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def experiment_of(arm: str, lr: float, steps: int, lag: int) -> Experiment:
    """One cell of the sweep."""
    return Experiment(
        algorithm=AlgorithmSection.model_validate(ARMS[arm]),
        lr=lr,
        steps=steps,
        lag=lag,
        schedule="gate" if arm.endswith("through the gate") else "stationary",
        engine_noise=ENGINE_NOISE,
    )


def measure(cell: tuple[str, float, int, int]) -> dict[str, Any]:
    """Final gains of all seeds in one cell (arm, lr, steps, lag), with the batch's health."""
    curves = run_experiment(arithmetic_ladder(), experiment_of(*cell), SEEDS)
    return {
        "gains": gains_of(curves).tolist(),
        "effective_sample_fraction": curves.effective_sample_fraction,
        "clip_fraction": curves.clip_fraction,
        "lag_mean": curves.lag_mean,
        "stopped": int((curves.stopped_S >= 0).sum()),
    }


def gains_of(curves: Curves) -> Any:
    """Exact quality after the last step less that before the first, per seed."""
    return curves.quality_SK[:, -1] - curves.quality_SK[:, 0]


def best_lrs(run: Map) -> dict[str, float]:
    """For each arm the learning rate with the largest mean gain at lag 0."""
    cells = [(arm, lr, TUNED_STEPS, 0) for arm in ARMS for lr in TUNED_LRS]
    found: dict[str, dict[float, float]] = {arm: {} for arm in ARMS}
    for (arm, lr, *_), result in zip(cells, run(measure, cells), strict=True):
        found[arm][lr] = mean_interval(result["gains"])[0]
    return {arm: max(gains, key=lambda lr: gains[lr]) for arm, gains in found.items()}


def study_lag(run: Map) -> dict[str, Any]:
    """The whole table: regime -> arm -> its learning rate and, per lag, gain and what it is of the gain at lag 0."""
    tuned = best_lrs(run)
    regimes = {
        "gentle": (GENTLE_STEPS, dict.fromkeys(ARMS, PACE)),
        "tuned": (TUNED_STEPS, tuned),
        "stress": (TUNED_STEPS, {arm: STRESS * lr for arm, lr in tuned.items()}),
    }
    table: dict[str, Any] = {}
    for regime, (steps, lrs) in regimes.items():
        cells = [(arm, lrs[arm], steps, lag) for arm in ARMS for lag in LAGS]
        results = dict(zip([(cell[0], cell[3]) for cell in cells], run(measure, cells), strict=True))
        table[regime] = {
            arm: {"lr": lrs[arm], "lags": {lag: _row(results[arm, lag], results[arm, 0]) for lag in LAGS}}
            for arm in ARMS
        }
    return {
        "seeds": len(SEEDS),
        "steps": {"gentle": GENTLE_STEPS, "tuned": TUNED_STEPS, "stress": TUNED_STEPS},
        "default": AlgorithmSection.model_validate({}).name,
        "engine_noise_nats": ENGINE_NOISE,
        "tuned_lrs": list(TUNED_LRS),
        "regimes": table,
    }


def _row(result: dict[str, Any], at_zero: dict[str, Any]) -> dict[str, Any]:
    gains = result["gains"]
    health = {name: value for name, value in result.items() if name != "gains"}
    return {"gain": mean_interval(gains), "kept": ratio_interval(gains, at_zero["gains"]), **health}
