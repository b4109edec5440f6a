"""This file reads events.jsonl back: steps made and taken back, versions and their digests, checkpoints, drops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from rl.chooser import Reason
from rl.recorder import RunDirectory, read_rows


class Rollback(msgspec.Struct, frozen=True, kw_only=True):
    """The learners went back to the policy of to_step; the steps beyond it were made again."""

    from_step: int
    to_step: int
    reason: str
    time: float


class Drop(msgspec.Struct, frozen=True, kw_only=True):
    """A group that was sampled and not trained."""

    group: str
    prompt_id: str
    reason: str
    tokens: int


class DrawFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Why a prompt was drawn, for which group; a line of draws.jsonl."""

    draw: int
    group: str
    prompt: str
    source: str
    level: str
    time: float
    reason: Reason


class VersionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A policy version. digest is of its weights as published, None where no event tells it.

    earlier_digests: what the version was before a rollback, where that differs. generators verified it.
    """

    version: int
    digest: str | None = None
    earlier_digests: tuple[str, ...] = ()
    generators: tuple[int, ...] = ()


class StepFacts(msgspec.Struct, frozen=True, kw_only=True):
    """An optimizer step as its last event tells it; made counts how often it was made, rolled-back times included."""

    step: int
    batch_digest: str
    time: float
    made: int


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What the events say. steps and checkpoints are those that no rollback took back."""

    steps: dict[int, StepFacts]
    versions: dict[int, VersionFacts]
    checkpoints: tuple[int, ...]
    rollbacks: tuple[Rollback, ...]
    drops: dict[str, Drop]
    unreadable_lines: int

    def version(self, version: int) -> VersionFacts:
        """What is known of a version."""
        return self.versions.get(version, VersionFacts(version=version))

    def saved_by(self, step: int) -> tuple[int, ...]:
        """The checkpoints that hold a step, by theirs; retention may have removed them since."""
        return tuple(saved for saved in self.checkpoints if saved >= step)


def read_history(directory: RunDirectory) -> History:
    """What events.jsonl says; lines that a crash cut are counted and passed over."""
    reading = _Reading()
    for _, row in read_rows(directory.path / "events.jsonl"):
        if row is None:
            reading.unreadable += 1
        else:
            handler = reading.handlers.get(row.get("event", ""))
            if handler:
                handler(row)
    return reading.history()


def read_draws(directory: RunDirectory, group: str = "", prompt: str = "") -> dict[str, DrawFacts]:
    """The draws of a group or of a prompt, by group; of one made again the last. Earlier versions wrote none."""
    found: dict[str, DrawFacts] = {}
    for _, row in read_rows(directory.path / "draws.jsonl"):
        if row is not None and (row.get("group") == group or row.get("prompt") == prompt):
            facts = msgspec.convert(row, DrawFacts)
            found[facts.group] = facts
    return found


class _Reading:
    """The events so far."""

    def __init__(self) -> None:
        self.unreadable = 0
        self._steps: dict[int, StepFacts] = {}
        self._made: dict[int, int] = {}
        self._versions: dict[int, VersionFacts] = {}
        self._checkpoints: list[int] = []
        self._rollbacks: list[Rollback] = []
        self._drops: dict[str, Drop] = {}
        self.handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "step": self._step,
            "weights_verified": self._verified,
            "checkpoint": lambda row: self._checkpoints.append(row["step"]),
            "rollback": lambda row: self._back(row["from_step"], row["to_step"], row["reason"], row["time"]),
            "resume": self._resumed,
            "dropped": self._dropped,
        }

    def _step(self, row: dict[str, Any]) -> None:
        step = row["step"]
        self._made[step] = self._made.get(step, 0) + 1
        self._steps[step] = StepFacts(step=step, batch_digest=row["batch"], time=row["time"], made=self._made[step])
        if row.get("weights"):
            self._digest(step, row["weights"])

    def _verified(self, row: dict[str, Any]) -> None:
        facts = self._digest(row["version"], row["digest"])
        generators = tuple(sorted({*facts.generators, *row.get("generators", ())}))
        self._versions[facts.version] = msgspec.structs.replace(facts, generators=generators)

    def _digest(self, version: int, digest: str) -> VersionFacts:
        facts = self._versions.get(version, VersionFacts(version=version))
        if facts.digest not in (None, digest):
            earlier = (*facts.earlier_digests, facts.digest)
            facts = msgspec.structs.replace(facts, earlier_digests=earlier, generators=())
        self._versions[version] = facts = msgspec.structs.replace(facts, digest=digest)
        return facts

    def _resumed(self, row: dict[str, Any]) -> None:
        self._back(max(self._steps, default=0), row["step"], "rl resume", row["time"])
        if row["step"]:
            self._checkpoints.append(row["step"])  # a crash may have come between the checkpoint and its event

    def _back(self, from_step: int, to_step: int, reason: str, time: float) -> None:
        if from_step > to_step:
            self._rollbacks.append(Rollback(from_step=from_step, to_step=to_step, reason=reason, time=time))
        self._steps = {step: facts for step, facts in self._steps.items() if step <= to_step}
        self._checkpoints = [step for step in self._checkpoints if step <= to_step]

    def _dropped(self, row: dict[str, Any]) -> None:
        drop = Drop(
            group=row["group"],
            prompt_id=row.get("prompt", ""),
            reason=row.get("reason", ""),
            tokens=row.get("tokens", 0),
        )
        self._drops[drop.group] = drop

    def history(self) -> History:
        """What they amount to."""
        return History(
            steps=self._steps,
            versions=self._versions,
            checkpoints=tuple(sorted(set(self._checkpoints))),
            rollbacks=tuple(self._rollbacks),
            drops=self._drops,
            unreadable_lines=self.unreadable,
        )
