"""This file makes the random batch on which objectives are compared with their references.

Nested lists of floats, answer by answer, because that is what a reference transcribed from a paper reads; `tokens_of`
gives the same as the flat tensors of learners/losses.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from learners.losses import Tokens

MAX_TOKENS = 9


@dataclass(frozen=True)
class Answer:
    """One trajectory: per token log-probabilities of the policy, the sampler and the reference, lag, entropy."""

    reward: float
    policy: tuple[float, ...]
    sampler: tuple[float, ...]
    reference: tuple[float, ...]
    lags: tuple[int, ...]
    entropy: tuple[float, ...]
    truncated: bool


Batch = tuple[tuple[Answer, ...], ...]


def random_batch(seed: int = 0, groups: int = 3, answers: int = 4, spread: float = 0.6) -> Batch:
    """Groups whose rewards differ. Ratios are far enough from 1 that every clip, cap and mask has something to do."""
    rng = random.Random(seed)

    def answer(reward: float) -> Answer:
        count = rng.randint(1, MAX_TOKENS)
        policy = tuple(-rng.uniform(0.02, 3.0) for _ in range(count))
        shift = rng.gauss(0, spread / 2)  # an answer's ratios lean one way, as they do, or products would cancel
        return Answer(
            reward=reward,
            policy=policy,
            sampler=tuple(min(-0.01, value + shift + rng.gauss(0, spread)) for value in policy),
            reference=tuple(value + rng.gauss(0, spread) for value in policy),
            lags=tuple(sorted((rng.randint(0, 4) for _ in range(count)), reverse=True)),
            entropy=tuple(rng.uniform(0.1, 2.0) for _ in range(count)),
            truncated=rng.random() < 0.25,
        )

    rewards = [[rng.choice((0.0, 0.25, 1.0)) for _ in range(answers - 2)] + [0.0, 1.0] for _ in range(groups)]
    return tuple(tuple(answer(reward) for reward in group) for group in rewards)


def answers_of(batch: Batch) -> list[Answer]:
    """All answers in the order in which their tokens lie in tensors."""
    return [answer for group in batch for answer in group]


def rewards_of(batch: Batch) -> list[list[float]]:
    """rewards[g][i]."""
    return [[answer.reward for answer in group] for group in batch]


def lengths_of(batch: Batch) -> list[list[int]]:
    """lengths[g][i]."""
    return [[len(answer.policy) for answer in group] for group in batch]


def per_token(batch: Batch, values: Sequence[Sequence[float]]) -> torch.Tensor:
    """values[g][i] of each answer, repeated over its tokens [N]."""
    flat = [value for group in values for value in group]
    spread = [value for value, answer in zip(flat, answers_of(batch), strict=True) for _ in answer.policy]
    return torch.tensor(spread, dtype=torch.float64)


def tokens_of(batch: Batch, advantages: Sequence[Sequence[float]], cutoff: float = float("inf")) -> Tokens:
    """The batch as one micro-batch; log π and entropy are leaves with gradient."""
    answers = answers_of(batch)

    def flat(field: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor([value for answer in answers for value in getattr(answer, field)], dtype=dtype)

    return Tokens(
        logprobs_N=flat("policy").requires_grad_(),
        behaviour_N=flat("sampler"),
        advantages_N=per_token(batch, advantages),
        lags_N=flat("lags"),
        sequence_N=torch.tensor([index for index, answer in enumerate(answers) for _ in answer.policy]),
        truncated_N=torch.tensor([answer.truncated for answer in answers for _ in answer.policy]),
        entropy_N=flat("entropy").requires_grad_(),
        reference_N=flat("reference"),
        cutoff=cutoff,
    )
