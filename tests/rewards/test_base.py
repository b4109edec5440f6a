"""This file tests rewards/base.py: what a returned value means, and which failure an exception is."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from rewards.base import Failure, Score, failure_of, judgement_of, reward


@pytest.mark.parametrize(
    "returned", [1, True, 1.0, np.float32(1), np.int64(1), np.bool_(True), Decimal(1), Fraction(1)]
)
def test_any_real_number_is_a_score(returned):
    judgement = judgement_of(returned)
    assert isinstance(judgement, Score) and judgement.value == 1.0 and type(judgement.value) is float


@pytest.mark.parametrize("returned", ["1.0", [1.0], {"score": 1.0}, object(), 1j, lambda: 1.0])
def test_anything_else_is_a_failure_and_no_guess(returned):
    judgement = judgement_of(returned)
    assert (
        isinstance(judgement, Failure) and judgement.kind == "exception" and "rewards.base.Score" in judgement.message
    )


@pytest.mark.parametrize("returned", [float("nan"), float("inf"), Score(1.0, {"length": float("nan")})])
def test_a_number_that_is_not_finite_is_a_failure_of_its_own_kind(returned):
    assert judgement_of(returned).kind == "not_finite"


def test_none_is_a_failure_and_a_returned_failure_stays_one():
    assert judgement_of(None).kind == "none"
    assert judgement_of(Failure("timeout", "the judge did not answer")) == Failure(
        "timeout", "the judge did not answer"
    )


def test_exceptions_are_told_apart_by_kind_and_their_message_is_bounded():
    assert failure_of(MemoryError()).kind == "memory"
    assert failure_of(TimeoutError("5 s")).kind == "timeout"
    assert failure_of(ZeroDivisionError("division by zero")) == Failure(
        "exception", "ZeroDivisionError: division by zero"
    )
    assert len(failure_of(ValueError("x" * 10_000)).message) == 2000


def test_the_decorator_leaves_the_function_as_it_is():
    def judge(completion: str) -> float:
        return 1.0

    assert reward("always_right")(judge) is judge
