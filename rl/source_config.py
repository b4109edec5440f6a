"""This file declares where prompts come from: endless generators, files, and datasets of the hub."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.section import Section


class Difficulty(Section):
    """What `rl screen` found of each prompt: a prior for the curriculum, and a filter."""

    path: str | None = Field(
        default=None, description="the file that rl screen wrote; null: <path>.difficulty.jsonl beside a jsonl file"
    )
    min_pass_rate: float = Field(default=0.0, ge=0, le=1, description="prompts below are left out of training")
    max_pass_rate: float = Field(default=1.0, ge=0, le=1, description="prompts above are left out of training")

    @model_validator(mode="after")
    def _something_may_be_between(self) -> Difficulty:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate {self.min_pass_rate} is above max_pass_rate {self.max_pass_rate}; swap them"
            )
        return self


class ReasoningGymSource(Section):
    """Endless prompts from one reasoning_gym dataset; each level is a set of its own parameters."""

    kind: Literal["reasoning_gym"]
    dataset: str = Field(description="a reasoning_gym dataset name")
    levels: dict[str, dict[str, Any]] = Field(min_length=1, description="level name -> dataset parameters")
    weight: float = Field(default=1.0, gt=0, description="share of this source among all sources")
    instruction: str = Field(default="", description="text appended to every question")


class RowsSource(Section):
    """What rows of a finite source are read by."""

    prompt_column: str = Field(default="prompt", description="a string, or a list of {role, content}")
    reference_column: str | None = Field(default="answer", description="the reference answer; null where there is none")
    level_column: str | None = Field(default=None, description="the difficulty bucket; null puts all in one")
    difficulty: Difficulty | None = Field(default=None, description="pass rates that rl screen wrote; null: none")
    weight: float = Field(default=1.0, gt=0, description="share of this source among all sources")
    instruction: str = Field(default="", description="text appended to every question")


class JsonlSource(RowsSource):
    """Prompts from a file with one JSON object per line."""

    kind: Literal["jsonl"]
    path: str = Field(description="the file to train on")
    held_out_path: str | None = Field(
        default=None, description="the file to evaluate on; none: the source is not evaluated"
    )


class HubSource(RowsSource):
    """Prompts from a Hugging Face dataset."""

    kind: Literal["hub"]
    dataset: str = Field(description="a datasets id, such as openai/gsm8k")
    subset: str | None = Field(default=None, description="the dataset's configuration name")
    split: str = Field(default="train", description="the split to train on")
    held_out_split: str | None = Field(default=None, description="the split to evaluate on")


Source = Annotated[ReasoningGymSource | JsonlSource | HubSource, Field(discriminator="kind")]
