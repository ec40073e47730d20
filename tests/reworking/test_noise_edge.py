"""`extract --rank auto` keeps what rounding to the stored dtypes cannot have made, and no more, whatever the dtypes.

The oracle is how the checkpoints are made: a difference of known rank in float64, rounded once to the stored dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import planted, save_model, seeded
from torch import Tensor

from loratool import extract
from loratool.errors import FitError

NAME = "m.q_proj.weight"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def found(folder: Path, base: Tensor, tuned: Tensor, exact: bool = False) -> int:
    """The rank that `auto` gives the one layer; 0 where nothing is above the noise."""
    one, two = save_model(folder / "base", {NAME: base}), save_model(folder / "tuned", {NAME: tuned})
    try:
        report = extract(one, two, folder / "out", rank="auto", exact=exact, dry_run=True)
    except FitError:
        return 0
    assert report.modules[NAME].rank == report.modules[NAME].above_noise
    return report.modules[NAME].rank


def weight(shape: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64) * 0.02


def uneven(shape: tuple[int, int], seed: int) -> Tensor:
    """Rows and columns of very different sizes, as models have them: a hundred times at most, both together."""
    rows, columns = (10.0 ** torch.rand(size, generator=seeded(size + seed), dtype=torch.float64) for size in shape)
    return weight(shape, seed) * rows[:, None] * columns


@pytest.mark.parametrize(("shape", "exact"), [((600, 400), False), ((150, 400), True)], ids=["sketch", "exact"])
@pytest.mark.parametrize("size", [2e-3, 0.02, 2.0], ids=["a tenth of W", "as large as W", "100 times W"])
@pytest.mark.parametrize(
    ("before", "after"), [("F32", "F32"), ("BF16", "BF16"), ("F16", "F16"), ("F64", "F64"), ("F32", "BF16")]
)
def test_the_rank_that_was_planted_is_found(
    before: str, after: str, size: float, shape: tuple[int, int], exact: bool, tmp_path: Path
) -> None:
    """A difference of rank 8, small beside the weight or far larger, in any dtype: neither its own rounding nor that
    of the subtraction counts as rank.
    """
    base = weight(shape).to(FLOATS[before])
    tuned = (base.double() + planted(base, 8, 3, size)).to(FLOATS[after])
    assert found(tmp_path, base, tuned, exact) == 8


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("made", [weight, uneven], ids=["even", "uneven"])
def test_rounding_alone_is_no_rank(made: Callable[[tuple[int, int], int], Tensor], dtype: str, tmp_path: Path) -> None:
    """A checkpoint and the same rounded to another dtype differ by noise only: nothing is left, also where some rows
    and columns are a hundred times larger than others, and their noise with them.
    """
    for seed, shape in itertools.product(range(3), [(300, 300), (150, 400), (500, 60)]):
        base = made(shape, seed)
        assert found(tmp_path / f"{seed} {shape}", base, base.to(FLOATS[dtype])) == 0


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_noise_of_large_rows_hides_no_rank_of_the_others(dtype: str, tmp_path: Path) -> None:
    """Two rows with weights a thousand times larger have that much more noise; a difference of rank 6 in the other
    rows is found all the same, and no more than the noise of the two rows comes with it.
    """
    base = weight((400, 300))
    base[[7, 200]] *= 1000
    base = base.to(FLOATS[dtype])
    change = planted(base, 6, 3, 0.02 if dtype == "BF16" else 1e-4)
    change[[7, 200]] = 0
    noise = base.double() * torch.finfo(FLOATS[dtype]).eps * 0.4
    change[[7, 200]] = (noise * torch.randn(base.shape, generator=seeded(5), dtype=torch.float64).sign())[[7, 200]]
    rank = found(tmp_path, base, (base.double() + change).to(FLOATS[dtype]))
    assert 6 <= rank <= 8


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_difference_from_zeros_has_the_noise_of_its_own_values(dtype: str, tmp_path: Path) -> None:
    """Where the base is zero the difference is the tuned weight, rounded as it is stored."""
    base = torch.zeros(300, 200, dtype=FLOATS[dtype])
    tuned = planted(base, 5, 3, 0.5).to(FLOATS[dtype])
    assert found(tmp_path, base, tuned) == 5
