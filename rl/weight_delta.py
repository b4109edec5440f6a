"""This file says how a delta is written: only the values whose bits differ from those of another version, its base.

An optimizer step of the size that reinforcement learning takes leaves most bfloat16 values as they were. A delta is a
safetensors file with two arrays for each tensor that changed: how many unchanged values lie before each change, and the
new bits. Every STRIDE-th value counts as changed, so that a gap always fits 16 bits. Bits replace bits: what a receiver
makes of base and delta is the new version to the last bit, and is digested like one that came whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

STRIDE = 1 << 16
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # unsigned integers as wide as a dtype
GAPS, VALUES = "/gaps", "/values"  # after the tensor's name

# Keys of the file's metadata. A delta names the digest of its base (WeightUpdate.base_digest). A whole version that
# deltas may follow says so: whoever loads it keeps it.
BASE, KEEP = "base", "keep"


class Changes(NamedTuple):
    """What is different in a tensor: gaps [K] uint16, values [K] as unsigned integers of the tensor's width."""

    gaps: np.ndarray
    values: np.ndarray


def changes_between(base: np.ndarray, new: np.ndarray) -> Changes | None:
    """The changes from base to new, both flat arrays of bits; None where there are none."""
    changed = base != new
    if not changed.any():
        return None
    changed[::STRIDE] = True
    places = np.flatnonzero(changed)
    return Changes((np.diff(places, prepend=-1) - 1).astype(np.uint16), new[places])


def changed_copy(base: np.ndarray, changes: Changes) -> np.ndarray:
    """base with the changes made, in memory of its own. Raises ValueError where they are not changes of this array."""
    gaps, values = changes
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if gaps.dtype != np.uint16 or values.dtype != base.dtype or gaps.shape != values.shape:
        raise ValueError(f"{len(gaps)} gaps of {gaps.dtype} and {len(values)} values of {values.dtype}")
    if places.size and places[-1] >= base.size:
        raise ValueError(f"a change at {places[-1]} of {base.size} values")
    new = base.copy()
    new[places] = values
    return new
