"""This file measures the start: seconds from `rl run` to the first draw and step, on a new and a used machine.

    python tests/benchmarks/bench_start.py [--config smoke] [--rounds 1] [--quick]

The first run finds empty caches (converted models, and what vLLM and others keep below XDG_CACHE_HOME); the second
finds what the first left there. Files that the operating system holds in memory stay there for both.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.children import FinishedRun, end_on_sigterm, json_lines, run_rl
from tests.benchmarks.report import RESULTS, Table, options, publish, ratio

FIRST, SECOND = "first run", "second run"
OVERRIDES = ("run.steps=1", "evaluation.prompts_per_level=1", "checkpoint.every_steps=10000")
PHASES = ("the command is up", "the first draw", "the first step's end")


def phases(run: FinishedRun) -> dict[str, float]:
    """Seconds from the command to each phase of its start."""
    started = next(row["time"] for row in json_lines(run.directory / "events.jsonl") if row["event"] == "start")
    drawn = json_lines(run.directory / "draws.jsonl")[0]["time"]
    reached = (started, drawn, run.step_ends[0])
    return {phase: moment - run.child.started for phase, moment in zip(PHASES, reached, strict=True)}


def table(taken: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """Medians of each phase, and how much sooner the second run is there."""
    rows = []
    for phase in PHASES:
        first, second = ([each[phase] for each in taken[name]] for name in (FIRST, SECOND))
        rows.append((phase, statistics.median(first), statistics.median(second), str(ratio(first, second))))
    return Table("seconds from the command", ("until", FIRST, SECOND, "ratio"), tuple(rows))


def main() -> None:
    """Measure, print, keep."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--config", default="smoke", help="a bare name in configs/, or a path")
    chosen = parser.parse_args()
    end_on_sigterm()
    taken: dict[str, list[dict[str, float]]] = {FIRST: [], SECOND: []}
    RESULTS.mkdir(parents=True, exist_ok=True)
    for _ in range(1 if chosen.quick else chosen.rounds or 1):
        with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
            caches = {name: str(Path(folder) / "caches" / name) for name in ("SLIPSTREAM_CACHE", "XDG_CACHE_HOME")}
            for name, measured in taken.items():
                run = run_rl(chosen.config, OVERRIDES, Path(folder) / name.replace(" ", "_"), caches)
                measured.append(phases(run))
                print(f"{name}: {measured[-1]}", file=sys.stderr, flush=True)
    publish("start", [table(taken)], config=chosen.config, seconds=taken)


if __name__ == "__main__":
    main()
