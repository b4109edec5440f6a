"""The reductions of rl/metrics.py."""

import pytest

from rl.metrics import highest, last, lowest, mean, merge, total, values


def test_each_name_combines_by_its_own_reduction():
    merged = merge(
        [
            {"a": mean(1.0, 3), "b": total(2), "c": highest(5), "d": lowest(5), "e": last(1)},
            {"a": mean(5.0, 1), "b": total(3), "c": highest(4), "d": lowest(4), "e": last(2)},
        ]
    )
    assert values(merged) == {"a": 2.0, "b": 5.0, "c": 5.0, "d": 4.0, "e": 2.0}


def test_a_mean_over_nothing_leaves_the_other_mean_alone():
    assert merge([{"a": mean(3.0, 0)}, {"a": mean(7.0, 2)}])["a"].value == 7.0


def test_one_name_with_two_reductions_is_refused():
    with pytest.raises(ValueError, match="a is both a mean and a sum"):
        merge([{"a": mean(1)}, {"a": total(1)}])
