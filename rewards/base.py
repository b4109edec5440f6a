"""This file is the contract of a reward: what a plugin imports, what it may return, and how it can fail.

A reward is a plain function, sync or async, in one of two forms (`rewards/loading.py` tells them apart by signature):

    def even_digits(completion: str, reference: str | None, **columns) -> float | Score    # one completion
    def even_digits(prompts, completions, **columns) -> list[float | None]                 # TRL's batch form

The prompt's text is the column `prompt` of the first form. A function without `**columns` gets only what it names.
A judgement is a Score or a Failure; a Failure is never turned into a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, SupportsFloat, TypeVar

import msgspec

FailureKind = Literal["exception", "none", "not_finite", "timeout", "memory", "crash", "import"]
Function = TypeVar("Function", bound=Callable[..., Any])

NAME_ATTRIBUTE = "__reward_name__"
MAX_MESSAGE_CHARACTERS = 2000


class Score(msgspec.Struct, frozen=True):
    """A judgement with its components: parts are logged as numbers, extra is kept for people to read."""

    value: float
    parts: dict[str, float] = {}
    extra: dict[str, Any] = {}


class Failure(msgspec.Struct, frozen=True):
    """Why there is no judgement. A reward may return one itself, for example when its service does not answer."""

    kind: FailureKind
    message: str


def reward(name: str) -> Callable[[Function], Function]:
    """Names a reward function, so that `path/to/file.py:name` finds it; the function itself stays as it is."""

    def mark(function: Function) -> Function:
        setattr(function, NAME_ATTRIBUTE, name)
        return function

    return mark


def judgement_of(returned: object) -> Score | Failure:
    """What a reward's return value means: numbers and Scores are finite or a Failure, None is a Failure."""
    if returned is None:
        return Failure("none", "the reward returned None")
    if isinstance(returned, Failure):
        return returned
    score = returned if isinstance(returned, Score) else Score(returned)  # type: ignore[arg-type]
    numbers = {"value": score.value, **{f"part {name!r}": part for name, part in score.parts.items()}}
    for what, number in numbers.items():
        if not isinstance(number, SupportsFloat):
            return Failure(
                "exception", f"{what} is a {type(number).__name__}; return a number or rewards.base.Score with numbers"
            )
        if not math.isfinite(float(number)):
            return Failure("not_finite", f"{what} is {float(number)}")
    return Score(float(score.value), {name: float(part) for name, part in score.parts.items()}, score.extra)


def failure_of(error: BaseException) -> Failure:
    """The kind of failure that an exception inside a reward is."""
    kind: FailureKind = "exception"
    if isinstance(error, MemoryError):
        kind = "memory"
    elif isinstance(error, TimeoutError):
        kind = "timeout"
    return Failure(kind, f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARACTERS])
