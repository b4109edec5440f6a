"""This file answers `rl check`: the arithmetic of a configuration with units, and what is wrong with it before it runs.

Pure but for looking at files: nothing is started, and neither torch nor vLLM is imported.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
from collections.abc import Callable

import msgspec
from rich.table import Table

from rl import model_size
from rl.chooser import check_name
from rl.config import RunConfig
from rl.prompts import left_out_by_difficulty, validate
from rl.source_config import HubSource, JsonlSource, ReasoningGymSource, Source

GIB = 1 << 30
BYTES_PER_PARAMETER_STATE = 12  # fp32 master and both AdamW moments
BYTES_PER_PARAMETER_EXPORT = 2  # bf16, also what one weight update carries
BYTES_PER_PARAMETER_TRAINING = 18  # state, fp32 gradient and the bf16 copy that computes
BYTES_PER_SAMPLED_TOKEN = 12  # msgpack: a token id and a float64 log-probability
BYTES_PER_PROCESS = 1 << 30  # what importing torch or vLLM costs each process that does

ResolveReward = Callable[[str], object]


class Row(msgspec.Struct, frozen=True):
    """One line of the arithmetic: a quantity, its value with the unit, and how it comes about."""

    area: str
    what: str
    value: str
    how: str = ""


class Threads(msgspec.Struct, frozen=True):
    """CPU threads of each engine and of each learner rank."""

    engine: int
    rank: int


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_threads(config: RunConfig, cores: int) -> Threads:
    """Cores shared out evenly over engines and learner ranks, at least one each, where the config names no number."""
    share = max(1, cores // (config.generators.count + config.learner.ranks))
    return Threads(engine=config.generators.threads or share, rank=config.learner.threads_per_rank or share)


def longest_group_tokens(config: RunConfig) -> int:
    """Tokens of the longest row the learner can meet; with packing per_answer that of a group's longest answer."""
    return config.longest_row_tokens


def memory_bytes(config: RunConfig, parameters: int) -> int:
    """Host memory of a whole run on CPU; of a CUDA run only its processes, as weights live on the devices. Rough."""
    processes = BYTES_PER_PROCESS * (1 + 2 * config.generators.count + config.learner.ranks)
    if config.device == "cuda":
        return processes + 2 * BYTES_PER_PARAMETER_EXPORT * parameters
    training = BYTES_PER_PARAMETER_TRAINING * parameters
    cache = int(config.generators.kv_cache_gib * GIB)
    sampling = config.generators.count * (2 * BYTES_PER_PARAMETER_EXPORT * parameters + cache)
    buffered = min(config.buffer.max_bytes, (config.staleness.max_lag + 1) * _batch_bytes(config))
    return processes + training + sampling + shared_memory_bytes(parameters) + buffered


def shared_memory_bytes(parameters: int) -> int:
    """Shared memory of weight updates: the version being read and the next one being written."""
    return 2 * BYTES_PER_PARAMETER_EXPORT * parameters


def checkpoint_bytes(parameters: int, config: RunConfig) -> int:
    """Disk of one checkpoint: sharded fp32 state, a moving reference with it, and the bf16 Hugging Face export."""
    return (_state_bytes(config) + BYTES_PER_PARAMETER_EXPORT) * parameters


def _state_bytes(config: RunConfig) -> int:
    """Of fp32 state, per parameter: master and both moments, and the mean of masters that a KL term may pull to."""
    moving = config.algorithm.kl is not None and config.algorithm.kl.reference == "ema"
    return BYTES_PER_PARAMETER_STATE + (4 if moving else 0)


def checkpoints_at_once(config: RunConfig) -> int:
    """Complete checkpoints on disk at the fullest moment: those that stay, and the one that replaces the oldest."""
    return min(config.checkpoint.keep + 1, math.ceil(config.run.steps / config.checkpoint.every_steps))


def disk_shortfall(config: RunConfig, folder: pathlib.Path) -> str | None:
    """What is wrong with the disk of the run directory `folder`, with the fix; None where its checkpoints will fit.

    What lies in the folder already counts as room: a resumed run replaces it.
    """
    parameters = model_size.count_parameters(config.model.path)
    if parameters is None:
        return None
    there = sum(file.stat().st_size for file in folder.glob("checkpoints/**/*") if file.is_file())
    needed = checkpoints_at_once(config) * checkpoint_bytes(parameters, config)
    free = shutil.disk_usage(folder).free
    if free + there >= needed:
        return None
    return (
        f"the disk of {folder} has {free:,} bytes free, but {checkpoints_at_once(config)} checkpoints of "
        f"{checkpoint_bytes(parameters, config):,} bytes will be there at once; free some space, set run.dir to "
        f"another disk, or lower checkpoint.keep (now {config.checkpoint.keep})"
    )


def devices_needed(config: RunConfig) -> int:
    """GPUs that the run occupies; 0 on CPU."""
    engines = config.generators.count * config.generators.tensor_parallel
    return engines + config.learner.ranks if config.device == "cuda" else 0


def arithmetic(config: RunConfig, cores: int) -> tuple[Row, ...]:
    """Every derived quantity a person should see before paying for a run. cores counts the CPU cores of a node."""
    parameters = model_size.count_parameters(config.model.path)
    return (
        *_batch_rows(config),
        *_prompt_rows(config),
        *_ahead_rows(config),
        *_evaluation_rows(config),
        *_process_rows(config, cores),
        *_size_rows(config, parameters),
    )


def problems(config: RunConfig, resolve_reward: ResolveReward) -> list[str]:
    """What would stop this run at its start: each with fact, value and fix; empty where nothing was found.

    resolve_reward finds a reward by its `use` and raises ValueError if there is none: rewards.loading.resolve.
    """
    found = [model_size.missing(config.model.path)]
    found += validate(config.sources)
    for name, function in config.rewards.functions.items():
        try:
            resolve_reward(function.use)
        except ValueError as error:
            found.append(f"rewards.functions.{name}: {error}")
    try:
        check_name(config.curriculum.name)
    except ValueError as error:
        found.append(str(error))
    needed, cap = _batch_bytes(config), config.buffer.max_bytes
    if needed > cap:
        found.append(
            f"buffer.max_bytes {cap} cannot hold one batch of full-length answers, about {needed} bytes: sampling "
            f"would wait for ever; raise it to {4 * needed} or more"
        )
    return [problem for problem in found if problem]


def render(rows: tuple[Row, ...], title: str) -> Table:
    """The arithmetic as a table, one section per area."""
    view = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name in ("area", "what", "value", "how"):
        view.add_column(name, style="dim" if name in ("area", "how") else "", overflow="fold")
    shown = ""
    for row in rows:
        view.add_row(row.area if row.area != shown else "", row.what, row.value, row.how)
        shown = row.area
    return view


def _batch_bytes(config: RunConfig) -> int:
    """Payload of one batch in the buffer when every answer is as long as allowed."""
    return config.trajectories_per_step * config.rollout.max_tokens * BYTES_PER_SAMPLED_TOKEN


def _prompt_rows(config: RunConfig) -> list[Row]:
    """What the difficulty that `rl screen` wrote leaves out; an unreadable file is a problem, and told as one."""
    try:
        left_out = left_out_by_difficulty(config.sources)
    except ValueError:
        return []
    return [
        Row("batch", f"prompts of {name} left out", f"{count:,} of {total:,}", f"outside sources.{name}.difficulty")
        for name, (count, total) in left_out.items()
    ]


def _batch_rows(config: RunConfig) -> list[Row]:
    groups, size, longest = config.learner.groups_per_step, config.rollout.group_size, longest_group_tokens(config)
    shared = config.learner.packing == "shared_prefix"
    rows, unit = (groups, "group") if shared else (config.trajectories_per_step, "answer")
    stands = "once before its answers" if shared else "before each answer"
    rows_fit = config.learner.micro_batch_tokens // longest
    rows_of_rank = math.ceil(groups / config.learner.ranks) * (rows // groups)
    return [
        Row(
            "batch", "trajectories per step", _count(config.trajectories_per_step), f"{groups} groups x {size} answers"
        ),
        Row(
            "batch",
            "sampled tokens per step, at most",
            _count(config.trajectories_per_step * config.rollout.max_tokens),
            f"{config.rollout.max_tokens} tokens per answer",
        ),
        Row(
            "batch",
            "packed tokens per step, at most",
            _count(rows * longest),
            f"{longest} per {unit}: a prompt of up to {config.max_prompt_tokens} tokens stands {stands}",
        ),
        Row(
            "batch",
            "micro-batches per rank, at full length",
            _count(math.ceil(rows_of_rank / rows_fit)),
            f"{rows_of_rank} {unit}s per rank, {rows_fit} in {config.learner.micro_batch_tokens} tokens",
        ),
        Row("batch", "trajectories in the run", _count(config.trajectories_per_step * config.run.steps), "trained"),
    ]


def _ahead_rows(config: RunConfig) -> list[Row]:
    lag, groups = config.staleness.max_lag, config.max_groups_ahead
    in_flight, engines = groups * config.rollout.group_size, config.generators
    slots = engines.count * engines.max_sequences
    return [
        Row("lag", "lag, at most", f"{lag} policy versions", "synchronous" if lag == 0 else "older groups are dropped"),
        Row(
            "lag",
            "groups in flight and buffered, at most",
            _count(groups),
            f"(max_lag {lag} + 1) x {config.learner.groups_per_step}",
        ),
        Row(
            "lag",
            "sequences decoded together, at most",
            _count(min(slots, in_flight)),
            f"{engines.count} x {engines.max_sequences} slots, {in_flight} trajectories permitted",
        ),
    ]


def _evaluation_rows(config: RunConfig) -> list[Row]:
    levels = {name: _held_out_levels(source) for name, source in config.sources.items()}
    prompts = sum(levels.values()) * config.evaluation.prompts_per_level
    parts = ", ".join(f"{name} {count}" for name, count in levels.items())
    times = len({0, config.run.steps, *range(0, config.run.steps, config.evaluation.every_steps)})
    return [
        Row(
            "evaluation",
            "held-out prompts, each time",
            _count(prompts),
            f"{config.evaluation.prompts_per_level} per level; levels: {parts}",
        ),
        Row("evaluation", "times", _count(times), f"before, every {config.evaluation.every_steps} steps, after"),
    ]


def _held_out_levels(source: Source) -> int:
    """Levels that are evaluated; a file's own levels are known only when it is read, so it counts as one."""
    match source:
        case ReasoningGymSource():
            return len(source.levels)
        case JsonlSource():
            return int(source.held_out_path is not None)
        case HubSource():
            return int(source.held_out_split is not None)


def _process_rows(config: RunConfig, cores: int) -> list[Row]:
    threads, generators = share_threads(config, cores), config.generators
    where = "GPU" if config.device == "cuda" else "CPU"
    server = "embedded, on this machine" if config.buffer.redis is None else "the server of buffer.redis"
    rows = [
        Row("processes", "driver", "1 process", "gate, curriculum, ledger"),
        Row("processes", "Redis", "1 process" if config.buffer.redis is None else "none", server),
        Row(
            "processes",
            "generators",
            f"{generators.count} x (Ray actor + vLLM engine)",
            f"{where}, {generators.tensor_parallel} device(s) each"
            if where == "GPU"
            else f"CPU, {threads.engine} thread(s) and {generators.kv_cache_gib:g} GiB of cache each",
        ),
        Row(
            "processes",
            "reward workers",
            f"{generators.count * config.rewards.workers} child process(es)",
            f"{config.rewards.workers} per generator",
        ),
        Row(
            "processes",
            "learner ranks",
            f"{config.learner.ranks} Ray actor(s)",
            f"{where}, {config.learner.compute_dtype}, {threads.rank} thread(s) each",
        ),
        Row("processes", "weight updates", config.weight_backend.replace("_", " "), "verified by digest and canary"),
    ]
    if where == "GPU":
        rows.append(Row("processes", "GPUs", _count(devices_needed(config)), "engines and ranks share none"))
    return rows


def _size_rows(config: RunConfig, parameters: int | None) -> list[Row]:
    if parameters is None:
        return [Row("size", "parameters", "unknown", "until the model is downloaded; a checkpoint takes 14 bytes each")]
    kept = config.checkpoint.keep
    return [
        Row("size", "parameters", f"{parameters / 1e6:,.1f} million", config.model.path),
        Row("size", "one weight update", _size(BYTES_PER_PARAMETER_EXPORT * parameters), "bf16, to every generator"),
        Row(
            "size",
            "one checkpoint",
            _size(checkpoint_bytes(parameters, config)),
            f"fp32 state {_state_bytes(config)} + export 2 bytes/parameter",
        ),
        Row(
            "size",
            "checkpoints on disk, at most",
            _size(checkpoints_at_once(config) * checkpoint_bytes(parameters, config)),
            f"{kept} kept and one being written, one every {config.checkpoint.every_steps} steps",
        ),
        Row("size", "host memory, roughly", _size(memory_bytes(config, parameters)), "all processes together"),
    ]


def _count(number: int) -> str:
    return f"{number:,}"


def _size(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / (1 << 20):.0f} MiB"
