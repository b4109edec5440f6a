"""This file draws prompts as the gate permits, has them sampled, and keeps the books of every group that is not saved.

A draw is written to Redis before it is sampled and stays there until its group is published or dropped. Whoever takes
the run up after a crash samples the very same draws again: no prompt is skipped and none is paid for twice in the
policy. The books say of every group, until a checkpoint holds it, where it is: running, waiting in the buffer, or
leased for a step. Redis may lose its last second; `reconcile` compares the two and mends what it lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from rl.buffer import BufferStats
from rl.crew import Crew
from rl.lengths import LengthBeliefs
from rl.orders import Draw
from rl.parts import Parts, Plan
from rl.shared import Shared
from rl.trajectory import DropReason, Group, GroupEntry, GroupReport
from rl.waits import within

REMEMBERED_DROPS = 4096  # far more than can end in the second that Redis may lose


class Sampler:
    """The sampling loop, and the driver's knowledge of every group that is not saved yet."""

    def __init__(self, plan: Plan, parts: Parts, shared: Shared, crew: Crew) -> None:
        self.plan = plan
        self.parts = parts
        self.next_draw = 0
        self._shared = shared
        self._crew = crew
        self._draws: dict[str, Draw] = {}  # of every group that is running, waiting or leased
        self._running: dict[str, int] = {}  # and the version that it was admitted under
        self._cut_before = 0
        self._waiting: set[str] = set()
        self._seen: set[str] = set()  # published, not saved yet, and evidence for the curriculum already
        self._ahead: set[str] = set()  # leased or dropped before their report came: a generator died after publishing
        self._unfinished: list[Draw] = []  # drawn by an earlier process, or lost with it: sampled before new ones
        self._drops: deque[tuple[int, str, int, DropReason]] = deque(maxlen=REMEMBERED_DROPS)
        self._lengths = LengthBeliefs()
        self._keeping = asyncio.Lock()

    async def loop(self) -> None:
        """Draw as long as there is room within the lag bound and in the buffer."""
        while True:
            await within(self._room_to_draw(), self.plan.deadlines.batch_deadline_s, "room to draw", "the learners")
            if self.plan.max_lag == 0:
                await self._sample_round()
            else:
                self._crew.spawn(self._sample_group(await self._next()), "sampling")

    async def _room_to_draw(self) -> None:
        while True:
            self._shared.changed.clear()  # before the look, which awaits: a change during it must not be missed
            self._cut_long_tails()
            if self._room() > 0 and await self.parts.buffer.has_room():
                return
            await self._shared.changed.wait()

    def _cut_long_tails(self) -> None:
        """With rollout.long_tail drop, give up what runs and would be stale by now if it were done.

        No token of a group is older than the version that it was admitted under, so that version decides; a generator
        that began it later, after the death of another, keeps it. Each comes back as a report like any, dropped as
        stale. The tokens sampled by then are counted, those of one that the engine had not come to are none.
        """
        oldest = self._shared.step - self.plan.max_lag
        if self.plan.long_tail == "continue" or self.plan.max_lag == 0 or oldest <= self._cut_before:
            return
        if any(version < oldest for version in self._running.values()):
            self._cut_before = oldest
            self._crew.spawn(self._cut(oldest), "cutting long tails")

    async def _cut(self, oldest: int) -> None:
        cutting = self.parts.generators.cut_tails(oldest)
        what = f"groups from before version {oldest} to be aborted"
        await within(cutting, self.plan.deadlines.update_deadline_s, what, "the generators")

    def _room(self) -> int:
        """Groups that may be sampled now; none beyond what the remaining steps can train on."""
        gate, plan = self.parts.gate, self.plan
        version = self._shared.sampling_version
        if plan.max_lag == 0 and (self._shared.engines.locked() or not self._round_open(version)):
            return 0
        if self._unfinished:
            return len(self._unfinished)  # they were permitted when they were drawn
        still_needed = plan.run.steps * plan.groups_per_step - gate.accepted - gate.running
        return min(gate.room(version), still_needed)

    def _round_open(self, version: int) -> bool:
        """A round starts when nothing runs; draws that wait to be sampled again are counted as running already."""
        idle = self.parts.gate.running == len(self._unfinished)
        return idle and (bool(self._unfinished) or self.parts.gate.round_open(version))

    async def _next(self) -> Draw:
        """A draw to sample: one that was lost with a process, or a new one, written down before it is sampled."""
        if self._unfinished:
            draw = self._unfinished.pop(0)
        else:
            draw = self._draw()
            self.parts.gate.admit()
        self._draws[draw.group_id] = draw
        self._running[draw.group_id] = self._shared.sampling_version
        async with self._keeping:
            await self.parts.buffer.admit(draw, self._encoded_state())
        return draw

    def _draw(self) -> Draw:
        choice = self.parts.curriculum.draw(self._shared.sampling_version)
        prompt = self.parts.prompts.next(choice.source, choice.level, choice.key)
        number, self.next_draw = self.next_draw, self.next_draw + 1
        key = f"{self.plan.run.seed}/{number}"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") >> 1
        group_id = f"{self.plan.run_id}/{number:08d}"
        self.parts.recorder.draw(number, group_id, prompt.prompt_id, choice)
        expected_tokens = self.parts.curriculum.group_size * self._lengths.mean(prompt.source, prompt.level)
        return Draw(group_id=group_id, draw=number, prompt=prompt, seed=seed, expected_tokens=expected_tokens)

    async def _sample_group(self, draw: Draw) -> None:
        what = f"group {draw.group_id} (prompt {draw.prompt.prompt_id})"
        rollout = self.parts.generators.rollout(draw)
        await self._absorb(await within(rollout, self.plan.deadlines.group_deadline_s, what, "its generator"))

    async def _sample_round(self) -> None:
        """Sample everything there is room for, together, with the engines to itself."""
        async with self._shared.engines:
            draws = [await self._next() for _ in range(self._round_size())]
            work = self.parts.generators.rollout_round(draws)
            what = f"a round of {len(draws)} groups"
            reports = await within(work, self.plan.deadlines.group_deadline_s, what, "the generators")
        for report in sorted(reports, key=lambda report: report.draw):
            await self._absorb(report)

    def _round_size(self) -> int:
        """The size of a round that is taken up again counts what was drawn for it before."""
        gate, plan = self.parts.gate, self.plan
        again = len(self._unfinished)
        still_needed = plan.run.steps * plan.groups_per_step - gate.accepted - gate.running
        return again + max(0, min(gate.room(self._shared.sampling_version), still_needed))

    async def _absorb(self, report: GroupReport) -> None:
        """Turn a finished group into evidence; a dropped one gives its capacity back."""
        parts = self.parts
        if report.group_id in self._ahead:
            self._ahead.remove(report.group_id)  # the books have it already, with what the first sampling published
        else:
            await self._book(report)
        self._observe(report.source, report.level, report.scores, report.oldest_version, report.prompt_id)
        cut = report.dropped in ("stale", "aborted")
        self._lengths.observe(report.source, report.level, report.completion_tokens, cut)
        parts.account.add(report)
        parts.rewards.observe(report)
        parts.curriculum.check_signal(self.plan.groups_per_step)
        async with self._keeping:
            await parts.buffer.keep_state(self._encoded_state())
        self._shared.published.set()
        self._shared.changed.set()

    async def _book(self, report: GroupReport) -> None:
        gate, group_id, reason = self.parts.gate, report.group_id, report.dropped
        dropped = reason is not None and await self._drop(report.draw, group_id, report.num_tokens, reason)
        self._running.pop(group_id, None)
        if dropped:
            gate.drop_running()
            self._draws.pop(group_id, None)
            self._tell_drop(group_id, report.prompt_id, reason, report.num_tokens)
        else:  # also where a generator that died had published it: what is in the buffer counts
            gate.publish()
            self._waiting.add(group_id)
            self._seen.add(group_id)

    async def _drop(self, draw: int, group_id: str, tokens: int, reason: DropReason) -> bool:
        dropped = await self.parts.buffer.drop(draw, group_id, tokens, reason)
        if dropped:
            self._drops.append((draw, group_id, tokens, reason))
        return dropped

    def _tell_drop(self, group_id: str, prompt_id: str, reason: DropReason | None, tokens: int) -> None:
        self.parts.recorder.event("dropped", group=group_id, prompt=prompt_id, reason=reason, tokens=tokens)

    def _observe(self, source: str, level: str, scores: Sequence[float | None], version: int, prompt_id: str) -> None:
        judged = [score for score in scores if score is not None]
        pass_rate = sum(judged) / len(judged) if judged else None
        key = prompt_id.removeprefix(f"{source}/{level}/")
        self.parts.curriculum.observe(source, level, pass_rate, len(set(judged)) > 1, version, len(judged), key)

    # What leaves the books

    def leased(self, entries: Iterable[GroupEntry]) -> None:
        """These groups are a step's from now on."""
        for group_id in (entry.group_id for entry in entries):
            self._waiting.discard(group_id)
            if group_id in self._running:
                del self._running[group_id]
                self._ahead.add(group_id)
                self.parts.gate.publish()

    def dropped_as_stale(self, entries: Iterable[GroupEntry]) -> None:
        """These groups left the buffer untrained; their capacity comes back once, even if Redis says it twice."""
        for entry in entries:
            if entry.group_id in self._waiting:
                self._waiting.remove(entry.group_id)
                self.parts.gate.drop_accepted()
            elif entry.group_id in self._running:
                del self._running[entry.group_id]
                self._ahead.add(entry.group_id)
                self.parts.gate.drop_running()
            else:
                continue
            self._forget(entry.group_id)
            self._drops.append((entry.draw, entry.group_id, entry.num_tokens, "stale"))
            self._tell_drop(entry.group_id, entry.prompt_id, "stale", entry.num_tokens)
        self._shared.changed.set()

    def committed(self, entries: Iterable[GroupEntry]) -> None:
        """These groups are part of a saved policy."""
        for entry in entries:
            self._forget(entry.group_id)
        self._shared.changed.set()

    def _forget(self, group_id: str) -> None:
        self._draws.pop(group_id, None)
        self._seen.discard(group_id)

    # Stops, crashes, and what Redis lost

    def state(self) -> dict[str, Any]:
        """Everything that decides the following draws, and which published groups were evidence already; JSON-able."""
        return {
            "next_draw": self.next_draw,
            "prompts": self.parts.prompts.state_dict(),
            "curriculum": self.parts.curriculum.state_dict(),
            "lengths": self._lengths.state_dict(),
            "seen": sorted(self._seen),
        }

    def _encoded_state(self) -> bytes:
        return json.dumps(self.state()).encode()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.next_draw = state["next_draw"]
        self.parts.prompts.load_state_dict(state["prompts"])
        self.parts.curriculum.load_state_dict(state["curriculum"])
        if "lengths" in state:  # what earlier versions saved has none
            self._lengths.load_state_dict(state["lengths"])
        self._seen = set(state["seen"])

    def unseen(self, group_ids: Iterable[str]) -> list[str]:
        """Those that were published just before the process ended which would have learnt from them."""
        return [group_id for group_id in group_ids if group_id not in self._seen]

    def see(self, group: Group) -> None:
        """Learn from a published group that no process has learnt from."""
        self._seen.add(group.group_id)
        prompt = group.prompt
        self._observe(prompt.source, prompt.level, group.scores, group.oldest_version, prompt.prompt_id)
        lengths = [len(trajectory.completion.token_ids) for trajectory in group.trajectories]
        self._lengths.observe(prompt.source, prompt.level, lengths)

    def take_up(self, waiting: Iterable[str], unfinished: Sequence[Draw]) -> None:
        """Go on with the groups that an earlier process left waiting, and the draws that it left unfinished."""
        self._waiting.update(waiting)
        self._unfinished += unfinished
        for draw in unfinished:
            self.next_draw = max(self.next_draw, draw.draw + 1)
            self.parts.gate.admit()

    async def reconcile(self) -> int:
        """Mend what Redis lost of its last second; returns how many groups are sampled again.

        What is running is admitted again, what was dropped is dropped again, and a published group that is neither
        waiting nor leased is sampled again, from its own draw. Leases and commits are the business of the caller.
        """
        buffer = self.parts.buffer
        for group_id in sorted(self._running):
            if draw := self._draws.get(group_id):
                await buffer.admit(draw, None)
        for drop in tuple(self._drops):
            await buffer.drop(*drop)
        before = set(self._waiting)  # what is published from here on may be younger than the look at Redis
        holdings = await buffer.holdings()
        held = {entry.group_id for entry in holdings.waiting} | holdings.leased.keys()
        lost = sorted((before - held) & self._waiting)
        await self.sample_again(lost)
        return len(lost)

    def released(self, group_ids: Iterable[str]) -> None:
        """These groups are no step's any more and wait again."""
        self._waiting.update(group_ids)

    async def sample_again(self, group_ids: Iterable[str]) -> None:
        """Sample accepted groups anew that nobody has any more, under their own ids, prompts and seeds.

        A group whose draw an earlier process made is counted as aborted: it was on disk for longer than Redis may
        lose, so what took it was no restart of ours.
        """
        for group_id in group_ids:
            draw = self._draws.get(group_id)
            if draw is None:
                await self._drop(int(group_id.rpartition("/")[2]), group_id, 0, "aborted")
                self._forget(group_id)
                if group_id in self._waiting:
                    self._waiting.remove(group_id)
                    self.parts.gate.drop_accepted()
                continue
            self._waiting.discard(group_id)
            self.parts.gate.lose_accepted()
            self._unfinished.append(draw)
            await self.parts.buffer.admit(draw, None)
        self._unfinished.sort(key=lambda draw: draw.draw)
        self._shared.changed.set()

    async def counts(self) -> tuple[BufferStats, int]:
        """Where everything is, and how many groups may be in flight; what was admitted while asking counts as well."""
        running, drawn = self.parts.gate.running, self.next_draw
        stats = await self.parts.buffer.stats()
        return stats, running + self.next_draw - drawn
