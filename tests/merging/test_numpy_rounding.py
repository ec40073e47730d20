"""Steps of numpy's exact sums, each against rational numbers or numpy itself."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from exactly import exact_products

from loratool.merging.numpy_rounding import subtract_by_rows, sums_of_few_digits
from loratool.merging.numpy_sums import places_of

LONG = 1 + 2.0**-27  # (1 + 2^-27) (1 - 2^-27) is one but for its last digit, which float64 has not


@pytest.mark.parametrize("rank", [1, 16])
def test_sums_that_float64_holds_are_exact(rank: int) -> None:
    """Factors of as many digits as bfloat16 has, of sizes and with zeros as adapters have them: all are held."""
    generator = np.random.default_rng(rank)
    left, right, start = (generator.integers(-255, 256, (200, n)) * 2.0**-12 for n in (rank, rank, 1))
    start = start[:, 0] * 2.0 ** generator.integers(-9, 3, 200)
    found = sums_of_few_digits(start, left, right, -0.5)
    for number, one, other, sum_ in zip(start, left, right, found, strict=True):
        assert Fraction(float(sum_)) == Fraction(float(number)) + exact_products(one.tolist(), other.tolist(), -0.5)


@pytest.mark.parametrize(
    ("start", "left", "right", "scale"),
    [
        pytest.param(1.0, [1.0], [1.0], 0.3, id="a scale of many digits"),
        pytest.param(1.0, [LONG], [2 - LONG], 1.0, id="a product that is rounded to few digits"),
        pytest.param(2.0**40, [1.0], [2.0**-20], 1.0, id="numbers far from each other"),
        pytest.param(0.0, [1.0, 2.0**-40], [1.0, 1.0], 1.0, id="products far from each other"),
        pytest.param(1.0, [1 + 2.0**-23], [1 + 2.0**-23], 1.0, id="float32 of all its digits"),
    ],
)
def test_sums_that_float64_may_not_hold_are_left_open(
    start: float, left: list[float], right: list[float], scale: float
) -> None:
    assert np.isnan(sums_of_few_digits(np.array([start]), np.array([left]), np.array([right]), scale)).all()


@pytest.mark.parametrize("count", [0, 7, 64, 1000, 1001])
@pytest.mark.parametrize("share", [0, 0.01, 1])
def test_places_of_flags_are_those_that_numpy_finds(count: int, share: float) -> None:
    flags = np.random.default_rng(count).random(count) < share
    assert np.array_equal(places_of(flags), np.flatnonzero(flags))


@pytest.mark.parametrize("width", [1, 15, 100])
def test_a_column_is_subtracted_and_numpy_keeps_its_buffers(width: int) -> None:
    values, column = np.arange(3.0 * width).reshape(3, width), np.array([[1.0], [2.0], [4.0]])
    wanted, before = values - column, np.getbufsize()
    subtract_by_rows(values, column, values)
    assert np.array_equal(values, wanted)
    assert np.getbufsize() == before
