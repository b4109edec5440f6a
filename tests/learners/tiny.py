"""This file gives the learner tests a tiny random Llama, random groups, and a way to run ranks as real processes."""

from __future__ import annotations

import multiprocessing
import pathlib
import random
import traceback
from collections.abc import Callable, Sequence

import msgspec
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learners.batcher import BatchPlan
from learners.learner import Learner, LearnerSettings
from rl.algorithm_config import AlgorithmSection
from rl.codec import entry_of
from rl.config import LearnerSection
from rl.orders import StepOrder
from rl.trajectory import Completion, Group, GroupEntry, Prompt, Trajectory, VersionSpan

VOCABULARY = 61


def save_tiny_llama(directory: pathlib.Path, tied: bool = True, seed: int = 0) -> str:
    """Two layers, grouped-query attention, 61 tokens; large enough weights that answers differ in likelihood."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


def random_group(index: int, rewards: Sequence[float | None] = (0.0, 1.0, 0.5, 0.0), max_tokens: int = 9) -> Group:
    """A group with random lengths and tokens; the first half of each answer is of version 0, the rest of version 1."""
    rng = random.Random(index)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high)))

    trajectories = []
    for reward in rewards:
        ids = tokens(2, max_tokens)
        middle = len(ids) // 2
        completion = Completion(
            text="",
            token_ids=ids,
            logprobs=tuple(-rng.uniform(2.0, 6.0) for _ in ids),
            spans=(VersionSpan(0, 0, middle), VersionSpan(1, middle, len(ids))),
            finish_reason="stop",
        )
        trajectories.append(Trajectory(completion=completion, reward=reward, parts=()))
    prompt = Prompt(
        prompt_id=f"p{index}",
        source="sums",
        level="easy",
        messages=(),
        reference=None,
        columns={},
        token_ids=tokens(3, 8),
    )
    return Group(group_id=f"g{index}", draw=index, prompt=prompt, trajectories=tuple(trajectories), finished_at=0.0)


def order_of(groups: Sequence[Group], step: int = 1, first: bool = False) -> StepOrder:
    """Train this batch at version 1."""
    entries = tuple(entry_of(group, 1) for group in groups)
    return StepOrder(step=step, version=1, entries=entries, first=first)


def settings_for(model_dir: str, folder: pathlib.Path, algorithm: str = "cispo", **learner) -> LearnerSettings:
    """Settings with a rendezvous of their own in this folder."""
    options = {"micro_batch_tokens": 256, "lr": 1e-2, "max_grad_norm": 1e9} | learner
    folder.mkdir(parents=True, exist_ok=True)
    return LearnerSettings(
        run_id=f"test-{abs(hash(str(folder)))}",
        model_dir=model_dir,
        device="cpu",
        rendezvous=f"file://{folder}/rendezvous",
        temperature=0.8,
        max_tokens=9,
        canary_token_ids=(5, 6, 7, 8),
        node="here",
        threads=1,
        deadline_s=60.0,
        learner=LearnerSection(**options),
        algorithm=AlgorithmSection(name=algorithm),
    )


def make_learner(
    settings: LearnerSettings,
    groups: Sequence[Group],
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype | None = torch.float64,
) -> Learner:
    """A learner that fetches from these groups."""
    by_id = {group.group_id: group for group in groups}
    return Learner(settings, rank, world_size, lambda ids: [by_id[group_id] for group_id in ids], dtype=dtype)


def plan_within(learner: Learner, entries: Sequence[GroupEntry], ranks: int, budget: int) -> BatchPlan:
    """The learner's plan, for so many ranks, with forward passes of at most `budget` padded tokens."""
    options = msgspec.structs.replace(
        learner._settings, learner=learner._settings.learner.model_copy(update={"micro_batch_tokens": budget})
    )
    before, learner._settings = learner._settings, options
    try:
        return learner._plan_for(entries, ranks)
    finally:
        learner._settings = before


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sharded tensors to plain copies. A collective."""
    return {name: getattr(tensor, "full_tensor", lambda t=tensor: t)().clone() for name, tensor in tensors.items()}


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    """The master weights."""
    return whole({name: parameter.detach() for name, parameter in learner.policy.model.named_parameters()})


def gradients_of(learner: Learner) -> dict[str, torch.Tensor]:
    """The gradients left by accumulate_gradient."""
    return whole({name: parameter.grad for name, parameter in learner.policy.model.named_parameters()})


def run_ranks(function: Callable[..., None], world_size: int, *arguments: object) -> None:
    """Call function(rank, world_size, *arguments) in as many fresh processes; raises with the first traceback."""
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    processes = [
        context.Process(target=_guarded, args=(failures, function, rank, world_size, *arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError("a rank did not end within 120 s")
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0] * world_size


def _guarded(failures, function: Callable[..., None], *arguments: object) -> None:
    try:
        function(*arguments)
    except BaseException:  # told to the test that waits for this process, which fails with it
        failures.put(traceback.format_exc())
        raise
