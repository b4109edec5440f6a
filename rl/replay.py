"""This file prepares the replay of a step, from files alone, and says how it went; learners/replay.py computes.

A replay recomputes a step's loss from the archived batch and the policy that trained on it, and compares it with the
one recorded when the run made the step. It only reads: the run may be going on.
"""

from __future__ import annotations

import pathlib
from typing import Any

import msgspec
from rich.table import Table

from rl import checkpoints
from rl.archive import Archive
from rl.history import read_history
from rl.recorder import RunDirectory, read_rows

# Relative to the sum of |token losses|. Measured in bf16 on CPU with a model of 135 million parameters: 0 from the
# checkpoint before the step, and after steps trained again, for one rank and two, whatever the number of threads. Where
# products round otherwise (another kind of machine, other libraries; measured by laying the batch out otherwise) up to
# 6e-4 with the same weights, and 8e-3 after four steps trained again; a policy one version off differs by 3e-3.
TOLERANCE = 1e-6


class RecordedStep(msgspec.Struct, frozen=True, kw_only=True):
    """What the run wrote down of a step. scale is the mean |token loss|; ranks is how many laid its batch out."""

    step: int
    loss: float
    scale: float
    ranks: int
    batch_digest: str


class ReplayPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Load `checkpoint` (None: the starting model), make `steps` again; the last of them is the one in question.

    weights is the recorded digest of the policy that the last step trained from, where it is known.
    passed_over are the checkpoints that would have been nearer, and why they are not used.
    """

    run_id: str
    checkpoint: pathlib.Path | None
    start_step: int
    steps: tuple[RecordedStep, ...]
    weights: str | None
    passed_over: tuple[str, ...]


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """A step's loss as recorded and as computed again, in nats per token or per unit of the algorithm's normaliser.

    drift is the largest relative difference of the losses of the steps trained again on the way, retrained in number.
    same_weights tells whether the policy is the recorded one bit by bit; None where its digest was not recorded.
    """

    step: int
    groups: int
    recorded: float
    recomputed: float
    scale: float
    tolerance: float
    started_from: str
    retrained: int
    drift: float
    same_weights: bool | None
    seconds: float

    @property
    def difference(self) -> float:
        """Between the two losses, relative to the scale."""
        distance = abs(self.recomputed - self.recorded)
        return distance / self.scale if self.scale else distance

    @property
    def agrees(self) -> bool:
        """Whether the recomputed loss is the recorded one up to the tolerance; never where it is not a number."""
        return self.difference <= self.tolerance


def plan_replay(directory: RunDirectory, step: int) -> ReplayPlan:
    """Find the nearest policy before `step` and the steps from there on.

    Raises:
        ValueError: the run has not made the step, did not record its loss, or lacks an archived step on the way.
    """
    rows = {row["step"]: row for _, row in read_rows(directory.path / "metrics.jsonl") if row is not None}
    history, archive = read_history(directory), Archive(directory)
    if step not in rows or step not in history.steps:
        stands = max(rows, default=0)
        raise ValueError(
            f"run {directory.run_id} has recorded no step {step}: it stands at step {stands}; "
            + (f"choose a step from 1 to {stands}" if stands else "wait for its first step")
        )
    folder, start_step, passed_over = _nearest_policy(directory, step - 1)
    on_the_way = range(start_step + 1, step + 1)
    missing = [number for number in on_the_way if not archive.holds(number)]
    if missing:
        raise ValueError(
            f"{archive.path_of(missing[0])} does not exist, and step {step} needs it: the nearest policy is "
            f"{folder or 'the starting model'}, of step {start_step}; put the file back, or choose a step up to "
            f"{missing[0] - 1}"
        )
    digests = {number: facts.batch_digest for number, facts in history.steps.items()}
    return ReplayPlan(
        run_id=directory.run_id,
        checkpoint=folder,
        start_step=start_step,
        steps=tuple(_recorded(number, rows.get(number, {}), digests) for number in on_the_way),
        weights=history.version(step - 1).digest,
        passed_over=passed_over,
    )


def render(replayed: Replayed) -> Table:
    """The comparison, quantity by quantity."""
    view = Table(title=f"replay of step {replayed.step}", title_justify="left", show_header=False, box=None)
    view.add_column(style="dim")
    view.add_column(overflow="fold")
    weights = {None: "not recorded", True: "the recorded ones, bit for bit", False: "not the recorded ones bit for bit"}
    again = f"{replayed.retrained} steps trained again" if replayed.retrained else "no step trained again"
    if replayed.retrained:
        again += f", whose losses differ by {replayed.drift:.2g} of their scale at most"
    verdict = "[green]agrees[/green]" if replayed.agrees else "[bold red]differs[/bold red]"
    for name, value in (
        ("groups", str(replayed.groups)),
        ("policy from", f"{replayed.started_from}, {again}"),
        ("weights", weights[replayed.same_weights]),
        ("recorded loss", repr(replayed.recorded)),
        ("recomputed loss", repr(replayed.recomputed)),
        ("difference", f"{replayed.recomputed - replayed.recorded:.3g}"),
        ("scale", f"{replayed.scale:.6g}, the sum of the tokens' |losses|, normalised alike"),
        ("relative to it", f"{replayed.difference:.3g}, allowed are {replayed.tolerance:g}"),
        ("took", f"{replayed.seconds:.1f} s"),
        ("verdict", verdict),
    ):
        view.add_row(name, value)
    return view


def _recorded(step: int, row: dict[str, Any], digests: dict[int, str]) -> RecordedStep:
    lacking = [name for name in ("learner/loss", "learner/loss_abs", "learner/ranks") if name not in row]
    if lacking or step not in digests:
        raise ValueError(
            f"step {step} has no {lacking[0] if lacking else 'batch digest'} in the run's records, so there is nothing "
            "to compare with; it was made by a version of Slipstream that did not record it, or the record is damaged"
        )
    return RecordedStep(
        step=step,
        loss=row["learner/loss"],
        scale=row["learner/loss_abs"],
        ranks=int(row["learner/ranks"]),
        batch_digest=digests[step],
    )


def _nearest_policy(directory: RunDirectory, newest: int) -> tuple[pathlib.Path | None, int, tuple[str, ...]]:
    """The newest whole checkpoint of step `newest` or before, and its step; None and 0 for the starting model."""
    passed_over: list[str] = []
    for folder in sorted(directory.checkpoints.glob("step_*"), reverse=True):
        try:
            manifest = checkpoints.read_manifest(folder)
            if manifest is None or manifest.step > newest:
                continue
            if manifest.run_id != directory.run_id:
                raise ValueError(f"checkpoint {folder} belongs to run {manifest.run_id}")
            checkpoints.verify(folder, manifest)
        except (ValueError, OSError) as error:  # damaged, or removed by the run's retention while we look
            passed_over.append(str(error))
            continue
        return folder, manifest.step, tuple(passed_over)
    return None, 0, tuple(passed_over)
