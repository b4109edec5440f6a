"""This file writes the run directory: a JSON object per line, whole files atomically, for people and pandas."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from rl.evaluation import Evaluation
from rl.metrics import Metrics, values
from rl.trajectory import Group


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replace a file whole: a reader, or a crash, sees the old text or the new one, never a part.

    Raises:
        OSError: the disk is full or the folder is not writable; the old file is then unharmed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class RunDirectory:
    """The folder runs/<run id>/ and the names in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path).absolute()

    @property
    def run_id(self) -> str:
        """The folder's name is the run's id."""
        return self.path.name

    @property
    def config(self) -> pathlib.Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def outcome(self) -> pathlib.Path:
        """How the run ended."""
        return self.path / "outcome.json"

    @property
    def checkpoints(self) -> pathlib.Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def archive(self) -> pathlib.Path:
        """The committed groups, by step."""
        return self.path / "archive"

    @property
    def logs(self) -> pathlib.Path:
        """One file per process."""
        return self.path / "logs"

    @property
    def redis(self) -> pathlib.Path:
        """The embedded Redis server's data."""
        return self.path / "redis"

    def create(self) -> None:
        """Make the folders. Raises OSError where the parent is not writable."""
        for folder in (self.path, self.checkpoints, self.archive, self.logs, self.path / "rollouts"):
            folder.mkdir(parents=True, exist_ok=True)


class Recorder:
    """Appends what happened to the run directory's line files."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.directory.path / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def event(self, kind: str, **facts: Any) -> None:
        """One line of events.jsonl: what happened, when, and its facts."""
        self._append("events.jsonl", {"time": time.time(), "event": kind, **facts})

    def step(self, step: int, metrics: Metrics) -> None:
        """One line of metrics.jsonl per optimizer step."""
        self._append("metrics.jsonl", {"step": step, "time": time.time(), **values(metrics)})

    def evaluation(self, evaluation: Evaluation) -> None:
        """One line of evaluations.jsonl."""
        self._append("evaluations.jsonl", {"time": time.time(), **msgspec.to_builtins(evaluation)})

    def ledger(self, step: int, version: int, group_ids: Iterable[str]) -> None:
        """Write down, durably and before the optimizer moves, which groups step `step` trains on."""
        with (self.directory.path / "ledger.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "version": version, "groups": list(group_ids)}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_ledger(self) -> dict[int, tuple[str, ...]]:
        """Step -> group ids, as far as lines are whole; a step written twice counts as last written."""
        path = self.directory.path / "ledger.jsonl"
        steps: dict[int, tuple[str, ...]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # a crash cut the last line: that step never began
            steps[row["step"]] = tuple(row["groups"])
        return steps

    def rollouts(self, step: int, groups: Iterable[Group]) -> None:
        """rollouts/step_N.jsonl: one row per answer, with its text, reward parts, versions and mean log-probability."""
        path = self.directory.path / "rollouts" / f"step_{step:06d}.jsonl"
        with path.open("w") as file:
            for group in groups:
                for row in rollout_rows(group):
                    file.write(json.dumps({"step": step, **row}) + "\n")

    def archive(self, step: int, groups: Iterable[Group]) -> None:
        """archive/step_N.parquet: everything a later replay of the step needs, one row per answer.

        Raises:
            OSError: the file could not be written; nothing was committed then, so nothing is lost.
        """
        import pyarrow
        import pyarrow.parquet

        rows = [{"step": step, **row} for group in groups for row in archive_rows(group)]
        path = self.directory.archive / f"step_{step:06d}.parquet"
        partial = path.with_suffix(".partial")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
        partial.replace(path)


def rollout_rows(group: Group) -> list[dict[str, Any]]:
    """One readable row per answer of a group."""
    return [
        {
            "group": group.group_id,
            "prompt_id": group.prompt.prompt_id,
            "source": group.prompt.source,
            "level": group.prompt.level,
            "prompt": "\n".join(message.text for message in group.prompt.messages),
            "reference": group.prompt.reference,
            "completion": trajectory.completion.text,
            "reward": trajectory.reward,
            "parts": {part.name: part.value for part in trajectory.parts},
            "failures": {part.name: part.failure for part in trajectory.parts if part.failure},
            "finish_reason": trajectory.completion.finish_reason,
            "tokens": len(trajectory.completion.token_ids),
            "versions": [[span.version, span.start, span.end] for span in trajectory.completion.spans],
            "mean_logprob": sum(trajectory.completion.logprobs) / len(trajectory.completion.logprobs),
        }
        for trajectory in group.trajectories
    ]


def archive_rows(group: Group) -> list[dict[str, Any]]:
    """One complete row per answer of a group: token ids and log-probabilities beside what people read."""
    rows = rollout_rows(group)
    for row, trajectory in zip(rows, group.trajectories, strict=True):
        row["draw"] = group.draw
        row["prompt_token_ids"] = list(group.prompt.token_ids)
        row["token_ids"] = list(trajectory.completion.token_ids)
        row["logprobs"] = list(trajectory.completion.logprobs)
        row["reward_versions"] = json.dumps({part.name: part.reward_version for part in trajectory.parts})
        row["parts"] = json.dumps(row["parts"])
        row["failures"] = json.dumps(row["failures"])
    return rows
