"""This file proves from a run's own files that nothing was lost, trained twice or too old, whatever died on the way."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from dataclasses import dataclass, field

from rl.archive import Archive
from rl.recorder import Recorder, RunDirectory
from rl.trajectory import DROP_REASONS


@dataclass
class Findings:
    """What is wrong with a run, in words; and what its faults cost."""

    problems: list[str] = field(default_factory=list)
    steps: int = 0
    groups: int = 0
    rollbacks: int = 0
    aborted: int = 0
    max_lag: int = 0

    def expect(self, holds: bool, problem: str) -> None:
        """Note a problem unless it holds."""
        if not holds:
            self.problems.append(problem)


def rows(path: pathlib.Path) -> list[dict]:
    """The whole lines of a file of JSON objects."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def audit(folder: pathlib.Path, max_lag: int, finished: bool = True) -> Findings:
    """Check invariants 1 to 3 of a run that has ended: exactly once, nothing vanishes, lag is bounded."""
    directory, found = RunDirectory(folder), Findings()
    events, metrics = rows(folder / "events.jsonl"), rows(folder / "metrics.jsonl")
    ledger, archive = Recorder(directory).read_ledger(), Archive(directory)
    found.rollbacks = sum(event["event"] == "rollback" for event in events)
    found.steps = len(metrics)
    steps = [row["step"] for row in metrics]
    found.expect(steps == list(range(1, len(steps) + 1)), f"metrics.jsonl has the steps {steps}")
    trained: Counter[str] = Counter()
    for step in steps:
        groups = archive.read(step)
        ids = [group.group_id for group in groups]
        trained.update(ids)
        planned = list(ledger.get(step, ()))
        found.expect(ids == planned, f"step {step} trained on {ids}, its ledger says {planned}")
        lag = max(step - 1 - group.oldest_version for group in groups)
        found.max_lag = max(found.max_lag, lag)
        found.expect(lag <= max_lag, f"step {step} trained on a token that is {lag} versions old")
    twice = [group_id for group_id, count in trained.items() if count > 1]
    found.expect(not twice, f"trained twice: {twice}")
    found.groups = len(trained)
    for row in metrics:
        _balance(found, row)
    if finished and metrics:
        _all_ended(found, metrics[-1], trained)
    return found


def _balance(found: Findings, row: dict) -> None:
    for unit, start, places in (
        ("groups", "drawn", ("trained", "buffered", "in_flight")),
        ("tokens", "sampled", ("trained", "buffered")),
    ):
        total = sum(row[f"flow/{unit}/{place}"] for place in places)
        total += sum(row[f"flow/{unit}/dropped/{reason}"] for reason in DROP_REASONS)
        found.expect(row[f"flow/{unit}/{start}"] == total, f"step {row['step']}: {unit} do not balance")


def _all_ended(found: Findings, row: dict, trained: Counter[str]) -> None:
    found.aborted = int(row["flow/groups/dropped/aborted"])
    count = row["flow/groups/trained"]
    found.expect(count == len(trained), f"{count} groups count as trained, the archive has {len(trained)}")


def batches(folder: pathlib.Path) -> dict[int, tuple[str, float]]:
    """Step -> batch digest and loss, as last made."""
    digests = {event["step"]: event["batch"] for event in rows(folder / "events.jsonl") if event["event"] == "step"}
    return {row["step"]: (digests[row["step"]], row["learner/loss"]) for row in rows(folder / "metrics.jsonl")}
