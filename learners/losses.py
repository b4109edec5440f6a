"""This file holds the per-token policy losses, as pure functions of the same arguments.

Shapes: N answer tokens. π is the current policy, μ the one that sampled, r = π/μ the ratio, A the advantage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What a loss sees. logprobs_N = log π, with gradient; behaviour_N = log μ; advantages_N = A; all in nats, fp64."""

    logprobs_N: Tensor
    behaviour_N: Tensor
    advantages_N: Tensor


@dataclass(frozen=True)
class TokenLosses:
    """loss_N is to be minimised; clipped_N marks the tokens whose importance weight was cut."""

    loss_N: Tensor
    clipped_N: Tensor


Loss = Callable[[Tokens, float], TokenLosses]


def cispo(tokens: Tokens, ratio_cap: float) -> TokenLosses:
    """- sg(min(r, ratio_cap)) A log π: truncated importance sampling that keeps the gradient of every token.

    CISPO, arXiv 2506.13585, in the form of ScaleRL, arXiv 2510.13786: clipped from above only.
    """
    ratio_N = (tokens.logprobs_N.detach() - tokens.behaviour_N).exp()
    weight_N = ratio_N.clamp(max=ratio_cap) * tokens.advantages_N
    return TokenLosses(loss_N=-weight_N * tokens.logprobs_N, clipped_N=ratio_N > ratio_cap)
