"""This file holds the tests of rl/lengths.py: what is believed of the length of answers, and by what."""

from __future__ import annotations

import json

import pytest

from rl.lengths import LengthBeliefs


def test_nobody_knows_before_the_first_group():
    assert LengthBeliefs().mean("sums", "easy") == 0.0


def test_a_level_is_believed_by_its_own_answers_a_new_one_by_those_of_its_source_or_of_all():
    beliefs = LengthBeliefs()
    beliefs.observe("sums", "easy", (10, 30))
    beliefs.observe("sums", "hard", (100,))
    beliefs.observe("proofs", "all", (1000,))
    assert [beliefs.mean("sums", level) for level in ("easy", "hard", "new")] == [20.0, 100.0, 60.0]
    assert beliefs.mean("games", "any") == pytest.approx((20 + 100 + 1000) / 3)


def test_a_belief_follows_a_policy_whose_answers_grow():
    beliefs = LengthBeliefs()
    beliefs.observe("sums", "easy", (100,))
    means = []
    for _ in range(20):
        beliefs.observe("sums", "easy", (200,))
        means.append(beliefs.mean("sums", "easy"))
    assert means == sorted(means) and means[0] == pytest.approx(120) and means[-1] > 195


def test_a_group_that_was_cut_off_shows_only_that_answers_are_longer_than_believed():
    beliefs = LengthBeliefs()
    beliefs.observe("sums", "easy", (), cut=True)
    beliefs.observe("sums", "easy", (100,))
    beliefs.observe("sums", "easy", (40, 50), cut=True)
    assert beliefs.mean("sums", "easy") == 100.0
    beliefs.observe("sums", "easy", (200,), cut=True)
    assert beliefs.mean("sums", "easy") == pytest.approx(120.0)


def test_a_restored_belief_goes_on_to_the_last_bit():
    beliefs, restored = LengthBeliefs(), LengthBeliefs()
    beliefs.observe("sums", "easy", (7, 8, 9))
    restored.load_state_dict(json.loads(json.dumps(beliefs.state_dict())))
    for each in (beliefs, restored):
        each.observe("sums", "easy", (1, 2, 4))
    assert restored.mean("sums", "easy") == beliefs.mean("sums", "easy")
