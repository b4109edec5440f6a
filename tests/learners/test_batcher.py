"""This file tests learners/batcher.py: who computes what, within which bounds, and what each token weighs."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learners.advantages import grpo
from learners.aggregations import AGGREGATIONS, constant_length, token_mean
from learners.batcher import RowLimits, check_payload, plan_batch, row_cost, weigh
from rl.codec import entry_of
from tests.learners.tiny import random_group


def entries_of(groups):
    return [entry_of(group, 1) for group in groups]


def plan_of(groups, ranks=1, budget=200, aggregation=token_mean, packing="shared_prefix", advantages=None):
    entries = entries_of(groups)
    advantages = advantages or grpo([entry.rewards for entry in entries])
    limits = RowLimits(budget, hidden_size=16, packing=packing)
    return plan_batch(entries, advantages, weigh(entries, aggregation, 9), ranks, limits)


def lengths_of(group):
    return [len(t.completion.token_ids) for t in group.trajectories if t.reward is not None]


def row_length(group, answers):
    return len(group.prompt.token_ids) + sum(len(group.trajectories[i].completion.token_ids) for i in answers)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(45, 200), st.sampled_from(["shared_prefix", "per_answer"]))
def test_a_plan_gives_every_answer_to_one_row_and_every_group_to_one_rank(count, ranks, budget, packing):
    groups = [random_group(index) for index in range(count)]
    plan = plan_of(groups, ranks, budget, packing=packing)
    answers = [(row.group, i) for rank in plan.micro_batches for rows in rank for row in rows for i in row.answers]
    assert sorted(answers) == [(group, i) for group in range(count) for i in range(4)]
    assert sorted(group for rank in range(ranks) for group in plan.groups_of(rank)) == list(range(count))
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    for rank in plan.micro_batches:
        for rows in rank:
            assert len(rows) * max((row_length(groups[r.group], r.answers) for r in rows), default=0) <= budget
            assert packing == "shared_prefix" or all(len(row.answers) == 1 for row in rows)
    assert sum(plan.rank_tokens) == plan.num_tokens == sum(group.num_tokens for group in groups)


def test_a_plan_balances_what_ranks_compute():
    groups = [random_group(index) for index in range(16)]
    plan = plan_of(groups, ranks=2)
    costs = [row_cost(len(group.prompt.token_ids), lengths_of(group), 16) for group in groups]
    loads = [sum(costs[group] for group in plan.groups_of(rank)) for rank in range(2)]
    assert max(loads) < 1.1 * min(loads)


def test_a_rows_cost_counts_its_tokens_and_the_pairs_that_see_each_other():
    assert row_cost(10, [], hidden_size=10**9) == pytest.approx(10)
    assert row_cost(10, [4, 4], hidden_size=1) == pytest.approx(18 + (50 + 2 * 4 * 12) / 6)
    long_answer = row_cost(40, [256], 576)
    assert row_cost(40, [256] * 16, 576) < 16 * long_answer  # the prompt is there once


def test_a_long_row_weighs_more_than_its_tokens_so_that_ranks_finish_together():
    lengths = [(0, 400)] + [(0, 100)] * 4
    long, *short = (row_cost(prompt, [answer], hidden_size=16) for prompt, answer in lengths)
    assert long > 1.5 * sum(short)


def test_answers_without_an_advantage_are_in_no_row_but_count_in_every_weight():
    groups = [random_group(index) for index in range(3)]
    advantages = [(None,) * 4, (0.5, None, -0.5, None), (1.0, -1.0, 1.0, -1.0)]
    for packing, rows_expected in (("shared_prefix", 2), ("per_answer", 6)):
        plan = plan_of(groups, packing=packing, advantages=advantages)
        rows = [row for micro_batch in plan.micro_batches[0] for row in micro_batch]
        assert len(rows) == rows_expected and plan.groups_of(0) == [1, 2]
        assert {answer for row in rows if row.group == 1 for answer in row.answers} == {0, 2}
        assert plan.num_tokens == sum(group.num_tokens for group in groups)
        kept = [len(groups[1].trajectories[i].completion.token_ids) for i in (0, 2)]
        assert plan.computed_tokens == sum(kept) + groups[2].num_tokens
        assert plan.weights == plan_of(groups, packing=packing).weights


def test_a_batch_without_any_advantage_has_no_micro_batches_on_any_rank():
    groups = [random_group(0), random_group(1)]
    plan = plan_of(groups, ranks=2, advantages=[(None,) * 4] * 2)
    assert plan.micro_batches == ((), ()) and plan.rank_tokens == (0, 0) and plan.num_tokens > 0


@pytest.mark.parametrize("packing", ["shared_prefix", "per_answer"])
def test_the_shares_of_a_rank_hold_each_answers_advantage_and_weight_once(packing):
    groups = [random_group(index, rewards=(0.0, None, 1.0)) for index in range(3)]
    plan = plan_of(groups, budget=60, packing=packing)
    shares = [share for rows in plan.shares(0, dict(enumerate(groups))) for share in rows]
    for group, values in zip(groups, plan.advantages, strict=True):
        mine = [share for share in shares if share.group is group]
        found = [value for share in mine for value in share.advantages if value is not None]
        assert sorted(found) == sorted(value for value in values if value is not None)
        assert sum(share.fraction for share in mine) == pytest.approx(1.0)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_weights_are_those_of_the_aggregation_over_scored_trajectories_of_the_whole_batch(name):
    groups = [random_group(0, rewards=(0.0, None, 1.0)), random_group(1), random_group(2, rewards=(None, None))]
    first, second, nothing = AGGREGATIONS[name]([lengths_of(group) for group in groups], 9)
    for ranks, budget in ((1, 200), (2, 60), (3, 60)):
        plan = plan_of(groups, ranks, budget, AGGREGATIONS[name])
        assert plan.weights == ((first[0], None, first[1]), tuple(second), (None, None)) and nothing == []
        assert sum(plan.rank_tokens) == sum(map(sum, map(lengths_of, groups)))


def test_constant_length_divides_by_the_longest_answer_that_sampling_allows():
    group = random_group(0, rewards=(0.0, None, 1.0))
    assert plan_of([group], aggregation=constant_length).weights == ((1 / 18, None, 1 / 18),)


def test_a_row_that_does_not_fit_and_a_batch_without_rewards_are_refused():
    with pytest.raises(ValueError, match=r"group g0 needs a row of \d+ tokens, but learner.micro_batch_tokens is 16"):
        plan_of([random_group(0)], budget=16)
    assert plan_of([random_group(0)], budget=17, packing="per_answer")
    with pytest.raises(ValueError, match="none of the 1 groups"):
        plan_of([random_group(0, rewards=(None, None))])


def test_a_payload_that_differs_from_its_entry_is_refused():
    group = random_group(0)
    check_payload(entry_of(group, 1), group)
    for change in ({"prompt_tokens": 1}, {"rewards": (0.0, 1.0, 0.5, 1e-300)}):
        with pytest.raises(ValueError, match="payload of group g0"):
            check_payload(msgspec.structs.replace(entry_of(group, 1), **change), group)
