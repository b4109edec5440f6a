"""This file holds the tests of what actors/worker_extension.py takes out of vLLM's sampler, and of updates made ready.

That an engine ends with its owner is tested on a real one, in test_vllm_engine.py.
"""

from __future__ import annotations

import threading

import pytest
import torch
import vllm
from vllm.v1.sample import sampler

from actors.worker_extension import WorkerExtension, leave_out_ranks


@pytest.fixture
def logprobs_NV() -> torch.Tensor:
    return torch.randn(5, 101, generator=torch.Generator().manual_seed(0)).log_softmax(-1)


def test_without_ranks_the_logprobs_of_sampled_tokens_are_the_same_bits(logprobs_NV, monkeypatch):
    sampled_N = torch.tensor([0, 7, 100, 3, 3])
    with_ranks = sampler.Sampler.gather_logprobs(logprobs_NV, 0, sampled_N)
    monkeypatch.setattr(sampler, "batched_count_greater_than", sampler.batched_count_greater_than)  # put back later
    assert leave_out_ranks(vllm.__version__), "vLLM has another version: look whether its ranks can still be left out"
    without = sampler.Sampler.gather_logprobs(logprobs_NV, 0, sampled_N)
    assert torch.equal(without.logprobs, with_ranks.logprobs)
    assert torch.equal(without.logprob_token_ids, with_ranks.logprob_token_ids)
    assert without.selected_token_ranks.shape == with_ranks.selected_token_ranks.shape


def test_another_vllm_is_left_as_it_is(monkeypatch):
    before = sampler.batched_count_greater_than
    assert not leave_out_ranks("0.33.0") and sampler.batched_count_greater_than is before


class Receiver:
    """A weight-transfer engine that is ready when it is told so."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.failure: Exception | None = None

    def prepare(self, update_info: dict) -> None:
        self.may_end.wait(20)
        if self.failure:
            raise self.failure


def test_an_update_is_made_ready_beside_the_worker_and_what_failed_is_raised():
    worker = WorkerExtension()
    worker.weight_transfer_engine = Receiver()
    worker.slipstream_prepare({})
    assert not worker.slipstream_prepared()
    worker.weight_transfer_engine.failure = ValueError("torn")
    worker.weight_transfer_engine.may_end.set()
    with pytest.raises(ValueError, match="torn"):
        while not worker.slipstream_prepared():
            pass
