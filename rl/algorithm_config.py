"""This file declares the objective: published combinations by name, every loss with its knobs, what surrounds it.

    name -> (advantage, loss, aggregation), any of which a config may replace; learners/algorithms.py has the functions

Words: the ratio r = π/μ compares the current policy with the one that sampled; u = π/π_prox compares it with the anchor
of the trust region. `weight_*` bound r, `clip_*` bound u. Sources are in the docstrings of learners/losses.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.section import Section

AdvantageName = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "max_rl", "batch_std"]
AggregationName = Literal["token_mean", "sequence_mean", "constant_length", "prompt_mean"]

CLIP = 0.2
CLIP_LOW = Field(default=CLIP, gt=0, lt=1, description="the trust region begins at 1 - this")
CLIP_HIGH = Field(default=CLIP, gt=0, description="the trust region ends at 1 + this")


class PpoClip(Section):
    """min(r A, clip(r) A): the trust region lies around the policy that sampled."""

    name: Literal["ppo_clip"] = "ppo_clip"
    clip_low: float = CLIP_LOW
    clip_high: float = CLIP_HIGH
    dual_clip: float | None = Field(default=None, gt=1, description="least value of the objective where A < 0, in |A|")


class Decoupled(Section):
    """min(π_prox/μ, cap) min(u A, clip(u) A): how far to move is told apart from who sampled."""

    name: Literal["decoupled"] = "decoupled"
    anchor: Literal["recompute", "log_linear"] = Field(
        default="recompute", description="π_prox: the policy at the start of the step, or interpolated by lag"
    )
    clip_low: float = CLIP_LOW
    clip_high: float = CLIP_HIGH
    weight_high: float = Field(default=5.0, ge=1, description="cap of π_prox/μ")

    @model_validator(mode="after")
    def _clip_can_act(self) -> Decoupled:
        if self.anchor == "recompute" and (self.clip_low, self.clip_high) != (CLIP, CLIP):
            raise ValueError(
                f"clip_low {self.clip_low} and clip_high {self.clip_high} do nothing with anchor recompute: a batch "
                "makes one step, so π_prox is the policy itself and u is 1; take anchor log_linear, or leave them out"
            )
        return self


class Cispo(Section):
    """sg(clip(r)) A log π: every token keeps its gradient."""

    name: Literal["cispo"] = "cispo"
    weight_low: float | None = Field(default=None, gt=0, le=1, description="lower clip of r; null for none")
    weight_high: float = Field(default=5.0, ge=1, description="upper clip of r")


class Aipo(Section):
    """sg(min(r, cap)) A log π."""

    name: Literal["aipo"] = "aipo"
    weight_high: float = Field(default=2.0, ge=1, description="cap of r, 2 to 10")


class Tis(Section):
    """min(π_old/μ, cap) times the PPO term around π_old, the policy at the start of the step."""

    name: Literal["tis"] = "tis"
    level: Literal["token", "sequence"] = Field(
        default="token", description="whose π_old/μ is capped; sequence: the product of its tokens'"
    )
    weight_high: float = Field(default=2.0, ge=1, description="cap of π_old/μ")


class Icepop(Section):
    """π_old/μ times the PPO term inside a band of π_old/μ, nothing outside: masked importance sampling."""

    name: Literal["icepop"] = "icepop"
    level: Literal["token", "sequence"] = Field(
        default="token", description="token: icepop; sequence: mis, by the product of its tokens' r"
    )
    weight_low: float = Field(default=0.5, ge=0, le=1, description="lower end of the band")
    weight_high: float = Field(default=5.0, ge=1, description="upper end of the band")


class Gspo(Section):
    """PPO's clip with one ratio per sequence, the geometric mean of its tokens' r."""

    name: Literal["gspo"] = "gspo"
    clip_low: float = Field(default=3e-4, gt=0, lt=1, description="the trust region begins at 1 - this")
    clip_high: float = Field(default=4e-4, gt=0, description="the trust region ends at 1 + this")


class DppoTv(Section):
    """- keep A r + κ log² r: a token is left out once its probability has moved by δ in its advantage's direction."""

    name: Literal["dppo_tv"] = "dppo_tv"
    delta: float = Field(default=0.2, gt=0, le=1, description="probability by which a token may move")
    kappa: float = Field(default=1e-3, ge=0, description="weight of log² r")


class M2po(Section):
    """r A on all tokens but those with the largest log² r, left out until the mean of the rest is below tau."""

    name: Literal["m2po"] = "m2po"
    tau: float = Field(default=0.04, gt=0, description="largest mean of log² r over the batch's tokens, nats²")


Loss = Annotated[PpoClip | Decoupled | Cispo | Aipo | Tis | Icepop | Gspo | DppoTv | M2po, Field(discriminator="name")]


class RatioMask(Section):
    """Tokens that count for nothing because r is outside a band, whatever the loss."""

    level: Literal["token", "sequence", "geometric"] = Field(
        default="geometric", description="whose r: the token's, the product of its answer's, or their geometric mean"
    )
    low: float = Field(default=0.5, ge=0, le=1, description="lower end of the band")
    high: float = Field(default=2.0, ge=1, description="upper end of the band")

    @model_validator(mode="after")
    def _band_has_room(self) -> RatioMask:
        if self.low == self.high:
            raise ValueError(f"low and high are both {self.low}, which leaves every token out; widen the band")
        return self


class ReferenceKl(Section):
    """A pull towards a reference policy."""

    coefficient: float = Field(gt=0, description="weight of the estimate in the loss")
    estimator: Literal["k1", "k2", "k3"] = Field(default="k3", description="of KL(π, reference), per token")
    reference: Literal["frozen", "ema"] = Field(default="frozen", description="starting weights, or their moving mean")
    ema_decay: float = Field(default=0.99, gt=0, lt=1, description="of reference ema: what a step leaves of the mean")


PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "grpo", "loss": {"name": "ppo_clip"}, "aggregation": "sequence_mean"},
    "dapo": {"advantage": "grpo", "loss": {"name": "ppo_clip", "clip_high": 0.28}, "aggregation": "token_mean"},
    "dr_grpo": {"advantage": "dr_grpo", "loss": {"name": "ppo_clip"}, "aggregation": "constant_length"},
    "rloo": {"advantage": "rloo", "loss": {"name": "ppo_clip"}, "aggregation": "token_mean"},
    "reinforce_pp": {"advantage": "reinforce_pp", "loss": {"name": "ppo_clip"}, "aggregation": "token_mean"},
    "max_rl": {"advantage": "max_rl", "loss": {"name": "cispo"}, "aggregation": "token_mean"},
    "decoupled": {"advantage": "grpo", "loss": {"name": "decoupled"}, "aggregation": "token_mean"},
    "cispo": {"advantage": "grpo", "loss": {"name": "cispo"}, "aggregation": "token_mean"},
    "scalerl": {"advantage": "batch_std", "loss": {"name": "cispo"}, "aggregation": "prompt_mean"},
    "aipo": {"advantage": "dr_grpo", "loss": {"name": "aipo"}, "aggregation": "token_mean"},
    "tis": {"advantage": "grpo", "loss": {"name": "tis"}, "aggregation": "token_mean"},
    "icepop": {"advantage": "grpo", "loss": {"name": "icepop"}, "aggregation": "token_mean"},
    "mis": {"advantage": "grpo", "loss": {"name": "icepop", "level": "sequence"}, "aggregation": "token_mean"},
    "gspo": {"advantage": "grpo", "loss": {"name": "gspo"}, "aggregation": "sequence_mean"},
    "dppo_tv": {"advantage": "grpo", "loss": {"name": "dppo_tv"}, "aggregation": "token_mean"},
    "m2po": {"advantage": "grpo", "loss": {"name": "m2po"}, "aggregation": "token_mean"},
}


class AlgorithmSection(Section):
    """The objective, by name; each of its parts may be replaced."""

    name: str = Field(default="cispo", description="a published combination: advantage, loss with knobs, aggregation")
    advantage: AdvantageName = Field(description="rewards to advantages; null takes the one of the name")
    loss: Loss = Field(description="of each token; its own knobs go here")
    aggregation: AggregationName = Field(description="what weighs the same: tokens, answers or prompts")
    mask: RatioMask | None = Field(default=None, description="leaves out what is too far off the policy")
    mask_truncated: bool = Field(default=False, description="leave out answers that were cut at rollout.max_tokens")
    kl: ReferenceKl | None = Field(default=None, description="a pull towards a reference; null for none")
    entropy_coefficient: float = Field(default=0.0, ge=0, description="bonus per nat of entropy, per token")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_name(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name") or "cispo"
        if not isinstance(name, str) or name not in PRESETS:
            near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"name is {name!r}, which is no algorithm{hint}; take one of: {', '.join(PRESETS)}")
        preset = PRESETS[name]
        merged = preset | {key: value for key, value in given.items() if value is not None}
        loss = given.get("loss") or {}
        if isinstance(loss, dict):  # knobs of a name's own loss come on top of its; another loss brings its own
            same = loss.get("name", preset["loss"]["name"]) == preset["loss"]["name"]
            merged["loss"] = preset["loss"] | loss if same else loss
        return merged

    @model_validator(mode="after")
    def _parts_fit(self) -> AlgorithmSection:
        for reason in _misfits(self):
            raise ValueError(reason)
        return self


def refusals(
    algorithm: AlgorithmSection, max_lag: int, reward_weights: Sequence[float], overlong: bool
) -> Iterator[str]:
    """What of an objective makes no sense with the rest of a run: reasons, each with its fix.

    max_lag is staleness.max_lag; reward_weights those of rewards.functions; overlong whether rewards.overlong is set.
    """
    if algorithm.advantage == "max_rl" and (overlong or any(weight < 0 for weight in reward_weights)):
        culprit = "rewards.overlong takes" if overlong else "a negative weight in rewards.functions takes"
        yield (
            "algorithm.advantage max_rl divides by a group's mean reward, so rewards must not be negative, but "
            f"{culprit} them below 0; drop it, or set algorithm.advantage to grpo"
        )
    loss = algorithm.loss
    if isinstance(loss, Decoupled) and loss.anchor == "log_linear" and max_lag < 2:
        yield (
            f"algorithm.loss.anchor log_linear interpolates between a policy two or more versions old and the current "
            f"one, but staleness.max_lag is {max_lag}, where it is ppo_clip to the letter; set algorithm.loss.name to "
            "ppo_clip, or raise staleness.max_lag"
        )


def _misfits(section: AlgorithmSection) -> Iterator[str]:
    """Combinations of parts that cannot do what they say."""
    loss, mask = section.loss, section.mask
    if isinstance(loss, Gspo) and section.aggregation != "sequence_mean":
        yield (
            f"aggregation {section.aggregation} does not fit loss gspo, whose tokens all carry their answer's whole "
            "term: longer answers would count more often; set aggregation to sequence_mean"
        )
    if isinstance(loss, Gspo) and mask is not None and mask.level == "token":
        yield (
            "mask.level token does not fit loss gspo: a token that is left out would still move its answer's ratio; "
            "set mask.level to geometric or sequence"
        )
    if mask is not None:
        yield from _idle(loss, mask)
    if section.kl is not None and section.kl.reference == "frozen":
        default = ReferenceKl.model_fields["ema_decay"].default
        if section.kl.ema_decay != default:
            yield (
                f"kl.ema_decay is {section.kl.ema_decay}, but kl.reference is frozen and moves not at all; set "
                "kl.reference to ema, or leave ema_decay out"
            )


def _idle(loss: Any, mask: RatioMask) -> Iterator[str]:
    """Bounds of a loss that its mask, on the same ratio, never lets act."""
    if getattr(loss, "level", "token") != mask.level:
        return
    if isinstance(loss, Icepop):
        yield (
            f"loss icepop and mask both leave out by r at {mask.level} level; drop mask and set the loss's weight_low "
            "and weight_high, or give mask another level"
        )
    if isinstance(loss, M2po):
        yield (
            "loss m2po makes its cutoff of all tokens, so a mask at token level leaves out what the cutoff has paid "
            "for; lower loss.tau instead, or set mask.level to geometric"
        )
    caps_r = not (isinstance(loss, Decoupled) and loss.anchor == "log_linear")  # whose weight is a root of r
    if isinstance(loss, Cispo | Aipo | Tis | Decoupled) and caps_r and mask.high <= loss.weight_high:
        yield (
            f"mask.high {mask.high} leaves loss.weight_high {loss.weight_high} nothing to cut at {mask.level} level; "
            "set loss.name to icepop, which is that combination, or mask.high above weight_high"
        )
    if isinstance(loss, PpoClip) and mask.low >= 1 - loss.clip_low and mask.high <= 1 + loss.clip_high:
        yield (
            f"the mask [{mask.low}, {mask.high}] lies inside ppo_clip's trust region, whose clip never acts; widen the "
            "mask, or narrow loss.clip_low and loss.clip_high"
        )
