"""This file is what a person sees of a run: one screen at the start, then a line per step, plain where piped."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rl.metrics import Metrics
from rl.time_ledger import added, shares

if TYPE_CHECKING:
    from rl.evaluation import Evaluation, Score

RECENT_STEPS = 10
WORTH_NAMING = 0.005  # of a role's time
ROLES = {"learner": "learner/seconds/", "generators": "generator/seconds/"}


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{_number(100 * value, 0)}%"


def _number(value: float, digits: int) -> str:
    """A dash where nothing was measured, as when no group finished within a step."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


class TerminalProgress:
    """Prints the run's lines; the console decides on colour by whether a terminal is there."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._console = Console(highlight=False) if console is None else console
        self._steps = steps
        self._step_seconds: list[float] = []
        self._started = time.monotonic()
        self._seconds: dict[str, dict[str, float]] = {role: {} for role in ROLES}

    def note(self, text: str) -> None:
        """One line of plain news, with the seconds since the start."""
        self._console.print(f"[dim]{time.monotonic() - self._started:6.0f} s[/dim]  {text}", soft_wrap=True)

    def step(self, step: int, metrics: Metrics, evaluation: Evaluation | None) -> None:
        """The line of one optimizer step: reward, held-out score, lag, speed, useful tokens, idle, time left."""

        def read(name: str) -> float:
            metric = metrics.get(name)
            return metric.value if metric else math.nan

        for role, prefix in ROLES.items():
            ledger = {
                name.removeprefix(prefix): each.value for name, each in metrics.items() if name.startswith(prefix)
            }
            self._seconds[role] = added([self._seconds[role], ledger])
        self._step_seconds = [*self._step_seconds, read("time/step/s")][-RECENT_STEPS:]
        left = (self._steps - step) * sum(self._step_seconds) / len(self._step_seconds)
        held_out = evaluation.overall.mean if evaluation and evaluation.overall.mean is not None else math.nan
        self.note(
            f"step [bold]{step:>4}[/bold]/{self._steps}  reward {_number(read('reward/mean'), 2)}  "
            f"held-out {_percent(held_out)}  lag {_number(read('policy/lag_mean/versions'), 1)} "
            f"(max {_number(read('policy/lag_max/versions'), 0)})  "
            f"gap {_number(read('policy/logprob_gap_mean/nats'), 3)}  "
            f"{_number(read('speed/sampled/tokens_per_s'), 0)} tok/s  "
            f"useful {_percent(read('flow/useful_token_fraction'))}  idle: learner "
            f"{_percent(read('learner/idle_fraction'))}, generator {_percent(read('generator/idle_fraction'))}  "
            f"{left / 60:.0f} min left"
        )

    def shares(self, role: str) -> dict[str, float]:
        """Where the time of the learner, or of the generators, went in all steps so far: shares, the largest first."""
        return shares(self._seconds[role])

    def where_the_time_went(self) -> None:
        """A line for each role: its wall time by activity."""
        for role in ROLES:
            named = [f"{name} {share:.0%}" for name, share in self.shares(role).items() if share >= WORTH_NAMING]
            if named:
                self.note(f"time of the {role}: {', '.join(named)}")

    def evaluation(self, evaluation: Evaluation) -> None:
        """The held-out table of one policy version."""
        table = Table(title=f"held-out, policy version {evaluation.version}", title_justify="left")
        for heading in ("source", "level", "score", "95% interval", "prompts"):
            table.add_column(heading, justify="left" if heading in ("source", "level") else "right")
        for level in evaluation.scores:
            table.add_row(level.source, level.level, *_score_cells(level.score))
        table.add_row("[bold]all[/bold]", "", *_score_cells(evaluation.overall))
        self._console.print(table)


def _score_cells(score: Score) -> tuple[str, str, str]:
    """Mean, interval and number of prompts; dashes where nothing could be judged."""
    if score.mean is None:
        return "-", "-", f"{score.total}"
    interval = f"{score.low:.1%} - {score.high:.1%}" if score.low is not None else "-"
    return f"{score.mean:.1%}", interval, f"{score.total}"
