"""This file is the composition root: the one place that knows every part, starts them, joins them and ends them.

What needs torch or vLLM is imported inside functions, so that `rl check` and `rl --help` stay light.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from rl import run_state
from rl.accounting import RewardWatch, StepAccount
from rl.buffer import Buffer
from rl.check import problems
from rl.config import RunConfig
from rl.config_loading import dump_config
from rl.curriculum import Curriculum
from rl.embedded_redis import EmbeddedRedis
from rl.process_guard import MARK, ProcessGuard
from rl.prompts import PromptSources
from rl.recorder import Recorder, RunDirectory
from rl.run import Parts, Plan, Run
from rl.run_outcome import Outcome
from rl.staleness import Gate
from rl.terminal import TerminalProgress
from rl.waits import within

if TYPE_CHECKING:
    from actors.fleet import GeneratorFleet
    from learners.fleet import LearnerFleet

CACHE = "SLIPSTREAM_CACHE"
END_SECONDS = 20.0


@dataclass(frozen=True)
class Machine:
    """How many threads each process gets, derived from the cores there are."""

    cores: int
    threads_per_generator: int
    threads_per_rank: int


def share_out(config: RunConfig, cores: int) -> Machine:
    """Split the cores evenly over engines and ranks, at least one thread each, unless the config says."""
    each = max(1, cores // (config.generators.count + config.learner.ranks))
    return Machine(cores, config.generators.threads or each, config.learner.threads_per_rank or each)


def cache_folder() -> pathlib.Path:
    """Where converted models are kept: $SLIPSTREAM_CACHE, or the user's cache folder."""
    return pathlib.Path(os.environ.get(CACHE, pathlib.Path.home() / ".cache" / "slipstream"))


async def launch(config: RunConfig, directory: RunDirectory, console: Console, resume: bool) -> Outcome:
    """Start everything, train, end everything; the outcome says how it went. Never raises for a failed run."""
    found = problems(config)
    if found:
        return Outcome.of_error("refused", ValueError("\n".join(found)))
    recorder = Recorder(directory)
    guard = ProcessGuard(directory.run_id)
    stopper = _Stopper(console)
    recorder.event("start", resume=resume)
    try:
        async with AsyncExitStack() as stack:
            run = stopper.run = await _assemble(stack, config, recorder, console, resume)
            status = await run.main()
            outcome = Outcome(status=status, step=run.step, summary=_summary(status, run, directory))
    except asyncio.CancelledError:
        outcome = Outcome(status="stopped", step=stopper.step, summary=f"at once; go on with: rl resume {directory.path}")
    except Exception as error:  # whatever ended the run is its outcome, with the traceback in outcome.json
        bad_input = stopper.run is None and isinstance(error, ValueError | OSError)
        outcome = Outcome.of_error("refused" if bad_input else "failed", error, stopper.step)
    finally:
        killed = guard.close()
    recorder.event("end", status=outcome.status, step=outcome.step, killed=killed)
    return outcome


class _Stopper:
    """The first Ctrl-C or SIGTERM asks for a checkpoint and an end; a second one, or one before training, ends at once."""

    def __init__(self, console: Console) -> None:
        self.run: Run | None = None
        self._console = console
        self._main_task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)

    @property
    def step(self) -> int:
        """Steps made so far."""
        return self.run.step if self.run else 0

    def _stop(self) -> None:
        if self.run is None or self.run.stop_requested.is_set():
            assert self._main_task is not None
            self._main_task.cancel()
            return
        self._console.print("[yellow]stopping after the step in hand; once more to stop at once[/yellow]")
        self.run.stop_requested.set()


def _summary(status: str, run: Run, directory: RunDirectory) -> str:
    if status == "stopped":
        return f"at step {run.step}, checkpoint written; go on with: rl resume {directory.path}"
    return f"{run.step} steps; model in {run_state.folder_of(directory.checkpoints, run.step) / 'export'}"


async def _assemble(
    stack: AsyncExitStack, config: RunConfig, recorder: Recorder, console: Console, resume: bool
) -> Run:
    """Start every part, cheapest first, so that bad input is told before anything expensive begins."""
    directory = recorder.directory
    checkpoint = run_state.newest_checkpoint(directory.checkpoints) if resume else None
    start_step = checkpoint[1].step if checkpoint else 0
    progress = TerminalProgress(config.run.steps, console)
    url = config.buffer.redis or await stack.enter_async_context(_embedded_redis(directory))
    buffer = await Buffer.connect(url, directory.run_id, config.buffer.max_bytes)
    stack.push_async_callback(buffer.close)
    machine = share_out(config, os.cpu_count() or 1)
    progress.note(_banner(config, directory, machine))
    model_dir = await asyncio.to_thread(_resolve_model, config.model.path)
    prompts = await asyncio.to_thread(_open_prompts, config, model_dir)
    weights = {name: source.weight for name, source in config.sources.items()}
    curriculum = Curriculum(
        prompts.levels, weights, config.curriculum, config.rollout.group_size, config.run.seed
    )
    gate = Gate(config.staleness.max_lag, config.learner.groups_per_step)
    if checkpoint:
        await _restore(buffer, recorder, start_step, prompts, curriculum, gate)
    await stack.enter_async_context(_ray(config, directory.run_id, machine))
    progress.note("starting the engines and the learner ranks")
    generators, learners = await _start_fleets(stack, config, directory, machine, model_dir, url)
    if checkpoint:
        await learners.load(str(checkpoint[0]))
    devices = config.generators.count * config.generators.tensor_parallel + config.learner.ranks
    parts = Parts(
        prompts=prompts,
        curriculum=curriculum,
        gate=gate,
        buffer=buffer,
        generators=generators,
        learners=learners,
        recorder=recorder,
        progress=progress,
        account=StepAccount(devices),
        rewards=RewardWatch(config.rewards.max_failure_fraction),
    )
    first_draw = (await buffer.stats()).drawn
    return Run(_plan(config, directory.run_id, start_step, first_draw), parts)


def _plan(config: RunConfig, run_id: str, start_step: int, first_draw: int) -> Plan:
    return Plan(
        run=config.run,
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        deadlines=config.monitoring,
        run_id=run_id,
        groups_per_step=config.learner.groups_per_step,
        max_lag=config.staleness.max_lag,
        max_canary_gap=config.weights.max_canary_gap,
        start_step=start_step,
        first_draw=first_draw,
    )


def _resolve_model(path: str) -> str:
    from learners.gguf_import import resolve_model

    return resolve_model(path, str(cache_folder()))


def _open_prompts(config: RunConfig, model_dir: str) -> PromptSources:
    from actors.chat import ChatTokenizer

    render = ChatTokenizer(model_dir).render
    return PromptSources.open(
        config.sources, render, config.max_prompt_tokens, config.run.seed, config.model.system_prompt
    )


async def _restore(
    buffer: Buffer, recorder: Recorder, start_step: int, prompts: PromptSources, curriculum: Curriculum, gate: Gate
) -> None:
    """Bring what the driver knew back to where the run stood."""
    await run_state.reconcile(buffer, recorder, start_step)
    state = run_state.load_sampling_state(recorder.directory.path)
    prompts.load_state_dict(state["prompts"])
    curriculum.load_state_dict(state["curriculum"])
    counts = await buffer.stats()
    held = counts.trained.groups + counts.leased.groups + counts.buffered.groups
    gate.load_state_dict({"accepted": held, "running": 0})


@asynccontextmanager
async def _embedded_redis(directory: RunDirectory) -> AsyncIterator[str]:
    server = await asyncio.to_thread(EmbeddedRedis.start, directory.redis)
    try:
        yield server.url
    finally:
        await asyncio.to_thread(server.stop)


@asynccontextmanager
async def _ray(config: RunConfig, run_id: str, machine: Machine) -> AsyncIterator[None]:
    """The cluster that RAY_ADDRESS names, or a local one that ends with the run."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        environment = {"env_vars": {MARK: run_id}}
        ray.init(namespace=run_id, runtime_env=environment, log_to_driver=False, logging_level="error")
    else:
        wanted = config.generators.count * machine.threads_per_generator + config.learner.ranks * machine.threads_per_rank
        ray.init(
            namespace=run_id,
            num_cpus=max(machine.cores, wanted),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    try:
        yield
    finally:
        await asyncio.to_thread(ray.shutdown)
