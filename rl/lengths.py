"""This file believes how long the answers to a prompt will be, by what its level's answers were lately.

Who starts the longest first ends together with the others: a schedule needs the order of the lengths, not the lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NEW = 0.2  # the weight of a new group's mean: what counts is about the latest ten groups, as the policy changes


class LengthBeliefs:
    """Running mean tokens of an answer, by source and level; decided by what was observed, in its order, alone."""

    def __init__(self) -> None:
        self._means: dict[str, dict[str, float]] = {}

    def observe(self, source: str, level: str, completion_tokens: Sequence[int], cut: bool = False) -> None:
        """Learn from a group's answers. Those of one that was cut off would be longer, and teach that at most."""
        mean = sum(completion_tokens) / max(1, len(completion_tokens))
        if not completion_tokens or (cut and mean <= self.mean(source, level)):
            return
        levels = self._means.setdefault(source, {})
        levels[level] = (1 - NEW) * levels.get(level, mean) + NEW * mean

    def mean(self, source: str, level: str) -> float:
        """Tokens that an answer is believed to take; for a new level its source's mean, then that of all; else 0."""
        levels = self._means.get(source, {})
        if level in levels:
            return levels[level]
        known = list(levels.values()) or [each for levels in self._means.values() for each in levels.values()]
        return sum(known) / len(known) if known else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All beliefs, JSON-able."""
        return {"means": {source: dict(levels) for source, levels in self._means.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._means = {source: dict(levels) for source, levels in state["means"].items()}
