"""This file lets parts call each other before all of them exist: fleets call back into the run, signals stop it."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from rl.config import RunConfig
from rl.crew import together
from rl.recorder import Recorder, RunDirectory
from rl.run import Run
from rl.stall_report import Versions, Witnesses
from rl.stall_report import report as stall_report
from rl.terminal import TerminalProgress
from rl.waits import within
from rl.weights import NcclGroup, UpdateReceipt, WeightUpdate

if TYPE_CHECKING:
    from actors.fleet import GeneratorFleet
    from learners.fleet import LearnerFleet


class Wiring:
    """What parts are told of each other before all of them exist: fleets start first, and call back into the run."""

    def __init__(self, config: RunConfig, recorder: Recorder, console: Console) -> None:
        self.config = config
        self.recorder = recorder
        self.progress = TerminalProgress(config.run.steps, console)
        self.run: Run | None = None
        self.stopper: Stopper | None = None
        self._fleets: tuple[GeneratorFleet, LearnerFleet] | None = None

    @property
    def directory(self) -> RunDirectory:
        """The run's folder."""
        return self.recorder.directory

    def told(self, kind: str, **facts: Any) -> None:
        """An event of a fleet: written down, and shown where a person should know."""
        self.recorder.event(kind, **facts)
        if "reason" in facts:
            self.progress.note(f"[yellow]{kind.replace('_', ' ')}[/yellow]: {escape(str(facts['reason']))}")

    def verify(self, update: WeightUpdate, receipt: UpdateReceipt) -> float:
        """Judge what a generator that joins has loaded."""
        assert self.run is not None, "weights are loaded once the run has offered them"
        return self.run.delivery.verify(update, receipt)

    async def introduce(self, generators: GeneratorFleet, learners: LearnerFleet) -> None:
        """Tell the generators where weights come from: a file, its bytes from another node, or a broadcast (nccl)."""
        self._fleets = (generators, learners)
        generators.introduce(learners.payload)
        if self.config.weight_backend == "nccl":
            generators.send = learners.send
            await self.regroup()

    async def regroup(self) -> None:
        """Have sender and receivers of the nccl backend meet, at the start and whenever one of them is new."""
        if self.config.weight_backend != "nccl" or self._fleets is None:
            return
        generators, learners = self._fleets
        address, port = await learners.free_port()
        workers = self.config.generators.tensor_parallel
        group = NcclGroup(address=address, port=port, engines=generators.receivers, workers=workers)
        met = together(generators.join(group), learners.join(group))
        deadline_s = self.config.monitoring.start_deadline_s
        await within(met, deadline_s, "the nccl group to meet", "generators and learner rank 0")

    async def report_stall(self, reason: str) -> None:
        """Write down how everything stands, and say where."""
        run = self.run
        if run is None:
            return
        witnesses = Witnesses(
            run_id=self.directory.run_id,
            directory=self.directory.path,
            gate=run.parts.gate,
            buffer_stats=lambda: run.parts.buffer.stats(),
            generators=run.parts.generators.describe,
            learners=run.parts.learners.describe,
            versions=lambda: Versions(run.step, run.shared.sampling_version),
        )
        told = await stall_report(reason, witnesses)
        self.recorder.event("stall_report", reason=reason, told=told)
        self.progress.note(escape(told))


class Stopper:
    """The first Ctrl-C or SIGTERM asks for a checkpoint and an end; a second, or one before training, ends at once.

    SIGUSR1 asks for a stall report: how everything stands, without ending anything.
    """

    def __init__(self, console: Console, wiring: Wiring) -> None:
        self._console = console
        self._wiring = wiring
        self._main_task = asyncio.current_task()
        self.listen()

    def listen(self) -> None:
        """Take the signals; once more after Ray has started, whose own handler of SIGTERM aborts 3 seconds later."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGUSR1, self._report)

    @property
    def step(self) -> int:
        """Steps made so far."""
        return self._wiring.run.step if self._wiring.run else 0

    def _stop(self) -> None:
        run = self._wiring.run
        if run is None or run.stop_requested.is_set():
            assert self._main_task is not None
            self._main_task.cancel()
            return
        self._console.print("[yellow]stopping after the step in hand; once more to stop at once[/yellow]")
        run.stop_requested.set()

    def _report(self) -> None:
        if self._wiring.run is not None:
            self._wiring.run.accompany(self._wiring.report_stall("SIGUSR1"), "writing a stall report")
