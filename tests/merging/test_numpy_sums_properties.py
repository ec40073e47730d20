"""Any weights and factors, planted ties and cancellations among them: numpy's elements are the exact sum rounded once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from exactly import exact_products, nearest_value
from hypothesis import HealthCheck, given, settings, strategies as st

from loratool.merging import exact_rows, numpy_sums
from loratool.merging.addends import ALL, Addend, Place
from loratool.merging.exact_rows import ExactSum, Scratch
from loratool.merging.numpy_rounding import RESULTS, Result
from loratool.merging.numpy_sums import Added, Tiles

FEW = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
SCALES = [0.3, -(16 / 7**0.5), 3e9, -(2.0**-59), 2.0**40]
POWERS = [1.0, 2.0, -0.5, 2.0**-20]
KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Float32 as a file of some dtype has it, where it fits."""
    kept: np.ndarray = torch.from_numpy(values.astype(np.float32)).to(KINDS[kind]).float().numpy()
    kept[~np.isfinite(kept)] = 1
    return kept


@st.composite
def sums(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """W, up, down and a scale: any, or of few digits, so that some sums are ties, or next to one by less than float64 keeps."""
    rows, rank, width = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 7, 16]))
    generator, of_few_digits = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.booleans())
    kind, size = draw(st.sampled_from([*KINDS])), 2.0 ** draw(st.integers(-40, 8))
    scale = draw(st.sampled_from(POWERS if of_few_digits else POWERS + SCALES))
    up, down = generator.standard_normal((rows, rank)), generator.standard_normal((rank, width))
    if of_few_digits:
        up, down = np.rint(4 * up) / 4, np.rint(4 * down) / 4
    up, down = stored(up * size, kind), stored(down, kind)
    up[generator.random(rows) < 0.2] = 0
    change = up.astype(np.float64) @ down.astype(np.float64) * scale
    if rank > 1 and draw(st.booleans()):  # what float64 loses beside the other products
        change -= np.outer(up[:, -1], down[-1]) * scale
        up[:, -1] = np.float32(size * 2.0**-60) * generator.choice([-1, 0, 1], rows)
    return stored(planted(change, generator), draw(st.sampled_from([*KINDS, "float32"]))), up, down, scale


def planted(change: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Weights that make sums ties of bfloat16, lie next to one, or cancel, among others."""
    size = np.abs(change).mean() + 2.0**-60 * generator.integers(0, 2)
    any_one = (generator.standard_normal(change.shape) * size * 2.0 ** generator.integers(-3, 12)).astype(np.float32)
    tie = (any_one.view(np.uint32) & np.uint32(0xFFFF0000) | np.uint32(0x8000)).view(np.float32) - change
    beside = np.nextafter(tie.astype(np.float32), np.float32(generator.choice([-np.inf, np.inf])))
    zero, odd = generator.choice([0.0, -0.0], change.shape), generator.choice([2.0**-133, 2.0**119, 0], change.shape)
    kinds = [any_one, tie, beside, -change, zero, odd]
    of_each = [0.2, 0.4, 0.15, 0.15, 0.1, 0.0] if generator.random() < 0.9 else [0, 0.5, 0, 0.3, 0, 0.2]
    return np.choose(generator.choice(len(kinds), change.shape, p=of_each), kinds)


def by_numpy(weight: np.ndarray, added: Added, rows: int, result: Result) -> np.ndarray | None:
    """Bits of W + ΔW in blocks of some rows; None where it is left to torch."""
    after, tiles = np.zeros(weight.shape, result.bits), Tiles(weight.shape[1], result)

    def read(values: np.ndarray, first: int) -> None:
        values[:] = weight[first : first + len(values)]

    blocks = range(0, len(weight), rows)
    done = [tiles.merge(added, read, first, after[first : first + rows], 2, look=True) for first in blocks]
    return None if None in done else after


def by_torch(weight: np.ndarray, up: np.ndarray, down: np.ndarray, scale: float, dtype: torch.dtype) -> np.ndarray:
    rows, width = weight.shape
    addend = Addend(Place(0, rows, ALL, width), torch.from_numpy(up), torch.from_numpy(down), scale)
    after = torch.empty(rows, width, dtype=dtype)
    total = ExactSum([addend], width, dtype, torch.float32, rows)
    total.merge(torch.from_numpy(weight), 0, after, Scratch(torch.device("cpu"), rows * width, 8), rows)
    return bits_of(after)


def bits_of(values: torch.Tensor) -> np.ndarray:
    size = 8 * values.element_size()
    bits: np.ndarray = values.view(torch.int16 if size == 16 else torch.int32).numpy().view(f"uint{size}")
    return bits


def exact(weight: np.ndarray, up: np.ndarray, down: np.ndarray, scale: float, dtype: torch.dtype) -> np.ndarray:
    """The oracle's bits: the sum of rational numbers, and of the dtype's the one next to it."""
    found = torch.empty(weight.shape, dtype=torch.float64)
    for row, column in np.ndindex(weight.shape):
        before = float(weight[row, column])
        value = Fraction(before) + exact_products(up[row].tolist(), down[:, column].tolist(), scale)
        found[row, column] = nearest_value(value, dtype) if value else before if before == 0 else 0.0
    return bits_of(found.to(dtype))


@FEW
@given(sums(), st.sampled_from([1, 1 << 17]), st.sampled_from([1, 3]), st.sampled_from(["BF16", "F32"]))
def test_bits_are_those_of_the_exact_sum(
    of: tuple[np.ndarray, np.ndarray, np.ndarray, float], tile: int, rows: int, into: str
) -> None:
    """Whatever the tiles and the blocks; torch gives them too, in float32 and in float64."""
    weight, up, down, scale = of
    result, dtype = RESULTS[into], {"BF16": torch.bfloat16, "F32": torch.float32}[into]
    wanted = exact(weight, up, down, scale, dtype)
    added = Added(up.astype(result.work), down.astype(result.work), scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_sums, "TILE", tile)
        patch.setattr(numpy_sums, "MANY", 1)
        got = by_numpy(weight, added, rows, result) if added.is_workable else None
        assert got is None or np.array_equal(got, wanted)
        for small in (0, 1 << 15):
            patch.setattr(exact_rows, "SMALL", small)
            assert np.array_equal(by_torch(weight, up, down, scale, dtype), wanted)
