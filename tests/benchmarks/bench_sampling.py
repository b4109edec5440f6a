"""This file measures sampling: real engines on the default model, started as Slipstream does and as vLLM would.

Run it as `python tests/benchmarks/bench_sampling.py`; about ten minutes, `--quick` one. "one process, block 32" is what
actors/engine_arguments.py asks for; "worker apart, block 128" is vLLM's own choice on a CPU, all else being equal.
Engines take turns, and one whose turn it is not is stopped by a signal, since it may poll. A token costs 2 FLOP for
each parameter (attention not counted); the ceiling is the rate of large bf16 products on all cores, measured before
each turn. CPU seconds are those of the engine's processes and of this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import psutil
from safetensors import safe_open
from vllm import AsyncEngineArgs

from actors.chat import ChatTokenizer
from actors.engine import EngineSettings, SampleRequest
from actors.engine_arguments import engine_arguments
from actors.vllm_engine import VllmEngine
from learners.gguf_import import resolve_model
from rl.trajectory import Message, TextPart
from tests.benchmarks.report import Table, options, publish, ratio
from tests.conftest import DEFAULT_MODEL, REPOSITORY

IN_FLIGHT = (16, 32, 64, 96)
GROUP_SIZE, TOKENS, ROUNDS = 8, 64, 5
QUESTION = "Tell a long story about {}, with every detail."
SUBJECTS = ("a lighthouse", "two foxes", "a clock", "the sea", "a market", "a train", "a map", "winter")
OURS, VLLMS = "one process, block 32", "worker apart, block 128"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One engine that takes its turns."""

    name: str
    threads: int
    engine: VllmEngine
    start_s: float


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one turn of an engine measured."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    ceiling_gflops: float


@contextlib.contextmanager
def as_vllm_would() -> Iterator[None]:
    """Have engines started inside be configured as vLLM configures itself on a CPU."""

    def arguments(settings: EngineSettings) -> AsyncEngineArgs:
        return dataclasses.replace(engine_arguments(settings), block_size=128, distributed_executor_backend="mp")

    with mock.patch("actors.vllm_engine.engine_arguments", arguments):
        yield


async def started(name: str, threads: int, model_dir: str) -> Arm:
    """An engine of one kind; it is stopped until its turn."""
    settings = EngineSettings(
        name=f"{name}, {threads} threads",
        model_dir=model_dir,
        device="cpu",
        weight_backend="shared_memory",
        max_context_tokens=256,
        max_sequences=max(IN_FLIGHT),
        kv_cache_gib=0.5,
        threads=threads,
    )
    began = time.perf_counter()
    with as_vllm_would() if name == VLLMS else contextlib.nullcontext():
        engine = await VllmEngine.start(settings)
    arm = Arm(name, threads, engine, time.perf_counter() - began)
    signalled(arm, signal.SIGSTOP)
    return arm


def signalled(arm: Arm, number: signal.Signals) -> None:
    """Stop an engine's processes, or let them go on."""
    for pid in arm.engine.pids:
        os.kill(pid, number)


def cpu_seconds(arm: Arm) -> float:
    """What the engine and this process have used."""
    times = [psutil.Process(pid).cpu_times() for pid in (os.getpid(), *arm.engine.pids)]
    return sum(each.user + each.system for each in times)


def ceiling() -> float:
    """GFLOP/s of large bf16 products on all cores, now."""
    program = pathlib.Path(__file__).with_name("matmul_rate.py")
    return float(subprocess.run([sys.executable, program], check=True, capture_output=True, text=True).stdout)


def requests(model_dir: str, in_flight: int, seed: int) -> list[SampleRequest]:
    """So many sequences, in groups."""
    chat = ChatTokenizer(model_dir)
    prompts = [chat.render((Message("user", (TextPart(QUESTION.format(each)),)),)) for each in SUBJECTS]
    return [
        SampleRequest(
            request_id=f"{seed}/{number}",
            token_ids=prompts[number % len(prompts)],
            count=GROUP_SIZE,
            max_tokens=TOKENS,
            temperature=1.0,
            seed=1000 * seed + number,
        )
        for number in range(in_flight // GROUP_SIZE)
    ]


async def turn(arm: Arm, model_dir: str, in_flight: int, seed: int) -> Turn:
    """Sample once; the first answers of an engine's first turn are not counted."""
    ceiling_gflops, asked = ceiling(), requests(model_dir, in_flight, seed)
    signalled(arm, signal.SIGCONT)
    await arm.engine.probe(60)
    cpu, began = cpu_seconds(arm), time.perf_counter()
    answers = await asyncio.gather(*(arm.engine.sample(request) for request in asked))
    wall_s, cpu_s = time.perf_counter() - began, cpu_seconds(arm) - cpu
    signalled(arm, signal.SIGSTOP)
    tokens = sum(len(completion.token_ids) for group in answers for completion in group)
    return Turn(tokens / wall_s, tokens / cpu_s, ceiling_gflops)


def parameters(model_dir: str) -> int:
    """Numbers in the model; a tied head is counted once, and used once per token."""
    with safe_open(pathlib.Path(model_dir) / "model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def row(arm: Arm, in_flight: int, turns: list[Turn], gflop_per_token: float) -> tuple:
    """One line of the table: medians over the turns."""
    rate = statistics.median(each.tokens_per_s for each in turns)
    per_cpu = statistics.median(each.tokens_per_cpu_s for each in turns)
    share = statistics.median(each.tokens_per_s * gflop_per_token / each.ceiling_gflops for each in turns)
    return arm.name, arm.threads, in_flight, rate, per_cpu, f"{share:.0%}"


def comparison(measured: dict[tuple[Arm, int], list[Turn]], ours: Arm, vllms: Arm) -> Table:
    """Both ways on the same threads, turn by turn."""
    rows = []
    for in_flight in sorted({each for _, each in measured}):
        pairs = measured[ours, in_flight], measured[vllms, in_flight]
        rates = [[each.tokens_per_s for each in turns] for turns in pairs]
        per_cpu = [[each.tokens_per_cpu_s for each in turns] for turns in pairs]
        rows.append((in_flight, ratio(*rates), ratio(*per_cpu)))
    return Table(f"{OURS} over {VLLMS}", ("in flight", "tokens/s", "tokens per CPU second"), tuple(rows))


async def measure(quick: bool, rounds: int) -> None:
    """Start the engines, have them take turns, and report."""
    model_dir = resolve_model(DEFAULT_MODEL, str(REPOSITORY / ".cache" / "models"))
    cores = len(os.sched_getaffinity(0))
    kinds = [(OURS, cores)] if quick else [(OURS, cores), (VLLMS, cores), (OURS, 1)]
    sizes = (64,) if quick else IN_FLIGHT
    arms = [await started(name, threads, model_dir) for name, threads in kinds]
    measured: dict[tuple[Arm, int], list[Turn]] = {(arm, size): [] for arm in arms for size in sizes}
    for arm in arms:
        await turn(arm, model_dir, GROUP_SIZE, seed=0)
    for number in range(rounds):
        for arm, size in measured:
            measured[arm, size].append(await turn(arm, model_dir, size, seed=1 + number))
    for arm in arms:
        signalled(arm, signal.SIGCONT)
        await arm.engine.stop()
    gflop_per_token = 2 * parameters(model_dir) / 1e9
    columns = ("engine", "threads", "sequences in flight", "tokens/s", "tokens per CPU second", "of the bf16 ceiling")
    table = tuple(row(arm, size, turns, gflop_per_token) for (arm, size), turns in measured.items())
    began = tuple((arm.name, arm.threads, arm.start_s) for arm in arms)
    starts = Table("Start of an engine", ("engine", "threads", "s"), began)
    tables = [Table("Sampling", columns, table), starts]
    ceilings = [each.ceiling_gflops for turns in measured.values() for each in turns]
    if not quick:
        tables.append(comparison(measured, arms[0], arms[1]))
    path = publish("sampling", tables, ceiling_gflops=ceilings, gflop_per_token=gflop_per_token)
    print(f"\nbf16 ceiling: {statistics.median(ceilings):.0f} GFLOP/s on {cores} cores; kept as {path}")


if __name__ == "__main__":
    asked_for = options(__doc__.splitlines()[0]).parse_args()
    default = 2 if asked_for.quick else ROUNDS
    asyncio.run(measure(asked_for.quick, asked_for.rounds or default))
