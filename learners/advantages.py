"""This file turns the rewards of one group into advantages: how much better an answer is than its siblings.

Every function takes the stored rewards R_i [G], None where judging failed, and returns the advantages [G], None in the
same places: a failure has no advantage, and no share in its siblings' mean. Computed in fp64; where all scored rewards
are equal the group says nothing, and every advantage is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Rewards = Sequence[float | None]
Advantages = tuple[float | None, ...]
Estimator = Callable[[Rewards], Advantages]

EPSILON = 1e-6


def grpo(rewards: Rewards) -> Advantages:
    """(R_i - mean) / (standard deviation + epsilon), population form. GRPO, arXiv 2402.03300."""
    centred = dr_grpo(rewards)
    scored = [value for value in centred if value is not None]
    deviation = math.sqrt(math.fsum(value * value for value in scored) / max(1, len(scored)))
    return tuple(None if value is None else value / (deviation + EPSILON) for value in centred)


def dr_grpo(rewards: Rewards) -> Advantages:
    """R_i - mean. Dr. GRPO, arXiv 2503.20783: dividing by the deviation would favour too easy and too hard prompts."""
    scored = [reward for reward in rewards if reward is not None]
    if not scored or min(scored) == max(scored):  # exact, where a computed deviation may be 1e-17
        return tuple(None if reward is None else 0.0 for reward in rewards)
    mean = math.fsum(scored) / len(scored)
    return tuple(None if reward is None else reward - mean for reward in rewards)


def rloo(rewards: Rewards) -> Advantages:
    """R_i - mean of the others, which is (R_i - mean) * G / (G - 1). Leave-one-out, arXiv 2402.14740."""
    count = sum(reward is not None for reward in rewards)
    return tuple(None if value is None else value * count / max(1, count - 1) for value in dr_grpo(rewards))
