"""This file is the built-in reward `reasoning_gym`: a dataset's own scorer on the answer in a completion."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Literal

from reasoning_gym import get_score_answer_fn
from reasoning_gym.utils import extract_answer

from rewards.base import Score, reward

NUMBER = re.compile(r"(?<!\d)[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
scorer_of: Callable[[str], Callable[..., float]] = functools.cache(get_score_answer_fn)  # some read files each time
Extract = Literal["last_number", "answer_tag", "whole"]


@reward("reasoning_gym")
def reasoning_gym_score(
    completion: str,
    dataset: str,
    entry: dict[str, Any],
    extract: Extract = "last_number",
    exact: bool = False,
) -> Score:
    """The dataset's score, from 0 to 1; the part `correct` is 1 for a full score only.

    dataset and entry are columns: the dataset's name and the whole item with question, answer and metadata. Many
    scorers give part of the score for an answer that contains the right one; exact makes that 0. No answer scores what
    the dataset gives for none. Whatever a scorer raises on a malformed answer is a failure.
    """
    score = float(scorer_of(dataset)(EXTRACTORS[extract](completion), entry))
    correct = float(score >= 1.0)
    return Score(correct if exact else score, {"correct": correct})


def last_number(completion: str) -> str | None:
    """The last number of the text without thousands separators, such as -1234.5; a minus after a digit is no sign."""
    numbers = NUMBER.findall(completion)
    return numbers[-1].replace(",", "").removeprefix("+") if numbers else None


EXTRACTORS: dict[Extract, Callable[[str], str | None]] = {
    "last_number": last_number,
    "answer_tag": extract_answer,
    "whole": str.strip,
}
