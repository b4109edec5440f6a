"""This file holds the per-token policy losses, as pure functions of a micro-batch's tokens and plain numbers.

Shapes: N answer tokens of one micro-batch, S its trajectories, M answer tokens of the whole batch; nats, fp64.

π is the current policy, μ the one that sampled, A the advantage, sg() takes no gradient; r = π/μ, u = π/π_prox. A batch
makes one optimizer step. So π_old, the policy at the start of the step, is sg(π): no second forward pass is needed, and
around π_old u is 1 with the gradient of log π, so that a clip of u cannot act.

Each loss is minimised after the caller has multiplied it by its aggregation weights (learners/aggregations.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learners.sequences import over_sequence


@dataclass(frozen=True)
class Tokens:
    """What a loss sees of N answer tokens.

    logprobs_N is log π, with gradient; behaviour_N log μ; advantages_N A; lags_N the learner's version less the
    token's. sequence_N (long) tells which trajectory, 0..S-1, a token belongs to; all tokens of a trajectory are here.
    truncated_N (bool) marks answers cut at max_tokens. entropy_N has a gradient where algorithm.entropy_coefficient is
    set. reference_N is the reference policy's log-probability; None where algorithm.kl is None. cutoff is what the
    loss' prepare() made of the whole batch, else infinite.
    """

    logprobs_N: Tensor
    behaviour_N: Tensor
    advantages_N: Tensor
    lags_N: Tensor
    sequence_N: Tensor
    truncated_N: Tensor
    entropy_N: Tensor
    reference_N: Tensor | None = None
    cutoff: float = math.inf

    @property
    def log_ratio_N(self) -> Tensor:
        """log r, with the gradient of log π."""
        return self.logprobs_N - self.behaviour_N


@dataclass(frozen=True)
class TokenLosses:
    """loss_N is to be minimised. clipped_N: weight cut or trust region left; masked_N: left out, no policy gradient."""

    loss_N: Tensor
    clipped_N: Tensor
    masked_N: Tensor


Loss = Callable[[Tokens], TokenLosses]
Prepare = Callable[[Tensor], float]
Level = Literal["token", "sequence"]


def ppo_clip(tokens: Tokens, clip_low: float, clip_high: float, dual_clip: float | None = None) -> TokenLosses:
    """- min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with dual_clip c, where A < 0: - max(that minimum, c A).

    PPO, arXiv 1707.06347, with the sampling policy as anchor; other bounds above than below: DAPO, arXiv 2503.14476;
    dual clip: arXiv 1912.09729. A clipped token has no gradient: r has left the region in the direction of A.
    """
    return _clipped_surrogate(tokens, tokens.log_ratio_N.exp(), clip_low, clip_high, dual_clip)


def decoupled(
    tokens: Tokens, anchor: Literal["recompute", "log_linear"], clip_low: float, clip_high: float, weight_high: float
) -> TokenLosses:
    """- min(sg(π_prox/μ), weight_high) * min(u A, clip(u, 1 - clip_low, 1 + clip_high) A). AReaL, arXiv 2505.24298.

    recompute: π_prox = π_old, so u = 1 and the loss is tis. log_linear, arXiv 2512.06547: π_prox is the policy one
    version ago, interpolated between μ, k versions ago, and π: log π_prox = log μ + (1 - 1/k)(log π - log μ), so
    log u = (log π - log μ)/k; at k <= 1 it is μ itself. π_prox has no gradient. The library of the paper leaves out
    tokens above the cap; truncating them keeps their gradient, and `mask` leaves out where that is wanted.
    """
    log_ratio_N = tokens.log_ratio_N.detach()
    share_N = torch.ones_like(log_ratio_N) if anchor == "recompute" else 1 - 1 / tokens.lags_N.clamp(min=1)
    log_anchor_N = tokens.behaviour_N + share_N * log_ratio_N
    weight_N = (share_N * log_ratio_N).exp()
    inner = _clipped_surrogate(tokens, (tokens.logprobs_N - log_anchor_N).exp(), clip_low, clip_high, None)
    return TokenLosses(
        loss_N=weight_N.clamp(max=weight_high) * inner.loss_N,
        clipped_N=inner.clipped_N | (weight_N > weight_high),
        masked_N=inner.masked_N,
    )


def cispo(tokens: Tokens, weight_low: float | None, weight_high: float) -> TokenLosses:
    """- sg(clip(r, weight_low, weight_high)) A log π: truncated importance weights; every token keeps its gradient.

    CISPO, arXiv 2506.13585; the bounds are those of r itself, not of r - 1. ScaleRL, arXiv 2510.13786, and CISPO's own
    runs have none below.
    """
    ratio_N = tokens.log_ratio_N.detach().exp()
    weight_N = ratio_N.clamp(min=weight_low, max=weight_high)
    return TokenLosses(
        loss_N=-weight_N * tokens.advantages_N * tokens.logprobs_N,
        clipped_N=weight_N != ratio_N,
        masked_N=_none(tokens),
    )


def aipo(tokens: Tokens, weight_high: float) -> TokenLosses:
    """- sg(min(r, weight_high)) A log π: one-sided, without a trust region. AIPO of LlamaRL, arXiv 2505.24034.

    Second-hand: neither the paper's text nor its code could be read for this. The gradient is that of tis.
    """
    return cispo(tokens, None, weight_high)


def tis(tokens: Tokens, level: Level, weight_high: float) -> TokenLosses:
    """- min(π_old/μ, weight_high) A π/sg(π): a truncated importance weight times PPO's term around π_old.

    fengyao.notion.site/off-policy-rl and TRL's token_truncate and sequence_truncate. At sequence level every token
    carries the product of its trajectory's ratios. The value is that of the surrogate, the gradient that of w A log π.
    """
    ratio_N = _level_ratio(tokens, level)
    return TokenLosses(
        loss_N=-ratio_N.clamp(max=weight_high) * tokens.advantages_N * _unit(tokens.logprobs_N),
        clipped_N=ratio_N > weight_high,
        masked_N=_none(tokens),
    )


def icepop(tokens: Tokens, level: Level, weight_low: float, weight_high: float) -> TokenLosses:
    """- M(π_old/μ) A π/sg(π), M(x) = x inside [weight_low, weight_high] and 0 outside: masked importance sampling.

    Token level: IcePop, arXiv 2510.18855, whose band is [0.5, 5]; TRL's token_mask. Sequence level: MIS, where M sees
    the product of the trajectory's ratios, and every token carries it; TRL's sequence_mask.
    """
    ratio_N = _level_ratio(tokens, level)
    outside_N = (ratio_N < weight_low) | (ratio_N > weight_high)
    weight_N = ratio_N.masked_fill(outside_N, 0.0)  # before the product: a ratio may be infinite, and inf * 0 is nan
    return TokenLosses(
        loss_N=-weight_N * tokens.advantages_N * _unit(tokens.logprobs_N),
        clipped_N=_none(tokens),
        masked_N=outside_N,
    )


def gspo(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """- min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) on each token of a trajectory, s = (π(y)/μ(y))^(1/|y|).

    GSPO, arXiv 2507.18071, equation 5, with the policy that sampled as π_old. The paper sums trajectories, each with
    weight 1/G: that is sequence_mean over tokens which all carry their trajectory's term, and no other aggregation is.
    """
    ratio_N = over_sequence(tokens.log_ratio_N, tokens.sequence_N, "mean").exp()
    return _clipped_surrogate(tokens, ratio_N, clip_low, clip_high, None)


def dppo_tv(tokens: Tokens, delta: float, kappa: float) -> TokenLosses:
    """- keep A r + kappa log² r; a token is left out where A > 0 and π - μ > delta, or A < 0 and π - μ < - delta.

    DPPO with binary total variation, arXiv 2602.04879, and the pull of arXiv 2602.02276, as prime-rl's
    trainer/rl/loss.py adds them; there too the pull towards μ acts on left-out tokens. A small probability may move by
    a large factor, and a large one may not.
    """
    moved_N = tokens.logprobs_N.detach().exp() - tokens.behaviour_N.exp()
    left_out_N = torch.where(tokens.advantages_N > 0, moved_N > delta, (tokens.advantages_N < 0) & (moved_N < -delta))
    surrogate_N = tokens.advantages_N * tokens.log_ratio_N.exp()
    return TokenLosses(
        loss_N=kappa * tokens.log_ratio_N**2 - surrogate_N.masked_fill(left_out_N, 0.0),
        clipped_N=_none(tokens),
        masked_N=left_out_N,
    )


def m2po(tokens: Tokens) -> TokenLosses:
    """- A r, but the tokens of largest log² r are left out until the mean over the rest of the batch is below tau.

    second_moment_cutoff makes tokens.cutoff of tau. M2PO, arXiv 2510.01161, as AReaL has it. The authors' code
    (Infini-AI-Lab/M2PO) counts and cuts only tokens that already moved in the direction of A, bounds the moment of the
    capped rather than of the kept, and cuts no r within [0.7, 1.5]; the paper's formula has none of this.
    """
    left_out_N = tokens.log_ratio_N.detach() ** 2 >= tokens.cutoff
    surrogate_N = tokens.advantages_N * tokens.log_ratio_N.exp()
    return TokenLosses(loss_N=-surrogate_N.masked_fill(left_out_N, 0.0), clipped_N=_none(tokens), masked_N=left_out_N)


def second_moment_cutoff(log_ratio_M: Tensor, tau: float) -> float:
    """The log² r from which on tokens are left out, so that the mean of the rest is below tau; inf leaves none out.

    Tokens of equal log² r stay or go together, so that the order of tokens does not matter.
    """
    moments_M = (log_ratio_M**2).sort().values
    means_M = moments_M.cumsum(0) / torch.arange(1, len(moments_M) + 1, dtype=moments_M.dtype, device=moments_M.device)
    kept = int((means_M < tau).sum())  # means of a sorted sequence never fall
    return moments_M[kept].item() if kept < len(moments_M) else math.inf


def _clipped_surrogate(
    tokens: Tokens, ratio_N: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> TokenLosses:
    advantages_N = tokens.advantages_N
    objective_N = torch.min(ratio_N * advantages_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N)
    left_N = torch.where(advantages_N > 0, ratio_N > 1 + clip_high, (advantages_N < 0) & (ratio_N < 1 - clip_low))
    if dual_clip is not None:
        floored_N = torch.max(objective_N, dual_clip * advantages_N)
        objective_N = torch.where(advantages_N < 0, floored_N, objective_N)
        left_N = left_N | ((advantages_N < 0) & (ratio_N > dual_clip))
    return TokenLosses(loss_N=-objective_N, clipped_N=left_N, masked_N=_none(tokens))


def _level_ratio(tokens: Tokens, level: Level) -> Tensor:
    """sg(π/μ) of each token, or the product of its trajectory's."""
    log_ratio_N = tokens.log_ratio_N.detach()
    return (log_ratio_N if level == "token" else over_sequence(log_ratio_N, tokens.sequence_N, "sum")).exp()


def _unit(logprobs_N: Tensor) -> Tensor:
    """π/sg(π): 1, with the gradient of log π."""
    return (logprobs_N - logprobs_N.detach()).exp()


def _none(tokens: Tokens) -> Tensor:
    return torch.zeros_like(tokens.truncated_N)
