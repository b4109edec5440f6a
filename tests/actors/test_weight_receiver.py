"""This file tests the receivers on a model of two layers; for NCCL the broadcast is replaced, the books are real.

Layerwise reloading on a real model is tested in test_vllm_engine.py.
"""

from __future__ import annotations

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from actors.kept_weights import KeptWeights
from actors.vllm_engine import _update_info
from actors.weight_receiver import BACKENDS, Books, SharedMemoryEngine, VerifiedNcclEngine, digest_all, digest_tensor
from rl.weight_delta import BASE, GAPS, KEEP, VALUES, changes_between
from rl.weights import TensorDigest, WeightUpdate, WeightUpdateError, combined


class TwoLayers(torch.nn.Module):
    """A model that loads weights as vLLM's do: through each parameter's weight_loader."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 2, bias=False)
        self.second = torch.nn.Linear(2, 2, bias=False)
        for parameter in self.parameters():
            parameter.weight_loader = _copy

    def load_weights(self, weights) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            parameters[name].weight_loader(parameters[name], tensor)
            loaded.add(name)
        return loaded


def _copy(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    param.data.copy_(loaded_weight)


@pytest.fixture
def model() -> TwoLayers:
    model = TwoLayers()
    record_metadata_for_reloading(model)
    return model


@pytest.fixture
def engine(model) -> VerifiedNcclEngine:
    engine = VerifiedNcclEngine.__new__(VerifiedNcclEngine)  # vLLM's constructor wants a whole VllmConfig
    engine.model, engine.model_config, engine.device = model, None, torch.device("cpu")
    engine.packed, engine.packed_buffer_size_bytes, engine.packed_num_buffers = True, 1, 1
    engine.model_update_group = object()
    engine.parallel_config = None
    return engine


def broadcast(monkeypatch, tensors: dict[str, torch.Tensor]) -> None:
    """Have the next broadcast deliver these tensors, one chunk each, in the order that the receiver expects."""

    def consume(iterator, post_unpack_func, **_) -> None:
        for name, _described in iterator:
            post_unpack_func([(name, tensors[name])])

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", consume)


def update_info(tensors: dict[str, torch.Tensor]) -> dict:
    return {
        "names": list(tensors),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "tensors": msgspec.to_builtins(digest_all(tensors.items())),
    }


def receive(engine: VerifiedNcclEngine, info: dict) -> None:
    engine.start_weight_update()
    engine.receive_weights(engine.parse_update_info(info))
    engine.finish_weight_update()


def new_weights() -> dict[str, torch.Tensor]:
    return {"first.weight": torch.full((2, 3), 5.0), "second.weight": torch.full((2, 2), 7.0)}


def test_a_whole_broadcast_is_loaded_and_digested(engine, model, monkeypatch):
    weights = new_weights()
    broadcast(monkeypatch, weights)
    receive(engine, update_info(weights))
    assert engine.books.received == digest_all(weights.items()) and not engine.books.torn
    assert model.first.weight.tolist() == weights["first.weight"].tolist()
    assert engine.model is model


def test_a_broadcast_of_other_bytes_is_named_and_leaves_the_model_torn_until_the_next_whole_one(
    engine, model, monkeypatch
):
    weights = new_weights()
    broadcast(monkeypatch, weights | {"second.weight": torch.zeros(2, 2)})
    with pytest.raises(WeightUpdateError, match="other bytes than were sent: second.weight"):
        receive(engine, update_info(weights))
    assert engine.books.torn and engine.model is model
    broadcast(monkeypatch, weights)
    receive(engine, update_info(weights))
    assert not engine.books.torn and model.second.weight.tolist() == weights["second.weight"].tolist()


def test_a_parameter_that_the_broadcast_leaves_out_is_named(engine, monkeypatch):
    weights = {"first.weight": new_weights()["first.weight"]}
    broadcast(monkeypatch, weights)
    with pytest.raises(WeightUpdateError, match="filled by no received tensor: second.weight"):
        receive(engine, update_info(weights))


@pytest.fixture
def reader(model) -> SharedMemoryEngine:
    reader = SharedMemoryEngine.__new__(SharedMemoryEngine)
    reader.model, reader.model_config, reader.device = model, None, torch.device("cpu")
    reader.books, reader._kept, reader._prepared = Books(), KeptWeights(), None
    return reader


def write_file(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> dict:
    """The update_info of a file that holds these tensors."""
    save_file(tensors, path, metadata=metadata)
    return {"path": str(path), "tensors": msgspec.to_builtins(digest_all(tensors.items()))}


def load(reader: SharedMemoryEngine, info: dict) -> None:
    reader.start_weight_update()
    reader.update_weights(info)
    reader.finish_weight_update()


def test_what_was_prepared_is_loaded_though_the_file_is_gone_or_another_by_now(reader, model, tmp_path):
    weights = new_weights()
    info = write_file(tmp_path / "update", weights)
    reader.prepare(info)
    assert model.first.weight.tolist() != weights["first.weight"].tolist() and not reader.books.received
    (tmp_path / "update").unlink()
    (tmp_path / "update").write_bytes(b"another")
    load(reader, info)
    assert model.first.weight.tolist() == weights["first.weight"].tolist()
    assert reader.books.received == digest_all(sorted(weights.items())) and not reader.books.torn


def test_an_update_that_was_not_prepared_is_verified_when_it_is_received(reader, model, tmp_path):
    reader.prepare(write_file(tmp_path / "overtaken", {name: tensor * 0 for name, tensor in new_weights().items()}))
    load(reader, write_file(tmp_path / "update", new_weights()))
    assert model.second.weight.tolist() == new_weights()["second.weight"].tolist()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_file_of_other_bytes_is_named_and_leaves_the_model_untouched(reader, model, tmp_path, ahead):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    info = write_file(tmp_path / "update", new_weights())
    save_file(new_weights() | {"second.weight": torch.zeros(2, 2)}, tmp_path / "update")
    with pytest.raises(WeightUpdateError, match="other bytes than were sent: second.weight"):
        reader.prepare(info) if ahead else load(reader, info)
    assert not reader.books.torn
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_what_was_prepared_for_other_digests_is_refused(reader, tmp_path):
    info = write_file(tmp_path / "update", new_weights())
    reader.prepare(info)
    other = write_file(tmp_path / "other", {name: tensor + 1 for name, tensor in new_weights().items()})
    with pytest.raises(WeightUpdateError, match="other bytes than were sent: first.weight, second.weight"):
        load(reader, info | {"tensors": other["tensors"]})


def write_delta(path, base: dict, new: dict, digest: str, extra_bits: int = 0) -> dict:
    """The update_info of a delta between two versions that differ in second.weight; extra_bits spoil its last value."""
    bits = [each["second.weight"].view(torch.uint32).flatten().numpy() for each in (base, new)]
    gaps, values = changes_between(*bits)
    values[-1] += extra_bits
    arrays = {GAPS: torch.from_numpy(gaps), VALUES: torch.from_numpy(values)}
    save_file({"second.weight" + end: array for end, array in arrays.items()}, path, metadata={BASE: digest})
    return {"path": str(path), "tensors": msgspec.to_builtins(digest_all(new.items()))}


def test_a_delta_is_loaded_on_the_version_that_was_kept_and_verified_as_if_it_had_come_whole(reader, model, tmp_path):
    base, new = new_weights(), new_weights() | {"second.weight": torch.tensor([[7.0, 7.0], [-1.0, 7.0]])}
    info = write_file(tmp_path / "base", base, {KEEP: "true"})
    load(reader, info)
    digest = combined(msgspec.convert(info["tensors"], list[TensorDigest]))
    with pytest.raises(WeightUpdateError, match="other bytes than were sent: second.weight"):
        load(reader, write_delta(tmp_path / "spoilt", base, new, digest, extra_bits=1))
    assert model.second.weight.tolist() == base["second.weight"].tolist() and not reader.books.torn
    sent = write_delta(tmp_path / "delta", base, new, digest)
    reader.prepare(sent)
    load(reader, sent)
    assert model.second.weight.tolist() == new["second.weight"].tolist()
    assert model.first.weight.tolist() == new["first.weight"].tolist()
    with pytest.raises(WeightUpdateError, match="load a whole version first"):
        reader.prepare(sent)  # what is kept now is the new version


def test_for_nccl_nothing_is_prepared(engine):
    engine.prepare(update_info(new_weights()))


def test_digests_are_of_the_bytes_in_row_major_order():
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    transposed = digest_tensor("w", tensor.T.contiguous().T)
    assert digest_tensor("w", tensor) == transposed
    assert (transposed.dtype, transposed.shape) == ("bfloat16", (2, 3))
    assert digest_tensor("w", tensor + 1).digest != transposed.digest
    assert digest_tensor("w", torch.tensor(1.0)).shape == ()


def test_both_backends_are_in_vllms_registry():
    registered = {name: WeightTransferEngineFactory._registry[name]() for name in BACKENDS.values()}
    assert set(registered.values()) == {SharedMemoryEngine, VerifiedNcclEngine}


def test_the_receiver_is_told_the_tensors_in_the_order_of_the_sender():
    digests = tuple(digest_all(reversed(new_weights().items())))
    update = WeightUpdate(
        version=1,
        backend="nccl",
        tensors=digests,
        digest=combined(digests),
        canary_token_ids=(),
        canary_logprobs=(),
        path=None,
        node="",
        num_bytes=0,
    )
    info = _update_info(update)
    assert info["names"] == sorted(new_weights()) and info["shapes"] == [[2, 3], [2, 2]]
