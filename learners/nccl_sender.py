"""This file is the learner's half of weights.backend nccl: vLLM's trainer-side engine, with the driver in the lead.

vLLM lets the trainer tell its engines what to do. Here the driver does: while rank 0 is inside `NcclSender(...)` every
generator is inside `join`, and while it is inside `send` every generator is inside `update`. So the client that vLLM's
engine calls does nothing, and only the rendezvous and the broadcast are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from rl.weights import NcclGroup


class NcclSender:
    """Rank 0 of the group that weights are broadcast in. Construction blocks until all engines have joined."""

    def __init__(self, group: NcclGroup) -> None:
        """Uses the current CUDA device."""
        self._source = LatestTensors()
        info = NCCLTrainerInitInfo(
            rank=0, master_address=group.address, master_port=group.port, world_size=group.world_size, packed=True
        )
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(info, client=DriverLeads(), source=self._source)

    def send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Broadcast full tensors of this device; blocks until all engines have them.

        Names, dtypes and shapes must be those of WeightUpdate.tensors: the receivers cut the stream by them. Both sides
        go by sorted names, so that the order cannot differ.
        """
        torch.cuda.current_stream().synchronize()  # vLLM packs on streams of its own, which wait for nobody
        self._source.tensors = dict(sorted(tensors.items()))
        try:
            self._engine.send_weights()
        finally:
            self._source.tensors = {}

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()


class LatestTensors(WeightSource):
    """The tensors of the version being sent."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())


class DriverLeads:
    """vLLM's client, where all it would ask of the engines has been asked of the generators already."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Generator.join has."""

    def start_weight_update(self) -> None:
        """Generator.update has."""

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Generator.update has."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Generator.update does when all tensors have come."""
