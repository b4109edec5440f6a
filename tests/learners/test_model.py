"""This file tests learners/model.py on one rank; tests/learners/test_learner.py has two."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from learners.blocks import BlockOptions
from learners.layouts import Layout, RowLengths
from learners.model import join_ranks, load_policy, score_sequence
from tests.learners.tiny import save_tiny_llama


@pytest.fixture
def process_group(tmp_path):
    assert join_ranks(f"file://{tmp_path}/rendezvous", 0, 1, "cpu", 60.0)
    yield
    dist.destroy_process_group()


def test_a_sequence_is_scored_like_transformers_scores_it_and_leaves_the_masters_in_place(tmp_path, process_group):
    model_dir = save_tiny_llama(tmp_path)
    policy = load_policy(model_dir, "cpu", torch.float32, torch.bfloat16)
    ids = (3, 9, 27, 4, 12)
    scores = score_sequence(policy, ids)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    expected = plain(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    assert scores == pytest.approx(expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), abs=0.1)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_entering_twice_is_noticed(process_group):
    assert not join_ranks("file:///nowhere", 0, 1, "cpu", 60.0)


def test_a_model_whose_logits_are_not_the_heads_alone_is_refused(tmp_path, process_group):
    model_dir = save_tiny_llama(tmp_path)
    config = pathlib.Path(model_dir, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match="soft-cap is not supported"):
        load_policy(model_dir, "cpu", torch.float32, torch.float32)


def test_an_fp32_head_multiplies_the_same_bf16_numbers_and_rounds_no_logit(tmp_path, process_group):
    model_dir, ids = save_tiny_llama(tmp_path), (3, 9, 27, 4, 12)
    own = BlockOptions("per_answer")  # ours computes attention in fp32, which would round the hidden states otherwise
    scores = {
        head: score_sequence(load_policy(model_dir, "cpu", torch.float32, torch.bfloat16, head, own), ids)
        for head in ("bfloat16", "float32")
    }
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        hidden_LH = plain.model(torch.tensor([ids])).last_hidden_state[0, :-1]
        logits_LV = hidden_LH.double() @ plain.lm_head.weight.double().T
    expected = logits_LV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert scores["float32"] == pytest.approx(expected, abs=1e-4)
    assert scores["bfloat16"] != pytest.approx(expected, abs=1e-4)


def test_gradients_come_back_through_an_fp32_head_to_fp32_masters(tmp_path, process_group):
    policy = load_policy(save_tiny_llama(tmp_path), "cpu", torch.float32, torch.bfloat16, "float32")
    order = torch.arange(3)
    ids, targets = torch.tensor([[3, 9, 4]]), torch.tensor([9, 4, 7])
    logprobs, entropy = policy(ids, order[None], Layout((RowLengths(3),)), order, targets, 1.0, True)
    assert logprobs.dtype == entropy.dtype == torch.float32
    (logprobs.sum() + entropy.sum()).backward()
    assert all(each.grad.dtype == torch.float32 and each.grad.full_tensor().norm() > 0 for each in policy.parameters())
