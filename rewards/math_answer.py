"""This file is the built-in reward `math`: is the answer mathematically equal to the reference? Judged by math-verify."""

from __future__ import annotations

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from rewards.base import reward


@reward("math")
def math_answer(completion: str, reference: str | None) -> float | None:
    """1 if an answer found in the completion equals the reference, 0 if not; LaTeX or plain expressions.

    None without a reference. Raises ValueError where the reference itself is no mathematics, and TimeoutError where
    math-verify runs into its own limit of 5 s: by default it would call both a wrong answer.
    """
    if reference is None:
        return None
    try:
        wanted = parse(f"\\boxed{{{reference}}}", raise_on_error=True) or parse(reference, raise_on_error=True)
        if not wanted:
            raise ValueError(f"math-verify finds no mathematics in the reference {reference!r}")
        return float(verify(wanted, parse(completion, raise_on_error=True), raise_on_error=True))
    except TimeoutException as error:  # a BaseException, which `except Exception` elsewhere would let through
        raise TimeoutError(f"math-verify: {error}") from error
