"""This file tests learners/layouts.py, and with learners/model.py that packing changes nothing."""

from __future__ import annotations

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from learners.advantages import grpo
from learners.layouts import Layout, RowLengths, Share, pack, rows_of
from learners.model import Policy
from tests.learners.tiny import random_group, save_tiny_llama


def share_of(group, weight=0.5):
    """The group with GRPO's advantages; its i-th answer weighs (i + 1) * weight per token."""
    return Share(group, grpo([group.rewards])[0], tuple(weight * (i + 1) for i in range(len(group.rewards))))


def split(share):
    """The same, every answer in a row of its own."""
    count = len(share.advantages)
    kept = [i for i in range(count) if share.advantages[i] is not None]
    alone = [tuple(share.advantages[i] if i == j else None for i in range(count)) for j in kept]
    return [Share(share.group, values, share.weights, 1 / len(kept)) for values in alone]


def lengths_of(group):
    return [len(t.completion.token_ids) for t in group.trajectories if t.reward is not None]


def test_a_share_weighs_what_its_tokens_weigh_together():
    group = random_group(0, rewards=(0.0, None, 1.0))
    first, second = lengths_of(group)
    assert share_of(group).weight == pytest.approx(0.5 * first + 1.5 * second)


def test_a_group_is_one_row_or_one_for_each_answer():
    assert [row.answers for row in rows_of(3, [0, 2], "shared_prefix")] == [(0, 2)]
    assert [row.answers for row in rows_of(3, [0, 2], "per_answer")] == [(0,), (2,)]
    assert rows_of(3, [], "shared_prefix") == rows_of(3, [], "per_answer") == []


@pytest.mark.parametrize("per_answer", [False, True])
def test_a_packed_row_gives_each_answer_the_log_probabilities_it_has_in_a_row_of_its_own(tmp_path, per_answer):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path), dtype=torch.float64).eval()
    groups = [random_group(index) for index in range(3)]
    shares = [share_of(group) for group in groups]
    packed = pack([row for share in shares for row in split(share)] if per_answer else shares, version=1)
    assert packed.layout.plain == per_answer
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
    assert packed.weights_N.tolist() == [0.5] * lengths[0] + [1.5] * lengths[1]
    assert packed.sequence_N.tolist() == [0] * lengths[0] + [1] * lengths[1]
    assert packed.num_real == len(group.prompt.token_ids) + sum(lengths)


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
    mask_LL = Layout((RowLengths(3, (2, 4)),)).mask()[0, 0]
    assert mask_LL[5:, :3].all() and not mask_LL[5:, 3:5].any()
    assert not mask_LL.triu(1).any() and mask_LL.diagonal().all()


def test_causal_text_counts_on_through_its_padding_and_a_shared_row_does_not():
    short, long = random_group(0, rewards=(1.0,)), random_group(1, rewards=(1.0,), max_tokens=30)
    plain = [Share(group, (1.0,), (1.0,)) for group in (short, long)]
    packed = pack(plain, version=1)
    assert packed.positions_BL.tolist() == [list(range(packed.layout.width))] * 2
    shared = pack([plain[0], share_of(random_group(2, rewards=(0.0, 1.0), max_tokens=30))], version=1)
    assert not shared.layout.plain and shared.positions_BL[0, -1] == 0


def test_a_rank_without_work_packs_one_row_without_answers():
    packed = pack([], version=1)
    assert packed.ids_BL.shape == (1, 1) and packed.source_N.shape == (0,) and packed.num_real == 0
    assert packed.sequence_N.dtype == torch.long and packed.weights_N.shape == packed.truncated_N.shape == (0,)
