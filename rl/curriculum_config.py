"""This file declares how the next prompt is chosen."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticKnownError

from rl.section import Section

BUILT_IN_NAMES = ("band", "uniform")


class CurriculumSection(Section):
    """Which prompt is worth paying for."""

    name: str = Field(
        default="band",
        description="band, uniform (draws without regard to difficulty), module:Class or path/to/file.py:Class",
    )
    params: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for a class of your own")
    band_low: float = Field(default=0.2, ge=0, le=1, description="lowest pass rate of the target band")
    band_high: float = Field(default=0.8, ge=0, le=1, description="highest pass rate of the target band")
    exploration_fraction: float = Field(
        default=0.05, ge=0, le=1, description="share of draws that ignore the beliefs, so that nothing starves"
    )
    discount_per_version: float = Field(
        default=0.9, gt=0, le=1, description="what a policy version leaves of old evidence about a level"
    )
    prompt_discount_per_version: float = Field(
        default=0.99, gt=0, le=1, description="the same for one prompt, which stays hard or easy among its level"
    )
    prompt_prior_answers: float = Field(
        default=4.0, gt=0, description="answers at its level's pass rate that a prompt's belief starts from"
    )
    mixture_flexibility: float = Field(
        default=0.75, ge=0, lt=1, description="share of a source's draws that it lends while it has little to teach"
    )
    cooldown_draws: int = Field(
        default=512,
        ge=0,
        description="draws of a level before a prompt of it returns; at most a quarter of its prompts",
    )
    retire_above: float = Field(default=0.9, ge=0, le=1, description="pass rate above which a prompt is left in peace")
    reprobe_versions: int = Field(
        default=50, ge=1, description="policy versions after which a retired prompt is drawn again"
    )
    max_uninformative_steps: int = Field(
        default=8, ge=1, description="steps' worth of groups without signal before stopping"
    )
    max_refill_factor: int = Field(
        default=16, ge=1, description="steps' worth of groups without signal during one step before stopping"
    )

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        if name not in BUILT_IN_NAMES and ":" not in name:
            raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, BUILT_IN_NAMES))})
        return name

    @model_validator(mode="after")
    def _band_is_a_band(self) -> CurriculumSection:
        if self.band_low >= self.band_high:
            raise ValueError(f"band_low {self.band_low} is not below band_high {self.band_high}; swap them")
        if self.params and self.name in BUILT_IN_NAMES:
            raise ValueError(f"params are for a class of your own, but name is {self.name}; remove {list(self.params)}")
        return self
