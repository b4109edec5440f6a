"""This file says what each token of a batch weighs in the scalar that a step minimises: the sum of weight * loss.

Every function takes lengths[g][i], the answer tokens of the i-th scored trajectory of group g, for the whole batch over
all ranks, and max_tokens, the longest answer that sampling allows; it returns weights[g][i], for each token of that
trajectory. Counted before anything is masked: were the masked tokens left out, the more is masked the more the rest
would weigh, and a batch that is nearly all off-policy would take a full step on its remains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rl.algorithm_config import AggregationName

Lengths = Sequence[Sequence[int]]
Aggregation = Callable[[Lengths, int], list[list[float]]]


def token_mean(lengths: Lengths, max_tokens: int) -> list[list[float]]:
    """1 / (tokens of the batch): every token weighs the same. DAPO, arXiv 2503.14476."""
    weight = 1 / max(1, sum(map(sum, lengths)))
    return [[weight for _ in group] for group in lengths]


def sequence_mean(lengths: Lengths, max_tokens: int) -> list[list[float]]:
    """1 / (trajectories of the batch * tokens of this one): every answer weighs the same. GRPO, arXiv 2402.03300.

    A long wrong answer is punished less per token than a short one, which Dr. GRPO names a bias towards length.
    """
    count = sum(map(len, lengths))
    return [[1 / (count * max(1, length)) for length in group] for group in lengths]


def constant_length(lengths: Lengths, max_tokens: int) -> list[list[float]]:
    """1 / (trajectories of the batch * max_tokens): none gains by its length. Dr. GRPO, arXiv 2503.20783."""
    weight = 1 / max(1, sum(map(len, lengths)) * max_tokens)
    return [[weight for _ in group] for group in lengths]


def prompt_mean(lengths: Lengths, max_tokens: int) -> list[list[float]]:
    """1 / (groups of the batch * tokens of this group): every prompt weighs the same. ScaleRL, arXiv 2510.13786.

    A group without a scored trajectory is no group of the batch.
    """
    count = sum(bool(group) for group in lengths)
    return [[1 / (count * max(1, sum(group))) for _ in group] for group in lengths]


AGGREGATIONS: dict[AggregationName, Aggregation] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant_length": constant_length,
    "prompt_mean": prompt_mean,
}
