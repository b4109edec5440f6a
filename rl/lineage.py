"""This file answers where things came from: from a step to its groups, prompts, rewards and weights, and back.

It knows what ledger.jsonl, archive/, events.jsonl and draws.jsonl of a run directory say, and nothing else; it changes
nothing, so a run may be going on. A step made again after a rollback counts as last made. `rl/lineage_view.py` shows
the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from rl.archive import Archive
from rl.history import DrawFacts, Drop, Rollback, VersionFacts, read_draws, read_history
from rl.recorder import Recorder, RunDirectory, read_rows
from rl.trajectory import Group


class GroupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A group as archived. versions: those that its tokens were sampled under; reward_versions by reward part."""

    group: str
    draw: int
    prompt_id: str
    source: str
    level: str
    versions: tuple[int, ...]
    rewards: tuple[float | None, ...]
    reward_versions: dict[str, str]
    tokens: int
    finished_at: float


class StepLineage(msgspec.Struct, frozen=True, kw_only=True):
    """All about a step. batch_digest is None where the step is in the ledger, and has not been made since."""

    step: int
    made: int
    batch_digest: str | None
    trained_from: VersionFacts
    produced: VersionFacts
    group_ids: tuple[str, ...]
    groups: tuple[GroupFacts, ...]
    checkpoints: tuple[int, ...]
    rollbacks: tuple[Rollback, ...]
    problems: tuple[str, ...] = ()


class GroupLineage(msgspec.Struct, frozen=True, kw_only=True):
    """All about a group. step trained it, or will: state says which; given_up are steps planned anew without it.

    drawn tells why its prompt was drawn; None where no line says so.
    """

    group: str
    step: int | None
    state: str
    given_up: tuple[int, ...]
    facts: GroupFacts | None
    checkpoints: tuple[int, ...]
    drawn: DrawFacts | None = None
    problems: tuple[str, ...] = ()


class PromptLineage(msgspec.Struct, frozen=True, kw_only=True):
    """All groups of a prompt that were trained, those known to be dropped, and why it was drawn each time."""

    prompt_id: str
    groups: tuple[GroupLineage, ...]
    dropped: tuple[Drop, ...]
    draws: tuple[DrawFacts, ...] = ()
    problems: tuple[str, ...] = ()


class SampledTokens(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens of a trained group were sampled under the version in question."""

    step: int
    group: str
    tokens: int


class VersionLineage(msgspec.Struct, frozen=True, kw_only=True):
    """All about a version. made_by is the step that produced it; None for the starting weights."""

    facts: VersionFacts
    made_by: int | None
    checkpoints: tuple[int, ...]
    sampled: tuple[SampledTokens, ...]
    problems: tuple[str, ...] = ()


Lineage = StepLineage | GroupLineage | PromptLineage | VersionLineage


class Genealogist:
    """Answers questions about one run directory, from the files as they were when it was made.

    Its questions raise ValueError for something that the run has no record of. What a missing or damaged archive hides
    is told in an answer's `problems`, beside what the other files say.
    """

    def __init__(self, directory: RunDirectory) -> None:
        """Raises ValueError where the ledger is damaged beyond a line that a crash cut."""
        self._directory = directory
        self._archive = Archive(directory)
        self._ledger = Recorder(directory).read_ledger()
        self._history = read_history(directory)

    def step(self, step: int) -> StepLineage:
        """From a step to all that it is made of."""
        if step not in self._ledger:
            stands = f"the ledger ends at step {max(self._ledger)}" if self._ledger else "the ledger is empty"
            raise ValueError(f"run {self._directory.run_id} has no step {step}; {stands}")
        problems: list[str] = []
        groups = tuple(map(_facts_of, self._read(step, problems)))
        group_ids, made = self._ledger[step], self._history.steps.get(step)
        if groups and tuple(facts.group for facts in groups) != group_ids:
            problems.append(f"the archive of step {step} holds other groups than the ledger says")
        if self._history.unreadable_lines:
            problems.append(f"events.jsonl has {self._history.unreadable_lines} unreadable line(s)")
        return StepLineage(
            step=step,
            made=made.made if made else 0,
            batch_digest=made.batch_digest if made else None,
            trained_from=self._history.version(step - 1),
            produced=self._history.version(step),
            group_ids=group_ids,
            groups=groups,
            checkpoints=self._history.saved_by(step) if made else (),
            rollbacks=tuple(back for back in self._history.rollbacks if back.to_step < step <= back.from_step),
            problems=tuple(problems),
        )

    def group(self, group: str) -> GroupLineage:
        """From a group, by its id or its draw's number, to the step that trained it or the reason that none did."""
        group_id = f"{self._directory.run_id}/{int(group):08d}" if group.isdigit() else group
        step = next((step for step, group_ids in self._ledger.items() if group_id in group_ids), None)
        drop = self._history.drops.get(group_id)
        drawn = read_draws(self._directory, group=group_id).get(group_id)
        if step is None and drop is None and drawn is None:
            raise ValueError(
                f"run {self._directory.run_id} has no record of group {group_id}: no step took it. Either it has not "
                "been trained yet, or it was dropped, which metrics.jsonl counts by reason"
            )
        problems: list[str] = []
        found = self._read(step, problems) if step is not None else []
        return GroupLineage(
            group=group_id,
            step=step,
            state=self._state(step, drop),
            given_up=self._given_up(group_id, step),
            facts=next((_facts_of(each) for each in found if each.group_id == group_id), None),
            checkpoints=self._history.saved_by(step) if step in self._history.steps else (),
            drawn=drawn,
            problems=tuple(problems),
        )

    def prompt(self, prompt_id: str) -> PromptLineage:
        """From a prompt to its groups."""
        problems: list[str] = []
        rows = self._scan(1, problems, "group", "prompt_id")
        groups = dict.fromkeys(row["group"] for _, row in rows if row["prompt_id"] == prompt_id)
        dropped = tuple(drop for drop in self._history.drops.values() if drop.prompt_id == prompt_id)
        draws = tuple(read_draws(self._directory, prompt=prompt_id).values())
        if not groups and not dropped and not draws:
            told = f" ({'; '.join(problems)})" if problems else ""
            raise ValueError(f"no step of run {self._directory.run_id} trained on prompt {prompt_id}{told}")
        return PromptLineage(
            prompt_id=prompt_id,
            groups=tuple(map(self.group, groups)),
            dropped=dropped,
            draws=draws,
            problems=tuple(problems),
        )

    def version(self, version: int) -> VersionLineage:
        """From a policy version to the step that made it and the trained tokens that it sampled."""
        if version not in self._history.versions and version not in (0, *self._history.steps):
            newest = max(self._history.steps, default=0)
            raise ValueError(f"run {self._directory.run_id} has no policy version {version}; the newest is {newest}")
        problems: list[str] = []
        tokens: dict[tuple[int, str], int] = {}
        for step, row in self._scan(version + 1, problems, "group", "versions"):
            count = sum(end - start for sampled_under, start, end in row["versions"] if sampled_under == version)
            if count:
                tokens[step, row["group"]] = tokens.get((step, row["group"]), 0) + count
        return VersionLineage(
            facts=self._history.version(version),
            made_by=version or None,
            checkpoints=self._history.saved_by(version)[:1] if version in self._history.checkpoints else (),
            sampled=tuple(SampledTokens(step=step, group=group, tokens=n) for (step, group), n in tokens.items()),
            problems=tuple(problems),
        )

    def _state(self, step: int | None, drop: Drop | None) -> str:
        if step is None:
            return f"dropped: {drop.reason}" if drop else "drawn, and no step has taken it"
        if step not in self._history.steps:
            return f"planned for step {step}, which has not been made, or not again since a rollback"
        saved = self._history.saved_by(step)
        return f"trained in step {step}, " + (f"saved by checkpoint {saved[0]}" if saved else "not saved yet")

    def _given_up(self, group_id: str, step: int | None) -> tuple[int, ...]:
        rows = (row for _, row in read_rows(self._directory.path / "ledger.jsonl") if row is not None)
        return tuple(dict.fromkeys(row["step"] for row in rows if group_id in row["groups"] and row["step"] != step))

    def _read(self, step: int, problems: list[str]) -> list[Group]:
        try:
            return self._archive.read(step)
        except ValueError as error:
            problems.append(str(error))
            return []

    def _scan(self, first: int, problems: list[str], *columns: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The archived rows of the groups that the ledger names, from step `first` on."""
        for step in sorted(step for step in self._ledger if step >= first):
            try:
                rows = self._archive.columns(step, *columns)
            except ValueError as error:
                problems.append(str(error))
                continue
            planned = set(self._ledger[step])
            yield from ((step, row) for row in rows if row["group"] in planned)


def _facts_of(group: Group) -> GroupFacts:
    parts = [part for trajectory in group.trajectories for part in trajectory.parts]
    spans = [span for trajectory in group.trajectories for span in trajectory.completion.spans]
    return GroupFacts(
        group=group.group_id,
        draw=group.draw,
        prompt_id=group.prompt.prompt_id,
        source=group.prompt.source,
        level=group.prompt.level,
        versions=tuple(sorted({span.version for span in spans})),
        rewards=group.rewards,
        reward_versions={part.name: part.reward_version for part in parts},
        tokens=group.num_tokens,
        finished_at=group.finished_at,
    )
