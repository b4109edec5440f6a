"""This file lists what every objective and advantage is compared with: the table of oracles.

A reference is TRL's trainer where it has the objective, and the formula written out in loops otherwise. Where TRL does
not do what the papers say, the deviation stands here, named, with the factor that undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from learners.advantages import EPSILON
from rl.algorithm_config import AlgorithmSection
from tests.learners import oracles_literal, oracles_trl
from tests.learners.oracles_batch import Batch, rewards_of
from tests.learners.oracles_trl import Knobs

FORMULA = "formula in loops"


@dataclass(frozen=True)
class ObjectiveOracle:
    """An objective, as the config says it, and how TRL is set to compute the same; without trl, the formula is."""

    title: str
    given: dict[str, Any]
    trl: Knobs | None = None

    @property
    def section(self) -> AlgorithmSection:
        return AlgorithmSection.model_validate(self.given)

    @property
    def reference(self) -> str:
        return FORMULA if self.trl is None else f"TRL GRPOTrainer ({self.title.removeprefix('trl ')})"

    def expected(self, batch: Batch) -> tuple[float, list[float]]:
        """The scalar, and its gradient with respect to each token's log π."""
        if self.trl is None:
            return oracles_literal.objective(self.section, batch)
        return oracles_trl.loss(batch, oracles_literal.advantages(self.section.advantage, rewards_of(batch)), self.trl)


def _formula(title: str, **given: Any) -> ObjectiveOracle:
    return ObjectiveOracle(title, given)


def _trl(title: str, given: dict[str, Any], sampler: str = "old", args: dict[str, Any] | None = None, **trainer: Any):
    clip = {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token"}
    return ObjectiveOracle(f"trl {title}", given, Knobs(clip | trainer, args or {}, sampler))


def _vllm(mode: str, low: float | None, high: float) -> dict[str, Any]:
    return {
        "sampler": "vllm",
        "loss_type": "dapo",
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }


CISPO = {"loss_type": "cispo", "epsilon_high": 1.5}
OBJECTIVES = (
    _formula("ppo_clip", name="grpo"),
    _formula("ppo_clip, wider above", name="dapo"),
    _formula("ppo_clip, dual clip", name="grpo", loss={"dual_clip": 1.3}),
    _formula("ppo_clip, constant length", name="dr_grpo"),
    _formula("decoupled", name="decoupled", loss={"weight_high": 1.4}),
    _formula("decoupled, log-linear", name="decoupled", loss={"anchor": "log_linear", "weight_high": 1.4}),
    _formula("cispo", name="cispo", loss={"weight_high": 1.5}),
    _formula("cispo, clipped below too", name="cispo", loss={"weight_low": 0.8, "weight_high": 1.5}),
    _formula("scalerl", name="scalerl", loss={"weight_high": 1.5}),
    _formula("max_rl", name="max_rl", loss={"weight_high": 1.5}),
    _formula("rloo", name="rloo"),
    _formula("reinforce_pp", name="reinforce_pp"),
    _formula("reinforce_pp_baseline", name="reinforce_pp", advantage="reinforce_pp_baseline"),
    _formula("aipo", name="aipo", loss={"weight_high": 1.3}),
    _formula("tis", name="tis", loss={"weight_high": 1.3}),
    _formula("tis of sequences", name="tis", loss={"level": "sequence", "weight_high": 1.3}),
    _formula("icepop", name="icepop", loss={"weight_low": 0.7, "weight_high": 1.4}),
    _formula("mis", name="mis", loss={"weight_low": 0.3, "weight_high": 2.0}),
    _formula("gspo", name="gspo"),
    _formula("gspo, wide", name="gspo", loss={"clip_low": 0.3, "clip_high": 0.3}),
    _formula("dppo_tv", name="dppo_tv", loss={"delta": 0.1, "kappa": 0.3}),
    _formula("m2po", name="m2po", loss={"tau": 0.1}),
    _formula("mask of tokens", name="dppo_tv", mask={"level": "token", "low": 0.6, "high": 1.6}),
    _formula("mask of sequences", name="cispo", mask={"level": "sequence", "low": 0.3, "high": 1.6}),
    _formula("mask by the geometric mean", name="gspo", mask={"level": "geometric", "low": 0.8, "high": 1.2}),
    _formula("truncated answers masked", name="grpo", mask_truncated=True, kl={"coefficient": 0.3}),
    _formula("k1", name="grpo", kl={"coefficient": 0.3, "estimator": "k1"}),
    _formula("k2", name="icepop", kl={"coefficient": 0.3, "estimator": "k2"}, loss={"weight_high": 1.4}),
    _formula("k3", name="m2po", kl={"coefficient": 0.3, "estimator": "k3"}, loss={"tau": 0.1}),
    _formula("entropy", name="dapo", entropy_coefficient=0.3, mask_truncated=True),
    _trl("loss_type grpo", {"name": "grpo"}),
    _trl("loss_type dapo", {"name": "dapo"}, loss_type="dapo", epsilon_high=0.28),
    _trl("loss_type bnpo", {"name": "dapo"}, loss_type="bnpo", epsilon_high=0.28),
    _trl("loss_type dr_grpo", {"name": "dr_grpo"}, loss_type="dr_grpo"),
    _trl("loss_type grpo, delta 1.3", {"name": "grpo", "loss": {"dual_clip": 1.3}}, args={"delta": 1.3}),
    _trl("loss_type cispo", {"name": "cispo", "loss": {"weight_high": 1.5}}, **CISPO),
    _trl("loss_type cispo, rloo", {"name": "cispo", "loss": {"weight_high": 1.5}, "advantage": "rloo"}, **CISPO),
    _trl(
        "importance_sampling_level sequence",
        {"name": "gspo"},
        importance_sampling_level="sequence",
        epsilon_low=3e-4,
        epsilon_high=4e-4,
    ),
    _trl("token_truncate", {"name": "tis", "loss": {"weight_high": 1.3}}, **_vllm("token_truncate", None, 1.3)),
    _trl(
        "sequence_truncate",
        {"name": "tis", "loss": {"level": "sequence", "weight_high": 1.3}},
        **_vllm("sequence_truncate", None, 1.3),
    ),
    _trl(
        "token_mask",
        {"name": "icepop", "loss": {"weight_low": 0.7, "weight_high": 1.4}},
        **_vllm("token_mask", 0.7, 1.4),
    ),
    _trl(
        "sequence_mask",
        {"name": "mis", "loss": {"weight_low": 0.3, "weight_high": 2.0}},
        **_vllm("sequence_mask", 0.3, 2.0),
    ),
    _trl(  # TRL's default weighs the KL of a token by r, with gradient, which GRPO's paper does not
        "beta 0.3, use_bias_correction_kl off",
        {"name": "grpo", "kl": {"coefficient": 0.3}},
        args={"use_bias_correction_kl": False},
        beta=0.3,
    ),
)


def root_mean_square(values: Sequence[float], ddof: int) -> float:
    """The deviation of values whose mean is 0, of the population (ddof 0) or of a sample (ddof 1)."""
    return math.sqrt(math.fsum(value * value for value in values) / (len(values) - ddof))


def _centred(batch: Batch) -> list[list[float]]:
    return oracles_literal.advantages("dr_grpo", rewards_of(batch))


def _same(batch: Batch) -> list[float]:
    return [1.0 for group in batch for _ in group]


def _of_group(batch: Batch) -> list[float]:
    groups = [
        (root_mean_square(g, 0) + EPSILON) / (root_mean_square(g, 1) + oracles_trl.EPSILON) for g in _centred(batch)
    ]
    return [factor for factor, group in zip(groups, batch, strict=True) for _ in group]


def _of_rewards(batch: Batch) -> list[float]:
    every = [reward for group in rewards_of(batch) for reward in group]
    raw = [reward - math.fsum(every) / len(every) for reward in every]
    centred = [value for group in _centred(batch) for value in group]
    factor = (root_mean_square(centred, 0) + EPSILON) / (root_mean_square(raw, 1) + oracles_trl.EPSILON)
    return [factor] * len(every)


def _of_leave_one_out(batch: Batch) -> list[float]:
    centred = [value for group in _centred(batch) for value in group]
    stretch = len(batch[0]) / (len(batch[0]) - 1)
    ours, theirs = root_mean_square(centred, 0) + EPSILON, stretch * root_mean_square(centred, 1) + oracles_trl.EPSILON
    return [stretch * ours / theirs] * len(centred)


@dataclass(frozen=True)
class AdvantageOracle:
    """An estimator and the trainer that has it. Ours times factor is TRL's; deviation says why they differ."""

    name: str
    kind: str = FORMULA
    knobs: Knobs = field(default_factory=Knobs)
    factor: Callable[[Batch], list[float]] = _same
    deviation: str = ""

    @property
    def reference(self) -> str:
        if self.kind == FORMULA:
            return FORMULA
        knobs = ", ".join(f"{name} {value}" for name, value in self.knobs.trainer.items())
        but = f", but for {self.deviation}" if self.deviation else ""
        return f"TRL {self.kind}Trainer ({knobs}{but})"

    def expected(self, batch: Batch) -> list[float]:
        """TRL's advantages of the batch's rewards, or the formula's, flat."""
        if self.kind == FORMULA:
            return [value for group in oracles_literal.advantages(self.name, rewards_of(batch)) for value in group]
        return oracles_trl.advantages(batch, self.kind, self.knobs)


SAMPLE = "a sample's deviation and epsilon 1e-4"
ADVANTAGES = (
    *map(
        AdvantageOracle,
        ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "max_rl", "batch_std"),
    ),
    AdvantageOracle("grpo", "GRPO", Knobs({"scale_rewards": "group"}), _of_group, SAMPLE),
    AdvantageOracle("dr_grpo", "GRPO", Knobs({"scale_rewards": "none"})),
    AdvantageOracle("rloo", "RLOO", Knobs({"normalize_advantages": False})),
    AdvantageOracle("reinforce_pp_baseline", "RLOO", Knobs({"normalize_advantages": True}), _of_leave_one_out, SAMPLE),
    AdvantageOracle(
        "batch_std",
        "GRPO",
        Knobs({"scale_rewards": "batch"}),
        _of_rewards,
        f"the deviation of rewards uncentred, {SAMPLE}",
    ),
)
