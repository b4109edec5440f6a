"""This file tests the nccl sender as far as one can without two GPUs: vLLM's engine with the broadcast replaced."""

from __future__ import annotations

import torch
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

from learners.nccl_sender import DriverLeads, LatestTensors, NcclSender
from rl.weights import NcclGroup


def test_the_sender_meets_the_engines_as_rank_0_and_broadcasts_by_sorted_names(monkeypatch):
    opened, sent = [], []
    stream = type("Stream", (), {"synchronize": lambda self: None})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: opened.append(info) or object())
    monkeypatch.setattr(
        nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **_: sent.extend(name for name, _ in iterator)
    )
    sender = NcclSender(NcclGroup(address="127.0.0.1", port=29500, engines=2, workers=2))
    assert (opened[0].master_address, opened[0].master_port, opened[0].world_size) == ("127.0.0.1", 29500, 5)
    sender.send({"b": torch.zeros(2, dtype=torch.bfloat16), "a": torch.zeros(3)})
    assert sent == ["a", "b"]


def test_the_tensors_are_described_as_they_will_be_broadcast():
    source = LatestTensors()
    source.tensors = {"w": torch.zeros(2, 3, dtype=torch.bfloat16)}
    (meta,) = source.metadata()
    assert (meta.name, meta.dtype, meta.shape) == ("w", torch.bfloat16, (2, 3))
    assert [name for name, _ in source] == ["w"]


def test_the_driver_takes_the_place_of_vllms_client():
    assert isinstance(DriverLeads(), VLLMWeightSyncClient)
