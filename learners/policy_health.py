"""This file measures, per step, over all ranks and by lag, how far the policy is from the one that sampled.

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
from rl.orders import COMPUTED_TOKENS

LAG_BUCKETS = (  # name, first and last lag in versions
    ("0", 0, 0),
    ("1", 1, 1),
    ("2", 2, 2),
    ("3-4", 3, 4),
    ("5-8", 5, 8),
    ("9-16", 9, 16),
    ("17+", 17, math.inf),
)


@dataclass(frozen=True)
class TokenFacts:
    """What is kept of each trained token, fp64 [N].

    log π, log μ and entropy in nats; lag in versions; advantage; clipped and masked, 0 or 1; the weighted loss; the
    reference's log-probability, or log π where there is none.
    """

    logprobs_N: Tensor
    behaviour_N: Tensor
    entropy_N: Tensor
    lags_N: Tensor
    advantages_N: Tensor
    clipped_N: Tensor
    masked_N: Tensor
    loss_N: Tensor
    reference_N: Tensor

    @classmethod
    def none(cls) -> TokenFacts:
        """Of a batch in which nothing is computed."""
        return cls(*torch.zeros(len(fields(cls)), 0, dtype=torch.float64))

    @property
    def log_ratios_N(self) -> Tensor:
        """log r = log π - log μ, in nats."""
        return self.logprobs_N - self.behaviour_N

    @property
    def ratios_N(self) -> Tensor:
        """r = π/μ."""
        return self.log_ratios_N.exp()

    @property
    def gaps_N(self) -> Tensor:
        """|log π - log μ| in nats."""
        return self.log_ratios_N.abs()

    def current_gap(self) -> float | None:
        """Mean |log π - log μ| of the tokens sampled at the learner's own version; None where there is none."""
        current_N = self.lags_N == 0
        return self.gaps_N[current_N].mean().item() if current_N.any() else None


def gather_facts(mine: Sequence[TokenFacts], rank_tokens: Sequence[int]) -> TokenFacts:
    """Join the micro-batches of all ranks; each gets the same. rank_tokens are the plan's answer tokens per rank."""
    columns = [torch.cat([getattr(facts, field.name) for facts in mine]) for field in fields(TokenFacts)]
    return TokenFacts(*gather(torch.stack(columns).double(), rank_tokens).cpu())


def gather(table: Tensor, rank_tokens: Sequence[int]) -> Tensor:
    """Join every rank's columns [rows, its tokens] to [rows, all tokens], the same on each. A collective."""
    padded = table.new_zeros(len(table), max(rank_tokens))
    padded[:, : table.shape[1]] = table
    tables = [torch.empty_like(padded) for _ in rank_tokens]
    dist.all_gather(tables, padded)
    return torch.cat([part[:, :count] for part, count in zip(tables, rank_tokens, strict=True)], 1)


def health(facts: TokenFacts) -> Metrics:
    """Over all computed tokens and by lag: what has no gradient is not computed, and in none of these means.

    A useful token has an advantage and is not masked.
    """
    count = len(facts.lags_N)
    whole = {f"policy/{name}": mean(value, count) for name, value in _distance(facts, slice(None)).items()}
    useful_N = (facts.advantages_N != 0) & (facts.masked_N == 0)
    return (
        whole
        | by_lag(facts)
        | {
            "policy/logprob_gap_p99/nats": highest(facts.gaps_N.quantile(0.99)),
            "policy/logprob_gap_max/nats": highest(facts.gaps_N.max()),
            "policy/ratio_mean": mean(facts.ratios_N.mean(), count),
            "policy/ratio_max": highest(facts.ratios_N.max()),
            "policy/entropy/nats": mean(facts.entropy_N.mean(), count),
            "policy/lag_mean/versions": mean(facts.lags_N.mean(), count),
            "policy/lag_max/versions": highest(facts.lags_N.max()),
            COMPUTED_TOKENS: total(count),
            "learner/useful/tokens": total(useful_N.sum()),
        }
    )


def nothing_computed() -> Metrics:
    """What `health` says of a batch without a gradient."""
    return {COMPUTED_TOKENS: total(0), "learner/useful/tokens": total(0)}


def by_lag(facts: TokenFacts) -> Metrics:
    """The same distances for the tokens of each lag, as policy/by_lag/<versions>/...; a lag without tokens has none."""
    found: Metrics = {}
    for name, low, high in LAG_BUCKETS:
        chosen_N = (facts.lags_N >= low) & (facts.lags_N <= high)
        count = int(chosen_N.sum())
        if count:
            distances = _distance(facts, chosen_N)
            found |= {f"policy/by_lag/{name}/{what}": mean(value, count) for what, value in distances.items()}
            found[f"policy/by_lag/{name}/token_fraction"] = mean(count / len(chosen_N), len(chosen_N))
    return found


def _distance(facts: TokenFacts, chosen_N: Tensor | slice) -> dict[str, Tensor | float]:
    """How far π is from μ on some tokens, with r = π/μ.

    The effective sample size (Σr)² / (N Σr²) is 1 where μ = π. KL is k3 = r - 1 - log r, an estimate of KL(μ || π); see
    joschu.net/blog/kl-approx.html.
    """
    ratio_N, log_ratio_N = facts.ratios_N[chosen_N], facts.log_ratios_N[chosen_N]
    return {
        "logprob_gap_mean/nats": log_ratio_N.abs().mean(),
        "effective_sample_fraction": ratio_N.sum() ** 2 / (len(ratio_N) * (ratio_N**2).sum()),
        "kl_to_behaviour/nats": (ratio_N - 1 - log_ratio_N).mean(),
        "clip_fraction": facts.clipped_N[chosen_N].mean(),
        "mask_fraction": facts.masked_N[chosen_N].mean(),
    }


def distance_to_reference(facts: TokenFacts) -> Metrics:
    """k3, an estimate of KL(π || reference) on the batch's tokens, which is that on π's own where μ = π."""
    log_ratio_N = facts.reference_N - facts.logprobs_N
    distance = (log_ratio_N.exp() - 1 - log_ratio_N).mean()
    return {"policy/kl_to_reference/nats": mean(distance, len(log_ratio_N))}


def objective(facts: TokenFacts) -> Metrics:
    """The scalar that the step minimises, and the size of its terms, beside which a difference can be judged.

    Gains and losses cancel nearly, so the loss alone says little about its own rounding. fsum is exact, so that the
    order of tokens, which differs with micro-batches and ranks, does not show.
    """
    losses = facts.loss_N.tolist() if facts.loss_N.isfinite().all() else [math.nan]  # fsum refuses infinities
    return {"learner/loss": mean(math.fsum(losses)), "learner/loss_abs": mean(math.fsum(map(abs, losses)))}
