"""This file is the composition root: the one place that knows every part, starts them, joins them and ends them.

What needs torch or vLLM is imported inside functions, so that `rl check` and `rl --help` stay light.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from rewards.loading import resolve
from rl import checkpoints
from rl.accounting import RewardWatch, StepAccount
from rl.archive import Archive
from rl.buffer import Buffer
from rl.check import Threads, available_cores, disk_shortfall, problems, share_threads
from rl.checkpoints import Manifest
from rl.config import RunConfig
from rl.control import AlreadyRunning, Answer, Desk, announce
from rl.crew import together
from rl.curriculum import Curriculum
from rl.embedded_redis import EmbeddedRedis
from rl.fleet_settings import generator_settings, learner_settings, limits_of
from rl.parts import Parts, Plan
from rl.planner import advice
from rl.process_guard import MARK, guarded
from rl.prompts import PromptSources
from rl.recorder import Recorder, RunDirectory
from rl.replay import Replayed, ReplayPlan
from rl.resume import take_up
from rl.run import Run
from rl.run_outcome import Outcome
from rl.staleness import Gate
from rl.terminal import ROLES
from rl.time_ledger import IDLE
from rl.waits import within
from rl.wiring import Stopper, Wiring

if TYPE_CHECKING:
    from actors.fleet import GeneratorFleet
    from learners.fleet import LearnerFleet

CACHE = "SLIPSTREAM_CACHE"
LOOK_EVERY_S = 0.5


def cache_folder() -> pathlib.Path:
    """Where converted models are kept: $SLIPSTREAM_CACHE, or the user's cache folder."""
    return pathlib.Path(os.environ.get(CACHE, pathlib.Path.home() / ".cache" / "slipstream"))


async def launch(
    config: RunConfig, directory: RunDirectory, console: Console, resume: bool, step: int | None = None
) -> Outcome:
    """Start everything, train, end everything; the outcome says how it went. Never raises for a failed run.

    With resume the run goes on from its newest complete checkpoint, or from that of `step`. Raises AlreadyRunning, with
    nothing touched, where another driver has the directory.
    """
    found = problems(config, resolve)
    if found:
        return Outcome.of_error("refused", ValueError("\n".join(found)))
    recorder = Recorder(directory)
    wiring = Wiring(config, recorder, console)
    stopper = wiring.stopper = Stopper(console, wiring)
    killed: list[str] = []
    try:
        with announce(directory.path) as desk, guarded(directory.run_id, desk.lock) as killed:
            recorder.event("start", resume=resume)
            async with AsyncExitStack() as stack:
                run = await _assemble(stack, wiring, desk, resume, step)
                status = await run.main()
                _explain(wiring)
                outcome = Outcome(status=status, step=run.step, summary=_summary(status, run, directory))
    except AlreadyRunning:
        raise
    except asyncio.CancelledError:
        outcome = Outcome(
            status="stopped", step=stopper.step, summary=f"at once; go on with: rl resume {directory.path}"
        )
    except Exception as error:  # whatever ended the run is its outcome, with the traceback in outcome.json
        bad_input = wiring.run is None and isinstance(error, ValueError | OSError)
        outcome = Outcome.of_error("refused" if bad_input else "failed", error, stopper.step)
    recorder.event("end", status=outcome.status, step=outcome.step, killed=killed)
    return outcome


def _explain(wiring: Wiring) -> None:
    """Say where the time went, and what would use the devices better."""
    config, progress = wiring.config, wiring.progress
    progress.where_the_time_went()
    idle = (progress.shares(role).get(IDLE, 0.0) for role in ROLES)
    found = advice(*idle, config.generators.count, config.learner.ranks)
    if found:
        progress.note(found)


def _summary(status: str, run: Run, directory: RunDirectory) -> str:
    if run.step == 0:
        return "before the first step; there is nothing to resume"
    if status == "stopped":
        return f"at step {run.step}, checkpoint written; go on with: rl resume {directory.path}"
    return f"{run.step} steps; model in {checkpoints.folder_of(directory.checkpoints, run.step) / 'export'}"


async def _assemble(stack: AsyncExitStack, wiring: Wiring, desk: Desk, resume: bool, step: int | None) -> Run:
    """Start every part, cheapest first, so that bad input is told before anything expensive begins."""
    config, directory, recorder = wiring.config, wiring.directory, wiring.recorder
    checkpoint = await asyncio.to_thread(_checkpoint, directory, step) if resume else None
    start_step = checkpoint[1].step if checkpoint else 0
    server = await _embedded_redis(stack, directory) if config.buffer.redis is None else None
    url = server.url if server else str(config.buffer.redis)
    buffer = await Buffer.connect(url, directory.run_id, limits_of(config), directory.owner())
    stack.push_async_callback(buffer.close)
    if buffer.warning:
        wiring.progress.note(f"[yellow]{escape(buffer.warning)}[/yellow]")
    threads = share_threads(config, available_cores())
    wiring.progress.note(_banner(config, directory, threads))
    opening = asyncio.to_thread(_open_model, config, directory)
    ray_up = stack.enter_async_context(_ray(directory.run_id))
    (model_dir, prompts), _ = await together(opening, ray_up)  # half of a second run's start is these two
    weights = {name: source.weight for name, source in config.sources.items()}
    curriculum = Curriculum(
        prompts.levels,
        weights,
        config.curriculum,
        config.rollout.group_size,
        config.run.seed,
        prompts.known,
        refills=config.rollout.zero_advantage == "drop",
    )
    if wiring.stopper is not None:
        wiring.stopper.listen()
    wiring.progress.note("starting the engines and the learner ranks")
    generators, learners = await _start_fleets(stack, wiring, threads, model_dir, url)
    devices = config.generators.count * config.generators.tensor_parallel + config.learner.ranks
    parts = Parts(
        prompts=prompts,
        curriculum=curriculum,
        gate=Gate(config.staleness.max_lag, config.learner.groups_per_step),
        buffer=buffer,
        generators=generators,
        learners=learners,
        recorder=recorder,
        archive=Archive(directory),
        progress=wiring.progress,
        account=StepAccount(devices, config.algorithm.mask_truncated),
        rewards=RewardWatch(config.rewards.max_failure_fraction),
        report_stall=wiring.report_stall,
        regroup=wiring.regroup,
    )
    run = wiring.run = Run(_plan(config, directory.run_id, start_step), parts)
    if checkpoint:
        await _take_up(run, *checkpoint)
    _accompany(run, desk, server)
    return run


def _checkpoint(directory: RunDirectory, step: int | None) -> tuple[pathlib.Path, Manifest]:
    """What a resume starts from, looked through byte by byte; newer ones go if an older one was asked for."""
    folder, manifest = checkpoints.newest_checkpoint(directory.checkpoints, directory.run_id, step)
    checkpoints.verify(folder, manifest)
    checkpoints.discard_after(directory.checkpoints, manifest.step)
    return folder, manifest


async def _take_up(run: Run, folder: pathlib.Path, manifest: Manifest) -> None:
    load = run.parts.learners.load(str(folder))
    await within(load, run.plan.deadlines.step_deadline_s, f"{folder.name} to load", "the learner ranks")
    found = await take_up(run.parts, run.sampler, run.saver, manifest)
    if found.redis_was_empty:
        run.parts.progress.note(
            "[yellow]Redis has nothing of this run: what waited in the buffer is lost, and is drawn anew[/yellow]"
        )


def _accompany(run: Run, desk: Desk, server: EmbeddedRedis | None) -> None:
    """Tasks beside the loops: requests are answered, and a Redis of our own is started again when it dies."""

    async def scale(request: Mapping[str, Any]) -> str:
        count = request.get("generators")
        if type(count) is not int:  # a file can come from anywhere
            raise ValueError(f"generators must be a whole number, not {count!r}")
        return await run.parts.generators.scale(count)

    def told(kind: str, answer: Answer) -> None:
        run.parts.recorder.event("request", request=kind, accepted=answer.accepted, answer=answer.text)

    async def keep_alive(server: EmbeddedRedis) -> None:
        while True:
            if not server.alive:
                run.parts.recorder.event("redis_died")
                await asyncio.to_thread(server.revive)
                run.parts.recorder.event("redis_revived")
            await asyncio.sleep(LOOK_EVERY_S)

    run.accompany(desk.serve({"scale": scale}, told), "the request desk")
    if server is not None:
        run.accompany(keep_alive(server), "keeping Redis alive")


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
        max_buffer_bytes=config.buffer.max_bytes,
        max_learner_restarts=config.learner.max_restarts,
        start_step=start_step,
        guardrails=config.staleness.guardrails,
        long_tail=config.rollout.long_tail,
        weights_every_steps=config.weights.every_steps,
    )


def resolve_model(path: str) -> str:
    """A local Hugging Face directory of the model that a config names."""
    from learners.gguf_import import resolve_model

    return resolve_model(path, str(cache_folder()))


def _open_model(config: RunConfig, directory: RunDirectory) -> tuple[str, PromptSources]:
    """The model's directory, and the prompts rendered for it. Raises ValueError where the run will not fit the disk."""
    from actors.chat import ChatTokenizer

    model_dir = resolve_model(config.model.path)
    if shortfall := disk_shortfall(config, directory.path):
        raise ValueError(shortfall)  # now, and not after the first step
    render = ChatTokenizer(model_dir).render
    prompts = PromptSources.open(
        config.sources, render, config.max_prompt_tokens, config.run.seed, config.model.system_prompt
    )
    return model_dir, prompts


async def _embedded_redis(stack: AsyncExitStack, directory: RunDirectory) -> EmbeddedRedis:
    server = await asyncio.to_thread(EmbeddedRedis.start, directory.redis)
    stack.push_async_callback(asyncio.to_thread, server.stop)
    return server


@asynccontextmanager
async def _ray(run_id: str) -> AsyncIterator[None]:
    """The cluster that RAY_ADDRESS names, or a local one that ends with the run."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        environment = {"env_vars": {MARK: run_id}}
        ray.init(namespace=run_id, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            namespace=run_id,
            num_cpus=available_cores(),
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


def _refuse_scattered_copies(learners: LearnerFleet) -> None:
    import ray

    nodes = {rank.node for rank in learners.describe()}
    if nodes != {ray.get_runtime_context().get_node_id()}:
        raise ValueError(
            f"checkpoint.memory_every_steps keeps copies in one node's shared memory, but the ranks are on "
            f"{len(nodes)} node(s) that are not all the driver's; set it to null, and checkpoint.every_steps lower"
        )


async def _start_fleets(
    stack: AsyncExitStack, wiring: Wiring, threads: Threads, model_dir: str, url: str
) -> tuple[GeneratorFleet, LearnerFleet]:
    """Bring engines and ranks up side by side; whichever part fails, what did start is ended by the stack."""
    from actors.fleet import FleetHooks, GeneratorFleet
    from learners.fleet import LearnerFleet

    config, directory = wiring.config, wiring.directory

    async def generators() -> GeneratorFleet:
        settings = generator_settings(config, directory, threads, model_dir, url)
        hooks = FleetHooks(verify=wiring.verify, on_event=wiring.told, regroup=wiring.regroup)
        fleet = await GeneratorFleet.start(settings, config.generators.count, hooks)
        stack.push_async_callback(fleet.close)
        return fleet

    async def learners() -> LearnerFleet:
        settings = learner_settings(config, directory, threads, model_dir, url)
        fleet = await LearnerFleet.start(settings, config.learner.ranks, wiring.told)
        stack.push_async_callback(fleet.close)
        return fleet

    both = together(generators(), learners())
    started = await within(both, config.monitoring.start_deadline_s, "engines and learner ranks to start", "Ray")
    if config.checkpoint.memory_every_steps:
        _refuse_scattered_copies(started[1])
    await wiring.introduce(*started)
    return started[0], started[1]


def replay(config: RunConfig, directory: RunDirectory, plan: ReplayPlan, tolerance: float) -> Replayed:
    """Make an archived step again, in this process. Raises ValueError as learners/replay.py does."""
    from learners.replay import replay as make_again

    threads = share_threads(config, available_cores())
    settings = learner_settings(config, directory, threads, resolve_model(config.model.path), "").learner
    return make_again(plan, directory, settings, tolerance)
