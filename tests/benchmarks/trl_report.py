"""This file turns what bench_trl.py measured into figures and tables: pure, so that it can be tested without models."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.evaluation import wilson_interval
from tests.benchmarks.report import Ratio, Table, ratio

OURS, THEIRS = "Slipstream", "TRL"
# facts of the work, not of a program: FLOP that 64 answers of this model take, with each prompt computed once
SAMPLING_TFLOP, TRAINING_TFLOP = 0.58, 1.8
GIB = 1 << 30


@dataclass(frozen=True)
class ArmRun:
    """One arm, one seed: wall-clock start, end of each compared step, peak memory, {level: [right, all]} at the end."""

    seed: int
    started: float
    step_ends: tuple[float, ...]
    peak_bytes: int
    scores: Mapping[str, Sequence[int]]

    @property
    def step_seconds(self) -> list[float]:
        """Of each step but the first, which holds the start."""
        return [after - before for before, after in zip(self.step_ends, self.step_ends[1:], strict=False)]

    @property
    def steady_steps_per_s(self) -> float:
        """Steps per second after the first."""
        return len(self.step_seconds) / (self.step_ends[-1] - self.step_ends[0])

    @property
    def whole_steps_per_s(self) -> float:
        """Steps per second from the command on."""
        return len(self.step_ends) / (self.step_ends[-1] - self.started)

    @property
    def first_step_s(self) -> float:
        """From the command to the end of the first step."""
        return self.step_ends[0] - self.started


def right_and_all(scores: Sequence[Mapping[str, Sequence[int]]]) -> tuple[int, int]:
    """Right answers, and all, over levels and runs."""
    counts = [count for each in scores for count in each.values()]
    return sum(right for right, _ in counts), sum(total for _, total in counts)


def shown_score(right: int, total: int) -> str:
    """A fraction with its 95 % Wilson interval, in percent."""
    low, high = wilson_interval(right, total)
    return f"{right / total:.1%} ({low * 100:.1f} to {high * 100:.1f})"


def floor_seconds(gflops_per_s: float) -> float:
    """Seconds of a step if it were nothing but products at the machine's rate for large ones."""
    return (SAMPLING_TFLOP + TRAINING_TFLOP) * 1000 / gflops_per_s


def comparison(ours: Sequence[ArmRun], theirs: Sequence[ArmRun], answers: int) -> dict[str, Ratio]:
    """Each quantity's ratio, ours over theirs where more is better and theirs over ours where less is."""

    def of(what, better_more: bool) -> Ratio:
        mine, other = [what(run) for run in ours], [what(run) for run in theirs]
        return ratio(mine, other) if better_more else ratio(other, mine)

    return {
        "seconds per step": of(lambda run: statistics.median(run.step_seconds), better_more=False),
        "trajectories/s, steady": of(lambda run: answers * run.steady_steps_per_s, better_more=True),
        "trajectories/s, start-up included": of(lambda run: answers * run.whole_steps_per_s, better_more=True),
        "seconds to the first step's end": of(lambda run: run.first_step_s, better_more=False),
        "peak memory": of(lambda run: run.peak_bytes, better_more=False),
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The comparison and, where several settings of TRL were tried, what each took."""
    arms = {name: [ArmRun(**run) for run in runs] for name, runs in result["arms"].items() if runs}
    ratios = comparison(arms[OURS], arms[THEIRS], result["answers"]) if len(arms) == 2 else {}
    rows = [
        _row("seconds per step, median (range)", arms, _seconds_cell, ratios.get("seconds per step")),
        _row(
            "trajectories/s, steady",
            arms,
            _rate_cell(result, "steady_steps_per_s"),
            ratios.get("trajectories/s, steady"),
        ),
        _row(
            "trajectories/s from the command to the last step",
            arms,
            _rate_cell(result, "whole_steps_per_s"),
            ratios.get("trajectories/s, start-up included"),
        ),
        _row(
            "seconds from the command to the first step's end",
            arms,
            _first_cell,
            ratios.get("seconds to the first step's end"),
        ),
        _row("peak memory, all processes", arms, _memory_cell, ratios.get("peak memory")),
        _row(
            f"of the machine's floor, {floor_seconds(result['gflops_per_s']):.1f} s a step",
            arms,
            _floor_cell(result),
            None,
        ),
        _row(f"held-out accuracy, at first {shown_score(*right_and_all([result['start']]))}", arms, _score_cell, None),
    ]
    title = (
        f"{result['steps']} steps of {result['answers']} answers, seeds {', '.join(map(str, result['seeds']))}, "
        f"TRL {result['setting']}"
    )
    found = [Table(title, ("", *arms, "ratio"), tuple(rows))]
    if result.get("tuned"):
        each = tuple((name, statistics.median(ArmRun(**run).step_seconds)) for name, run in result["tuned"].items())
        found.append(Table("TRL's settings, seconds per step", ("setting", "s"), each))
    return found


def _row(what: str, arms: Mapping[str, Sequence[ArmRun]], cell, compared: Ratio | None) -> tuple[str, ...]:
    return (what, *(cell(runs) for runs in arms.values()), str(compared) if compared else "")


def _seconds_cell(runs: Sequence[ArmRun]) -> str:
    taken = [seconds for run in runs for seconds in run.step_seconds]
    return f"{statistics.median(taken):.1f} ({min(taken):.1f} to {max(taken):.1f})"


def _rate_cell(result: Mapping[str, Any], what: str):
    return lambda runs: f"{result['answers'] * statistics.median(getattr(run, what) for run in runs):.2f}"


def _first_cell(runs: Sequence[ArmRun]) -> str:
    return f"{statistics.median(run.first_step_s for run in runs):.0f}"


def _memory_cell(runs: Sequence[ArmRun]) -> str:
    return f"{statistics.median(run.peak_bytes for run in runs) / GIB:.1f} GiB"


def _floor_cell(result: Mapping[str, Any]):
    floor = floor_seconds(result["gflops_per_s"])
    return lambda runs: f"{statistics.median(1 / run.steady_steps_per_s for run in runs) / floor:.1f} times"


def _score_cell(runs: Sequence[ArmRun]) -> str:
    return shown_score(*right_and_all([run.scores for run in runs]))
