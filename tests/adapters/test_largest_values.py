"""The largest magnitude of a tensor in its file tells whether all of it is finite, and whether all of it is zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratool.adapters.adapter import PIECE, StoredTensor, is_finite, is_zero
from loratool.files.safefile import read_safefile

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """Tensors as they are in a file."""
    save_file(tensors, folder / "x.safetensors")
    file = read_safefile(folder / "x.safetensors")
    return {name: StoredTensor(file, info) for name, info in file.tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_value_in_any_piece_decides(dtype: torch.dtype, tmp_path: Path) -> None:
    """A tensor is read in pieces; the value is the first, the last, or the first one of the second piece."""
    count = PIECE // dtype.itemsize + 3
    special = (torch.nan, torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).smallest_normal, -0.0)
    more = () if dtype == torch.float8_e4m3fn else (torch.inf, -torch.inf)  # which has none
    made = {}
    for value in (*special, *more):
        for place in (0, count - 1, PIECE // dtype.itemsize):
            values = torch.zeros(count, dtype=torch.float64)
            values[place] = value
            made[f"{value} at {place}"] = values.to(dtype)
    for name, tensor in stored(tmp_path, made).items():
        wide = made[name].double()
        assert tensor.finite() == is_finite(*tensor.largest()) == bool(wide.isfinite().all()), name
        assert is_zero(tensor) == bool((wide == 0).all()), name


def test_a_tensor_without_values_is_finite_and_zero(tmp_path: Path) -> None:
    found = stored(tmp_path, {"x": torch.zeros(0, 4), "counts": torch.ones(2, dtype=torch.int64)})
    assert found["x"].finite()
    assert is_zero(found["x"])
    assert found["counts"].finite()
    assert not is_zero(found["counts"])
