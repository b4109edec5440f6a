"""This file reduces a value of each token over the trajectory that it belongs to.

Shapes: N answer tokens of a micro-batch, S its trajectories.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def over_sequence(values_N: Tensor, sequence_N: Tensor, how: Literal["sum", "mean"]) -> Tensor:
    """The sum or mean over each trajectory, given back to each of its tokens [N]. sequence_N holds 0..S-1 (long)."""
    count = int(sequence_N.max()) + 1 if len(sequence_N) else 0
    sums_S = values_N.new_zeros(count).index_add(0, sequence_N, values_N)
    if how == "mean":
        sums_S = sums_S / values_N.new_zeros(count).index_add(0, sequence_N, torch.ones_like(values_N))
    return sums_S[sequence_N]
