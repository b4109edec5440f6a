"""This file gathers the sharded policy, tensor by tensor, and puts a version into shared memory for the generators.

The file is a plain safetensors file with Hugging Face names, so an engine's own weight loader reads it.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rl.weights import TensorDigest, digest_of

SHARED_MEMORY = pathlib.Path("/dev/shm")
KEPT_FILES = 2  # a generator may still be reading the version before the newest


def gather_weights(model: PreTrainedModel, dtype: torch.dtype, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Each weight whole, in dtype, on the CPU, under its Hugging Face name; a tied one once.

    A collective: all ranks must exhaust it, though only those with keep are given anything. The cast comes before the
    gathering, which halves what travels.
    """
    shared = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    for name, tensor in model.state_dict().items():
        if name in shared:
            continue
        cast = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        whole = cast.full_tensor() if isinstance(cast, DTensor) else cast
        if keep:
            yield name, whole.cpu().contiguous()


def digest_tensors(tensors: dict[str, Tensor]) -> tuple[TensorDigest, ...]:
    """A digest of each tensor's bytes, by name."""
    return tuple(
        TensorDigest(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            digest=digest_of(tensor.flatten().view(torch.uint8).numpy().data),
        )
        for name, tensor in sorted(tensors.items())
    )


class SharedMemoryFiles:
    """The versions of one run in shared memory, or else in the temporary directory; at most two stay."""

    def __init__(self, run_id: str, num_bytes: int) -> None:
        """num_bytes is the size of one version: a container's shared memory is often too small for four of them."""
        self._run_id = run_id
        needed = (KEPT_FILES + 2) * num_bytes  # one is being written, one may be pinned for a generator that joins
        roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= needed
        self.directory = SHARED_MEMORY if roomy else pathlib.Path(tempfile.gettempdir())

    def write(self, version: int, tensors: dict[str, Tensor]) -> str:
        """Write a version and forget those before the previous one; returns the path, complete from the start."""
        # A version that is written again after a rollback gets another name: a generator may be reading the first.
        path = self.directory / f"slipstream-{self._run_id}-v{version}-{os.getpid()}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, path)
        for old in self._files()[KEPT_FILES:]:
            old.unlink(missing_ok=True)
        return str(path)

    def remove(self) -> None:
        """Remove every file of this run, also those of a process that was killed; call it when the run ends."""
        for file in (*self._files(), *self.directory.glob(f"slipstream-{self._run_id}-v*.partial")):
            file.unlink(missing_ok=True)

    def _files(self) -> list[pathlib.Path]:
        """Newest first."""
        found = self.directory.glob(f"slipstream-{self._run_id}-v*.safetensors")
        return sorted(found, key=lambda file: file.stat().st_mtime_ns, reverse=True)
