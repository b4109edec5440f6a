"""This file is the run: four loops that never wait for each other beyond the lag bound.

     prompts -> curriculum -> gate -> generators -> rewards -> [ Redis trajectory buffer ]
                    ^           ^        (_sample)                         |
                    |           |                                          |  lease
                    |  reports  |  version v, verified                     v
                    +-----------+---- (_broadcast) <--- weights --- learners (_train)

    _sample     draws prompts as the gate permits, and turns finished groups into evidence
    _train      leases a batch, writes the ledger, steps the learners, checkpoints
    _broadcast  delivers the newest weights to every generator and believes only what it verified
    _evaluate   scores held-out prompts at one pinned version, while training goes on

With max_lag 0 the same loops are the synchronous algorithm: `_sample` works in rounds that start together and end
together, so that two runs of one seed train on the same batches, bit for bit.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Literal

from rl import run_state
from rl.accounting import check_balance
from rl.buffer import BufferStats
from rl.crew import Crew
from rl.evaluation import Evaluation, summarise
from rl.metrics import last
from rl.orders import Draw, StepOrder, StepReport
from rl.parts import Parts, Plan
from rl.trajectory import GroupEntry, GroupReport
from rl.waits import within
from rl.weights import WeightUpdate, verify

WATCH_EVERY_S = 2.0
Ended = Literal["finished", "stopped"]


class Run:
    """One run from its first draw to its end, which is an explicit event: all steps done, a stop, or a failure."""

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self.plan = plan
        self.parts = parts
        self.step = plan.start_step  # the learners' policy version equals the number of steps made
        self.sampling_version = plan.start_step
        self.stop_requested = asyncio.Event()
        self._crew = Crew()
        self._admitted = 0
        self._engines = asyncio.Lock()  # held while weights change, or must not
        self._changed = asyncio.Event()  # a group came back, a version arrived, payloads left the buffer
        self._delivery = asyncio.Event()
        self._published = asyncio.Event()
        self._offered: WeightUpdate | None = None
        self._delivered: WeightUpdate | None = None
        self._new_weights = asyncio.Event()
        self._evaluation_due = asyncio.Event()
        self._last_evaluation: Evaluation | None = None
        self._uncommitted: list[tuple[int, tuple[str, ...]]] = []
        self._ledger = {step: groups for step, groups in parts.recorder.read_ledger().items() if step > plan.start_step}

    async def main(self) -> Ended:
        """Train until the end; returns "finished" or "stopped". Whatever fails first is raised."""
        self._crew.spawn(self._broadcast(), "the broadcast loop")
        self._crew.spawn(self._evaluate(), "the evaluation loop")
        self._crew.spawn(self._watch(), "the watch over the generators")
        return await self._crew.run(self._train(), "the training loop")

    # Sampling

    async def _sample(self) -> None:
        """Draw as long as there is room within the lag bound and in the buffer."""
        while True:
            await within(self._room_to_draw(), self.plan.deadlines.batch_deadline_s, "room to draw", "the learners")
            if self.plan.max_lag == 0:
                await self._sample_round()
            else:
                self._crew.spawn(self._sample_group(await self._draw()), "sampling")

    async def _room_to_draw(self) -> None:
        while True:
            self._changed.clear()  # before the look, which awaits: a change during it must not be missed
            if self._room() > 0 and await self.parts.buffer.has_room():
                return
            await self._changed.wait()

    def _room(self) -> int:
        """Groups that may be drawn now; none beyond what the remaining steps can train on."""
        gate, plan = self.parts.gate, self.plan
        if plan.max_lag == 0 and (self._engines.locked() or not gate.round_open(self.sampling_version)):
            return 0
        still_needed = plan.run.steps * plan.groups_per_step - gate.accepted - gate.running
        return min(gate.room(self.sampling_version), still_needed)

    async def _draw(self) -> Draw:
        choice = self.parts.curriculum.draw(self.sampling_version)
        prompt = self.parts.prompts.next(choice.source, choice.level)
        self.parts.gate.admit()
        self._admitted += 1
        number = await self.parts.buffer.admit()
        key = f"{self.plan.run.seed}/{number}"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") >> 1
        return Draw(group_id=f"{self.plan.run_id}/{number:08d}", draw=number, prompt=prompt, seed=seed)

    async def _sample_group(self, draw: Draw) -> None:
        what = f"group {draw.group_id} (prompt {draw.prompt.prompt_id})"
        rollout = self.parts.generators.rollout(draw)
        await self._absorb(await within(rollout, self.plan.deadlines.group_deadline_s, what, "its generator"))

    async def _sample_round(self) -> None:
        """Sample everything there is room for, together, with the engines to itself."""
        async with self._engines:
            draws = [await self._draw() for _ in range(self._round_size())]
            work = self.parts.generators.rollout_round(draws)
            what = f"a round of {len(draws)} groups"
            reports = await within(work, self.plan.deadlines.group_deadline_s, what, "the generators")
        for report in sorted(reports, key=lambda report: report.draw):
            await self._absorb(report)

    def _round_size(self) -> int:
        gate = self.parts.gate
        still_needed = self.plan.run.steps * self.plan.groups_per_step - gate.accepted
        return min(gate.room(self.sampling_version), still_needed)

    async def _absorb(self, report: GroupReport) -> None:
        """Turn a finished group into evidence; a dropped one gives its capacity back."""
        parts = self.parts
        if report.dropped is None:
            parts.gate.publish()
        else:
            await parts.buffer.drop(report.group_id, report.num_tokens, report.dropped)
            parts.gate.drop_running()
        scores = [reward for reward in report.rewards if reward is not None]
        pass_rate = sum(scores) / len(scores) if scores else None
        informative = len(set(scores)) > 1
        parts.curriculum.observe(report.source, report.level, pass_rate, informative, report.oldest_version)
        parts.account.add(report)
        parts.rewards.observe(report)
        parts.curriculum.check_signal(self.plan.groups_per_step)
        self._published.set()
        self._changed.set()

    # Training

    async def _train(self) -> Ended:
        await self._offer_weights()
        await within(self._until_delivered(self.step), self.plan.deadlines.update_deadline_s, "the first weights")
        if self.step == 0:
            self._evaluation_due.set()
        self._crew.spawn(self._sample(), "the sampling loop")
        while self.step < self.plan.run.steps:
            entries = await self._batch_or_stop()
            if entries is None:
                break
            await self._train_on(entries)
        outcome: Ended = "finished" if self.step == self.plan.run.steps else "stopped"
        await self._conclude(outcome)
        return outcome

    async def _train_on(self, entries: tuple[GroupEntry, ...]) -> None:
        parts, plan, step = self.parts, self.plan, self.step + 1
        group_ids = tuple(entry.group_id for entry in entries)
        parts.recorder.ledger(step, self.step, group_ids)
        order = StepOrder(step=step, version=self.step, entries=entries, first=self.step == plan.start_step)
        report = await within(
            parts.learners.step(order), plan.deadlines.step_deadline_s, f"step {step}", "the learner ranks"
        )
        assert report.version == step, f"step {step} left the learners at version {report.version}"
        self.step = step
        self._uncommitted.append((step, group_ids))
        await self._offer_weights()
        await self._record(report, entries)
        if step % plan.evaluation.every_steps == 0 and step < plan.run.steps:
            self._evaluation_due.set()
        if step % plan.checkpoint.every_steps == 0 or not await parts.buffer.has_room():
            await self._checkpoint()

    async def _record(self, report: StepReport, entries: tuple[GroupEntry, ...]) -> None:
        parts = self.parts
        counts = await self._balanced_counts()
        sampling = parts.curriculum.metrics() | parts.prompts.metrics() | parts.generators.metrics()
        if self._last_evaluation is not None:
            sampling |= self._last_evaluation.metrics()
        sampling["weights/version_behind"] = last(self.step - self.sampling_version)
        metrics = parts.account.close(report, counts, sampling)
        parts.recorder.step(report.step, metrics)
        parts.recorder.event("step", step=report.step, batch=report.batch_digest, groups=len(entries))
        shown = [entry.group_id for entry in entries[: self.plan.deadlines.rollouts_per_step]]
        parts.recorder.rollouts(report.step, await parts.buffer.fetch(shown))
        self._keep_sampling_state()
        parts.progress.step(report.step, metrics, self._last_evaluation)

    async def _balanced_counts(self) -> BufferStats:
        """Where everything is; raises where something is nowhere. What was admitted while asking may be in flight."""
        running, admitted = self.parts.gate.running, self._admitted
        counts = await self.parts.buffer.stats()
        check_balance(counts, running + self._admitted - admitted)
        return counts

    def _keep_sampling_state(self) -> None:
        state = {"prompts": self.parts.prompts.state_dict(), "curriculum": self.parts.curriculum.state_dict()}
        run_state.save_sampling_state(self.parts.recorder.directory.path, state)

    async def _batch_or_stop(self) -> tuple[GroupEntry, ...] | None:
        """The next batch, or None once a stop was asked for."""
        if self.stop_requested.is_set():
            return None
        batch = self._crew.spawn(self._next_batch(), "waiting for a batch")
        stop = asyncio.ensure_future(self.stop_requested.wait())
        try:
            await asyncio.wait({batch, stop}, return_when=asyncio.FIRST_COMPLETED)
            return batch.result() if batch.done() else None
        finally:
            stop.cancel()
            if not batch.done():
                batch.cancel()

    async def _next_batch(self) -> tuple[GroupEntry, ...]:
        replay = self._ledger.pop(self.step + 1, None)
        if replay is not None:
            return await self.parts.buffer.lease_again(replay)
        seconds, what = self.plan.deadlines.batch_deadline_s, f"{self.plan.groups_per_step} fresh groups in the buffer"
        return await within(self._lease(), seconds, what, "the generators")

    async def _lease(self) -> tuple[GroupEntry, ...]:
        plan, parts = self.plan, self.parts
        while True:
            self._published.clear()
            lease = await parts.buffer.lease(plan.groups_per_step, self.step, plan.max_lag, ordered=plan.max_lag == 0)
            for _ in lease.dropped:
                parts.gate.drop_accepted()
            if lease.dropped:
                self._changed.set()
            if lease.entries:
                return lease.entries
            await self._published.wait()

    # Weights

    async def _offer_weights(self) -> None:
        """Have the learners write their current version down, for the broadcast loop to deliver."""
        publish = self.parts.learners.publish(self.step)
        what = f"the weights of version {self.step}"
        self._offered = await within(publish, self.plan.deadlines.update_deadline_s, what, "learner rank 0")
        self._new_weights.set()
        if self._offered.path is None:  # nccl: the senders take part in the transfer, so the next step waits for it
            await within(
                self._until_delivered(self.step), self.plan.deadlines.update_deadline_s, what, "the generators"
            )

    async def _broadcast(self) -> None:
        """Deliver the newest offered weights; a version that was overtaken while waiting is skipped."""
        while True:
            await self._new_weights.wait()
            async with self._engines:
                self._new_weights.clear()
                update = self._offered
                assert update is not None
                seconds = self.plan.deadlines.update_deadline_s
                what = f"policy version {update.version} to load"
                receipts = await within(self.parts.generators.update(update), seconds, what, "the generators")
                gaps = [verify(update, receipt, self._delivered, self.plan.max_canary_gap) for receipt in receipts]
                self._delivered = update
                self.sampling_version = update.version
                self._delivery.set()
            self.parts.recorder.event(
                "weights_verified",
                version=update.version,
                digest=update.digest,
                bytes=update.num_bytes,
                canary_gap_nats=max(gaps),
                seconds=[receipt.seconds for receipt in receipts],
            )
            self._changed.set()

    async def _until_delivered(self, version: int) -> None:
        while self._delivered is None or self._delivered.version < version:
            self._delivery.clear()
            await self._delivery.wait()

    # Evaluation, health, checkpoints, end

    async def _evaluate(self) -> None:
        while True:
            await self._evaluation_due.wait()
            self._evaluation_due.clear()
            await self._evaluate_now()

    async def _evaluate_now(self) -> Evaluation:
        """Score the held-out prompts at whatever version the generators hold; no weights move meanwhile."""
        plan, parts = self.plan.evaluation, self.parts
        prompts = [
            prompt
            for source, levels in parts.prompts.levels.items()
            for level in levels
            for prompt in parts.prompts.held_out(source, level, plan.prompts_per_level)
        ]
        async with self._engines:
            version = self.sampling_version
            work = parts.generators.evaluate(prompts, plan.temperature, self.plan.run.seed)
            what = f"{len(prompts)} held-out answers"
            graded = await within(work, self.plan.deadlines.group_deadline_s, what, "the generators")
        evaluation = summarise(self.step, version, graded)
        self._last_evaluation = evaluation
        parts.recorder.evaluation(evaluation)
        parts.progress.evaluation(evaluation)
        self._changed.set()
        return evaluation

    async def _watch(self) -> None:
        """Notice the death of an engine that nobody is waiting for."""
        while True:
            await within(self.parts.generators.check(), 30.0, "a sign of life", "the generators")
            await asyncio.sleep(WATCH_EVERY_S)

    async def _checkpoint(self) -> None:
        """Save, mark whole, and only then archive and let go of the groups of the saved steps."""
        parts, plan = self.parts, self.plan
        checkpoints = parts.recorder.directory.checkpoints
        folder = run_state.folder_of(checkpoints, self.step)
        save = parts.learners.save(str(folder))
        await within(save, plan.deadlines.step_deadline_s, f"the checkpoint of step {self.step}", "the learner ranks")
        run_state.complete(folder, run_state.Manifest(plan.run_id, self.step, self.step))
        for step, group_ids in self._uncommitted:
            parts.recorder.archive(step, await parts.buffer.fetch(group_ids))
            await parts.buffer.commit(group_ids)
        self._uncommitted.clear()
        run_state.retire(checkpoints, plan.checkpoint.keep)
        parts.recorder.event("checkpoint", step=self.step)
        self._changed.set()

    async def _conclude(self, outcome: Ended) -> None:
        """Checkpoint; a finished run also evaluates its last version and accounts for what nobody will train on."""
        parts, plan = self.parts, self.plan
        if self._uncommitted:
            await self._checkpoint()
        if outcome == "stopped":
            self._keep_sampling_state()
            return
        delivered = self._until_delivered(self.step)
        await within(delivered, plan.deadlines.update_deadline_s, "the last weights", "the generators")
        self._evaluation_due.clear()
        await self._evaluate_now()
        await parts.buffer.drop_buffered("surplus")
        await self._balanced_counts()
