"""This file is the one reward of the comparison with TRL: the last number of an answer is the reference, or it is not.

Both systems call the same function: TRL as its `reward_funcs`, Slipstream as a reward in a file.
"""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(completions: list[list[dict[str, str]]], answer: list[str], **columns) -> list[float]:
    """1 for each answer whose last number is the reference, else 0."""
    return [float(is_right(turns[-1]["content"], right)) for turns, right in zip(completions, answer, strict=True)]


def is_right(text: str, reference: str) -> bool:
    """Whether the last number in a text is the reference, as a number."""
    numbers = NUMBER.findall(text)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(reference)
