"""This file holds what the simulation predicts of a finished run against what the run measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from rl.planner_costs import Costs
from rl.planner_fit import WARM_UP_STEPS, Row, average, total
from rl.prediction import Prediction, Setting
from rl.simulation import simulate

SEEDS = 5  # a short run's figures depend on which answers were long


class Compared(msgspec.Struct, frozen=True):
    """One figure of a run. Shares and lags differ by so many of their unit, the rest by a share of the measured."""

    what: str
    measured: float
    predicted: float
    is_share: bool = False
    is_lag: bool = False

    @property
    def error(self) -> str:
        """How far the prediction is off."""
        difference = self.predicted - self.measured
        if self.is_share:
            return f"{100 * difference:+.1f} points"
        return f"{difference:+.2f}" if self.is_lag or not self.measured else f"{difference / self.measured:+.1%}"

    def cells(self) -> tuple[str, str, str, str]:
        """The line of a table: what, measured, predicted, error."""
        form = "{:.1%}" if self.is_share else "{:.2f}"
        return self.what, form.format(self.measured), form.format(self.predicted), self.error


def compare(setting: Setting, costs: Costs, steps: Sequence[Row], to_the_end: bool) -> list[Compared]:
    """Measured and predicted figures of the steps that costs were fitted to; to_the_end: the last is the run's last."""
    last = int(max(row["step"] for row in steps))
    found = [simulate(setting, costs, last, WARM_UP_STEPS, seed, to_the_end) for seed in range(SEEDS)]
    seconds = total(steps, "time/step/s")
    sampled = sum(row["speed/sampled/tokens_per_s"] * row["time/step/s"] for row in steps)
    generator_s = sum(value for row in steps for name, value in row.items() if name.startswith("generator/seconds/"))
    lag = average(steps, "policy/lag_mean/versions")
    answers = setting.groups_per_step * setting.group_size * len(steps)
    return [
        Compared("seconds a step", seconds / len(steps), _mean(found, "step_s")),
        Compared("trajectories/s", answers / seconds, _mean(found, "trajectories_per_s")),
        Compared("sampled tokens/s", sampled / seconds, _mean(found, "sampled_tokens_per_s")),
        Compared("learner idle", total(steps, "learner/seconds/idle") / seconds, _mean(found, "learner_idle"), True),
        Compared(
            "generators idle",
            total(steps, "generator/seconds/idle") / generator_s,
            _mean(found, "generator_idle"),
            True,
        ),
        Compared("mean lag, versions", lag, _mean(found, "lag_mean"), False, True),
    ]


def _mean(found: Sequence[Prediction], name: str) -> float:
    return statistics.fmean(getattr(each, name) for each in found)
