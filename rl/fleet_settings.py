"""This file derives from a config what engines and learner ranks are built from; with launch.py, the composition root.

What needs torch or vLLM is imported inside functions, so that `rl check` and `rl --help` stay light.
"""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Literal

from rl.buffer import BufferLimits
from rl.check import Threads
from rl.config import RunConfig
from rl.recorder import RunDirectory
from rl.trajectory import Message, TextPart

if TYPE_CHECKING:
    import actors.fleet
    import learners.fleet

CANARY = "A quick brown fox jumps over the lazy dog. What is 12 + 30?"


def _anywhere(use: str) -> str:
    """A reward's `use` that means the same in a process with another working directory."""
    path, colon, function = use.rpartition(":")
    return f"{pathlib.Path(path).absolute()}{colon}{function}" if path.endswith(".py") else use


def limits_of(config: RunConfig) -> BufferLimits:
    """The buffer's limits, the same for every process."""
    section = config.buffer
    return BufferLimits(section.max_bytes, section.max_groups, section.reconnect_deadline_s)


def _cpus(threads: int) -> int:
    """What Ray reserves: nothing where Ray is our own, so that `rl scale` is not refused for cores that are shared."""
    return threads if os.environ.get("RAY_ADDRESS") else 0


def _transport(config: RunConfig) -> Literal["auto", "dense", "delta"]:
    """auto is dense where Ray is our own, for all generators read the whole file in place then, which is faster."""
    transport = config.weights.transport
    return "dense" if transport == "auto" and not os.environ.get("RAY_ADDRESS") else transport


def generator_settings(
    config: RunConfig, directory: RunDirectory, threads: Threads, model_dir: str, url: str
) -> actors.fleet.FleetSettings:
    """What every generator is built from."""
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
            head_dtype=config.model.head_dtype,
        ),
        generator=GeneratorSettings(
            run_id=directory.run_id,
            group_size=config.rollout.group_size,
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            first_answers=config.rollout.first_answers,
            overlong=config.rewards.overlong,
            order=config.rollout.order,
            zero_advantage=config.rollout.zero_advantage,
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
        limits=limits_of(config),
        log_folder=str(directory.logs),
        num_cpus=_cpus(threads.engine),
        num_gpus=config.generators.tensor_parallel if cuda else 0,
        max_restarts=config.generators.max_restarts,
        heartbeat_deadline_s=config.monitoring.heartbeat_deadline_s,
        start_deadline_s=config.monitoring.start_deadline_s,
    )


def learner_settings(
    config: RunConfig, directory: RunDirectory, threads: Threads, model_dir: str, url: str
) -> learners.fleet.FleetSettings:
    """What every learner rank is built from."""
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
            head_dtype=config.model.head_dtype,
            guardrails=dict(config.staleness.guardrails),
            transport=_transport(config),
        ),
        redis_url=url,
        log_folder=str(directory.logs),
        num_cpus=_cpus(threads.rank),
        heartbeat_deadline_s=config.monitoring.heartbeat_deadline_s,
        reconnect_deadline_s=config.buffer.reconnect_deadline_s,
        num_gpus=1 if config.device == "cuda" else 0,
    )
