"""This file is the built-in reward `format`: does the answer have the shape that was asked for?"""

from __future__ import annotations

import re

from rewards.base import Score, reward


@reward("format")
def format_tags(completion: str, tags: tuple[str, ...] = (), pattern: str | None = None) -> Score:
    """1 if the answer keeps the format, else 0.

    tags must each enclose something exactly once, one after the other, and pattern (a regular expression, in which the
    dot matches line breaks too) must match the whole answer, spaces around it aside. Each tag that is there once is a
    part of value 1. Raises ValueError where neither is given.
    """
    if not tags and pattern is None:
        raise ValueError("the format reward has neither tags nor a pattern; set one in its params")
    parts = {f"tag/{tag}": float(_encloses_once(completion, tag)) for tag in tags}
    in_order = re.search(".*".join(rf"<{re.escape(tag)}>.+?</{re.escape(tag)}>" for tag in tags), completion, re.DOTALL)
    matches = pattern is None or re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None
    return Score(float(all(parts.values()) and in_order is not None and matches), parts)


def _encloses_once(completion: str, tag: str) -> bool:
    return completion.count(f"<{tag}>") == completion.count(f"</{tag}>") == 1
