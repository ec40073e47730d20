"""What is missing of a rounded update is added in the update's own column and row space, by one look at all rows."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from loratool.merging import compensating
from loratool.merging.addends import ALL, Addend, Place
from loratool.merging.compensated_sums import compensated_sum
from loratool.merging.compensating import Compensation, compensated, round_to, sample
from loratool.merging.exact_rows import ExactSum

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def normal(*shape: int, seed: int, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """By torch, in float64."""
    found: np.ndarray = torch.from_numpy(values).to(DTYPES[dtype]).double().numpy()
    return found


class Rows:
    """A weight whose rows can be read."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight

    def __call__(self, values: np.ndarray, first: int) -> None:
        values[:] = self.weight[first : first + len(values)]


def pair(rows: int, width: int, rank: int, dtype: str, ratio: float = 1e-3) -> tuple[np.ndarray, np.ndarray, Rows]:
    """Factors of an update and a weight of that dtype, whose ratio of norms is `ratio`."""
    weight = rounded(normal(rows, width, seed=1, size=0.02), dtype).astype(np.float32)
    up, down = normal(rows, rank, seed=2), normal(rank, width, seed=3)
    return up * np.float32(ratio * np.linalg.norm(weight) / np.linalg.norm(up @ down)), down, Rows(weight)


def space(factor: np.ndarray) -> np.ndarray:
    """The orthogonal projection onto the columns of a factor."""
    basis, sizes, _ = np.linalg.svd(factor.astype(float), full_matrices=False)
    basis = basis[:, sizes > 1e-6 * sizes[0]]
    found: np.ndarray = basis @ basis.T
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "rank"), [(96, 64, 5), (33, 47, 3), (7, 600, 8), (300, 1, 1)], ids=str)
@pytest.mark.parametrize("tile", [1, 1 << 17])
def test_what_is_added_is_the_missing_part_in_the_own_spaces(
    rows: int, width: int, rank: int, dtype: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P R + R Q − P R Q by dense projections in float64, where E comes from torch; for tiles of a row and of all rows."""
    monkeypatch.setattr(compensating, "TILE", tile)
    monkeypatch.setattr(Compensation, "scale_for", lambda *_: 1.0)
    up, down, read = pair(rows, width, rank, dtype)
    up[:, -1] = up[:, 0]  # two columns that are alike
    change = (up @ down).astype(float)
    missing = change - (rounded((read.weight + up @ down), dtype) - read.weight)
    left, right = space(up), space(down.T)
    wanted = change + left @ missing + missing @ right - left @ missing @ right
    one, other = compensated(up, down, 1.0, read, dtype)
    assert one.dtype == other.dtype == np.float32
    near = 5e-3 * np.linalg.norm(change)  # an element next to a tie may be rounded otherwise
    assert np.linalg.norm(one.astype(float) @ other - wanted) < near < np.linalg.norm(wanted - change) / 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [1e-4, 3e-4, 1e-3, 1e-2])
def test_the_rounded_weight_holds_the_update(dtype: str, ratio: float) -> None:
    """Its whole size along itself; and of its columns and rows, in its own spaces, far more than by rounding alone."""
    up, down, read = pair(384, 512, 8, dtype, ratio)
    change = (up @ down).astype(float)
    one, other = compensated(up, down, 1.0, read, dtype)
    held = rounded(read.weight + one @ other, dtype) - read.weight
    alone = rounded(read.weight + up @ down, dtype) - read.weight
    assert (held * change).sum() / (change**2).sum() == pytest.approx(1, abs=0.01)
    if (alone * change).sum() / (change**2).sum() < 0.9:
        for side, basis in ((0, space(up)), (1, space(down.T))):
            errors = [np.linalg.norm(np.moveaxis(each - change, side, 0).T @ basis) for each in (held, alone)]
            assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_weight_are_corrected_one_by_one(dtype: str) -> None:
    """Two updates of the upper rows, one of every other column below, and a difference in full, which stays as it is."""
    rows, width, ratio = 256, 192, 1e-3 if dtype == "BF16" else 1e-4
    weight = rounded(normal(rows, width, seed=1, size=0.02), dtype).astype(np.float32)

    def part(place: Place, rank: int, seed: int) -> Addend:
        up, down = normal(place.rows, rank, seed=seed), normal(rank, place.width, seed=seed + 1)
        size = 0.02 * ratio * math.sqrt(up.shape[0] * place.width) / np.linalg.norm(up @ down)
        return Addend(place, torch.from_numpy(up), torch.from_numpy(down), float(size))

    above, below = Place(0, 160, ALL, width), Place(160, 96, slice(0, None, 2), width // 2)
    whole = Addend(Place(0, rows, ALL, width), torch.from_numpy(normal(rows, width, seed=9, size=0.01)), None, 1.0)
    parts = [part(above, 4, 2), part(below, 3, 4), whole, part(above, 2, 6)]

    def change_of(some: Iterable[Addend]) -> np.ndarray:
        found = np.zeros((rows, width))
        for each in some:
            values = each.up.double() if each.down is None else each.up.double() @ each.down.double()
            found[each.place.first : each.place.stop, each.place.columns] += each.scale * values.numpy()
        return found

    result = compensated_sum(ExactSum(parts, width, DTYPES[dtype], torch.float32, rows), Rows(weight))
    assert [each.up.shape[1] for each in result.parts] == [12, 6, width]
    held = rounded((weight + change_of(result.parts)).astype(np.float32), dtype) - weight - change_of([whole])
    for group in (parts[::3], parts[1:2]):
        change = change_of(group)
        assert (held * change).sum() / (change**2).sum() == pytest.approx(1, abs=0.02)


def test_scales_of_factors_do_not_matter() -> None:
    up, down, read = pair(96, 64, 5, "BF16")
    wanted = np.matmul(*compensated(up, down, 1.0, read, "BF16"))
    for shift in (-100, 31, 100):
        size = np.float64(2.0) ** shift
        found = compensated((up / size).astype(np.float32), (down * size).astype(np.float32), 1.0, read, "BF16")
        assert np.array_equal(np.matmul(*found), wanted)
    assert np.array_equal(np.matmul(*compensated(up * 4, down, 0.25, read, "BF16")), wanted)


def test_an_update_of_zeros_stays_one() -> None:
    _, down, read = pair(96, 64, 5, "BF16")
    one, other = compensated(np.zeros((96, 5), np.float32), down, 2.0, read, "BF16")
    assert not (one @ other).any()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_do_not_count(odd: float) -> None:
    """An element that cannot hold anything: what is missing of it is all of it, and the others are as they should be."""
    up, down, read = pair(96, 64, 5, "BF16")
    read.weight[5, 7] = odd
    one, other = compensated(up, down, 1.0, read, "BF16")
    change, finite = (up @ down).astype(float), np.isfinite(read.weight)
    before = np.where(finite, read.weight, 0)
    held = np.where(finite, rounded(before + one @ other, "BF16") - before, 0)
    assert (held * change).sum() / (change**2).sum() == pytest.approx(1, abs=0.02)


def test_rows_without_an_update_stay_as_they_are() -> None:
    up, down, read = pair(96, 64, 5, "BF16")
    up[10:80] = 0
    one, _ = compensated(up, down, 1.0, read, "BF16")
    assert not one[10:80].any()
    assert one[:10].any(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_digits_are_cut_as_torch_does(dtype: str) -> None:
    """Over the whole range of the dtype, its subnormal numbers and zeros included; ties are left out."""
    generator = np.random.default_rng(4)
    size = 2.0 ** generator.uniform(-26, 15, 4096)
    values = np.concatenate([size * generator.choice([-1, 1], 4096), [0.0, -0.0]]).astype(np.float32)
    wanted = rounded(values, dtype)
    round_to(dtype, values)
    assert np.array_equal(values.astype(float), wanted)


@pytest.mark.parametrize(("count", "wanted"), [(5, 8), (100, 8), (100, 64), (1000, 130), (9, 8)])
def test_a_sample_is_spread_over_all_numbers(count: int, wanted: int) -> None:
    numbers = np.arange(count) * 3
    found = sample(numbers, wanted)
    assert np.array_equal(found, np.unique(found))
    assert set(found.tolist()) <= set(numbers.tolist())
    assert min(count, 8) <= len(found) <= max(wanted, 8)
    if count > wanted >= 16:
        assert found[0] == 0
        assert found[-1] == numbers[-1]
