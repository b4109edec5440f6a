"""This file holds what stands around any policy loss: masks on r, and estimates of the distance to a reference.

Shapes: N answer tokens of one micro-batch, nats, fp64. π is the current policy, ρ the reference; d = log π - log ρ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from learners.losses import Tokens
from learners.sequences import over_sequence

MaskLevel = Literal["token", "sequence", "geometric"]
Divergence = Callable[[Tensor, Tensor], Tensor]


def outside_band(tokens: Tokens, level: MaskLevel, low: float, high: float) -> Tensor:
    """No token where sg(r) is outside [low, high]: its own r, its trajectory's product of r, or their geometric mean.

    The geometric mean does not drift out of the band with an answer's length, as the product does.
    """
    log_ratio_N = tokens.log_ratio_N.detach()
    if level != "token":
        log_ratio_N = over_sequence(log_ratio_N, tokens.sequence_N, "sum" if level == "sequence" else "mean")
    ratio_N = log_ratio_N.exp()
    return (ratio_N < low) | (ratio_N > high)


def k1(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """Value d; gradient that of sg(d) log π.

    d averages to KL(π, ρ), but its own gradient, that of log π, averages to 0 whatever ρ is. The gradient of the
    average is that of the score function, which is what enters. See joschu.net/blog/kl-approx.html.
    """
    difference_N = (logprobs_N - reference_N).detach()
    return difference_N * (1 + logprobs_N - logprobs_N.detach())


def k2(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """d² / 2: the gradient of k1, with a value that is never negative. See joschu.net/blog/kl-approx.html."""
    return (logprobs_N - reference_N) ** 2 / 2


def k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """exp(-d) + d - 1: never negative, and with k1's average. As in GRPO, arXiv 2402.03300.

    Its gradient averages to that of KL(ρ, π), the other direction, which has the same minimum. None of the three is
    weighted by r, so off the policy they average over what μ samples.
    """
    difference_N = logprobs_N - reference_N
    return (-difference_N).exp() + difference_N - 1


DIVERGENCES: dict[Literal["k1", "k2", "k3"], Divergence] = {"k1": k1, "k2": k2, "k3": k3}
