"""This file holds what every section of the configuration is: strict and frozen."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A strict and frozen part of the configuration: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)
