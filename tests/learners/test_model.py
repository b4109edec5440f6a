"""This file tests learners/model.py on one rank; tests/learners/test_learner.py has two."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

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
