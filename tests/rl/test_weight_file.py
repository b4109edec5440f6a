"""This file tests rl/weight_file.py against safetensors itself."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from rl.weight_file import DTYPES, FileWriter, Planned, lay_out


def raw(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def test_every_dtype_is_read_back_by_safetensors_whatever_order_it_was_written_in(tmp_path):
    tensors = {
        f"{name} {shape}": (torch.randn(shape) * 9).to(getattr(torch, name))
        for name in DTYPES
        for shape in ((3, 5), (), (0, 2))
    }
    plan = [Planned(name, name.split()[0], tuple(tensor.shape)) for name, tensor in tensors.items()]
    path = tmp_path / "weights.safetensors"
    file = FileWriter(path, lay_out(plan, {"format": "pt", "base": "x"}))
    for name, tensor in tensors.items():
        file.put(name, raw(tensor))
    assert not path.exists()
    file.finish()
    with safe_open(path, "pt") as found:
        assert found.metadata() == {"format": "pt", "base": "x"}
        assert set(found.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = found.get_tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape) and bytes(raw(read)) == bytes(raw(tensor))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_every_tensor_lies_at_a_multiple_of_its_width():
    plan = [Planned("a", "uint8", (3,)), Planned("b", "bfloat16", (5,)), Planned("c", "float64", (1,))]
    layout = lay_out(plan, {})
    assert all(layout.offsets[each.name] % DTYPES[each.dtype][1] == 0 for each in plan)
    assert layout.num_bytes == len(layout.header) + 3 + 10 + 8


def test_a_tensor_that_was_not_planned_has_no_place(tmp_path):
    file = FileWriter(tmp_path / "f", lay_out([Planned("a", "uint8", (3,))], {}))
    with pytest.raises(KeyError, match="b"):
        file.put("b", b"abc")
