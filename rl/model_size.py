"""This file finds a model's weights on disk and counts its parameters from file headers alone, without torch.

`rl check` and `rl doctor` derive disk and memory from the count; both must answer at once.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import re
import struct
from typing import Any, BinaryIO

GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


def missing(path: str) -> str | None:
    """What is wrong with `model.path` as far as the disk can tell, with the fix; None where nothing is.

    A Hugging Face id is not looked up: it may be downloaded at the start.
    """
    if path.startswith("gguf:"):
        package, _, file = path.removeprefix("gguf:").partition("/")
        if not package.isidentifier() or not file:
            return f"model.path {path!r} is not of the form gguf:<python package>/<file>"
        if importlib.util.find_spec(package) is None:
            return f"model.path names the Python package {package!r}, which is not installed; run `make venv`"
        if not _gguf_file(path).is_file():
            return f"model.path: package {package!r} has no file {file!r}; it has: {', '.join(_gguf_names(package))}"
        return None
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        lacking = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
        return f"model.path {path} lacks {', '.join(lacking)}; give a Hugging Face model folder" if lacking else None
    if folder.is_absolute() or path.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return f"model.path {path!r} is no directory; give a directory, a Hugging Face id or gguf:<package>/<file>"
    return None


def count_parameters(path: str) -> int | None:
    """Parameters of the model at `model.path`: exact from GGUF or safetensors headers, else as its name says (1.5B).

    None where neither tells. Raises ValueError if a header is not what its file's name promises.
    """
    if missing(path) is None and path.startswith("gguf:"):
        return _count_gguf(_gguf_file(path))
    files = sorted(pathlib.Path(path).expanduser().glob("*.safetensors"))
    if files:
        return sum(map(_count_safetensors, files))
    named = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z])", path)
    return int(float(named[1]) * {"B": 1e9, "M": 1e6}[named[2]]) if named else None


def _package_folder(package: str) -> pathlib.Path:
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ["."]
    return pathlib.Path(next(iter(folders)))


def _gguf_file(path: str) -> pathlib.Path:
    package, _, file = path.removeprefix("gguf:").partition("/")
    return _package_folder(package) / file


def _gguf_names(package: str) -> list[str]:
    folder = _package_folder(package)
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.gguf")) or ["no GGUF file at all"]


def _count_safetensors(file: pathlib.Path) -> int:
    with file.open("rb") as stream:
        (length,) = _unpack(stream, "Q")
        header = json.loads(stream.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _count_gguf(file: pathlib.Path) -> int:
    """Sum the tensor shapes of a GGUF header (format: docs/gguf.md of ggml-org/ggml, versions 2 and 3).

    By hand, because the gguf package needs four seconds for the same: it materialises the whole vocabulary.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{file} does not start with GGUF; it is no GGUF file or a broken download")
        _, tensors, entries = _unpack(stream, "IQQ")
        for _ in range(entries):
            _skip_string(stream)
            _skip_value(stream, _unpack(stream, "I")[0])
        total = 0
        for _ in range(tensors):
            _skip_string(stream)
            (rank,) = _unpack(stream, "I")
            total += math.prod(_unpack(stream, "Q" * rank))
            stream.seek(struct.calcsize("<IQ"), 1)  # element type, offset
        return total


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    data = stream.read(struct.calcsize("<" + form))
    try:
        return struct.unpack("<" + form, data)
    except struct.error:
        raise ValueError(f"{stream.name} ends inside its header; it is a broken download") from None


def _skip_string(stream: BinaryIO) -> None:
    stream.seek(_unpack(stream, "Q")[0], 1)


def _skip_value(stream: BinaryIO, kind: int) -> None:
    if kind == GGUF_STRING:
        _skip_string(stream)
    elif kind == GGUF_ARRAY:
        element, count = _unpack(stream, "IQ")
        if element in GGUF_SCALARS:
            stream.seek(count * struct.calcsize("<" + GGUF_SCALARS[element]), 1)
            return
        for _ in range(count):
            _skip_value(stream, element)
    elif kind in GGUF_SCALARS:
        stream.seek(struct.calcsize("<" + GGUF_SCALARS[kind]), 1)
    else:
        raise ValueError(f"{stream.name} holds a GGUF value of unknown kind {kind}; its header is damaged")
