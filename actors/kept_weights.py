"""This file reads a policy version from its file, whole or as a delta on the version that was kept for that.

A whole version's tensors lie in the mapped file, so keeping them costs no memory while the file is there for others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from rl.weight_delta import BASE, BITS, GAPS, KEEP, VALUES, Changes, changed_copy
from rl.weights import WeightUpdateError


class Read(NamedTuple):
    """Tensors by name, and whether deltas on them may follow."""

    tensors: dict[str, Tensor]
    keep: bool


class KeptWeights:
    """The version that a delta may be based on: nothing until `keep`, and then never changed in place."""

    def __init__(self) -> None:
        self._digest = ""
        self._tensors: dict[str, Tensor] = {}

    def read(self, path: str) -> Read:
        """The tensors of a file, which stays mapped as long as they live, even when its name is gone.

        Raises WeightUpdateError for a delta on another version than the kept one, or one that does not fit it.
        """
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        if BASE not in metadata:
            return Read(tensors, keep=KEEP in metadata)
        if metadata[BASE] != self._digest:
            raise WeightUpdateError(
                f"{path} holds changes to the weights with digest {metadata[BASE]}, but those kept here have "
                f"{self._digest or 'none'}; load a whole version first"
            )
        return Read(self._changed(tensors), keep=True)

    def keep(self, digest: str, tensors: dict[str, Tensor]) -> None:
        """Keep a version in place of the one before."""
        self._digest, self._tensors = digest, tensors

    def _changed(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {name.removesuffix(GAPS) for name in arrays if name.endswith(GAPS)}
        foreign = arrays.keys() - {name + end for name in self._tensors for end in (GAPS, VALUES)}
        if foreign:
            raise WeightUpdateError(
                f"the delta changes what the kept weights do not have: {', '.join(sorted(foreign))}"
            )
        return {
            name: _changed_tensor(name, tensor, arrays) if name in changed else tensor
            for name, tensor in self._tensors.items()
        }


def _changed_tensor(name: str, base: Tensor, arrays: dict[str, Tensor]) -> Tensor:
    bits = BITS[base.dtype.itemsize]
    try:
        changes = Changes(arrays[name + GAPS].numpy(), arrays[name + VALUES].numpy())
        new = changed_copy(base.flatten().view(torch.uint8).numpy().view(bits), changes)
    except (ValueError, KeyError) as error:
        raise WeightUpdateError(f"the delta does not fit {name}: {error}") from error
    return torch.from_numpy(new).view(base.dtype).reshape(base.shape)
