"""This file writes checkpoints behind the training: the state is copied aside, and a thread writes the copy.

Training waits for the copy only. The thread has a process group of its own (gloo), so that its collectives and those of
the training, which may meet in another order on every rank, stay apart. The copies lie on the CPU and are used again.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from learners import checkpoint


class BackgroundSave:
    """The saves of one rank, one at a time. All ranks begin the same ones in the same order."""

    def __init__(self, model_dir: str, export_dtype: torch.dtype, deadline_s: float) -> None:
        """A collective. deadline_s bounds every wait of one rank's thread for another's.

        An export holds the weights in export_dtype, and of model_dir all that is not weights.
        """
        self._model_dir = model_dir
        self._export_dtype = export_dtype
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=deadline_s))
        self._mesh = DeviceMesh.from_group(self._group, "cpu")
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}

    def begin(self, folder: str, state: dict[str, Any], export: bool) -> None:
        """Copy aside what `checkpoint.state_of` gives, and begin to write it to folder/state, and to folder/export.

        When this returns the live tensors may change.
        """
        assert self._writing is None, "a checkpoint is still being written: finish it before the next begins"
        copied = {name: self._copied(name, value) for name, value in state.items()}
        if any(copy.is_pinned() for copy in self._copies.values()):
            torch.cuda.synchronize()  # a copy to pinned memory is only begun when copy_ returns
        self._writing = self._thread.submit(self._write, folder, copied, export)

    def finish(self) -> None:
        """Wait until the checkpoint is on disk. Raises what writing it raised, such as OSError on a full disk."""
        assert self._writing is not None, "no checkpoint is being written: begin one first"
        try:
            self._writing.result()
        finally:
            self._writing = None

    def close(self) -> None:
        """Wait for the thread. Its group goes with the process group that it was made in."""
        self._thread.shutdown()

    def _write(self, folder: str, state: dict[str, Any], export: bool) -> None:
        exported = state["model"] | state.get("buffers", {})
        weights = sum(tensor.numel() for tensor in exported.values()) * self._export_dtype.itemsize if export else 0
        held = sum(tensor.nbytes for part in state.values() if isinstance(part, dict) for tensor in part.values())
        checkpoint.save_state(os.path.join(folder, "state"), state, held + weights, self._group)
        if export:
            tensors = self._whole(exported)
            if dist.get_rank(self._group) == 0:
                checkpoint.export_model(os.path.join(folder, "export"), self._model_dir, tensors)

    def _whole(self, sharded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gathered tensors in the dtype of an export, on rank 0; nothing on the others."""
        gathered = {}
        for name, tensor in sharded.items():
            cast = tensor.to(self._export_dtype) if tensor.is_floating_point() else tensor
            whole = cast.full_tensor() if isinstance(cast, DTensor) else cast
            if dist.get_rank(self._group) == 0:
                gathered[name] = whole.contiguous()
        return gathered

    def _copied(self, name: str, value: Any) -> Any:
        """A copy in the memory that the last one of this name had; of a sharded tensor the shard, on the CPU mesh."""
        if isinstance(value, dict):
            return {key: self._copied(f"{name}/{key}", each) for key, each in value.items()}
        shard = value.to_local() if isinstance(value, DTensor) else value
        if name not in self._copies:
            self._copies[name] = torch.empty_like(shard, device="cpu", pin_memory=shard.is_cuda)
        copy = self._copies[name].copy_(shard, non_blocking=True)
        if not isinstance(value, DTensor):
            return copy
        size, stride = value.size(), value.stride()
        return DTensor.from_local(copy, self._mesh, value.placements, run_check=False, shape=size, stride=stride)
