"""This file measures what asynchrony brings where it should: long tails and slow judges, against max_lag 0.

    python tests/benchmarks/bench_lag.py [--config long_tail slow_judge] [--steps 8] [--rounds 1] [--quick]

Both arms are `rl run` of the same file on the same cores. With max_lag 0 the two sides never compute at once, so each
gets all cores there; otherwise the cores are shared out as always. The asynchronous arm goes on for max_lag steps
beyond those that count, since a run samples nothing that it will not train on. The planner's figures come from costs
that it fits to each arm's own first run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rl.config import RunConfig
from rl.config_loading import load_config
from rl.planner import predict, setting_of
from rl.planner_fit import fit
from rl.recorder import RunDirectory
from rl.time_ledger import shares
from tests.benchmarks.children import FinishedRun, end_on_sigterm, run_rl
from tests.benchmarks.report import RESULTS, Table, options, publish, ratio

CONFIGS = ("long_tail", "slow_judge")
ASYNCHRONOUS, SYNCHRONOUS = "as configured", "max_lag 0"
SKIPPED_STEPS = 2  # until the pipeline is full
SHOWN_SHARES = 5
QUICK = ("learner.groups_per_step=2",)


@dataclass(frozen=True)
class Turn:
    """One run: trained trajectories/s in the steady state, seconds by activity of each role, the planner's rate."""

    trajectories_per_s: float
    seconds: Mapping[str, Mapping[str, float]]
    planned_per_s: float | None


def overrides_of(name: str, arm: str, steps: int, cores: int) -> list[str]:
    """What an arm changes: evaluation and checkpoints wait for the end, and max_lag 0 gets all cores for each side."""
    shared = ["evaluation.every_steps=10000", "evaluation.prompts_per_level=1", "checkpoint.every_steps=10000"]
    if arm == ASYNCHRONOUS:
        return [*shared, f"run.steps={steps + load_config(name).staleness.max_lag}"]
    threads = [f"generators.threads={cores}", f"learner.threads_per_rank={cores}"]
    return [*shared, *threads, "staleness.max_lag=0", f"run.steps={steps}"]


def steady(
    rows: Sequence[Mapping[str, Any]], steps: int, trajectories: int
) -> tuple[float, dict[str, dict[str, float]]]:
    """Trajectories/s after the first steps up to step `steps`, and the seconds of each role by activity."""
    counted = rows[SKIPPED_STEPS:steps]
    rate = trajectories * len(counted) / (counted[-1]["time"] - rows[SKIPPED_STEPS - 1]["time"])
    seconds = {role: seconds_of(counted, f"{role}/seconds/") for role in ("generator", "learner")}
    return rate, seconds


def seconds_of(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """The sums of all metrics with a prefix, by the rest of their names."""
    sums: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(prefix):
                sums[name.removeprefix(prefix)] = sums.get(name.removeprefix(prefix), 0.0) + value
    return sums


def planned(config: RunConfig, run: FinishedRun) -> float | None:
    """Trajectories/s as the planner predicts them from this run's own costs; None where the run is too short for it."""
    try:
        costs = fit(config, RunDirectory(run.directory), "cpu")
    except ValueError as error:
        print(f"the planner has no figure: {error}", file=sys.stderr)
        return None
    return predict(setting_of(config), costs).prediction.trajectories_per_s


def take_turn(name: str, arm: str, steps: int, folder: Path, more: Sequence[str] = ()) -> Turn:
    """Run one arm once; `more` changes both arms alike."""
    cores = len(os.sched_getaffinity(0))
    run = run_rl(name, [*overrides_of(name, arm, steps, cores), *more], folder)
    config = load_config(str(run.directory / "config.yaml"))
    rate, seconds = steady(run.rows, steps, config.trajectories_per_step)
    turn = Turn(rate, seconds, planned(config, run))
    shutil.rmtree(folder)  # gigabytes
    print(f"{name}, {arm}: {turn}", file=sys.stderr, flush=True)
    return turn


def tables(turns: Mapping[str, Mapping[str, Sequence[Turn]]]) -> list[Table]:
    """The comparison of each config, and where the time of each arm went."""
    compared, spent = [], []
    for name, arms in turns.items():
        ahead, behind = arms[ASYNCHRONOUS], arms[SYNCHRONOUS]
        rates = [[turn.trajectories_per_s for turn in arm] for arm in (ahead, behind)]
        plans = [arm[0].planned_per_s for arm in (ahead, behind)]
        foretold = f"{plans[0] / plans[1]:.2f}x" if plans[0] and plans[1] else "not told"
        compared.append((name, *(f"{statistics.median(each):.2f}" for each in rates), str(ratio(*rates)), foretold))
        for arm, taken in arms.items():
            spent += [(name, arm, role, shown_shares(taken[-1].seconds[role])) for role in taken[-1].seconds]
    columns = ("config", ASYNCHRONOUS, SYNCHRONOUS, "ratio", "planner's ratio")
    return [
        Table("trajectories/s, asynchronous against max_lag 0 on the same cores", columns, tuple(compared)),
        Table("where the time went", ("config", "arm", "role", "shares"), tuple(spent)),
    ]


def shown_shares(seconds: Mapping[str, float]) -> str:
    """The largest shares of a role's time, in words."""
    return ", ".join(f"{activity} {share:.0%}" for activity, share in list(shares(seconds).items())[:SHOWN_SHARES])


def main() -> None:
    """Measure, print, keep."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", default=list(CONFIGS), help="bare names in configs/")
    parser.add_argument("--steps", type=int, default=8, help=f"steps; the first {SKIPPED_STEPS} do not count")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of both arms, to try")
    chosen = parser.parse_args()
    end_on_sigterm()
    steps, rounds, more = (4, 1, QUICK) if chosen.quick else (chosen.steps, chosen.rounds or 1, chosen.set)
    turns = {name: {arm: [] for arm in (ASYNCHRONOUS, SYNCHRONOUS)} for name in chosen.config}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        for number in range(rounds):
            for name, arms in turns.items():
                for arm, taken in arms.items():
                    place = Path(folder) / f"{name}-{arm.replace(' ', '_')}-{number}"
                    taken.append(take_turn(name, arm, steps, place, more))
    facts = {
        name: {arm: [asdict(turn) for turn in taken] for arm, taken in arms.items()} for name, arms in turns.items()
    }
    publish("lag", tables(turns), steps=steps, turns=facts)


if __name__ == "__main__":
    main()
