"""Numerics of products up @ down, against dense linear algebra in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratool.lowrank import (
    Product,
    canonical,
    change,
    core_space,
    decompose,
    difference,
    gram,
    inner,
    length,
    norm,
    padded,
    side_by_side,
    singular_values,
    sketch,
)


def made(rows: int, columns: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Product:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    down = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return Product(up.to(dtype), down.to(dtype))


def deficient(rows: int, columns: int, rank: int) -> Product:
    """Of half the rank that it has columns."""
    product = made(rows, columns, rank)
    return Product(torch.cat([product.up[:, ::2], product.up[:, ::2]], 1), product.down[: 2 * -(-rank // 2)])


def gauged(product: Product, seed: int = 5) -> Product:
    """The same matrix, shared otherwise between its factors."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(product.rank, product.rank, generator=generator, dtype=torch.float64)
    mixing = mixing + 3 * torch.eye(product.rank, dtype=torch.float64)
    return Product(product.up @ mixing, torch.linalg.solve(mixing, product.down))


CASES = {
    "tall": made(40, 9, 5),
    "wide": made(7, 50, 4),
    "square": made(20, 20, 8),
    "one wide": made(1, 6, 1),
    "of more rank than room": made(5, 4, 9),
    "of half its rank": deficient(30, 20, 8),
    "zero": Product(torch.zeros(12, 3, dtype=torch.float64), torch.ones(3, 8, dtype=torch.float64)),
}


@pytest.mark.parametrize("product", CASES.values(), ids=CASES)
def test_a_decomposition_is_that_of_the_dense_matrix(product: Product) -> None:
    dense = product.matrix()
    found = decompose(product)
    k = len(found.values)
    assert k == min(product.rank, *dense.shape)
    wanted = torch.linalg.svdvals(dense)
    torch.testing.assert_close(found.values, wanted[:k], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(singular_values(product), wanted[:k], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((found.left * found.values) @ found.right, dense, rtol=1e-12, atol=1e-12)
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.left.T @ found.left, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.right @ found.right.T, eye, rtol=0, atol=1e-12)
    assert found.significant == int(torch.linalg.matrix_rank(dense))


@pytest.mark.parametrize("product", CASES.values(), ids=CASES)
def test_a_truncation_is_as_near_as_eckart_and_young_say(product: Product) -> None:
    dense = product.matrix()
    values = torch.linalg.svdvals(dense)
    found = decompose(product)
    for rank in range(1, len(found.values) + 1):
        cut = found.truncated(rank).product()
        assert cut.rank == rank
        error, best = float((dense - cut.matrix()).norm()), float(values[rank:].norm())
        assert error == pytest.approx(best, rel=1e-9, abs=1e-12 * (1 + float(values[0])))
        torch.testing.assert_close(cut.up.norm(dim=0), cut.down.norm(dim=1))  # both factors have the same share


def test_a_batch_is_decomposed_as_its_members_are() -> None:
    members = [made(20, 12, 6, seed) for seed in range(4)]
    batch = Product(torch.stack([m.up for m in members]), torch.stack([m.down for m in members]))
    whole = decompose(batch)
    for at, member in enumerate(members):
        one = decompose(member)
        for found, wanted in ((whole.left[at], one.left), (whole.values[at], one.values), (whole.right[at], one.right)):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        assert float(norm(batch)[at]) == pytest.approx(float(member.matrix().norm()))
    assert length(batch) == pytest.approx(float(torch.stack([m.matrix() for m in members]).norm()))


def test_signs_do_not_depend_on_how_a_matrix_is_shared_between_factors() -> None:
    product = made(25, 18, 6)
    one, other = decompose(product), decompose(gauged(product))
    torch.testing.assert_close(one.left, other.left, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.right, other.right, rtol=1e-9, atol=1e-9)
    assert bool((one.left.gather(0, one.left.abs().argmax(0, keepdim=True)) > 0).all())


def test_float32_factors_give_singular_values_to_the_precision_of_float32() -> None:
    product = made(300, 200, 16)
    wanted = torch.linalg.svdvals(product.matrix())[:16]
    found = decompose(product.to(torch.float32)).values
    assert float((found - wanted).abs().max() / wanted[0]) <= 1e-6


def test_inner_products_are_those_of_the_matrices() -> None:
    products = [made(15, 11, rank, rank) for rank in (2, 5, 7)]
    dense = torch.stack([p.matrix().flatten() for p in products])
    torch.testing.assert_close(gram(products), dense @ dense.T, rtol=1e-12, atol=1e-10)
    assert float(inner(products[0], products[1])) == pytest.approx(float(dense[0] @ dense[1]))


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9])
def test_the_distance_of_near_products_is_right_however_near(distance: float) -> None:
    one = made(60, 50, 6)
    step = made(60, 6, 6, 9).matrix() * distance
    other = Product(one.up + step, one.down)
    wanted = float((step @ one.down).norm())
    assert float(norm(difference(one, other))) == pytest.approx(wanted, rel=1e-4)
    apart = change(one, other)
    assert math.sqrt(float(inner(apart, apart))) == pytest.approx(wanted, rel=1e-6)


def test_sums_and_zeros_are_exact() -> None:
    parts = [made(9, 8, rank, rank) for rank in (1, 3, 4)]
    total = side_by_side(parts)
    assert total.rank == 8
    torch.testing.assert_close(total.matrix(), sum((p.matrix() for p in parts), torch.zeros(9, 8).double()))
    assert torch.equal(padded(parts[1], 6).matrix(), parts[1].matrix())
    assert padded(parts[1], 6).rank == 6


@given(st.integers(0, 10_000))
def test_the_canonical_form_is_the_same_for_every_gauge(seed: int) -> None:
    product = made(14, 10, 4, seed % 7)
    one, other = canonical(product), canonical(gauged(product, seed))
    torch.testing.assert_close(one.up, other.up, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(one.matrix(), product.matrix(), rtol=1e-9, atol=1e-9)


def test_core_space_loses_nothing_and_does_not_see_the_gauge() -> None:
    shapes = [made(30, 22, rank, rank) for rank in (2, 5, 3)]
    zero = Product(torch.zeros(30, 2, dtype=torch.float64), torch.ones(2, 22, dtype=torch.float64))
    products = [*shapes, zero, shapes[0]]  # one of them twice
    core = core_space(products)
    assert core.left.shape[1] <= 10  # the second copy has no directions of its own
    for product, matrix in zip(products, core.matrices, strict=True):
        torch.testing.assert_close(core.left @ matrix @ core.right, product.matrix(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(core.product(matrix).matrix(), product.matrix(), rtol=1e-10, atol=1e-10)
    again = core_space([gauged(p) for p in products])
    torch.testing.assert_close(again.matrices, core.matrices, rtol=1e-8, atol=1e-8)


@dataclass(frozen=True)
class Cut:
    """A dense matrix, given out in tiles of some rows."""

    matrix: Tensor
    step: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.matrix.shape[1])

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.matrix.shape[0], self.step):
            yield first, self.matrix[first : first + self.step]


def decaying(power: float, seed: int = 0) -> Tensor:
    """A (400, 300) matrix whose singular values fall as 1, 2^-p, 3^-p …"""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(400, 300, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64)).Q
    matrix: Tensor = (left * torch.arange(1, 301).double() ** -power) @ right.T
    return matrix.float()


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("oversampling", "worse"), [(8, 1.011), (24, 1.003)])
def test_a_sketch_is_nearly_as_near_as_can_be_and_knows_its_error(
    power: float, oversampling: int, worse: float
) -> None:
    matrix = decaying(power)
    best = float(torch.linalg.svdvals(matrix.double())[24:].norm())
    found = sketch(Cut(matrix, 64), 24, oversampling, 2)
    error = float((matrix.double() - (found.found.left * found.found.values) @ found.found.right).norm())
    assert error <= worse * best
    assert found.error(24) == pytest.approx(error / float(matrix.double().norm()), rel=1e-5)


def test_a_sketch_is_the_same_for_one_seed_and_every_size_of_tile() -> None:
    matrix = decaying(1.0)
    one, again, cut = (sketch(Cut(matrix, step), 10, 10, 2, seed=4) for step in (400, 400, 17))
    assert torch.equal(one.found.values, again.found.values)
    torch.testing.assert_close(one.found.product().matrix(), cut.found.product().matrix(), rtol=0, atol=1e-6)


def test_a_sketch_of_zeros_is_zero() -> None:
    found = sketch(Cut(torch.zeros(30, 20), 8), 4, 4, 2)
    assert not bool(found.found.product().matrix().any())
    assert found.error(4) == 0
