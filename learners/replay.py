"""This file computes a step again, alone: the policy from a checkpoint, the batch from the archive, the same loss.

One rank does what all ranks of the run did: it computes the micro-batches that each of them had, as they were cut then,
because a bf16 product rounds differently beside other rows. Only the sums of gradients over ranks may then differ.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import torch

from learners import batcher
from learners.learner import Learner, LearnerSettings
from learners.weight_sender import digest_tensors
from rl.archive import Archive
from rl.codec import entry_of
from rl.orders import StepOrder, StepReport
from rl.recorder import RunDirectory
from rl.replay import RecordedStep, Replayed, ReplayPlan
from rl.trajectory import Group, GroupEntry
from rl.weights import combined

Note = Callable[[str], None]


class Replayer(Learner):
    """A single rank that trains on archived batches, each laid out for as many ranks as there were."""

    def __init__(self, settings: LearnerSettings, archive: Archive, dtype: torch.dtype | None = None) -> None:
        super().__init__(settings, 0, 1, self._archived, dtype)
        self._archive = archive
        self._groups: dict[str, Group] = {}
        self._ranks = 1

    def make_again(self, recorded: RecordedStep) -> StepReport:
        """Train an archived step, from the policy that stands.

        Raises:
            ValueError: the archive is unreadable, or holds another batch than the step was made of.
        """
        groups = self._archive.read(recorded.step)
        self._groups, self._ranks = {group.group_id: group for group in groups}, recorded.ranks
        entries = tuple(entry_of(group, 0) for group in groups)
        report = self.step(StepOrder(step=recorded.step, version=recorded.step - 1, entries=entries, first=False))
        if report.batch_digest != recorded.batch_digest:
            raise ValueError(
                f"{self._archive.path_of(recorded.step)} holds a batch of digest {report.batch_digest}, but the run "
                f"trained step {recorded.step} on {recorded.batch_digest}; put the file of this run back"
            )
        return report

    def plan(self, entries: Sequence[GroupEntry]) -> batcher.BatchPlan:
        """The plan of all ranks, for this one: each one's first micro-batch, then each one's second, and so on."""
        shared = self._plan_for(entries, self._ranks)
        turns = zip(*shared.micro_batches, strict=True)
        mine = tuple(rows for turn in turns for rows in turn if rows)
        return replace(shared, micro_batches=(mine,), rank_tokens=(shared.computed_tokens,))

    def weight_digest(self) -> str:
        """The digest that the weights would be published with."""
        return combined(digest_tensors(self._whole_weights()))

    def _archived(self, group_ids: Sequence[str]) -> list[Group]:
        return [self._groups[group_id] for group_id in group_ids]


def replay(
    plan: ReplayPlan,
    directory: RunDirectory,
    settings: LearnerSettings,
    tolerance: float,
    note: Note = lambda text: None,
    dtype: torch.dtype | None = None,
) -> Replayed:
    """Recompute the loss of the plan's last step; settings are the run's, dtype is for tests, note hears of progress.

    Raises:
        ValueError: a checkpoint or an archived step on the way does not hold what it should.
    """
    began = time.monotonic()
    *before, last = plan.steps
    drift = 0.0
    with tempfile.TemporaryDirectory() as folder:
        alone = msgspec.structs.replace(
            settings,
            run_id=f"{settings.run_id}-replay-{os.getpid()}",  # shared memory of that name is the run's own
            rendezvous=f"file://{folder}/rendezvous",
            node="",
        )
        replayer = Replayer(alone, Archive(directory), dtype)
        try:
            if plan.checkpoint is not None:
                replayer.load(str(plan.checkpoint / "state"))
            for recorded in before:
                loss = replayer.make_again(recorded).metrics["learner/loss"].value
                drift = max(drift, abs(loss - recorded.loss) / (recorded.scale or 1.0))
                note(f"step {recorded.step} trained again")
            same_weights = plan.weights and replayer.weight_digest() == plan.weights
            report = replayer.make_again(last)
        finally:
            replayer.close()
    return Replayed(
        step=last.step,
        groups=len(replayer._groups),
        recorded=last.loss,
        recomputed=report.metrics["learner/loss"].value,
        scale=last.scale,
        tolerance=tolerance,
        started_from=plan.checkpoint.name if plan.checkpoint else "the starting model",
        retrained=len(before),
        drift=drift,
        same_weights=same_weights if plan.weights else None,
        seconds=time.monotonic() - began,
    )
