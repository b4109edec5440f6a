"""This file gathers the sharded policy, tensor by tensor, and puts a version into shared memory for the generators.

While one tensor is gathered, those before it are digested and written in a thread. The file is a plain safetensors file
with Hugging Face names, so an engine's own weight loader reads it. Where deltas are asked for, the same thread compares
each tensor with the version before and writes a second file of what changed.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import msgspec
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rl.weight_delta import BASE, BITS, GAPS, KEEP, VALUES, Changes, changes_between
from rl.weight_file import FileWriter, Layout, Planned, lay_out
from rl.weights import TensorDigest, combined, digest_of

Transport = Literal["auto", "dense", "delta"]
SHARED_MEMORY = pathlib.Path("/dev/shm")
KEPT_FILES = 2  # a generator may still be reading the version before the newest
GATHERED_AHEAD = 4  # tensors that wait for the writer; each is whole, in memory of its own


def plan_weights(model: PreTrainedModel, dtype: torch.dtype) -> list[Planned]:
    """What gather_weights will give, known before anything is gathered."""
    return [
        Planned(name, _words(dtype if tensor.is_floating_point() else tensor.dtype), tuple(tensor.shape))
        for name, tensor in _untied(model)
    ]


def gather_weights(model: PreTrainedModel, dtype: torch.dtype, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Each weight whole, in dtype, on the CPU, under its Hugging Face name; a tied one once.

    A collective: all ranks must exhaust it, though only those with keep are given anything. The cast comes before the
    gathering, which halves what travels.
    """
    for name, tensor in _untied(model):
        cast = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        whole = cast.full_tensor() if isinstance(cast, DTensor) else cast
        if keep:
            yield name, whole.cpu().contiguous()


def fill(outgoing: Outgoing | None, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gather the weights into what goes out; a rank with nothing to send only takes part."""
    for name, tensor in gather_weights(model, dtype, keep=outgoing is not None):
        assert outgoing is not None
        outgoing.add(name, tensor)


def digest_tensors(tensors: dict[str, Tensor]) -> tuple[TensorDigest, ...]:
    """A digest of each tensor's bytes, by name."""
    return tuple(_digest(name, tensor) for name, tensor in sorted(tensors.items()))


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """A version that is complete, in the words of WeightUpdate; path is None where it stays in memory."""

    version: int
    tensors: tuple[TensorDigest, ...]
    digest: str
    num_bytes: int
    path: str | None = None
    base_version: int | None = None
    base_digest: str = ""
    delta_path: str | None = None
    delta_bytes: int = 0


class Outgoing:
    """A version while it is gathered: `add` each tensor, then `finish`."""

    def __init__(self, version: int, target: Target | None = None) -> None:
        """Without a target, the tensors are digested and stay here, by sorted name once all have come."""
        self.tensors: dict[str, Tensor] = {}
        self._version = version
        self._target = target
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weight writer")
        self._places = threading.BoundedSemaphore(GATHERED_AHEAD)
        self._digests: list[Future[TensorDigest]] = []
        self._num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Hand a whole CPU tensor over, which must not change until `finish`; waits while the writer is far behind.

        Never raises what the writer met, for gathering is a collective that must go on: `finish` does.
        """
        self._places.acquire()
        self._num_bytes += tensor.nbytes
        self._digests.append(self._pool.submit(self._take, name, tensor))
        if self._target is None:
            self.tensors[name] = tensor

    def finish(self) -> Written:
        """Wait until everything is digested and written, and only then give the files their names."""
        self._pool.shutdown()
        self.tensors = dict(sorted(self.tensors.items()))
        tensors = tuple(sorted((each.result() for each in self._digests), key=lambda tensor: tensor.name))
        known = Written(version=self._version, tensors=tensors, digest=combined(tensors), num_bytes=self._num_bytes)
        return self._target.finish(known) if self._target else known

    def _take(self, name: str, tensor: Tensor) -> TensorDigest:
        try:
            if self._target is not None:
                self._target.write(name, tensor)
            return _digest(name, tensor)
        finally:
            self._places.release()


class Target:
    """The files of one version while they are written; used by one thread at a time."""

    def __init__(self, path: pathlib.Path, layout: Layout, base: Written | None, always_delta: bool) -> None:
        self._path, self._base, self._always_delta = path, base, always_delta
        self._base_file = safe_open(base.path, "pt") if base is not None else None
        self._changes: dict[str, Changes] = {}
        self._file = FileWriter(path, layout)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor at its place, and note what changed in it."""
        raw = _raw(tensor)
        self._file.put(name, raw.data)
        if self._base_file is not None:
            bits = BITS[tensor.dtype.itemsize]
            changes = changes_between(_raw(self._base_file.get_tensor(name)).view(bits), raw.view(bits))
            if changes is not None:
                self._changes[name] = changes

    def finish(self, known: Written) -> Written:
        """Name the file, and beside it the delta if it is smaller, or wanted anyway."""
        self._file.finish()
        known = msgspec.structs.replace(known, path=str(self._path))
        delta_bytes = sum(changes.gaps.nbytes + changes.values.nbytes for changes in self._changes.values())
        base = self._base
        if base is None or not (self._always_delta or delta_bytes < known.num_bytes):
            return known
        path = self._path.with_suffix(".delta")
        _write_delta(path, self._changes, base)
        based = {"base_version": base.version, "base_digest": base.digest}
        return msgspec.structs.replace(known, **based, delta_path=str(path), delta_bytes=delta_bytes)


class SharedMemoryFiles:
    """The versions of one run in shared memory, or else in the temporary directory; at most two stay."""

    def __init__(self, run_id: str, num_bytes: int, transport: Transport = "dense") -> None:
        """num_bytes is the size of one version: a container's shared memory is often too small for four of them."""
        self._run_id = run_id
        self._transport: Transport = transport
        self._newest: Written | None = None
        needed = (KEPT_FILES + 2) * num_bytes  # one is being written, one may be pinned for a generator that joins
        roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= needed
        self.directory = SHARED_MEMORY if roomy else pathlib.Path(tempfile.gettempdir())

    def begin(self, version: int, plan: Iterable[Planned]) -> Outgoing:
        """Begin to write a version, to be filled with exactly the tensors that are planned."""
        # A version that is written again after a rollback gets another name: a generator may be reading the first.
        path = self.directory / f"slipstream-{self._run_id}-v{version}-{os.getpid()}.safetensors"
        deltas = self._transport != "dense"
        layout = lay_out(plan, {"format": "pt"} | ({KEEP: "true"} if deltas else {}))
        base = self._newest if deltas and self._newest and self._newest.version != version else None
        return Outgoing(version, Target(path, layout, base, self._transport == "delta"))

    def finish(self, outgoing: Outgoing) -> Written:
        """Complete a version and forget those before the previous one."""
        written = outgoing.finish()
        self._newest = written if written.path else None
        for old in self._files()[KEPT_FILES:]:
            old.unlink(missing_ok=True)
            old.with_suffix(".delta").unlink(missing_ok=True)
        return written

    def remove(self) -> None:
        """Remove every file of this run, also those of a process that was killed; call it when the run ends."""
        for kind in ("safetensors", "delta", "partial"):
            for file in self.directory.glob(f"slipstream-{self._run_id}-v*.{kind}"):
                file.unlink(missing_ok=True)

    def _files(self) -> list[pathlib.Path]:
        """Newest first."""
        found = self.directory.glob(f"slipstream-{self._run_id}-v*.safetensors")
        return sorted(found, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def _write_delta(path: pathlib.Path, changes: Mapping[str, Changes], base: Written) -> None:
    arrays = {name + GAPS: each.gaps for name, each in changes.items()}
    arrays |= {name + VALUES: each.values for name, each in changes.items()}
    plan = [Planned(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    file = FileWriter(path, lay_out(plan, {"format": "pt", BASE: base.digest}))
    for name, array in arrays.items():
        file.put(name, array.data)
    file.finish()


def _untied(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    shared = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in shared)


def _raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor."""
    return tensor.flatten().view(torch.uint8).numpy()


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(name: str, tensor: Tensor) -> TensorDigest:
    return TensorDigest(name, _words(tensor.dtype), tuple(tensor.shape), digest_of(_raw(tensor).data))
