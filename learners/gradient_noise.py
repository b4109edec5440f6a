"""This file estimates how noisy a batch's gradient is, from its norm at two batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from learners.layouts import Share
from rl.metrics import Metrics, mean


class GradientNoise:
    """The simple noise scale tr(Σ) / |G|², in groups: the batch at which noise and signal are of one size.

    McCandlish et al., arXiv 1812.06162, appendix A.1. With g_small the mean gradient over b groups and g_big that over
    B, E|g|² = |G|² + tr(Σ)/size gives unbiased estimates of both:

        |G|² = (B |g_big|² - b |g_small|²) / (B - b),   tr(Σ) = (|g_small|² - |g_big|²) / (1/b - 1/B)

    g_small is what the first half of the micro-batches left, scaled up by their share of the aggregation weights. One
    step's estimates scatter by more than their size, and the ratio is biased: average squared_signal and trace over
    many steps before dividing. A replay of several ranks' step halves the batch elsewhere than they did. Groups without
    a gradient are none of the batch here. Where a group's answers have rows of their own (learner.packing), its parts
    count as independent, and the trace comes out too small where they are not.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_micro_batches: int) -> None:
        self._parameters = parameters
        self._middle = num_micro_batches // 2 - 1  # nothing can be told where there is one micro-batch
        self._half: tuple[float, float] | None = None
        self._weight = self._groups = 0.0
        self._totals: Tensor | None = None

    def after(self, index: int, mine: Sequence[Share]) -> None:
        """Micro-batch `index` of this rank, these rows, is in the gradient. A collective in the middle."""
        self._weight += sum(share.weight for share in mine)
        self._groups += sum(share.fraction for share in mine)
        if index == self._middle:
            self._totals = self._summed(self._squared_norm(), self._weight, self._groups)

    def metrics(self) -> Metrics:
        """Called with the whole gradient in place. A collective. Nothing where the halves cannot be compared."""
        if self._totals is None:
            return {}
        squared_half, half_weight, half_groups = self._totals.tolist()
        squared, weight, groups = self._summed(self._squared_norm(), self._weight, self._groups).tolist()
        if not (0 < half_weight < weight and 0 < half_groups < groups):
            return {}
        small, big = squared_half / half_weight**2, squared / weight**2
        signal = (groups * big - half_groups * small) / (groups - half_groups)
        trace = (small - big) / (1 / half_groups - 1 / groups)
        found: Metrics = {
            "learner/gradient_noise/squared_signal": mean(signal),
            "learner/gradient_noise/trace": mean(trace),
        }
        return found | ({"learner/gradient_noise/scale/groups": mean(trace / signal)} if signal > 0 < trace else {})

    def _squared_norm(self) -> float:
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        local = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
        return sum(float(norm) ** 2 for norm in torch._foreach_norm(local))

    def _summed(self, *values: float) -> Tensor:
        total = torch.tensor(values, dtype=torch.float64, device=self._parameters[0].device)
        dist.all_reduce(total)
        return total
