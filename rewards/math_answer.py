"""This file is the built-in reward `math`: is the answer equal to the reference, as math-verify judges?"""

from __future__ import annotations

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from rewards.base import reward

SEARCHED_CHARACTERS = 4000  # parsing time grows with the square: 40,000 characters of repeated numbers take over 5 s


@reward("math")
def math_answer(completion: str, reference: str | None) -> float | None:
    """1 if an answer in the completion's last 4,000 characters equals the reference, 0 if not; LaTeX or plain text.

    A reference may be a bare expression, a solution with \\boxed{...}, or one that ends in "#### answer" as GSM8K's do.
    None without a reference. Raises ValueError where the reference itself is no mathematics, and TimeoutError where
    math-verify runs into its own limit of 5 s: by default it would call both a wrong answer.
    """
    if reference is None:
        return None
    try:
        answer = reference.rpartition("####")[2]
        wanted = parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}", raise_on_error=True)
        if not wanted:
            raise ValueError(f"math-verify finds no mathematics in the reference {reference!r}")
        found = completion[-SEARCHED_CHARACTERS:].replace("<answer>", " ").replace("</answer>", " ")
        return float(verify(wanted, parse(found, raise_on_error=True), raise_on_error=True))
    except TimeoutException as error:  # a BaseException, which `except Exception` elsewhere would let through
        raise TimeoutError(f"math-verify: {error}") from error
