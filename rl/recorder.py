"""This file writes the run directory: a JSON object per line, whole files atomically, for people and pandas."""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from rl.chooser import Choice
from rl.evaluation import Evaluation
from rl.metrics import Metrics, values
from rl.trajectory import Group


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Replace a file whole and durably: a reader, or a crash, sees the old content or the new one, never a part.

    Raises:
        OSError: the disk is full or the folder is not writable; the old file is then unharmed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # a rename is durable only once its folder is
    finally:
        os.close(folder)


def read_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line of a line file and its object: None where a crash, or a writer still at work, cut the line."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if line.strip():
                yield line.rstrip("\n"), row if isinstance(row, dict) else None


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

    def owner(self) -> str:
        """A token that tells this run's keys in Redis from those of another run of the same id."""
        path = self.path / "owner"
        if not path.exists():
            write_atomically(path, secrets.token_hex(16))
        return path.read_text()

    def create(self) -> None:
        """Make the folders. Raises OSError where the parent is not writable."""
        for folder in (self.path, self.checkpoints, self.archive, self.logs, self.path / "rollouts"):
            folder.mkdir(parents=True, exist_ok=True)


class Recorder:
    """Appends what happened to the run directory's line files."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    def _append(self, name: str, row: Mapping[str, Any], durably: bool = False) -> None:
        with (self.directory.path / name).open("a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # a crash cut the last line; what comes now must not be lost with it
            file.write(json.dumps(row).encode() + b"\n")
            if durably:
                file.flush()
                os.fsync(file.fileno())

    def event(self, kind: str, **facts: Any) -> None:
        """One line of events.jsonl: what happened, when, and its facts."""
        self._append("events.jsonl", {"time": time.time(), "event": kind, **facts})

    def draw(self, number: int, group_id: str, prompt_id: str, choice: Choice) -> None:
        """One line of draws.jsonl per draw: which prompt, and why it was drawn.

        It stays when a run goes back: the draws were made. One that is made again, because the driver died or Redis
        lost it before it was sampled, has a second line, and the last one counts.
        """
        facts = {"draw": number, "group": group_id, "prompt": prompt_id, "source": choice.source, "level": choice.level}
        self._append("draws.jsonl", {"time": time.time(), **facts, "reason": msgspec.to_builtins(choice.reason)})

    def step(self, step: int, metrics: Metrics) -> None:
        """One line of metrics.jsonl per optimizer step."""
        self._append("metrics.jsonl", {"step": step, "time": time.time(), **values(metrics)})

    def read_metric(self, name: str) -> dict[int, float]:
        """Step -> value of one metric, of all steps that have it in metrics.jsonl."""
        rows = (row for _, row in read_rows(self.directory.path / "metrics.jsonl") if row is not None)
        return {row["step"]: row[name] for row in rows if name in row}

    def evaluation(self, evaluation: Evaluation) -> None:
        """One line of evaluations.jsonl."""
        self._append("evaluations.jsonl", {"time": time.time(), **msgspec.to_builtins(evaluation)})

    def ledger(self, step: int, version: int, group_ids: Iterable[str]) -> None:
        """Write down, durably and before the optimizer moves, which groups step `step` trains on."""
        self._append("ledger.jsonl", {"step": step, "version": version, "groups": list(group_ids)}, durably=True)

    def read_ledger(self) -> dict[int, tuple[str, ...]]:
        """Step -> group ids; a step written twice counts as last written, and a line that a crash cut never began.

        Raises:
            ValueError: an unreadable line is no cut one, for later steps follow it and its own is in no other line.
        """
        path = self.directory.path / "ledger.jsonl"
        steps: dict[int, tuple[str, ...]] = {}
        unreadable = 0
        for _, row in read_rows(path):
            if row is None:
                unreadable += 1
            else:
                steps[row["step"]] = tuple(row["groups"])
        missing = set(range(min(steps, default=0), max(steps, default=0))) - steps.keys()
        if unreadable and missing:
            raise ValueError(
                f"{path} has {unreadable} unreadable line(s), and nothing says what step {min(missing)} trained on, "
                f"though step {max(steps)} came after it; restore the file from a backup"
            )
        return steps

    def rewind(self, step: int) -> None:
        """Forget, in metrics and evaluations, what came after `step`: those steps are about to be made again.

        Their rows move to metrics_rolled_back.jsonl and evaluations_rolled_back.jsonl, where a line that a crash cut
        stands as {"unreadable": its text}. The ledger and the events stay: they tell what was done, also in vain.
        """
        for name in ("metrics", "evaluations"):
            path = self.directory.path / f"{name}.jsonl"
            kept, gone = [], []
            for line, row in read_rows(path):
                if row is not None and row["step"] <= step:
                    kept.append(line)
                else:
                    gone.append(line if row is not None else json.dumps({"unreadable": line}))
            if not gone:
                continue
            away = self.directory.path / f"{name}_rolled_back.jsonl"
            before = [line for line, _ in read_rows(away)]
            known = set(before)  # a crash between the two writes left the rows in both files
            write_atomically(away, _joined(before + [line for line in gone if line not in known]))
            write_atomically(path, _joined(kept))

    def rollouts(self, step: int, groups: Iterable[Group]) -> None:
        """rollouts/step_N.jsonl: one row per answer, with its text, reward parts, versions and mean log-probability."""
        path = self.directory.path / "rollouts" / f"step_{step:06d}.jsonl"
        with path.open("w") as file:
            for group in groups:
                for row in rollout_rows(group):
                    file.write(json.dumps({"step": step, **row}) + "\n")


def _joined(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


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
            "mean_logprob": sum(trajectory.completion.logprobs) / max(1, len(trajectory.completion.logprobs)),
        }
        for trajectory in group.trajectories
    ]
