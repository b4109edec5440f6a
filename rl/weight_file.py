"""This file lays out a safetensors file before its tensors exist, so that each is written as soon as it is gathered."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable, Mapping

import msgspec

# torch's words for a dtype, what safetensors calls it, and its bytes
DTYPES = {
    "float64": ("F64", 8),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float32": ("F32", 4),
    "int32": ("I32", 4),
    "uint32": ("U32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "int16": ("I16", 2),
    "uint16": ("U16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
ALIGNMENT = 8  # of the first tensor; a reader maps the file and computes with what lies there


class Planned(msgspec.Struct, frozen=True):
    """A tensor that will be written: its name, its dtype in torch's words, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]


class Layout(msgspec.Struct, frozen=True):
    """Where everything of a file lies: the header at 0, each tensor's bytes from offsets[name] on."""

    header: bytes
    offsets: dict[str, int]
    num_bytes: int


def lay_out(tensors: Iterable[Planned], metadata: Mapping[str, str]) -> Layout:
    """The layout of a safetensors file of these tensors.

    The format allows no gap between tensors, so the wider dtypes come first: then each lies at a multiple of its width.
    """
    ordered = sorted(tensors, key=lambda tensor: (-DTYPES[tensor.dtype][1], tensor.name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    position = 0
    for tensor in ordered:
        begins[tensor.name], position = position, position + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": tensor.shape,
            "data_offsets": (begins[tensor.name], position),
        }
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + begin for name, begin in begins.items()}
    return Layout(header, offsets, len(header) + position)


class FileWriter:
    """A file on its way: `put` everything of its layout, in any order, then `finish`; until then it is .partial."""

    def __init__(self, path: pathlib.Path, layout: Layout) -> None:
        self._path, self._layout = path, layout
        self._file = path.with_suffix(".partial").open("wb", buffering=0)
        self._put_at(0, layout.header)

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Write the bytes of one tensor to their place."""
        self._put_at(self._layout.offsets[name], content)

    def finish(self) -> None:
        """Give the file its name: whoever sees the name sees all of it."""
        self._file.close()
        os.replace(self._file.name, self._path)

    def _put_at(self, offset: int, content: bytes | memoryview) -> None:
        rest = memoryview(content).cast("B")
        while rest:  # one call writes two gigabytes at most
            written = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[written:], offset + written
