"""This file is the run: four loops that never wait for each other beyond the lag bound.

     prompts -> curriculum -> gate -> generators -> rewards -> [ Redis trajectory buffer ]
                    ^           ^      (sampling.py)                       |
                    |           |                                          |  lease
                    |  reports  |  version v, verified                     v
                    +-----------+--- (delivery.py) <--- weights --- learners (_train)

    sampling    draws prompts as the gate permits, and turns finished groups into evidence
    _train      leases a batch, writes the ledger, steps the learners, has the policy saved (saving.py)
    delivery    delivers the newest weights to every generator and believes only what it verified
    _evaluate   scores held-out prompts at one pinned version, while training goes on

With max_lag 0 the same loops are the synchronous algorithm: sampling works in rounds that start together and end
together, so that two runs of one seed train on the same batches, bit for bit.

Whoever dies, the run goes on: generators are replaced behind their calls, learners roll back to the newest saved state
and get the very batches of the lost steps again, and what Redis lost of its last second is sampled again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

from rl import checkpoints
from rl.accounting import check_balance, imbalance
from rl.buffer import BufferRewound, BufferStats, MissingGroups
from rl.crew import Crew, together
from rl.delivery import Delivery
from rl.evaluation import Evaluation, summarise
from rl.guardrails import GateGuard, check_names
from rl.metrics import Metrics, last
from rl.orders import StepOrder, StepReport
from rl.parts import GeneratorsLost, LearnersLost, Parts, Plan
from rl.sampling import Sampler
from rl.saving import Saver, copies_folder
from rl.shared import Shared
from rl.trajectory import Group, GroupEntry
from rl.waits import WaitExpired, within

WATCH_EVERY_S = 2.0
Ended = Literal["finished", "stopped"]


class Run:
    """One run from its first draw to its end, which is an explicit event: all steps done, a stop, or a failure."""

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self.plan = plan
        self.parts = parts
        self.stop_requested = asyncio.Event()
        self._crew = Crew()
        self.shared = Shared(plan.start_step)
        self.sampler = Sampler(plan, parts, self.shared, self._crew)
        self.delivery = Delivery(plan, parts, self.shared)
        self.saver = Saver(plan, parts, self.sampler, self._crew)
        self._guard = GateGuard(plan.guardrails, parts.gate)
        self._sampling = False
        self._names_checked = False
        self._evaluation_due = asyncio.Event()
        self._last_evaluation: Evaluation | None = None
        self._ledger = {step: groups for step, groups in parts.recorder.read_ledger().items() if step > plan.start_step}
        self._loaded_step = plan.start_step  # what the learner ranks were last loaded with
        self._furthest_step = plan.start_step
        self._restarts = 0
        self._restarts_in_a_row = 0
        self._reconciling = asyncio.Lock()

    @property
    def step(self) -> int:
        """Optimizer steps made, which is the learners' policy version."""
        return self.shared.step

    async def main(self) -> Ended:
        """Train until the end; returns "finished" or "stopped". Whatever fails first is raised."""
        self._crew.spawn(self.delivery.loop(), "the broadcast loop")
        self._crew.spawn(self._evaluate(), "the evaluation loop")
        self._crew.spawn(self._watch(), "the watch over the parts")
        return await self._crew.run(self._train(), "the training loop", self._before_the_end)

    def accompany(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Have a task live and die with the run; its failure is the run's."""
        self._crew.spawn(work, name)

    # Training

    async def _train(self) -> Ended:
        while True:
            try:
                return await self._train_to_the_end()
            except (LearnersLost, MissingGroups) as error:
                await self._recover(error)

    async def _train_to_the_end(self) -> Ended:
        await self.delivery.offer(self.step)
        what, deadline_s = "the first weights", self.plan.deadlines.update_deadline_s
        await within(self.delivery.until_delivered(self.step), deadline_s, what, "the generators")
        if not self._sampling:
            self._sampling = True
            if self.step == 0:
                self._evaluation_due.set()
            self._crew.spawn(self.sampler.loop(), "the sampling loop")
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
        order = StepOrder(step=step, version=self.step, entries=entries, first=self.step == self._loaded_step)
        stepping = within(
            parts.learners.step(order), plan.deadlines.step_deadline_s, f"step {step}", "the learner ranks"
        )
        report, groups = await together(stepping, self._archive(step, group_ids))
        assert report.version == step, f"step {step} left the learners at version {report.version}"
        self.shared.step = step
        self.parts.curriculum.step_made()
        self.shared.changed.set()
        self.saver.trained(step, entries)
        if step > self._furthest_step:
            self._furthest_step, self._restarts_in_a_row = step, 0
        await self.delivery.offer_if_due(step)
        counts = await self._record(report, groups)
        if step % plan.evaluation.every_steps == 0 and step < plan.run.steps:
            self._evaluation_due.set()
        await self._save_if_due(step, counts)

    async def _archive(self, step: int, group_ids: Sequence[str]) -> list[Group]:
        """Write down, while the learners work, what they work on: Redis may lose it, and a later replay needs it."""
        groups = await self.parts.buffer.fetch(group_ids)
        writing = asyncio.to_thread(self.parts.archive.write, step, groups)
        await within(writing, self.plan.deadlines.step_deadline_s, f"the archive of step {step}", "the disk")
        return groups

    async def _record(self, report: StepReport, groups: list[Group]) -> BufferStats:
        parts = self.parts
        counts = await self._balanced_counts()
        sampling = parts.curriculum.metrics() | parts.prompts.metrics() | parts.generators.metrics()
        if self._last_evaluation is not None:
            sampling |= self._last_evaluation.metrics()
        sampling |= self._own_metrics() | self.delivery.metrics()
        parts.account.trained(groups)
        metrics = parts.account.close(report, counts, sampling)
        parts.recorder.step(report.step, metrics)
        offered = self.delivery.offered
        weights = offered.digest if offered is not None and offered.version == report.version else None
        parts.recorder.event("step", step=report.step, batch=report.batch_digest, groups=len(groups), weights=weights)
        parts.recorder.rollouts(report.step, groups[: self.plan.deadlines.rollouts_per_step])
        parts.progress.step(report.step, metrics, self._last_evaluation)
        self._act_on(report, metrics)
        return counts

    def _act_on(self, report: StepReport, metrics: Metrics) -> None:
        """Have the guardrails look at a step; the learner's have acted before it."""
        if not self._names_checked and report.has_gradient:  # a step without one reports less
            check_names(self.plan.guardrails, metrics, report.metrics)
            self._names_checked = True
        for trip in (*report.trips, *self._guard.judge(metrics)):
            facts = {"name": trip.name, "action": trip.action, "metric": trip.metric, "value": trip.value}
            self.parts.recorder.event("guardrail", step=report.step, **facts, reason=str(trip))
            self.parts.progress.note(f"[yellow]{trip}: {trip.action.replace('_', ' ')}[/yellow]")

    def _own_metrics(self) -> Metrics:
        return {
            "weights/version_behind": last(self.step - self.shared.sampling_version),
            "learner/restarts/count": last(self._restarts),
            "staleness/allowed_lag/versions": last(self.parts.gate.allowed_lag),
            "buffer/reconnects/count": last(self.parts.buffer.reconnects),
        }

    async def _save_if_due(self, step: int, counts: BufferStats) -> None:
        """At the configured steps, and when the payloads that wait for a checkpoint outgrow the buffer's cap."""
        settings = self.plan.checkpoint
        if step % settings.every_steps == 0 or counts.leased_bytes >= self.plan.max_buffer_bytes:
            await self.saver.save(step)
        elif settings.memory_every_steps and step % settings.memory_every_steps == 0:
            await self.saver.copy(step)

    async def _balanced_counts(self) -> BufferStats:
        """Where everything is; raises where something is nowhere, and stays so after Redis was told what we know."""
        counts, in_flight = await self.sampler.counts()
        if imbalance(counts, in_flight):
            await self._reconcile("groups did not balance")
            counts, in_flight = await self.sampler.counts()
        check_balance(counts, in_flight)
        return counts

    # Batches

    async def _batch_or_stop(self) -> tuple[GroupEntry, ...] | None:
        """The next batch, or None once a stop was asked for."""
        if self.stop_requested.is_set():
            return None
        batch = self._crew.spawn(self._next_batch(), "waiting for a batch")
        stop = asyncio.ensure_future(self.stop_requested.wait())
        try:
            with self.parts.account.waiting():
                await asyncio.wait({batch, stop}, return_when=asyncio.FIRST_COMPLETED)
            return batch.result() if batch.done() else None
        finally:
            stop.cancel()
            if not batch.done():
                batch.cancel()

    async def _next_batch(self) -> tuple[GroupEntry, ...]:
        step = self.step + 1
        planned = self._ledger.pop(step, None)
        if planned is not None:
            entries = await self.saver.redeliver(step, planned)
            if entries is not None:
                return entries
            await self._void(step, planned)
        seconds, what = self.plan.deadlines.batch_deadline_s, f"{self.plan.groups_per_step} fresh groups in the buffer"
        return await within(self._lease(step), seconds, what, "the generators")

    async def _void(self, step: int, planned: Sequence[str]) -> None:
        """A step in the ledger lost groups with Redis's last second, before anything was saved of it: start it anew."""
        kept = await self.parts.buffer.release(step)
        self.sampler.released(kept)
        lost = [group_id for group_id in planned if group_id not in kept]
        await self.sampler.sample_again(lost)
        self.parts.recorder.event("batch_lost", step=step, sampled_again=lost, kept=len(kept))

    async def _lease(self, step: int) -> tuple[GroupEntry, ...]:
        plan, parts = self.plan, self.parts
        while True:
            self.shared.published.clear()
            ordered = plan.max_lag == 0
            try:
                lease = await parts.buffer.lease(step, plan.groups_per_step, self.step, plan.max_lag, ordered)
            except BufferRewound as error:
                await self._reconcile(str(error))
                continue
            self.sampler.dropped_as_stale(lease.dropped)
            if lease.entries:
                self.sampler.leased(lease.entries)
                return lease.entries
            await self.shared.published.wait()

    # When something died

    async def _recover(self, error: LearnersLost | MissingGroups) -> None:
        """Start the learner ranks anew from the newest saved state; the steps beyond it are made again.

        Generators go on meanwhile, up to the gate, with the versions they hold.
        """
        parts, plan, from_step = self.parts, self.plan, self.step
        self._restarts += 1
        self._restarts_in_a_row += 1
        parts.recorder.event("learners_lost", step=from_step, reason=str(error))
        parts.progress.note(f"[yellow]{error}[/yellow]; going back to the newest saved state")
        if self._restarts_in_a_row > plan.max_learner_restarts:
            raise RuntimeError(
                f"the learner ranks were lost {self._restarts_in_a_row} times without a new step in between "
                f"(learner.max_restarts {plan.max_learner_restarts}); the last time: {error}"
            ) from error
        await self.saver.settle()
        restart = parts.learners.restart()
        await within(restart, plan.deadlines.start_deadline_s, "the learner ranks to start again", "Ray")
        await parts.regroup()
        to_step = await self._load_newest()
        self.saver.roll_back(to_step)
        self._ledger = {step: ids for step, ids in parts.recorder.read_ledger().items() if step > to_step}
        self._loaded_step = self.shared.step = to_step
        parts.recorder.rewind(to_step)
        parts.recorder.event("rollback", from_step=from_step, to_step=to_step, reason=str(error))

    async def _load_newest(self) -> int:
        copies = copies_folder(self.plan.run_id)
        roots = (self.parts.recorder.directory.checkpoints, copies)
        while saved := await asyncio.to_thread(checkpoints.newest_of, roots, self.plan.run_id):
            folder, manifest = saved
            try:
                await asyncio.to_thread(checkpoints.verify, folder, manifest)
            except ValueError as damage:
                if folder.parent != copies:
                    raise
                self.parts.recorder.event("copy_damaged", step=manifest.step, reason=str(damage))
                await asyncio.to_thread(checkpoints.discard, folder)
                continue
            load = self.parts.learners.load(str(folder))
            await within(load, self.plan.deadlines.step_deadline_s, f"{folder.name} to load", "the learner ranks")
            return manifest.step
        return 0  # the ranks start at the starting weights

    async def _reconcile(self, reason: str) -> None:
        """Tell Redis what the driver knows, and sample again what only Redis knew."""
        async with self._reconciling:
            again = await self.sampler.reconcile()
            await self.saver.reconcile()
            await self.parts.buffer.confirm_leases(self.step)
            self.parts.recorder.event("reconciled", reason=reason, sampled_again=again)

    async def _watch(self) -> None:
        """Notice a fleet that nobody is waiting for, and a Redis that was restarted or replaced."""
        server = await self.parts.buffer.server_id()
        while True:
            await within(self.parts.generators.check(), 30.0, "a sign of life", "the generators")
            now = await self.parts.buffer.server_id()
            if now != server:
                server = now
                await self._reconcile("Redis was started again, or another server took over")
            await asyncio.sleep(WATCH_EVERY_S)

    async def _before_the_end(self, error: BaseException) -> None:
        """While everything still stands as it failed, write down how it stands."""
        if isinstance(error, WaitExpired | GeneratorsLost | LearnersLost):
            await self.parts.report_stall(f"{type(error).__name__}: {error}")

    # Evaluation and end

    async def _evaluate(self) -> None:
        while True:
            await self._evaluation_due.wait()
            self._evaluation_due.clear()
            await self._evaluate_now()

    async def _evaluate_now(self) -> None:
        """Score the held-out prompts at whatever version the generators hold; no weights move meanwhile."""
        plan, parts = self.plan.evaluation, self.parts
        prompts = [
            prompt
            for source, levels in parts.prompts.levels.items()
            for level in levels
            for prompt in parts.prompts.held_out(source, level, plan.prompts_per_level)
        ]
        async with self.shared.engines:
            version = self.shared.sampling_version
            work = parts.generators.evaluate(prompts, plan.temperature, self.plan.run.seed)
            what = f"{len(prompts)} held-out answers"
            graded = await within(work, self.plan.deadlines.group_deadline_s, what, "the generators")
        evaluation = summarise(self.step, version, graded)
        self._last_evaluation = evaluation
        parts.recorder.evaluation(evaluation)
        parts.progress.evaluation(evaluation)
        self.shared.changed.set()

    async def _conclude(self, outcome: Ended) -> None:
        """Save; a finished run also evaluates its last version and accounts for what nobody will train on."""
        parts, plan = self.parts, self.plan
        await self.saver.settle()
        if self.saver.steps:
            await self.saver.save(self.step)
            await self.saver.settle()
        if self.saver.steps:
            raise LearnersLost("the learner ranks died while the last checkpoint was being written")
        if outcome == "stopped":
            return
        delivered = self.delivery.until_delivered(self.step)
        await within(delivered, plan.deadlines.update_deadline_s, "the last weights", "the generators")
        self._evaluation_due.clear()
        await self._evaluate_now()
        await parts.buffer.drop_waiting("surplus")
        await self._balanced_counts()
