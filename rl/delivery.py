"""This file delivers policy versions to the generators: the newest one, in flight, believed only when verified."""

from __future__ import annotations

import asyncio

from rl.metrics import Metrics, last
from rl.parts import LearnersLost, Parts, Plan
from rl.shared import Shared
from rl.waits import within
from rl.weights import UpdateReceipt, WeightUpdate, verify


class Delivery:
    """The broadcast loop. A version that was overtaken while something held the engines is skipped."""

    def __init__(self, plan: Plan, parts: Parts, shared: Shared) -> None:
        self.plan = plan
        self.parts = parts
        self.offered: WeightUpdate | None = None
        self._shared = shared
        self._delivered: WeightUpdate | None = None
        self._lost: LearnersLost | None = None
        self._delivery = asyncio.Event()
        self._new_weights = asyncio.Event()

    async def offer(self, version: int) -> None:
        """Have the learners write their current version down, for the loop to deliver.

        After a rollback the steps are made again whose versions the generators hold already; those are not sent until
        the learners have caught up.
        """
        if self.offered is not None and version < self.offered.version:
            return
        deadline_s = self.plan.deadlines.update_deadline_s
        what = f"the weights of version {version}"
        self.offered = await within(self.parts.learners.publish(version), deadline_s, what, "learner rank 0")
        self._new_weights.set()
        if self.offered.path is None:  # nccl: the senders take part in the transfer, so the next step waits for it
            await within(self.until_delivered(version), deadline_s, what, "the generators")

    async def offer_if_due(self, version: int) -> None:
        """Offer every weights.every_steps-th version, counted from the last one offered, and those to be evaluated.

        The last one itself is due again after a rollback: it was made anew.
        """
        plan, offered = self.plan, self.offered
        evaluated = version % plan.evaluation.every_steps == 0 or version == plan.run.steps
        skipped = offered is not None and offered.version < version < offered.version + plan.weights_every_steps
        if evaluated or not skipped:
            await self.offer(version)

    async def loop(self) -> None:
        """Deliver the newest offered weights, whenever nothing else holds the engines."""
        while True:
            await self._new_weights.wait()
            async with self._shared.engines:
                self._new_weights.clear()
                update = self.offered
                assert update is not None
                seconds = self.plan.deadlines.update_deadline_s
                what = f"policy version {update.version} to load"
                try:
                    receipts = await within(self.parts.generators.update(update), seconds, what, "the generators")
                except LearnersLost as error:  # over nccl they take part; the training loop waits here, and rolls back
                    self._lost = error
                    self._delivery.set()
                    continue
                gaps = [self.verify(update, receipt) for receipt in receipts]
                self._conclude(update, receipts, gaps)
            self._shared.changed.set()

    def verify(self, update: WeightUpdate, receipt: UpdateReceipt) -> float:
        """Check what one generator received; returns the canary's gap in nats. Raises WeightUpdateError."""
        previous = self._delivered
        if previous is not None and previous.version >= update.version:
            previous = None  # sent again, to a generator that joined or after a rollback: it need not differ
        return verify(update, receipt, previous, self.plan.max_canary_gap)

    def _conclude(self, update: WeightUpdate, receipts: list[UpdateReceipt], gaps: list[float]) -> None:
        before = self._delivered
        self._delivered = update
        self._shared.sampling_version = update.version
        self._delivery.set()
        again = {"as_before": before.digest == update.digest} if before and before.version == update.version else {}
        self.parts.recorder.event(
            "weights_verified",
            version=update.version,
            digest=update.digest,
            bytes=update.num_bytes,
            transport="delta" if update.delta_path else "dense",
            delta_bytes=update.delta_bytes,
            generators=[receipt.generator for receipt in receipts],
            canary_gap_nats=max(gaps, default=None),
            seconds=[receipt.seconds for receipt in receipts],
            **again,
        )

    def metrics(self) -> Metrics:
        """Bytes of the newest delivered version, as one travels to another node: a delta's where there is one."""
        update = self._delivered
        if update is None:
            return {}
        return {"weights/update/bytes": last(update.delta_bytes if update.delta_path else update.num_bytes)}

    async def until_delivered(self, version: int) -> None:
        """Wait until every working generator holds `version` or a newer one. Raises LearnersLost if its sender died."""
        while self._delivered is None or self._delivered.version < version:
            self._delivery.clear()
            await self._delivery.wait()
            if self._lost is not None:
                error, self._lost = self._lost, None
                raise error
