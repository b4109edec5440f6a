"""This file measures, per step and over all ranks, how far the policy is from the one that sampled.

Shapes: N answer tokens of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from rl.metrics import Metrics, highest, mean, total


@dataclass(frozen=True)
class TokenFacts:
    """What is kept of each trained token, fp64 [N].

    log π, log μ and entropy in nats; lag in versions; advantage; clipped, 0 or 1; the loss before it is normalised.
    """

    logprobs_N: Tensor
    behaviour_N: Tensor
    entropy_N: Tensor
    lags_N: Tensor
    advantages_N: Tensor
    clipped_N: Tensor
    loss_N: Tensor

    @property
    def gaps_N(self) -> Tensor:
        """|log π - log μ| in nats."""
        return (self.logprobs_N - self.behaviour_N).abs()

    def current_gap(self) -> float | None:
        """Mean |log π - log μ| of the tokens sampled at the learner's own version; None where there is none."""
        current_N = self.lags_N == 0
        return self.gaps_N[current_N].mean().item() if current_N.any() else None


def gather_facts(mine: Sequence[TokenFacts], rank_tokens: Sequence[int]) -> TokenFacts:
    """Join the micro-batches of all ranks; each gets the same. rank_tokens are the plan's answer tokens per rank."""
    columns = [torch.cat([getattr(facts, field.name) for facts in mine]) for field in fields(TokenFacts)]
    table = torch.stack(columns).to(torch.float64)
    padded = table.new_zeros(len(columns), max(rank_tokens))
    padded[:, : table.shape[1]] = table
    tables = [torch.empty_like(padded) for _ in rank_tokens]
    dist.all_gather(tables, padded)
    return TokenFacts(*torch.cat([part[:, :count] for part, count in zip(tables, rank_tokens, strict=True)], 1).cpu())


def health(facts: TokenFacts) -> Metrics:
    """The batch's metrics. KL is k3 = r - 1 - log r, an estimate of KL(μ || π); see joschu.net/blog/kl-approx.html.

    The effective sample size (Σr)² / (N Σr²) is 1 where μ = π. A token is useful where its advantage is not 0.
    """
    log_ratio_N = facts.logprobs_N - facts.behaviour_N
    ratio_N = log_ratio_N.exp()
    count = len(ratio_N)
    return {
        "policy/logprob_gap_mean/nats": mean(facts.gaps_N.mean(), count),
        "policy/logprob_gap_p99/nats": highest(facts.gaps_N.quantile(0.99)),
        "policy/logprob_gap_max/nats": highest(facts.gaps_N.max()),
        "policy/ratio_mean": mean(ratio_N.mean(), count),
        "policy/ratio_max": highest(ratio_N.max()),
        "policy/effective_sample_fraction": mean(ratio_N.sum() ** 2 / (count * (ratio_N**2).sum()), count),
        "policy/clip_fraction": mean(facts.clipped_N.mean(), count),
        "policy/entropy/nats": mean(facts.entropy_N.mean(), count),
        "policy/kl_to_behaviour/nats": mean((ratio_N - 1 - log_ratio_N).mean(), count),
        "policy/lag_mean/versions": mean(facts.lags_N.mean(), count),
        "policy/lag_max/versions": highest(facts.lags_N.max()),
        "learner/trained/tokens": total(count),
        "learner/useful/tokens": total((facts.advantages_N != 0).sum()),
    }


def objective(facts: TokenFacts, normaliser: float) -> Metrics:
    """The scalar that the step minimises, and the size of its terms, beside which a difference can be judged.

    Gains and losses cancel nearly, so the loss alone says little about its own rounding. fsum is exact, so that the
    order of tokens, which differs with micro-batches and ranks, does not show.
    """
    losses = facts.loss_N.tolist() if facts.loss_N.isfinite().all() else [math.nan]  # fsum refuses infinities
    return {
        "learner/loss": mean(math.fsum(losses) / normaliser, normaliser),
        "learner/loss_abs": mean(math.fsum(map(abs, losses)) / normaliser, normaliser),
    }
