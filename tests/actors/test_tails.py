"""Which groups a generator samples, and which of them have become too old."""

from __future__ import annotations

from actors.tails import Tails


def test_only_what_began_before_the_version_is_cut_with_both_its_requests():
    tails = Tails()
    with tails.running("run/0", 3) as old, tails.running("run/1", 4) as young:
        assert tails.cut(4) == ["run/0", "run/0/further"]
        assert old.is_cut and not young.is_cut


def test_a_group_that_has_ended_is_not_cut_and_one_in_hand_may_be_told_twice():
    tails = Tails()
    with tails.running("run/0", 3):
        assert tails.cut(4) == tails.cut(5) != []
    assert tails.cut(9) == []
