"""This file adds up what happened between two optimizer steps, and checks that nothing vanished.

drawn = trained + leased + buffered + dropped + in flight. Redis counts the first five, where they outlive the driver,
and the gate the last. A group moves in Redis before the gate hears of it, so what Redis cannot place is at most what
the gate has running.

A token is useful if it was trained with an advantage other than 0. Every other sampled token was dropped, is not
trained yet, or belongs to an answer exactly as good as its group.

Time is accounted for alike: the seconds of a role by activity sum to its wall time. A rank that is not busy waits for
groups (idle), or for the driver, which leases, archives and writes down (lease).
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rl.buffer import BufferStats
from rl.metrics import Metrics, highest, last, lowest, mean, merge, total
from rl.orders import StepReport
from rl.time_ledger import IDLE, added
from rl.trajectory import DropReason, Group, GroupReport, RewardPart

JUDGEMENTS_WATCHED = 256
JUDGEMENTS_BEFORE_A_VERDICT = 32
CUT_OFF: tuple[DropReason, ...] = ("aborted", "stale")  # before all answers had ended
USEFUL_TOKENS = "learner/useful/tokens"  # of one step, as the learner counts them


def imbalance(counts: BufferStats, running: int) -> str:
    """What does not add up, in words; empty where everything drawn and sampled is somewhere."""
    placed_tokens = counts.buffered_tokens + counts.leased_tokens + counts.trained_tokens
    unplaced_tokens = counts.sampled_tokens - placed_tokens - sum(tokens for _, tokens in counts.dropped.values())
    if 0 <= counts.in_flight <= running and not unplaced_tokens:
        return ""
    return (
        f"{counts.in_flight} of the groups drawn are nowhere while {running} are in flight, and {unplaced_tokens} "
        f"sampled tokens are nowhere; {counts}"
    )


def check_balance(counts: BufferStats, running: int) -> None:
    """Raise RuntimeError where groups or tokens vanished or appeared, with every count."""
    found = imbalance(counts, running)
    if found:
        raise RuntimeError(
            f"groups do not balance: {found}. This is a defect of Slipstream: please report it with the run's "
            "events.jsonl"
        )


class RewardWatch:
    """Looks at the last judgements of every reward and stops a run whose reward fails too often."""

    def __init__(self, max_failure_fraction: float) -> None:
        self._max_failure_fraction = max_failure_fraction
        self._recent: dict[str, deque[RewardPart]] = defaultdict(lambda: deque(maxlen=JUDGEMENTS_WATCHED))

    def observe(self, report: GroupReport) -> None:
        """Count a group's judgements.

        Raises:
            ValueError: above the configured fraction of a reward's recent judgements failed; names it and why.
        """
        for parts in report.parts:
            for part in parts:
                self._recent[part.name].append(part)
        for name, recent in self._recent.items():
            failures = [part for part in recent if part.failure]
            if len(recent) < JUDGEMENTS_BEFORE_A_VERDICT:
                continue
            if len(failures) > self._max_failure_fraction * len(recent):
                raise ValueError(
                    f"reward {name} failed on {len(failures)} of the last {len(recent)} answers, above "
                    f"rewards.max_failure_fraction {self._max_failure_fraction}; the last failure was "
                    f"{failures[-1].failure}: {failures[-1].message}"
                )


class StepAccount:
    """Collects group reports until a step ends, then turns them and the counts into the step's metrics."""

    def __init__(self, devices: int, mask_truncated: bool = False) -> None:
        self._devices = devices
        self._mask_truncated = mask_truncated
        self._batch: Metrics = {}
        self._useful: dict[int, float] = {}  # step -> tokens
        self._reports: list[GroupReport] = []
        self._waited = 0.0
        self._opened = time.monotonic()

    def add(self, report: GroupReport) -> None:
        """Count a finished group."""
        self._reports.append(report)

    def trained(self, groups: Iterable[Group]) -> None:
        """Count the answers of the step's batch: those with a reward, and what became of the truncated ones."""
        scored = [each for group in groups for each in group.trajectories if each.reward is not None]
        truncated = sum(each.completion.finish_reason == "length" for each in scored)
        masked = truncated if self._mask_truncated else 0
        self._batch = {
            "batch/answers/scored": total(len(scored)),
            "batch/answers/truncated_trained": total(truncated - masked),
            "batch/answers/truncated_masked": total(masked),
        }

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as the learner waiting for groups."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - start

    def take_up(self, useful: Mapping[int, float]) -> None:
        """Go on from the useful tokens of the steps that an earlier process made and kept."""
        self._useful = dict(useful)

    def close(self, step: StepReport, counts: BufferStats, sampling: Metrics) -> Metrics:
        """The metrics of the step that just ended; a new account opens."""
        wall = time.monotonic() - self._opened
        reports, self._reports, self._opened = self._reports, [], time.monotonic()
        sampled = merge(_of_report(report) for report in reports)
        learner = self._learner_seconds(step, wall)
        speed: Metrics = {
            "time/step/s": last(wall),
            "speed/sampled/tokens_per_s": last(sum(report.num_tokens for report in reports) / wall),
            "speed/trained/tokens_per_s": last(step.num_tokens / wall),
            "learner/idle_fraction": last(learner[IDLE] / wall),
            "cost/accelerator_s_per_million_trained_tokens": last(self._devices * wall * 1e6 / max(1, step.num_tokens)),
            **{f"learner/seconds/{activity}": last(seconds) for activity, seconds in learner.items()},
            **_of_generators(reports),
        }
        useful = self._count_useful(step, counts.sampled_tokens, sum(report.num_tokens for report in reports))
        batch, self._batch = self._batch, {}
        return merge([step.metrics, sampled, speed, sampling, batch, useful, _of_counts(counts)])

    def _learner_seconds(self, step: StepReport, wall: float) -> dict[str, float]:
        """Where a rank's time since the last step went. What ranks do beside the driver may overlap with a wait."""
        busy = sum(step.seconds.values())
        waited, self._waited = self._waited, 0.0
        idle = max(0.0, min(waited, wall - busy))
        return {**step.seconds, IDLE: idle, "lease": max(0.0, wall - busy - idle)}

    def _count_useful(self, step: StepReport, sampled: int, sampled_since: int) -> Metrics:
        """The useful share of what was sampled in the whole run, and between this step and the one before.

        A step that is made again after a rollback replaces itself; what it was made of is sampled only once. A step
        trains on what was sampled before it began, so its own share may exceed 1.
        """
        if USEFUL_TOKENS not in step.metrics:
            return {}
        for undone in [number for number in self._useful if number >= step.step]:
            del self._useful[undone]
        self._useful[step.step] = useful = step.metrics[USEFUL_TOKENS].value
        metrics = {"flow/useful_token_fraction": last(sum(self._useful.values()) / max(1, sampled))}
        if sampled_since:
            metrics["flow/useful_token_fraction/step"] = last(useful / sampled_since)
        return metrics


def _of_generators(reports: Iterable[GroupReport]) -> Metrics:
    """The generators' time by activity, and how full their engines were: what rl/planner_costs.py fits an engine to.

    A group that was sampled at once holds its sequences for as many engine steps as its longest answer has tokens; so
    its seconds tell how long a step took, and all groups together how many sequences were in flight on average.
    """
    seconds = added([report.ledger for report in reports])
    metrics: Metrics = {f"generator/seconds/{activity}": last(each) for activity, each in seconds.items()}
    in_flight = 0.0
    for report in reports:
        longest = max(report.completion_tokens, default=0)
        if report.first_answers is None and report.dropped not in CUT_OFF and longest:
            step_s = report.seconds.get("sample", 0.0) / longest
            in_flight += step_s * report.num_tokens
            metrics = merge([metrics, {"generator/engine_step/s": mean(step_s, longest)}])
    if in_flight and seconds.get("sample"):
        metrics["generator/sequences/mean"] = last(in_flight / seconds["sample"])
    return metrics


def _of_report(report: GroupReport) -> Metrics:
    """A group's metrics. Rewards are averaged over the answers that were sampled whatever they were worth.

    Of a group in two stages that is the first: its other answers exist only because the first differ, and would draw
    the mean towards the middle. Lengths are those of whole answers: of a group that was cut off nobody knows them.
    """
    place, first = f"{report.source}/{report.level}", report.first_answers
    scores = [reward for reward in report.rewards[:first] if reward is not None]
    metrics: Metrics = {
        "sampling/groups": total(1),
        "sampling/zero_advantage_fraction": mean(report.dropped == "zero_advantage"),
    }
    answers = len(report.rewards)
    if answers and report.dropped not in CUT_OFF:
        metrics["sampling/truncated_fraction"] = mean(report.truncated / answers, answers)
        metrics["sampling/completion_length/tokens"] = mean(report.num_tokens / answers, answers)
        if first is not None:
            metrics["sampling/stopped_at_first_fraction"] = mean(answers == first)
    for activity, seconds in report.seconds.items():
        metrics[f"sampling/{activity}/s_per_group"] = mean(seconds)
    if scores:
        average = sum(scores) / len(scores)
        metrics["reward/mean"] = mean(average, len(scores))
        metrics[f"reward/mean/{place}"] = mean(average, len(scores))
        metrics["reward/min"] = lowest(min(scores))
        metrics["reward/max"] = highest(max(scores))
    told = [part for parts in report.parts[:first] for part in parts]
    told += [part for parts in report.parts[len(report.rewards[:first]) :] for part in parts if part.value is None]
    return merge([metrics, *(_of_part(report.source, part) for part in told)])


def _of_part(source: str, part: RewardPart) -> Metrics:
    name = f"{source}/{part.name}"
    if part.value is None:
        return {f"reward/failures/{name}/{part.failure}": total(1)}
    return {f"reward/part/{name}": mean(part.value), f"reward/seconds/{part.name}": mean(part.seconds)}


def _of_counts(counts: BufferStats) -> Metrics:
    trained = counts.trained_tokens + counts.leased_tokens  # leased groups are trained, and wait for their checkpoint
    metrics: Metrics = {
        "flow/groups/drawn": last(counts.drawn),
        "flow/groups/trained": last(counts.trained_groups + counts.leased_groups),
        "flow/groups/buffered": last(counts.buffered_groups),
        "flow/groups/in_flight": last(counts.in_flight),
        "flow/tokens/sampled": last(counts.sampled_tokens),
        "flow/tokens/trained": last(trained),
        "flow/tokens/buffered": last(counts.buffered_tokens),
        "buffer/bytes": last(counts.buffered_bytes + counts.leased_bytes),
        "buffer/oldest_age/s": last(counts.oldest_age_s),
    }
    for reason, (groups, tokens) in counts.dropped.items():
        metrics[f"flow/groups/dropped/{reason}"] = last(groups)
        metrics[f"flow/tokens/dropped/{reason}"] = last(tokens)
    return metrics
