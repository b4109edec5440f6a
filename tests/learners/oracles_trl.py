"""This file drives TRL's trainers on a batch, as a second implementation of what they have in common with ours.

The trainers are built once, around a model of a few weights that is never run: the one method that would run it answers
with the batch's own log-probabilities, fp64, of which log π is the leaf that the gradient is taken of. Everything after
that, from rewards to the scalar, is TRL's code. Its knobs are set on the trainer as its constructor would.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.learners.oracles_batch import MAX_TOKENS, Batch, answers_of

VERSION = "1.16"
EPSILON = 1e-4  # what TRL adds to a deviation; ours is learners/advantages.py EPSILON
LETTER, END, PADDING = 3, 1, 0


@dataclass(frozen=True)
class Knobs:
    """How a trainer is set. sampler says where TRL looks for μ: as its old policy, or behind vLLM's correction."""

    trainer: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    sampler: str = "old"


def loss(batch: Batch, advantages: list[list[float]], knobs: Knobs) -> tuple[float, list[float]]:
    """GRPOTrainer's scalar on the batch with these advantages, and its gradient with respect to each token's log π."""
    trainer = _trainer("GRPO")
    answers = answers_of(batch)
    policy = _padded([answer.policy for answer in answers]).requires_grad_()
    with _set(trainer, knobs, policy, batch):
        inputs = trainer._generate_and_score_completions([{"prompt": "a"} for _ in answers])
        if knobs.sampler == "old":
            inputs["old_per_token_logps"] = _padded([answer.sampler for answer in answers])
        inputs["advantages"] = torch.tensor([value for group in advantages for value in group], dtype=torch.float64)
        scalar = trainer._compute_loss(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(scalar, policy)
    return scalar.item(), [gradient[s, t].item() for s, answer in enumerate(answers) for t in range(len(answer.policy))]


def advantages(batch: Batch, kind: str, knobs: Knobs) -> list[float]:
    """The advantages that a GRPO or RLOO trainer gives the batch's rewards, flat."""
    trainer = _trainer(kind)
    with _set(trainer, knobs, _padded([answer.policy for answer in answers_of(batch)]), batch):
        prompts = [{"prompt": "a"} for _ in answers_of(batch)]
        return trainer._generate_and_score_completions(prompts)["advantages"].tolist()


def _padded(rows: list[tuple[float, ...]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)


@contextlib.contextmanager
def _set(trainer: Any, knobs: Knobs, policy: torch.Tensor, batch: Batch) -> Iterator[None]:
    """The trainer with these knobs and this batch, for a while. Its lists of floats become fp64 tensors."""
    answers, reference_model = answers_of(batch), object()
    reference = _padded([answer.reference for answer in answers])

    def generate(prompts: list) -> tuple:
        ids = [[LETTER] * (len(a.policy) - 1) + [LETTER if a.truncated else END] for a in answers]
        texts, sampled = ["a"] * len(ids), [list(answer.sampler) for answer in answers]
        short = ([[LETTER]] * len(ids), ids, texts)
        return short if "RLOO" in type(trainer).__name__ else (*short[:2], None, texts, sampled, {}, None, None)

    def log_probabilities(model: object, *_: object, **__: object) -> tuple:
        own = policy if torch.is_grad_enabled() else policy.detach()
        return (reference if model is reference_model else own), torch.zeros_like(policy), None

    own = {
        "_generate": generate,
        "_get_per_token_logps_and_entropies": log_probabilities,
        "_calculate_rewards": lambda *_: torch.tensor([[a.reward] for a in answers], dtype=torch.float64),
        "num_generations": len(batch[0]),
        "max_completion_length": MAX_TOKENS,
        "ref_model": reference_model,
        "current_gradient_accumulation_steps": 1,
        "use_vllm": knobs.sampler == "vllm",
        **knobs.trainer,
    }
    before = {name: getattr(trainer, name, None) for name in own}
    args_before = {name: getattr(trainer.args, name) for name in knobs.args}
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        for name, value in own.items():
            setattr(trainer, name, value)
        for name, value in knobs.args.items():
            setattr(trainer.args, name, value)
        yield
    finally:
        torch.set_default_dtype(dtype)
        for name, value in before.items():
            setattr(trainer, name, value)
        for name, value in args_before.items():
            setattr(trainer.args, name, value)


@functools.cache
def _trainer(kind: str) -> Any:
    # trl would import vLLM for a server it may generate with, which takes as long as everything else here
    importlib.import_module("trl.import_utils").is_vllm_available = lambda *_, **__: False
    import datasets
    import trl
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": PADDING, "<end>": END, "<unk>": 2, "a": LETTER}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    shape = LlamaConfig(
        vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, eos_token_id=1
    )
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, f"{kind}Config")(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            num_generations=4,
            beta=0.0,
            gradient_checkpointing=False,
        )
        return getattr(trl, f"{kind}Trainer")(
            model=LlamaForCausalLM(shape),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 4),
            processing_class=tokenizer,
        )
