"""This file says how vLLM is configured for an EngineSettings: its arguments, and its environment while it starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from vllm import AsyncEngineArgs
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from actors.engine import EngineSettings
from actors.weight_receiver import BACKENDS


def engine_arguments(settings: EngineSettings) -> AsyncEngineArgs:
    """Everything that vLLM takes as an argument."""
    on_cpu = settings.device == "cpu"
    return AsyncEngineArgs(
        model=settings.model_dir,
        dtype="bfloat16",
        hf_overrides={"head_dtype": "float32"} if settings.head_dtype == "float32" else {},
        max_model_len=settings.max_context_tokens,
        max_num_seqs=settings.max_sequences,
        tensor_parallel_size=settings.tensor_parallel,
        # With a worker of its own the core polls shared memory while it waits, which costs a core that others could
        # use. vLLM turns the name "uni" into "mp" on a CPU, because it could not pin threads then; we pin none.
        distributed_executor_backend=UniProcExecutor if on_cpu and settings.tensor_parallel == 1 else None,
        gpu_memory_utilization=settings.gpu_memory_fraction,
        kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30) if on_cpu else None,
        # The CPU kernel attends to whole blocks: with vLLM's 128 a sequence of 40 tokens costs as much as one of 128.
        block_size=32 if on_cpu else None,
        enforce_eager=on_cpu,  # compiling costs minutes on a CPU; on CUDA the graphs are worth it
        # vLLM rewinds a seeded request's generator after each chunk of its prompt, which CPU generators refuse ("CPU
        # Generator does not use offset", vllm/v1/worker/gpu_model_runner.py of 0.32.0): the engine would die.
        enable_chunked_prefill=False if on_cpu else None,
        max_num_batched_tokens=max(2048, settings.max_context_tokens) if on_cpu else None,
        # Priority decides who starts, and who gives way where the cache is full; nobody gives way to who waits.
        scheduling_policy="priority" if settings.by_priority else "fcfs",
        seed=settings.seed,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        worker_extension_cls="actors.worker_extension.WorkerExtension",
        weight_transfer_config=WeightTransferConfig(backend=BACKENDS[settings.weight_backend]),
        disable_log_stats=True,
    )


def engine_variables(settings: EngineSettings) -> dict[str, str]:
    """What vLLM takes from its environment only. nobind: pinned threads would sit on the core the learner uses."""
    variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    variables["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    if settings.device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # vLLM compiles a few helpers even when eager, which ends a worker where there is no C++ compiler
        variables["TORCHDYNAMO_DISABLE"] = "1"
        if settings.threads is not None:
            variables["OMP_NUM_THREADS"] = str(settings.threads)
    return variables


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside, and put back what was there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
