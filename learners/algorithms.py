"""This file is the table of algorithms: which functions stand behind each name of the config. Where is GRPO? Here.

A published name is a row of PRESETS in rl/algorithm_config.py, which must not import torch. `grpo` there is advantage
grpo, loss ppo_clip and aggregation sequence_mean, and each of the three is a row of ADVANTAGES, LOSSES or AGGREGATIONS.
To add one: the function beside its like, its row, its knobs in rl/algorithm_config.py, its oracle in tests/learners.
docs/algorithms.md, which `make docs` writes, lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learners import losses
from learners.advantages import ADVANTAGES, Advantages, Estimator, Rewards
from learners.aggregations import AGGREGATIONS, Aggregation
from learners.losses import Loss, Prepare, TokenLosses, Tokens
from learners.penalties import DIVERGENCES, outside_band
from rl import algorithm_config as knobs
from rl.algorithm_config import AlgorithmSection

LOSSES: dict[type, Callable[[Any], Loss]] = {
    knobs.PpoClip: lambda k: partial(
        losses.ppo_clip, clip_low=k.clip_low, clip_high=k.clip_high, dual_clip=k.dual_clip
    ),
    knobs.Decoupled: lambda k: partial(
        losses.decoupled,
        anchor=k.anchor,
        clip_low=k.clip_low,
        clip_high=k.clip_high,
        weight_high=k.weight_high,
    ),
    knobs.Cispo: lambda k: partial(losses.cispo, weight_low=k.weight_low, weight_high=k.weight_high),
    knobs.Aipo: lambda k: partial(losses.aipo, weight_high=k.weight_high),
    knobs.Tis: lambda k: partial(losses.tis, level=k.level, weight_high=k.weight_high),
    knobs.Icepop: lambda k: partial(losses.icepop, level=k.level, weight_low=k.weight_low, weight_high=k.weight_high),
    knobs.Gspo: lambda k: partial(losses.gspo, clip_low=k.clip_low, clip_high=k.clip_high),
    knobs.DppoTv: lambda k: partial(losses.dppo_tv, delta=k.delta, kappa=k.kappa),
    knobs.M2po: lambda k: losses.m2po,
}
PULLING = (knobs.DppoTv,)  # losses that pull where the advantage is 0, too
PREPARES: dict[type, Callable[[Any], Prepare]] = {  # losses that must see the whole batch before any token's loss
    knobs.M2po: lambda k: partial(losses.second_moment_cutoff, tau=k.tau),
}


@dataclass(frozen=True)
class Algorithm:
    """The gradient of a batch is that of the sum over its tokens of aggregation weight * objective.

    prepare makes Tokens.cutoff of log r [M] of the whole batch's tokens; None: no forward pass ahead is needed.
    """

    advantage: Estimator
    aggregation: Aggregation
    loss: Loss
    prepare: Prepare | None
    section: AlgorithmSection

    @property
    def needs_reference(self) -> bool:
        """Whether Tokens.reference_N must be given."""
        return self.section.kl is not None

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether Tokens.entropy_N must carry a gradient."""
        return self.section.entropy_coefficient > 0

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether an answer whose advantage is exactly 0 has no share in the gradient, and need not be computed."""
        pulled = self.needs_reference or self.needs_entropy_gradient or isinstance(self.section.loss, PULLING)
        return not pulled and self.prepare is None

    def advantages(self, batch: Sequence[Rewards]) -> list[Advantages]:
        """Of each group and trajectory; None where a trajectory is not computed: it failed, or has no gradient."""
        found = self.advantage(batch)
        if not self.skips_zero_advantage:
            return found
        return [tuple(value or None for value in group) for group in found]

    def objective(self, tokens: Tokens) -> TokenLosses:
        """loss + kl.coefficient * KL(π, reference) - entropy_coefficient * entropy, per token [N].

        A token that mask or mask_truncated leaves out counts for nothing: no loss, no pull, no bonus. One that the loss
        itself leaves out (icepop, dppo_tv, m2po) loses its policy term only, since the loss judges no more than that.
        """
        found, section = self.loss(tokens), self.section
        loss_N, out_N = found.loss_N, self._left_out(tokens)
        if section.kl is not None:
            assert tokens.reference_N is not None, "algorithm.kl is set, but the tokens carry no reference"
            divergence_N = DIVERGENCES[section.kl.estimator](tokens.logprobs_N, tokens.reference_N)
            loss_N = loss_N + section.kl.coefficient * divergence_N
        if section.entropy_coefficient > 0:
            loss_N = loss_N - section.entropy_coefficient * tokens.entropy_N
        return TokenLosses(
            loss_N=torch.where(out_N, 0.0, loss_N),
            clipped_N=found.clipped_N & ~out_N,
            masked_N=found.masked_N | out_N,
        )

    def _left_out(self, tokens: Tokens) -> Tensor:
        out_N = tokens.truncated_N if self.section.mask_truncated else torch.zeros_like(tokens.truncated_N)
        mask = self.section.mask
        return out_N if mask is None else out_N | outside_band(tokens, mask.level, mask.low, mask.high)


def find_algorithm(section: AlgorithmSection) -> Algorithm:
    """The functions that a validated section names, with its knobs bound."""
    kind = type(section.loss)
    return Algorithm(
        advantage=ADVANTAGES[section.advantage],
        aggregation=AGGREGATIONS[section.aggregation],
        loss=LOSSES[kind](section.loss),
        prepare=PREPARES[kind](section.loss) if kind in PREPARES else None,
        section=section,
    )
