"""This file is the table of algorithms: a name, its advantage, its loss, its aggregation. Where is GRPO? Here.

Add a row for a new combination; add a function beside its like in advantages.py or losses.py for a new part.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from learners import advantages, losses


@dataclass(frozen=True)
class BatchSize:
    """The scored part of a whole batch, over all ranks, counted from metadata before anything is masked.

    num_tokens are sampled tokens; max_tokens is the longest completion that sampling allows.
    """

    num_tokens: int
    num_trajectories: int
    max_tokens: int


Normaliser = Callable[[BatchSize], float]


def token_mean(size: BatchSize) -> float:
    """Every token of the batch weighs the same. DAPO, arXiv 2503.14476."""
    return float(size.num_tokens)


def constant_length(size: BatchSize) -> float:
    """Every trajectory counts as one of full length, so that none gains by its length. Dr. GRPO, arXiv 2503.20783."""
    return float(size.num_trajectories * size.max_tokens)


@dataclass(frozen=True)
class Algorithm:
    """The gradient of a batch is that of sum(loss over its tokens) / normaliser."""

    advantage: advantages.Estimator
    loss: losses.Loss
    normaliser: Normaliser


ALGORITHMS: dict[str, Algorithm] = {
    "cispo": Algorithm(advantages.grpo, losses.cispo, token_mean),
    "dr_grpo": Algorithm(advantages.dr_grpo, losses.cispo, constant_length),
    "rloo": Algorithm(advantages.rloo, losses.cispo, token_mean),
}


def find_algorithm(name: str) -> Algorithm:
    """The table's row of that name. Raises ValueError with the nearest names."""
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise ValueError(f"algorithm.name is {name!r}, but the algorithms are {', '.join(ALGORITHMS)}; {hint}")
    return ALGORITHMS[name]
