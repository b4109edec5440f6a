"""This file tests rl/weight_delta.py: changes made to the base give the new version, bit for bit, or are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rl.weight_delta import STRIDE, Changes, changed_copy, changes_between


@given(arrays.arrays(np.uint16, st.integers(0, 300)), st.data())
def test_any_two_versions_round_trip(base, data):
    places = data.draw(st.lists(st.integers(0, max(0, len(base) - 1)), max_size=20)) if len(base) else []
    new = base.copy()
    new[places] ^= 3
    changes = changes_between(base, new)
    assert (changes is None) is bool((base == new).all())
    if changes is not None:
        assert (changed_copy(base, changes) == new).all()


@pytest.mark.parametrize("place", [0, 1, STRIDE - 1, STRIDE, STRIDE + 1, 3 * STRIDE + 2])
def test_a_change_far_from_all_others_is_found_again(place):
    base = np.zeros(3 * STRIDE + 3, np.uint16)
    new = base.copy()
    new[place] = 7
    changes = changes_between(base, new)
    assert (changed_copy(base, changes) == new).all() and len(changes.values) <= 5 and not base.any()


def test_bits_are_compared_and_not_numbers():
    base, new = (np.array([value], np.float32).view(np.uint32) for value in (0.0, -0.0))
    assert (changed_copy(base, changes_between(base, new)) == new).all()
    not_a_number = np.array([np.nan], np.float32).view(np.uint32)
    assert changes_between(not_a_number, not_a_number.copy()) is None


@pytest.mark.parametrize(
    "gaps, values, complaint",
    [
        (np.array([0, 5], np.uint16), np.array([1, 2], np.uint16), "a change at 6 of 4 values"),
        (np.array([0, 1], np.uint16), np.array([1], np.uint16), "2 gaps of uint16 and 1 values"),
        (np.array([0], np.int32), np.array([1], np.uint16), "gaps of int32"),
        (np.array([0], np.uint16), np.array([1], np.uint32), "values of uint32"),
    ],
)
def test_changes_that_do_not_fit_are_refused(gaps, values, complaint):
    with pytest.raises(ValueError, match=complaint):
        changed_copy(np.zeros(4, np.uint16), Changes(gaps, values))
