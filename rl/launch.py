"""This file is the composition root: the one place that knows every part, starts them, joins them and ends them.

What needs torch or vLLM is imported inside functions, so that `rl check` and `rl --help` stay light.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from rewards.loading import resolve
from rl import run_state
from rl.accounting import RewardWatch, StepAccount
from rl.buffer import Buffer
from rl.check import Threads, available_cores, problems, share_threads
from rl.config import RunConfig
from rl.crew import together
from rl.curriculum import Curriculum
from rl.embedded_redis import EmbeddedRedis
from rl.parts import Parts, Plan
from rl.process_guard import MARK, ProcessGuard
from rl.prompts import PromptSources
from rl.recorder import Recorder, RunDirectory
from rl.run import Run
from rl.run_outcome import Outcome
from rl.staleness import Gate
from rl.terminal import TerminalProgress
from rl.trajectory import Message, TextPart
from rl.waits import within
from rl.weights import NcclGroup

if TYPE_CHECKING:
    from actors.fleet import GeneratorFleet
    from learners.fleet import LearnerFleet

CACHE = "SLIPSTREAM_CACHE"
CANARY = "A quick brown fox jumps over the lazy dog. What is 12 + 30?"


def cache_folder() -> pathlib.Path:
    """Where converted models are kept: $SLIPSTREAM_CACHE, or the user's cache folder."""
    return pathlib.Path(os.environ.get(CACHE, pathlib.Path.home() / ".cache" / "slipstream"))


async def launch(config: RunConfig, directory: RunDirectory, console: Console, resume: bool) -> Outcome:
    """Start everything, train, end everything; the outcome says how it went. Never raises for a failed run."""
    found = problems(config, resolve)
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
        outcome = Outcome(
            status="stopped", step=stopper.step, summary=f"at once; go on with: rl resume {directory.path}"
        )
    except Exception as error:  # whatever ended the run is its outcome, with the traceback in outcome.json
        bad_input = stopper.run is None and isinstance(error, ValueError | OSError)
        outcome = Outcome.of_error("refused" if bad_input else "failed", error, stopper.step)
    finally:
        killed = guard.close()
    recorder.event("end", status=outcome.status, step=outcome.step, killed=killed)
    return outcome


class _Stopper:
    """The first Ctrl-C or SIGTERM asks for a checkpoint and an end; a second, or one before training, ends at once."""

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
    if run.step == 0:
        return "before the first step; there is nothing to resume"
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
    threads = share_threads(config, available_cores())
    progress.note(_banner(config, directory, threads))
    model_dir = await asyncio.to_thread(_resolve_model, config.model.path)
    prompts = await asyncio.to_thread(_open_prompts, config, model_dir)
    weights = {name: source.weight for name, source in config.sources.items()}
    curriculum = Curriculum(prompts.levels, weights, config.curriculum, config.rollout.group_size, config.run.seed)
    gate = Gate(config.staleness.max_lag, config.learner.groups_per_step)
    if checkpoint:
        await _restore(buffer, recorder, start_step, prompts, curriculum, gate)
    await stack.enter_async_context(_ray(config, directory.run_id, threads))
    progress.note("starting the engines and the learner ranks")
    generators, learners = await _start_fleets(stack, config, directory, threads, model_dir, url)
    if checkpoint:
        load = learners.load(str(checkpoint[0]))
        await within(load, config.monitoring.step_deadline_s, f"{checkpoint[0].name} to load", "the learner ranks")
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
    return Run(_plan(config, directory.run_id, start_step), parts)


def _plan(config: RunConfig, run_id: str, start_step: int) -> Plan:
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
    held = counts.trained_groups + counts.leased_groups + counts.buffered_groups
    gate.load_state_dict({"accepted": held, "running": 0})


@asynccontextmanager
async def _embedded_redis(directory: RunDirectory) -> AsyncIterator[str]:
    server = await asyncio.to_thread(EmbeddedRedis.start, directory.redis)
    try:
        yield server.url
    finally:
        await asyncio.to_thread(server.stop)


@asynccontextmanager
async def _ray(config: RunConfig, run_id: str, threads: Threads) -> AsyncIterator[None]:
    """The cluster that RAY_ADDRESS names, or a local one that ends with the run."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        environment = {"env_vars": {MARK: run_id}}
        ray.init(namespace=run_id, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    else:
        wanted = config.generators.count * threads.engine + config.learner.ranks * threads.rank
        ray.init(
            namespace=run_id,
            num_cpus=max(available_cores(), wanted),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield
    finally:
        await asyncio.to_thread(ray.shutdown)


def _banner(config: RunConfig, directory: RunDirectory, threads: Threads) -> str:
    return (
        f"[bold]{directory.run_id}[/bold]  {config.model.path}, {config.run.steps} steps of "
        f"{config.learner.groups_per_step} groups of {config.rollout.group_size} answers, max lag "
        f"{config.staleness.max_lag}\n          {config.generators.count} vLLM engine(s) and {config.learner.ranks} "
        f"learner rank(s) on {config.device}, {threads.engine} and {threads.rank} thread(s) each; "
        f"follow {directory.path}/metrics.jsonl"
    )


async def _start_fleets(
    stack: AsyncExitStack,
    config: RunConfig,
    directory: RunDirectory,
    threads: Threads,
    model_dir: str,
    url: str,
) -> tuple[GeneratorFleet, LearnerFleet]:
    """Bring engines and ranks up side by side; whichever part fails, what did start is ended by the stack."""
    from actors.fleet import GeneratorFleet
    from learners.fleet import LearnerFleet

    async def generators() -> GeneratorFleet:
        settings = _generator_settings(config, directory, threads, model_dir, url)
        fleet = await GeneratorFleet.start(settings, config.generators.count)
        stack.push_async_callback(fleet.close)
        return fleet

    async def learners() -> LearnerFleet:
        settings = _learner_settings(config, directory, threads, model_dir, url)
        fleet = await LearnerFleet.start(settings, config.learner.ranks)
        stack.push_async_callback(fleet.close)
        return fleet

    both = together(generators(), learners())
    started = await within(both, config.monitoring.start_deadline_s, "engines and learner ranks to start", "Ray")
    await _introduce(config, *started)
    return started[0], started[1]


async def _introduce(config: RunConfig, generators: GeneratorFleet, learners: LearnerFleet) -> None:
    """Tell the generators where weights come from: a file, its bytes from another node, or a broadcast over nccl."""
    generators.payload_of = learners.payload
    if config.weight_backend != "nccl":
        return
    address, port = await learners.free_port()
    engines, workers = config.generators.count, config.generators.tensor_parallel
    group = NcclGroup(address=address, port=port, engines=engines, workers=workers)
    met = together(generators.join(group), learners.join(group))
    await within(met, config.monitoring.start_deadline_s, "the nccl group to meet", "generators and learner rank 0")
    generators.send = learners.send


def _anywhere(use: str) -> str:
    """A reward's `use` that means the same in a process with another working directory."""
    path, colon, function = use.rpartition(":")
    return f"{pathlib.Path(path).absolute()}{colon}{function}" if path.endswith(".py") else use


def _generator_settings(config: RunConfig, directory: RunDirectory, threads: Threads, model_dir: str, url: str):
    from actors.engine import EngineSettings
    from actors.fleet import FleetSettings
    from actors.generator import GeneratorSettings
    from rewards.scorer import RewardSpec

    functions, cuda = config.rewards.functions, config.device == "cuda"
    return FleetSettings(
        engine=EngineSettings(
            name="generator",
            model_dir=model_dir,
            device=config.device,
            weight_backend=config.weight_backend,
            max_context_tokens=config.model.max_context_tokens,
            max_sequences=config.generators.max_sequences,
            tensor_parallel=config.generators.tensor_parallel,
            kv_cache_gib=config.generators.kv_cache_gib,
            gpu_memory_fraction=config.generators.gpu_memory_fraction,
            threads=None if cuda else threads.engine,
            seed=config.run.seed,
        ),
        generator=GeneratorSettings(
            run_id=directory.run_id,
            group_size=config.rollout.group_size,
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            reward_weights={name: function.weight for name, function in functions.items()},
            reward_names={
                source: tuple(name for name, each in functions.items() if source in (each.sources or config.sources))
                for source in config.sources
            },
        ),
        rewards={
            name: RewardSpec(_anywhere(each.use), each.timeout_s, each.params) for name, each in functions.items()
        },
        reward_workers=config.rewards.workers,
        redis_url=url,
        max_bytes=config.buffer.max_bytes,
        log_folder=str(directory.logs),
        num_cpus=threads.engine,
        num_gpus=config.generators.tensor_parallel if cuda else 0,
    )


def _learner_settings(config: RunConfig, directory: RunDirectory, threads: Threads, model_dir: str, url: str):
    from actors.chat import ChatTokenizer
    from learners.fleet import FleetSettings
    from learners.learner import LearnerSettings

    canary = ChatTokenizer(model_dir).render((Message("user", (TextPart(CANARY),)),))
    canary = canary[: config.max_prompt_tokens]  # an engine scores what it could also answer
    return FleetSettings(
        learner=LearnerSettings(
            run_id=directory.run_id,
            model_dir=model_dir,
            device=config.device,
            rendezvous="",  # rank 0 names it when its node is known
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_tokens,
            canary_token_ids=canary,
            node="",
            threads=threads.rank,
            deadline_s=config.monitoring.step_deadline_s,
            learner=config.learner,
            algorithm=config.algorithm,
        ),
        redis_url=url,
        log_folder=str(directory.logs),
        num_cpus=threads.rank,
        num_gpus=1 if config.device == "cuda" else 0,
    )
