"""This file turns the rewards of a batch of groups into advantages: how much better an answer is than its siblings.

Every estimator takes the stored rewards of all groups of a batch, R_i of each group [G], None where judging failed, and
returns advantages of the same shape, None in the same places: a failure has no advantage and no share in any mean.
Notation: m the mean of a group's scored rewards, s their standard deviation; all deviations are the population's.

Computed in fp64 with exact sums, so that the order of answers and of groups changes no bit. Where all scored rewards of
a group are equal the group says nothing: its advantages are exactly 0 and it has no share in statistics of the batch,
so that it is the same whether such a group was dropped on its way here or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rl.algorithm_config import AdvantageName

Rewards = Sequence[float | None]
Advantages = tuple[float | None, ...]
Estimator = Callable[[Sequence[Rewards]], list[Advantages]]

EPSILON = 1e-6  # keeps a deviation of rounding size from blowing noise up


def grpo(batch: Sequence[Rewards]) -> list[Advantages]:
    """(R_i - m) / (s + epsilon). GRPO, arXiv 2402.03300."""
    centred = dr_grpo(batch)
    return [_scaled(group, 1 / (_root_mean_square([group]) + EPSILON)) for group in centred]


def dr_grpo(batch: Sequence[Rewards]) -> list[Advantages]:
    """R_i - m. Dr. GRPO, arXiv 2503.20783: dividing by s would favour prompts that are too easy or too hard."""
    return [_minus(group, _mean(_scored(group))) if _informs(group) else _zeros(group) for group in batch]


def rloo(batch: Sequence[Rewards]) -> list[Advantages]:
    """R_i - mean of the others, which is (R_i - m) G / (G - 1). Leave-one-out, arXiv 2402.14740."""
    counts = [len(_scored(group)) for group in batch]
    return [_scaled(group, n / max(1, n - 1)) for group, n in zip(dr_grpo(batch), counts, strict=True)]


def reinforce_pp(batch: Sequence[Rewards]) -> list[Advantages]:
    """(R_i - mean of the batch) / (deviation of the batch + epsilon). REINFORCE++, arXiv 2501.03262.

    The paper takes R_i minus a KL penalty per token; here the penalty is algorithm.kl, a term of the loss.
    """
    informing = [group for group in batch if _informs(group)]
    mean = _mean([reward for group in informing for reward in _scored(group)])
    centred = [_minus(group, mean) if _informs(group) else _zeros(group) for group in batch]
    return _whitened(centred, informing)


def reinforce_pp_baseline(batch: Sequence[Rewards]) -> list[Advantages]:
    """(R_i - m) / (deviation of R_i - m over the batch + epsilon). REINFORCE++-baseline, arXiv 2501.03262.

    The mean of R_i - m over the batch is 0 already, so whitening is only the division.
    """
    return batch_std(batch)


def max_rl(batch: Sequence[Rewards]) -> list[Advantages]:
    """(R_i - m) / m, and 0 where m <= 0. MaxRL, arXiv 2602.02710: the gradient of a bound on log pass rate.

    Made for rewards in {0, 1}: the sum of score functions over successes, divided by the number of successes. A reward
    below 0 would turn signs around, which is why rl/algorithm_config.py refuses what can make one.
    """
    means = [_mean(_scored(group)) for group in batch]
    return [
        _scaled(group, 1 / mean) if mean > 0 else _zeros(group)
        for group, mean in zip(dr_grpo(batch), means, strict=True)
    ]


def batch_std(batch: Sequence[Rewards]) -> list[Advantages]:
    """(R_i - m) / (deviation of R_i - m over the batch + epsilon). ScaleRL, arXiv 2510.13786."""
    return _whitened(dr_grpo(batch), [group for group in batch if _informs(group)])


def _scored(group: Sequence[float | None]) -> list[float]:
    return [value for value in group if value is not None]


def _informs(group: Rewards) -> bool:
    """Whether two scored rewards differ: exact, where a computed deviation may be 1e-17."""
    scored = _scored(group)
    return bool(scored) and min(scored) != max(scored)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))


def _minus(group: Rewards, baseline: float) -> Advantages:
    return tuple(None if reward is None else reward - baseline for reward in group)


def _scaled(group: Advantages, factor: float) -> Advantages:
    return tuple(None if value is None else value * factor for value in group)


def _zeros(group: Rewards) -> Advantages:
    return tuple(None if reward is None else 0.0 for reward in group)


def _root_mean_square(groups: Sequence[Advantages]) -> float:
    return math.sqrt(_mean([value * value for group in groups for value in _scored(group)]))


def _whitened(centred: list[Advantages], informing: Sequence[Rewards]) -> list[Advantages]:
    """Divide by the deviation over the groups that inform; the others are zeros and add nothing to the squares."""
    count = sum(len(_scored(group)) for group in informing)
    squares = math.fsum(value * value for group in centred for value in _scored(group))
    deviation = math.sqrt(squares / max(1, count))
    return [_scaled(group, 1 / (deviation + EPSILON)) for group in centred]


ADVANTAGES: dict[AdvantageName, Estimator] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "max_rl": max_rl,
    "batch_std": batch_std,
}
