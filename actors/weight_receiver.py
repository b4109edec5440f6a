"""This file is what Slipstream adds to vLLM's worker process: weight-transfer engines that verify what they receive.

Two backends in vLLM's own registry. `slipstream_shared_memory` reads a file, before the engine is paused where it is
told of it in time; `slipstream_nccl` is vLLM's NCCL engine with books kept. Both digest the very bytes they hand to
`load_weights`, compare them with what the sender said, and check that every parameter of the model was filled. An
update that fails leaves the engine either as it was or, if loading had begun, `torn`: then it must not sample until a
complete update has arrived.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors.kept_weights import KeptWeights
from rl.weights import TensorDigest, combined, digest_of, verify_tensors

BACKENDS = {"shared_memory": "slipstream_shared_memory", "nccl": "slipstream_nccl"}


def digest_tensor(name: str, tensor: torch.Tensor) -> TensorDigest:
    """The digest of a CPU tensor's bytes, in row-major order."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return TensorDigest(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        digest=digest_of(raw.data),
    )


def digest_all(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[TensorDigest]:
    """Digest many tensors on all cores: hashing releases the interpreter lock.

    Copies from a device are made in this thread: its current stream is the one that the tensors were received on.
    """
    on_cpu = ((name, tensor.detach().cpu()) for name, tensor in tensors)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda named: digest_tensor(*named), on_cpu))


def unfilled_parameters(model: torch.nn.Module, expected: set[str], loaded: set[str]) -> list[str]:
    """Engine parameters that an update left without new values; to be asked before the reload is finalized.

    `loaded` is what load_weights reported. It speaks of whole parameters, while a fused one (qkv_proj) comes from
    several tensors of a checkpoint: the layer's element count shows one that is absent. An embedding is a single
    tensor and padded by vLLM, so its count may fall short.
    """
    missing = sorted(expected - loaded)
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        total = info.load_numel_total or 0
        if 0 < info.load_numel < total and not hasattr(layer, "num_embeddings_padded"):
            missing.append(f"{name} ({info.load_numel} of {total} elements)")
    return missing


def finalize(model: torch.nn.Module, model_config: Any) -> None:
    """Put the loaded weights where the kernels look for them, in layers that share a loaded parameter too."""
    finalize_layerwise_reload(model, model_config)
    renew_tied(model)


def renew_tied(model: torch.nn.Module) -> None:
    """Have layers that share a parameter compute with its new values.

    vLLM processes a tied parameter for the layer that owns it only. On a CPU the output head computes with a repacked
    copy of its own, which would stay at the starting weights for ever.
    """
    owned = dict(model.named_parameters())
    for name, _ in model.named_parameters(remove_duplicate=False):
        layer = model.get_submodule(name.rpartition(".")[0])
        if name not in owned and isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase):
            layer.quant_method.process_weights_after_loading(layer)


def parameter_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters, a tied one once."""
    return {name for name, _ in model.named_parameters()}


@dataclass
class Books:
    """What happened in the latest update: what was expected, came and was loaded, and the state it left.

    expected are the model's parameters without tied duplicates, listed while they are still tied: a reload unties them.
    """

    expected: set[str] = field(default_factory=set)
    received: list[TensorDigest] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)
    torn: bool = False

    def load(self, model: torch.nn.Module, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Hand tensors to the model; from here until the reload is finished it holds parts of two versions."""
        self.torn = True
        self.loaded |= model.load_weights(tensors)

    def verify(self, model: torch.nn.Module, sent: list[TensorDigest]) -> None:
        """Raise WeightUpdateError unless all that was sent came, and filled the model."""
        verify_tensors(sent, self.received, unfilled_parameters(model, self.expected, self.loaded))


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """A file of this node, whole or a delta, and what the sender says it makes (TensorDigest as plain values)."""

    path: str
    tensors: list[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """An update that was found to be what was sent; its tensors keep the file mapped, whatever becomes of its name."""

    path: str
    tensors: dict[str, torch.Tensor]
    received: list[TensorDigest]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads a file in shared memory, after its content has been found to be what was sent."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def __init__(self, *vllm_parts: Any) -> None:
        super().__init__(*vllm_parts)
        self.books = Books()
        self._kept = KeptWeights()
        self._prepared: Prepared | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to set up: each update names its file."""

    def prepare(self, update_info: dict[str, Any]) -> None:
        """Read and verify an update ahead of receiving it; a thread beside the engine's may, for the model is not used.

        Raises WeightUpdateError, and OSError, where it is not what was sent.
        """
        self._prepared = None  # an update that was never received
        self._prepared = self._verified(self.parse_update_info(update_info))

    def start_weight_update(self) -> None:
        """Nothing yet: the model stays as it is until the file has been verified."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive; unlike the base class, synchronize an accelerator only where there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load what was prepared, or else read it now. A file that is not what was sent leaves the model untouched."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared.path != update_info.path:
            prepared = self._verified(update_info)
        sent = _sent(update_info)
        verify_tensors(sent, prepared.received)  # once more: it may have been prepared for another update
        self.books = Books(parameter_names(self.model), prepared.received, torn=self.books.torn)
        initialize_layerwise_reload(self.model)
        try:
            self.books.load(self.model, list(prepared.tensors.items()))
            self.books.verify(self.model, sent)
        except BaseException:
            # Else the next update would count on top of this one's half-filled layers.
            finalize(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """The model is whole again."""
        finalize(self.model, self.model_config)
        self.books.torn = False

    def shutdown(self) -> None:
        """Nothing to end: what is held between updates are tensors."""

    def _verified(self, update: SharedMemoryUpdate) -> Prepared:
        tensors, keep = self._kept.read(update.path)
        received = digest_all(tensors.items())
        verify_tensors(_sent(update), received)
        if keep:
            self._kept.keep(combined(received), tensors)
        return Prepared(update.path, tensors, received)


def _sent(update: SharedMemoryUpdate | VerifiedNcclUpdate) -> list[TensorDigest]:
    return msgspec.convert(update.tensors, list[TensorDigest])


@dataclass
class VerifiedNcclUpdate(NCCLWeightTransferUpdateInfo):
    """vLLM's list of what will be broadcast, in order, and the sender's digests of it."""

    tensors: list[dict[str, Any]]


class _Inbox:
    """Stands where vLLM's NCCL engine expects the model, so that what it received is digested on the way."""

    def __init__(self, model: torch.nn.Module, books: Books) -> None:
        self.model = model
        self.books = books

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors = list(weights)
        self.books.received += digest_all(tensors)
        self.books.load(self.model, tensors)


class VerifiedNcclEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL engine. The broadcast is consumed as it comes, so a failure always leaves the model torn."""

    update_info_cls = VerifiedNcclUpdate

    def __init__(self, *vllm_parts: Any) -> None:
        super().__init__(*vllm_parts)
        self.books = Books()

    def prepare(self, update_info: dict[str, Any]) -> None:
        """Nothing can be: a broadcast needs both sides at once."""

    def start_weight_update(self) -> None:
        """As vLLM does, with new books."""
        self.books = Books(parameter_names(self.model), torn=True)
        super().start_weight_update()

    def receive_weights(self, update_info: VerifiedNcclUpdate) -> None:
        """Take part in the broadcast, then verify."""
        model = self.model
        self.model = _Inbox(model, self.books)
        try:
            super().receive_weights(update_info)
            self.books.verify(model, _sent(update_info))
        except BaseException:
            finalize(model, self.model_config)
            raise
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        """The model is whole again."""
        finalize(self.model, self.model_config)
        self.books.torn = False


# The one import-time effect: vLLM's worker imports this module with the extension, before it looks up the backend.
WeightTransferEngineFactory.register_engine(BACKENDS["shared_memory"], SharedMemoryEngine)
WeightTransferEngineFactory.register_engine(BACKENDS["nccl"], VerifiedNcclEngine)
