"""A finished run as `rl plan --from` finds it: metrics.jsonl as the simulation itself predicts, and rollouts/."""

from __future__ import annotations

import json
import pathlib
import random

from rl.config import RunConfig
from rl.config_loading import dump_config, load_config
from rl.planner import setting_of
from rl.planner_costs import Costs, Lengths
from rl.recorder import RunDirectory
from rl.simulation import simulate

KNOWN = Costs(
    engine_fixed_s=0.031,
    engine_sequence_s=0.0028,
    learner_fixed_s=0.5,
    learner_token_s=0.004,
    lengths=Lengths(groups=((4, 8, 12, 16, 20, 12, 8, 16),)),
    judge_s=0.05,
    zero_advantage_share=0.4,
    publish_s=0.25,
    between_s=0.1,
    prepare_s=0.2,
    pause_s=0.6,
    confirm_s=0.1,
)
STEPS = 30
UPDATE_S = KNOWN.prepare_s + KNOWN.pause_s + KNOWN.confirm_s


def config(*overrides: str) -> RunConfig:
    return load_config("arithmetic", [f"run.steps={STEPS}", "model.device=cpu", *overrides])


def row(step: int, settings: RunConfig, sequences: float, known: Costs = KNOWN) -> dict[str, float]:
    """A step's metrics: what a simulation of the whole run says, but for how full the engine was."""
    found = simulate(setting_of(settings), known, STEPS, 2, to_the_end=True)
    tokens = settings.trajectories_per_step * known.lengths.mean
    wall = found.step_s
    spent = {
        "idle": found.learner_idle * wall,
        "lease": known.between_s,
        "forward": 0.4 * known.learner_token_s * tokens,
        "backward": 0.6 * known.learner_token_s * tokens,
        "step": 0.8 * known.learner_fixed_s,
        "fetch": 0.2 * known.learner_fixed_s,
        "gather": 0.4 * known.publish_s,
        "send": 0.6 * known.publish_s,
    }
    engine_step_s = known.engine_fixed_s + known.engine_sequence_s * sequences
    idle_s = wall * found.generator_idle
    sampling_s = wall - idle_s - UPDATE_S
    beside = sampling_s / (sampling_s + idle_s)  # of updates: how often something is sampled meanwhile
    group_s = sampling_s + beside * UPDATE_S
    return {
        "step": step,
        "time/step/s": wall,
        "speed/trained/tokens_per_s": tokens / wall,
        "speed/sampled/tokens_per_s": found.sampled_tokens_per_s,
        "sampling/groups": 10.0,
        "sampling/zero_advantage_fraction": found.zero_advantage_groups / found.drawn,
        "sampling/completion_length/tokens": known.lengths.mean,
        "sampling/judge/s_per_group": known.judge_s,
        "generator/engine_step/s": engine_step_s * group_s / (group_s - beside * known.pause_s),
        "generator/sequences/mean": sequences * group_s / sampling_s,
        "generator/seconds/sample": sampling_s,
        "generator/seconds/update": UPDATE_S,
        "generator/seconds/idle": idle_s,
        "weights/update/prepare/s": known.prepare_s,
        "weights/update/pause/s": 0.2 * known.pause_s,
        "weights/update/load/s": 0.7 * known.pause_s,
        "weights/update/resume/s": 0.1 * known.pause_s,
        "weights/update/canary/s": known.confirm_s,
        "policy/lag_mean/versions": found.lag_mean,
        **{f"learner/seconds/{name}": seconds for name, seconds in spent.items()},
    }


def write_run(folder: pathlib.Path, rows: list[dict[str, float]], *overrides: str) -> RunDirectory:
    directory = RunDirectory(folder / "a_run")
    directory.create()
    directory.config.write_text(dump_config(config(*overrides)))
    (directory.path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    answers = [{"group": f"a_run/{draw}", "tokens": length} for draw in range(3) for length in KNOWN.lengths.groups[0]]
    text = "".join(json.dumps(answer) + "\n" for answer in answers)
    (directory.path / "rollouts" / "step_000003.jsonl").write_text(text)
    return directory


def finished_run(folder: pathlib.Path, varied: bool = True) -> RunDirectory:
    """Its engine was filled differently in every step, or alike in all."""
    chance = random.Random(0)
    made = row(0, config(), 16.0)
    rows = []
    for step in range(1, STEPS + 1):
        each = row(step, config(), chance.uniform(4, 60)) if varied else made | {"step": step}
        rows.append(each if step > 2 else each | {"time/step/s": 100.0, "generator/engine_step/s": 9.0})
    return write_run(folder, rows)
