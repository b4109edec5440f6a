"""This file saves the policy while training goes on, and lets go of groups only when a checkpoint holds their step."""

from __future__ import annotations

import asyncio
import pathlib
from collections import deque
from collections.abc import Sequence

from rl import checkpoints
from rl.buffer import MissingGroups
from rl.checkpoints import Manifest
from rl.crew import Crew
from rl.parts import LearnersLost, Parts, Plan
from rl.sampling import Sampler
from rl.trajectory import GroupEntry
from rl.waits import within

SHARED_MEMORY = pathlib.Path("/dev/shm")
REMEMBERED_COMMITS = 256  # steps: far more than can be committed in the second that Redis may lose


def copies_folder(run_id: str) -> pathlib.Path:
    """Where the copies lie that outlive a rank but not the machine; the process guard removes them with the run."""
    return SHARED_MEMORY / f"slipstream-{run_id}-copies"


class Saver:
    """Begins a checkpoint, completes it behind the training loop, and commits the groups of the steps it holds."""

    def __init__(self, plan: Plan, parts: Parts, sampler: Sampler, crew: Crew) -> None:
        self.plan = plan
        self.parts = parts
        self._sampler = sampler
        self._crew = crew
        self._writing: asyncio.Task[None] | None = None
        self._uncommitted: list[tuple[int, tuple[GroupEntry, ...]]] = []
        self._committed: deque[tuple[GroupEntry, ...]] = deque(maxlen=REMEMBERED_COMMITS)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps made whose groups wait for a checkpoint."""
        return tuple(step for step, _ in self._uncommitted)

    def trained(self, step: int, entries: tuple[GroupEntry, ...]) -> None:
        """A step was made from these groups, which are archived."""
        self._uncommitted.append((step, entries))

    async def save(self, step: int) -> None:
        """Copy the policy of `step` aside; it is written, marked whole and committed while training goes on."""
        folder = checkpoints.folder_of(self.parts.recorder.directory.checkpoints, step)
        await self._begin(folder, step, export=True)
        self._writing = self._crew.spawn(self._complete(folder, self._manifest(step)), "writing a checkpoint")

    async def copy(self, step: int) -> None:
        """As `save`, but into shared memory and without committing: something to roll back to, and no more."""
        folder = checkpoints.folder_of(copies_folder(self.plan.run_id), step)
        await self._begin(folder, step, export=False)
        self._writing = self._crew.spawn(self._complete_copy(folder, self._manifest(step)), "writing a copy")

    async def settle(self) -> None:
        """Wait until what is being written is written, or given up because its learners are gone."""
        if self._writing is not None:
            await self._writing
            self._writing = None

    def roll_back(self, step: int) -> dict[int, tuple[str, ...]]:
        """Forget the steps beyond `step`, which will be made again; returns their groups, by step."""
        beyond = {number: entries for number, entries in self._uncommitted if number > step}
        self._uncommitted = [(number, entries) for number, entries in self._uncommitted if number <= step]
        return {number: tuple(entry.group_id for entry in entries) for number, entries in beyond.items()}

    async def reconcile(self) -> None:
        """Tell Redis again what it may have lost of its last second: which groups are trained, which are leased."""
        for entries in tuple(self._committed):
            await self.parts.buffer.commit(entries)
        for step, entries in tuple(self._uncommitted):
            await self.redeliver(step, [entry.group_id for entry in entries])

    async def redeliver(self, step: int, group_ids: Sequence[str]) -> tuple[GroupEntry, ...] | None:
        """Lease a step's very batch again, from the archive where Redis has it no more; None where nobody has it."""
        buffer, archive = self.parts.buffer, self.parts.archive
        try:
            return await buffer.lease_exactly(step, group_ids)
        except MissingGroups as missing:
            if not archive.holds(step):
                return None
            archived = {group.group_id: group for group in await asyncio.to_thread(archive.read, step)}
            if not archived.keys() >= set(missing.group_ids):
                return None
            for group_id in missing.group_ids:
                await buffer.restore(step, archived[group_id])
            self.parts.recorder.event("restored_from_archive", step=step, groups=len(missing.group_ids))
        return await buffer.lease_exactly(step, group_ids)

    def _manifest(self, step: int) -> Manifest:
        return Manifest(run_id=self.plan.run_id, step=step, version=step, state=self._sampler.state())

    async def _begin(self, folder: pathlib.Path, step: int, export: bool) -> None:
        await self.settle()
        await asyncio.to_thread(checkpoints.begin, folder)
        work = self.parts.learners.begin_save(str(folder), export)
        deadline_s = self.plan.deadlines.step_deadline_s
        await within(work, deadline_s, f"the state of step {step} to be copied aside", "the learner ranks")

    async def _written(self, folder: pathlib.Path, manifest: Manifest) -> bool:
        """Whether the folder is a whole checkpoint now; not if its learners died, which the training loop hears too."""
        deadline_s = self.plan.deadlines.step_deadline_s
        try:
            work = self.parts.learners.finish_save()
            await within(work, deadline_s, f"the checkpoint of step {manifest.step}", "the learner ranks")
        except LearnersLost:
            await asyncio.to_thread(checkpoints.discard, folder)
            return False
        digesting = asyncio.to_thread(checkpoints.complete, folder, manifest)
        await within(digesting, deadline_s, f"the digests of the checkpoint of step {manifest.step}", "the disk")
        return True

    async def _complete(self, folder: pathlib.Path, manifest: Manifest) -> None:
        if not await self._written(folder, manifest):
            return
        await self._commit(manifest.step)
        await asyncio.to_thread(checkpoints.retire, folder.parent, self.plan.checkpoint.keep)
        self.parts.recorder.event("checkpoint", step=manifest.step)

    async def _commit(self, step: int) -> None:
        """Let Redis forget the groups of saved steps; a crash before the end leaves the rest to the next resume."""
        saved = [entries for number, entries in self._uncommitted if number <= step]
        for entries in saved:
            await self.parts.buffer.commit(entries)
            self._committed.append(entries)
            self._sampler.committed(entries)
        self._uncommitted = [(number, entries) for number, entries in self._uncommitted if number > step]

    async def _complete_copy(self, folder: pathlib.Path, manifest: Manifest) -> None:
        if await self._written(folder, manifest):
            await asyncio.to_thread(checkpoints.retire, folder.parent, 1)
