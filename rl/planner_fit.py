"""This file fits costs to a run that was made, from its metrics.jsonl and the lengths of the answers it kept."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rl.archive import Archive
from rl.config import RunConfig
from rl.planner_costs import Costs, Lengths
from rl.planner_guess import step_ratio
from rl.recorder import RunDirectory, read_rows

WARM_UP_STEPS = 2  # engines warm up, and the first batches wait for nothing
NEEDED = (
    "time/step/s",
    "speed/trained/tokens_per_s",
    "speed/sampled/tokens_per_s",
    "sampling/groups",
    "sampling/zero_advantage_fraction",
    "sampling/completion_length/tokens",
    "sampling/judge/s_per_group",
    "generator/engine_step/s",
    "generator/sequences/mean",
    "generator/seconds/sample",
    "learner/seconds/idle",
    "learner/seconds/lease",
    "learner/seconds/forward",
)
TOKEN_WORK = ("pack", "prepare", "forward", "backward")  # activities of learners/ that grow with the tokens
PUBLISHING = ("gather", "canary", "send")
ELSEWHERE = ("idle", "lease")
PAUSING = ("pause", "load", "resume")
VARIED, CORRELATED = 0.25, 0.5  # of sequences in flight: enough to tell a from b
ARCHIVED_STEPS = 20

Row = Mapping[str, float]


def read_steps(directory: RunDirectory) -> list[Row]:
    """The steps of a run after its first two.

    Raises:
        ValueError: there are too few, or they lack a metric that a fit needs.
    """
    rows = [row for _, row in read_rows(directory.path / "metrics.jsonl") if row is not None]
    steps: list[Row] = [row for row in rows if row["step"] > WARM_UP_STEPS]
    if len(steps) < 2:
        raise ValueError(
            f"{directory.path / 'metrics.jsonl'} has {len(rows)} steps; a fit leaves out the first {WARM_UP_STEPS} and "
            "needs two more: make a run of six, rl run CONFIG run.steps=6"
        )
    missing = [name for name in NEEDED if not any(name in row for row in steps)]
    if missing:
        raise ValueError(
            f"{directory.path / 'metrics.jsonl'} lacks {', '.join(missing)}: an earlier version of Slipstream wrote "
            "it, or rollout.first_answers left engine steps unmeasured; make another: rl run CONFIG run.steps=6 "
            "rollout.first_answers=null"
        )
    return steps


def fit(config: RunConfig, directory: RunDirectory, device: str) -> Costs:
    """The costs of a run, `config` being the run's own configuration. Raises ValueError as read_steps does."""
    steps = read_steps(directory)
    pause_s = sum(average(steps, f"weights/update/{phase}/s") for phase in PAUSING)
    confirm_s = average(steps, "weights/update/canary/s")
    prepare_s = average(steps, "weights/update/prepare/s")
    update_s = prepare_s + pause_s + confirm_s
    points = _engine_points(steps, pause_s / max(1e-12, update_s), config)
    fixed_s, sequence_s = fit_engine(points, step_ratio(device))
    tokens = sum(row["speed/trained/tokens_per_s"] * row["time/step/s"] for row in steps)
    groups, ranks = config.learner.groups_per_step, config.learner.ranks
    waited_s = update_s if config.weight_backend == "nccl" else 0.0  # the driver waits for the delivery
    return Costs(
        engine_fixed_s=fixed_s,
        engine_sequence_s=sequence_s,
        lengths=_lengths(directory, steps, config.rollout.max_tokens),
        judge_s=_by_group(steps, "sampling/judge/s_per_group"),
        zero_advantage_share=min(0.95, _by_group(steps, "sampling/zero_advantage_fraction")),
        learner_fixed_s=_activities(steps, set(_activity_names(steps)) - {*TOKEN_WORK, *PUBLISHING, *ELSEWHERE}),
        learner_token_s=_activities(steps, TOKEN_WORK) * len(steps) / tokens * groups / math.ceil(groups / ranks),
        publish_s=_activities(steps, PUBLISHING) * config.weights.every_steps,
        between_s=max(0.0, average(steps, "learner/seconds/lease") - waited_s),
        prepare_s=prepare_s,
        pause_s=pause_s,
        confirm_s=confirm_s,
        origin=f"fitted to {len(steps)} steps of {directory.run_id}",
    )


def fit_engine(points: Sequence[tuple[float, float]], ratio: float) -> tuple[float, float]:
    """a and b of step seconds = a + b * n, from (n, seconds); neither is negative.

    Where n hardly varies, or the seconds do not follow it, one point is all there is: a line through noise makes an
    engine too cheap at small n. Then a = ratio * b, the ratio of the device.
    """
    counts, seconds = zip(*points, strict=True)
    mean_n, mean_s = statistics.fmean(counts), statistics.fmean(seconds)
    varied = statistics.pstdev(counts) >= VARIED * mean_n and min(seconds) < max(seconds)
    if not varied or statistics.correlation(counts, seconds) < CORRELATED:
        sequence_s = mean_s / (ratio + mean_n)
        return ratio * sequence_s, sequence_s
    slope = statistics.linear_regression(counts, seconds).slope
    if slope * mean_n > mean_s:  # the line would begin below 0
        return 0.0, sum(n * s for n, s in points) / sum(n * n for n in counts)
    return mean_s - slope * mean_n, slope


def _engine_points(steps: Sequence[Row], pausing: float, config: RunConfig) -> list[tuple[float, float]]:
    """(sequences in an engine, seconds of its step) of each step of the run.

    The seconds of groups hold the updates that came while they were sampled, of which the share `pausing` stopped the
    engine, and the ledger's seconds of sampling hold none. Where more are asked than an engine decodes at once, a
    group's seconds hold its wait for a place too.
    """
    sampling_s, update_s = total(steps, "generator/seconds/sample"), total(steps, "generator/seconds/update")
    others_s = sum(total(steps, f"generator/seconds/{name}") for name in ("judge", "publish", "idle"))
    beside = sampling_s / (sampling_s + others_s) if config.staleness.max_lag else 0.0  # rounds end before an update
    stepping_s = sampling_s + beside * (1 - pausing) * update_s
    group_s = sampling_s + beside * update_s
    points = []
    for row in steps:
        if "generator/engine_step/s" in row and "generator/sequences/mean" in row:
            asked = max(1.0, row["generator/sequences/mean"] * sampling_s / group_s)
            decoded = min(asked, config.generators.max_sequences)
            points.append((decoded, row["generator/engine_step/s"] * stepping_s / group_s * decoded / asked))
    return points


def average(steps: Sequence[Row], name: str) -> float:
    """The mean of a metric over the steps that have it; 0 where none has."""
    return total(steps, name) / max(1, sum(name in row for row in steps))


def total(steps: Sequence[Row], name: str) -> float:
    """The sum of a metric over the steps that have it."""
    return sum(row.get(name, 0.0) for row in steps)


def _by_group(steps: Sequence[Row], name: str) -> float:
    """The mean of a metric of groups, each step counting with the groups that ended in it."""
    rows = [row for row in steps if name in row]
    return sum(row[name] * row["sampling/groups"] for row in rows) / sum(row["sampling/groups"] for row in rows)


def _activity_names(steps: Sequence[Row]) -> Iterable[str]:
    prefix = "learner/seconds/"
    return (name.removeprefix(prefix) for row in steps for name in row if name.startswith(prefix))


def _activities(steps: Sequence[Row], names: Iterable[str]) -> float:
    """Seconds a step in some of the learner's activities."""
    return sum(total(steps, f"learner/seconds/{name}") for name in names) / len(steps)


def _lengths(directory: RunDirectory, steps: Sequence[Row], max_tokens: int) -> Lengths:
    """Lengths as they were kept, scaled to the mean of all that were sampled: dropped groups were not kept."""
    mean = _by_group(steps, "sampling/completion_length/tokens")
    groups = tuple(tuple(group) for group in _kept_lengths(directory) if min(group, default=0) > 0)
    if not groups:
        return Lengths(mean_tokens=max(1.0, mean))
    scale = mean / Lengths(groups=groups).mean
    return Lengths(
        groups=tuple(tuple(max(1, min(max_tokens, round(scale * each))) for each in group) for group in groups)
    )


def _kept_lengths(directory: RunDirectory) -> Iterable[list[int]]:
    """The lengths of each archived group; of a run without an archive, of those written to rollouts/ for people."""
    archive = Archive(directory)
    groups: dict[str, list[int]] = {}
    rows: list[dict[str, Any]] = []
    for step in archive.steps()[-ARCHIVED_STEPS:]:
        rows += archive.columns(step, "group", "tokens")
    if not rows:
        files = sorted((directory.path / "rollouts").glob("step_*.jsonl"))[-ARCHIVED_STEPS:]
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        groups.setdefault(row["group"], []).append(row["tokens"])
    return groups.values()
