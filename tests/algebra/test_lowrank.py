"""Numerics of products up @ down, against dense linear algebra in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from loratool.algebra.lowrank.core import core_space
from loratool.algebra.lowrank.joint import joint, truncated
from loratool.algebra.lowrank.products import (
    Product,
    all_finite,
    canonical,
    change,
    decompose,
    difference,
    gram,
    inner,
    length,
    length_near,
    norm,
    padded,
    side_by_side,
    singular_values,
)
from loratool.algebra.lowrank.sketching import sketch


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
    torch.testing.assert_close(padded(parts[1], 6).matrix(), parts[1].matrix())
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


@pytest.mark.parametrize("product", CASES.values(), ids=CASES)
def test_a_product_cut_in_shared_coordinates_is_as_near_as_eckart_and_young_say(product: Product) -> None:
    dense = product.matrix()
    values = torch.linalg.svdvals(dense)
    for rank in range(1, min(product.rank, *dense.shape) + 1):
        cut, found = truncated(product, rank)
        torch.testing.assert_close(found[: len(values)], values[: len(found)], rtol=1e-12, atol=1e-12)
        assert cut.rank == rank
        assert bool(cut.up.isfinite().all())
        assert bool(cut.down.isfinite().all())
        error, best = float((dense - cut.matrix()).norm()), float(values[rank:].norm())
        assert error == pytest.approx(best, rel=1e-9, abs=1e-11 * (1 + float(values[0])))
        torch.testing.assert_close(cut.up.norm(dim=0), cut.down.norm(dim=1), rtol=1e-9, atol=1e-9)
    assert joint([product]).sum([1.0]).significant == int(torch.linalg.matrix_rank(dense))


@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_sum_of_products_is_decomposed_as_the_dense_sum_whatever_their_ranks(seed: int, ranks: list[int]) -> None:
    products = [made(13, 11, rank, seed + at) for at, rank in enumerate(ranks)]
    coefficients = [(-1.0) ** at * (at + 0.5) for at in range(len(ranks))]
    dense = torch.stack([c * p.matrix() for c, p in zip(coefficients, products, strict=True)]).sum(0)
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    found = joint([gauged(p, seed) for p in products]).sum(coefficients)
    k = min(len(s), len(found.values))
    torch.testing.assert_close(found.values[:k], s[:k], rtol=1e-8, atol=1e-8 * float(s[0]))
    kept = found.product(2).matrix()
    assert float((dense - kept).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-6, abs=1e-8 * float(s[0]))
    if len(s) > 2 and float(s[1] - s[2]) > 1e-2 * float(s[0]):
        best = (u[:, :2] * s[:2]) @ vt[:2]
        assert float((kept - best).norm()) <= 1e-6 * float(s[0])


def test_a_sum_that_cancels_is_zero_and_no_nan() -> None:
    product = made(12, 9, 3)
    for found in (joint([product, gauged(product)]).sum([1.0, -1.0]), joint([product]).sum([0.0])):
        kept = found.product(2)
        assert float(kept.matrix().norm()) <= 1e-10 * float(product.matrix().norm())
        assert bool(kept.up.isfinite().all())
        assert bool(kept.down.isfinite().all())


def test_a_batch_with_zero_and_deficient_members_is_cut_as_its_members_are() -> None:
    members = [made(30, 20, 8), deficient(30, 20, 8), Product(torch.zeros(30, 8).double(), made(30, 20, 8).down)]
    batch = Product(torch.stack([m.up for m in members]), torch.stack([m.down for m in members]))
    whole = joint([batch])
    cut = whole.sum([1.0]).product(3)
    found = decompose(batch)
    assert bool(found.left.isfinite().all())
    assert found.significant == 8
    for at, member in enumerate(members):
        values = torch.linalg.svdvals(member.matrix())
        torch.testing.assert_close(found.values[at], values[:8], rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(cut.up[at] @ cut.down[at], truncated(member, 3)[0].matrix(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(whole[at].sum([1.0]).values, values[:8], rtol=1e-12, atol=1e-11)
        assert float(norm(batch)[at]) == pytest.approx(float(values.norm()), abs=1e-12)


def test_one_call_gives_the_same_bits_as_another() -> None:
    product = made(50, 40, 7)
    for one, other in (
        (decompose(product).product(), decompose(product).product()),
        (truncated(product, 3)[0], truncated(product, 3)[0]),
    ):
        assert torch.equal(one.up, other.up)
        assert torch.equal(one.down, other.down)
        assert bool((one.up.gather(0, one.up.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("rank", [1, 5, 15])
def test_float32_and_float64_cut_to_the_same_matrix(rank: int) -> None:
    left = torch.linalg.qr(made(200, 16, 16).matrix()).Q * 0.6 ** torch.arange(16).double()  # gaps, so that it is one
    product = Product(left, torch.linalg.qr(made(150, 16, 16, 1).matrix()).Q.T)
    wanted = truncated(product, rank)[0].matrix()
    rough = truncated(product.to(torch.float32), rank)[0]
    assert rough.up.dtype == torch.float32
    for found in (rough.matrix(), decompose(product.to(torch.float32)).truncated(rank).product().matrix()):
        assert float((found.double() - wanted).norm()) <= 2e-6 * float(wanted.norm())


def test_the_norm_of_factors_whose_columns_cancel_is_right() -> None:
    one = made(40, 30, 4)
    step = made(40, 4, 4, 8).matrix() * 1e-7
    cancelling = Product(torch.cat([one.up + step, -one.up], 1), torch.cat([one.down, one.down]))
    wanted = float((step @ one.down).norm())
    assert float(norm(cancelling)) == pytest.approx(wanted, rel=1e-6)
    assert length_near(cancelling, sizes(cancelling)) == pytest.approx(wanted, rel=1e-6)


def sizes(product: Product) -> float:
    """‖up‖ · ‖down‖."""
    return float(product.up.norm() * product.down.norm())


@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e70, 0.0])
def test_the_norm_by_inner_products_is_that_of_the_matrix_at_any_size(factor: float) -> None:
    every = [made(8, 9, 2, seed) for seed in range(3)]
    batch = Product(torch.stack([one.up for one in every]), torch.stack([one.down for one in every]))
    for product in (*CASES.values(), batch):
        scaled = Product(product.up * factor, product.down * factor)
        found, wanted = length_near(scaled, sizes(scaled)), length(scaled)
        assert found == pytest.approx(wanted, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_one_value_that_is_no_number_is_found_and_a_large_sum_is_none(dtype: torch.dtype) -> None:
    """Numbers whose sum overflows are numbers; infinities of both signs, whose sum is NaN, are not."""
    largest = torch.finfo(dtype).max
    for values in (torch.full((5, 7), largest, dtype=dtype), torch.zeros(0, 3, dtype=dtype)):
        assert all_finite(values)
    for odd in (torch.nan, torch.inf, -torch.inf):
        values = torch.full((64, 33), 3.0, dtype=dtype)
        values[63, 32] = odd
        assert not all_finite(values)
        values[0, 0] = torch.inf
        assert not all_finite(values)
        assert not all_finite(values.mT)


@pytest.mark.parametrize("distance", [1e-5, 1e-7, 1e-8, 1e-9])
def test_a_change_of_both_factors_is_measured_where_squares_have_nothing_left(distance: float) -> None:
    one = made(60, 50, 6)
    up, down = made(60, 6, 6, 3).matrix() * distance, made(6, 50, 6, 4).matrix() * distance
    other = Product(one.up + up, one.down + down)
    wanted = float((up @ one.down + one.up @ down + up @ down).norm())
    apart = change(one, other)
    torch.testing.assert_close(apart.matrix(), up @ one.down + one.up @ down + up @ down, rtol=0, atol=1e-6 * wanted)
    assert math.sqrt(float(inner(apart, apart))) == pytest.approx(wanted, rel=1e-6)
    assert float(norm(difference(other, one))) == pytest.approx(wanted, rel=1e-4)


def test_inner_products_of_batches_add_up_over_their_members_and_are_bilinear() -> None:
    ups, downs = (
        [torch.stack([getattr(made(9, 7, 3, 4 * b + s), f) for s in range(3)]) for b in range(2)]
        for f in ("up", "down")
    )
    batches = [Product(up, down) for up, down in zip(ups, downs, strict=True)]
    dense = torch.stack([b.matrix().flatten() for b in batches])
    torch.testing.assert_close(gram(batches), dense @ dense.T, rtol=1e-12, atol=1e-10)
    one, other = batches
    assert inner(one, other).shape == (3,)
    torch.testing.assert_close(inner(one.scaled(-2.5), other), -2.5 * inner(one, other))
    total = side_by_side([one, other])
    torch.testing.assert_close(inner(total, total), inner(one, one) + 2 * inner(one, other) + inner(other, other))
    torch.testing.assert_close(norm(total).square(), inner(total, total))


@given(st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_core_space_of_any_ranks_is_lossless_and_keeps_inner_products(seed: int, ranks: list[int]) -> None:
    products = [made(8, 6, rank, seed + at) for at, rank in enumerate(ranks)]
    core = core_space(products)
    assert core.left.shape[1] <= 8
    assert core.right.shape[0] <= 6
    torch.testing.assert_close(core.left.T @ core.left, torch.eye(core.left.shape[1]).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(core.right @ core.right.T, torch.eye(core.right.shape[0]).double(), rtol=0, atol=1e-10)
    for product, matrix in zip(products, core.matrices, strict=True):
        torch.testing.assert_close(core.product(matrix).matrix(), product.matrix(), rtol=1e-8, atol=1e-8)
    flat = core.matrices.flatten(1)
    torch.testing.assert_close(flat @ flat.T, gram(products), rtol=1e-8, atol=1e-7)


def test_core_space_of_nothing_but_zeros_is_zero() -> None:
    zero = Product(torch.zeros(10, 3, dtype=torch.float64), made(10, 8, 3).down)
    core = core_space([zero, zero])
    assert bool(core.left.isfinite().all())
    assert bool(core.right.isfinite().all())
    assert not bool(core.matrices.any())


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (5, 60), (60, 5)], ids=str)
def test_a_sketch_of_a_matrix_of_low_rank_finds_all_of_it(shape: tuple[int, int]) -> None:
    rank = min(4, *shape)
    dense = made(*shape, rank).matrix()
    found = sketch(Cut(dense, 33), 12, 8, 2)
    values = torch.linalg.svdvals(dense)
    k = min(12, *shape)
    torch.testing.assert_close(found.found.values, values[:k], rtol=1e-9, atol=1e-7 * float(values[0]))
    assert found.error(rank) <= 1e-6
    assert found.error(rank - 1) == pytest.approx(float(values[rank - 1 :].norm() / values.norm()), rel=1e-5)
    torch.testing.assert_close(found.found.product().matrix(), dense, rtol=0, atol=1e-6 * float(values[0]))


def test_a_sketch_knows_the_error_of_every_smaller_rank() -> None:
    matrix = decaying(1.0, 3)
    found = sketch(Cut(matrix, 100), 16, 16, 2)
    size = float(matrix.double().norm())
    for rank in (1, 5, 16):
        error = float((matrix.double() - found.found.truncated(rank).product().matrix()).norm()) / size
        assert found.error(rank) == pytest.approx(error, rel=1e-5)


def test_sketches_of_other_seeds_differ_in_their_last_digits_only() -> None:
    matrix = decaying(1.0)
    one, other = (sketch(Cut(matrix, 64), 10, 10, 2, seed=seed) for seed in (1, 2))
    assert not torch.equal(one.found.left, other.found.left)
    torch.testing.assert_close(one.found.values[:5], other.found.values[:5], rtol=1e-3, atol=0)
