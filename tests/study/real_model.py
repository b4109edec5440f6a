"""This file compares curriculum and uniform draws on a real model: held-out accuracy against sampled tokens.

    python -m tests.study.real_model run --seeds 0 1 2 --dir runs/study          six runs, one after the other, hours
    python -m tests.study.real_model summarise --uniform DIR... --curriculum DIR...

`run` starts `rl run configs/arithmetic.yaml` for each arm and seed, and summarises them; `summarise` reads run
directories that are there already: metrics.jsonl (tokens sampled and useful, by step) and evaluations.jsonl (held-out
accuracy, by version). It prints JSON; with --out it writes it to a file, as docs/study/real_model.json for the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.study.intervals import mean_interval, ratio_interval, rounded
from tests.study.teaching import reach_interval, reached_at

STEPS = {"uniform": 24, "curriculum": 48}  # the curriculum's steps cost half the tokens or less
EVERY_STEPS = 4
ARMS = {"uniform": "uniform", "curriculum": "band"}
GRID = 41


@dataclass(frozen=True)
class RunCurve:
    """One run: held-out accuracy at the tokens sampled when that version was there, and the useful tokens in all."""

    name: str
    seed: int
    tokens: np.ndarray
    accuracy: np.ndarray
    sampled_tokens: float
    useful_tokens: float

    @property
    def useful_fraction(self) -> float:
        """Tokens trained with an advantage other than 0, of all that were sampled."""
        return self.useful_tokens / self.sampled_tokens


def read_run(directory: Path) -> RunCurve:
    """The curve of a finished run. ValueError where it has no step or no evaluation after the first."""
    steps = {int(row["step"]): row for row in _lines(directory / "metrics.jsonl")}  # a resumed step counts once
    scores = {int(row["version"]): row["overall"]["mean"] for row in _lines(directory / "evaluations.jsonl")}
    versions = [version for version in sorted(scores) if version == 0 or version in steps]
    if len(versions) < 2:
        raise ValueError(f"{directory} has {len(versions)} evaluations with known tokens; two are needed for a curve")
    tokens = [0.0 if version == 0 else steps[version]["flow/tokens/sampled"] for version in versions]
    used = [row["learner/useful/tokens"] for step, row in steps.items() if step <= versions[-1]]
    return RunCurve(
        name=directory.name,
        seed=_seed(directory),
        tokens=np.array(tokens),
        accuracy=np.array([scores[version] for version in versions]),
        sampled_tokens=tokens[-1],
        useful_tokens=float(sum(used)),
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _seed(directory: Path) -> int:
    import yaml

    return int(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))["run"]["seed"])


def summarise(uniform: Sequence[RunCurve], curriculum: Sequence[RunCurve]) -> dict[str, Any]:
    """Both arms, and how many of uniform's tokens the curriculum needs for uniform's final accuracy.

    Runs are paired by seed. tokens_to_uniform takes each pair by itself; of_mean_curves takes the tokens at which the
    curriculum's mean curve reaches and keeps uniform's mean final accuracy, as a share of uniform's mean tokens. A run
    that ended before it got there says no more than that: ended_at is its end, as a share of uniform's tokens. Equal
    tokens are the fewer of a pair's two ends.
    """
    pairs = {run.seed: run for run in curriculum}
    if sorted(pairs) != sorted(run.seed for run in uniform):
        seeds = sorted(run.seed for run in uniform), sorted(pairs)
        raise ValueError(f"uniform has the seeds {seeds[0]}, curriculum {seeds[1]}; compare the same ones")
    matched = [(run, pairs[run.seed]) for run in sorted(uniform, key=lambda run: run.seed)]
    shares = [reached_at(other.tokens, other.accuracy, run.accuracy[-1]) / run.tokens[-1] for run, other in matched]
    fractions = [[run.useful_fraction for run in side] for side in zip(*matched, strict=True)]
    arms = {"uniform": _arm([run for run, _ in matched]), "curriculum": _arm([other for _, other in matched])}
    ends = [min(run.tokens[-1], other.tokens[-1]) for run, other in matched]
    equal = [
        [_accuracy_at(run, end) for run, end in zip(side, ends, strict=True)] for side in zip(*matched, strict=True)
    ]
    return {
        "seeds": [run.seed for run, _ in matched],
        "arms": arms,
        "tokens_to_uniform": {**reach_interval(shares), "each": shares},
        "ended_at": [other.tokens[-1] / run.tokens[-1] for run, other in matched],
        "of_mean_curves": _of_mean_curves(arms),
        "equal_tokens": mean_interval(ends),
        "accuracy_at_equal_tokens": {
            "uniform": mean_interval(equal[0]),
            "curriculum": mean_interval(equal[1]),
            "difference": mean_interval([high - low for low, high in zip(*equal, strict=True)]),
        },
        "useful_over_uniform": ratio_interval(fractions[1], fractions[0]),
    }


def _arm(runs: Sequence[RunCurve]) -> dict[str, Any]:
    """Means over the runs; the mean curve ends where the first of them does."""
    grid = np.linspace(0, min(run.tokens[-1] for run in runs), GRID)
    curves = np.array([np.interp(grid, run.tokens, run.accuracy) for run in runs])
    return {
        "runs": [{"name": run.name, "seed": run.seed, "tokens": run.tokens, "accuracy": run.accuracy} for run in runs],
        "sampled_tokens": mean_interval([run.sampled_tokens for run in runs]),
        "final_accuracy": mean_interval([run.accuracy[-1] for run in runs]),
        "useful_fraction": mean_interval([run.useful_fraction for run in runs]),
        "grid_tokens": grid,
        "curve": [mean_interval(point) for point in curves.T],
    }


def _accuracy_at(run: RunCurve, tokens: float) -> float:
    return float(np.interp(tokens, run.tokens, run.accuracy))


def _of_mean_curves(arms: dict[str, Any]) -> float:
    uniform, other = arms["uniform"], arms["curriculum"]
    curve = np.array([point[0] for point in other["curve"]])
    return reached_at(other["grid_tokens"], curve, uniform["final_accuracy"][0]) / uniform["sampled_tokens"][0]


def command(arm: str, seed: int, folder: Path) -> list[str]:
    """The run of one arm and seed."""
    overrides = {
        "curriculum.name": ARMS[arm],
        "run.seed": seed,
        "run.name": f"{arm}{seed}",
        "run.steps": STEPS[arm],
        "run.dir": folder,
        "evaluation.every_steps": EVERY_STEPS,
        "checkpoint.every_steps": 1000,  # only at the end
        "checkpoint.keep": 1,
    }
    settings = [f"{name}={value}" for name, value in overrides.items()]
    return [sys.executable, "-m", "rl.cli", "run", "configs/arithmetic.yaml", *settings]


def run_all(seeds: Sequence[int], folder: Path) -> dict[str, list[Path]]:
    """Every run that is not in the folder yet, one after the other; the run directories by arm."""
    found: dict[str, list[Path]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            if not list(folder.glob(f"{arm}{seed}-*/outcome.json")):
                subprocess.run(command(arm, seed, folder), check=True)
            found[arm].append(sorted(folder.glob(f"{arm}{seed}-*/outcome.json"))[-1].parent)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    run = modes.add_parser("run")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--dir", type=Path, default=Path("runs/study"))
    reader = modes.add_parser("summarise")
    for arm in ARMS:
        reader.add_argument(f"--{arm}", type=Path, nargs="+", required=True)
    for mode in (run, reader):
        mode.add_argument("--out", type=Path, help="where the JSON goes")
    given = parser.parse_args(arguments)
    found = run_all(given.seeds, given.dir) if given.mode == "run" else {arm: vars(given)[arm] for arm in ARMS}
    result = summarise(*([read_run(path) for path in found[arm]] for arm in ARMS))
    text = json.dumps(rounded(result), indent=1) + "\n"
    if given.out is None:
        print(text, end="")
    else:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
