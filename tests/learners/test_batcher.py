"""This file tests learners/batcher.py, and with learners/model.py that packing changes nothing."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from learners.advantages import grpo
from learners.aggregations import AGGREGATIONS, constant_length, token_mean
from learners.batcher import Share, check_payload, pack, plan_batch
from learners.model import Policy
from rl.codec import entry_of
from tests.learners.tiny import random_group, save_tiny_llama


def entries_of(groups):
    return [entry_of(group, 1) for group in groups]


def plan_of(groups, world_size=1, budget=200, aggregation=token_mean):
    return plan_batch(entries_of(groups), world_size, budget, aggregation, max_tokens=9)


def share_of(group, weight=0.5):
    """The group with GRPO's advantages; its i-th scored answer weighs (i + 1) * weight per token."""
    scored = sum(reward is not None for reward in group.rewards)
    return Share(group, grpo([group.rewards])[0], tuple(weight * (i + 1) for i in range(scored)))


def lengths_of(group):
    return [len(t.completion.token_ids) for t in group.trajectories if t.reward is not None]


def row_length(group):
    return len(group.prompt.token_ids) + sum(lengths_of(group))


@given(st.integers(1, 12), st.integers(1, 4), st.integers(45, 200))
def test_a_plan_gives_every_group_to_one_rank_once_and_stays_within_the_budget(count, world_size, budget):
    groups = [random_group(index) for index in range(count)]
    plan = plan_of(groups, world_size, budget)
    assert sorted(i for rank in plan.micro_batches for rows in rank for i in rows) == list(range(count))
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    for rank in plan.micro_batches:
        for rows in rank:
            assert len(rows) * max((row_length(groups[i]) for i in rows), default=0) <= budget
    assert sum(plan.rank_tokens) == plan.num_tokens == sum(group.num_tokens for group in groups)


def test_a_plan_balances_the_ranks():
    groups = [random_group(index) for index in range(16)]
    plan = plan_of(groups, world_size=2)
    loads = [sum(row_length(groups[i]) for rows in rank for i in rows) for rank in plan.micro_batches]
    assert max(loads) < 1.1 * min(loads)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_weights_are_those_of_the_aggregation_over_scored_trajectories_of_the_whole_batch(name):
    groups = [random_group(0, rewards=(0.0, None, 1.0)), random_group(1), random_group(2, rewards=(None, None))]
    expected = AGGREGATIONS[name]([lengths_of(group) for group in groups], 9)
    for world_size, budget in ((1, 200), (2, 60), (3, 60)):
        plan = plan_of(groups, world_size, budget, AGGREGATIONS[name])
        assert plan.weights == tuple(map(tuple, expected))
        assert [len(weights) for weights in plan.weights] == [2, 4, 0]
        assert sum(plan.rank_tokens) == sum(map(sum, map(lengths_of, groups)))


def test_constant_length_divides_by_the_longest_answer_that_sampling_allows():
    group = random_group(0, rewards=(0.0, None, 1.0))
    assert plan_of([group], aggregation=constant_length).weights == ((1 / 18, 1 / 18),)


def test_a_share_weighs_what_its_tokens_weigh_together():
    group = random_group(0, rewards=(0.0, None, 1.0))
    first, second = lengths_of(group)
    assert share_of(group).weight == pytest.approx(0.5 * first + 1.0 * second)


def test_a_row_that_does_not_fit_and_a_batch_without_rewards_are_refused():
    with pytest.raises(ValueError, match=r"group g0 needs a row of \d+ tokens, but learner.micro_batch_tokens is 16"):
        plan_of([random_group(0)], budget=16)
    with pytest.raises(ValueError, match="none of the 1 groups"):
        plan_of([random_group(0, rewards=(None, None))])


def test_a_payload_that_differs_from_its_entry_is_refused():
    group = random_group(0)
    check_payload(entry_of(group, 1), group)
    with pytest.raises(ValueError, match="payload of group g0"):
        check_payload(msgspec.structs.replace(entry_of(group, 1), prompt_tokens=1), group)


def test_a_packed_row_gives_each_answer_the_log_probabilities_it_has_in_a_row_of_its_own(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path), dtype=torch.float64).eval()
    groups = [random_group(index) for index in range(3)]
    packed = pack([share_of(group) for group in groups], version=1)
    logprobs_N, _ = Policy(model)(*packed.inputs, 0.8)
    alone = []
    for group in groups:
        for trajectory in group.trajectories:
            answer = torch.tensor(trajectory.completion.token_ids)
            ids = torch.cat([torch.tensor(group.prompt.token_ids), answer])
            logits = model(ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1] / 0.8
            alone.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0])
    torch.testing.assert_close(logprobs_N, torch.cat(alone), rtol=1e-6, atol=1e-6)  # the model's norms are fp32
    weights = torch.linspace(-1, 1, len(logprobs_N), dtype=torch.float64)
    parameters = list(model.parameters())
    together = torch.autograd.grad((logprobs_N * weights).sum(), parameters)
    separate = torch.autograd.grad((torch.cat(alone) * weights).sum(), parameters)
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=1e-6)


def test_what_a_token_carries_lines_up_with_it_and_failures_are_not_packed():
    group = random_group(0, rewards=(0.0, None, 1.0))
    packed = pack([share_of(group)], version=3)
    kept = [group.trajectories[0], group.trajectories[2]]
    assert packed.targets_N.tolist() == [token for t in kept for token in t.completion.token_ids]
    assert packed.behaviour_N.tolist() == [value for t in kept for value in t.completion.logprobs]
    advantages, lengths = grpo([group.rewards])[0], lengths_of(group)
    assert packed.advantages_N.tolist() == [advantages[0]] * lengths[0] + [advantages[2]] * lengths[1]
    expected = [lag for n in lengths for lag in [3] * (n // 2) + [2] * (n - n // 2)]
    assert packed.lags_N.tolist() == expected
    assert packed.weights_N.tolist() == [0.5] * lengths[0] + [1.0] * lengths[1]
    assert packed.sequence_N.tolist() == [0] * lengths[0] + [1] * lengths[1]
    assert packed.num_real == row_length(group)


def test_tokens_of_cut_answers_are_marked_and_trajectories_are_numbered_over_the_rows_of_a_micro_batch():
    groups = [random_group(index, rewards=(0.0, 1.0)) for index in range(2)]
    cut = groups[1].trajectories[0]
    cut = msgspec.structs.replace(cut, completion=msgspec.structs.replace(cut.completion, finish_reason="length"))
    groups[1] = msgspec.structs.replace(groups[1], trajectories=(cut, groups[1].trajectories[1]))
    packed = pack([share_of(group) for group in groups], version=1)
    lengths = [length for group in groups for length in lengths_of(group)]
    assert packed.sequence_N.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert packed.truncated_N.tolist() == [i == 2 for i, length in enumerate(lengths) for _ in range(length)]


def test_an_answer_sees_the_prompt_and_itself_only():
    group = random_group(0, rewards=(0.0, 1.0))
    mask_LL = pack([share_of(group)], version=1).mask_B1LL[0, 0]
    prompt = len(group.prompt.token_ids)
    first = prompt + len(group.trajectories[0].completion.token_ids)
    assert mask_LL[first:, :prompt].all()
    assert not mask_LL[first:, prompt:first].any()
    assert not mask_LL.triu(1).any()


def test_a_rank_without_work_packs_one_row_without_answers():
    packed = pack([], version=1)
    assert packed.ids_BL.shape == (1, 1) and packed.source_N.shape == (0,) and packed.num_real == 0
    assert packed.sequence_N.dtype == torch.long and packed.weights_N.shape == packed.truncated_N.shape == (0,)
