"""What an update does to rows is what its definition says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from loratool.algebra.updates import formulas, residual
from loratool.algebra.updates.additive import Add, LowRank, stack
from loratool.algebra.updates.base import ANY, Update, WeightRows
from loratool.algebra.updates.compound import Both, Chain, Fill, Image
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors, ExpertLowRank
from loratool.algebra.updates.multiplying import (
    BlockAffine,
    InputMap,
    Modulated,
    Reflections,
    Rotation,
    RowRotation,
    Scale,
)
from loratool.algebra.updates.products import Bases, Circulant, Grid, Hadamard, Kronecker, Pooled, Shared, Tiled
from loratool.algebra.updates.reordered import Reordered, RowOrder
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.algebra.updates.residual import Residual
from loratool.algebra.updates.rewriting import Injection, Network, Pairs, Recomposed
from loratool.algebra.updates.sparse import Scatter, Spectrum, Wavelet

Random = Callable[..., Tensor]  # sizes → a float64 tensor


def random(seed: int) -> Random:
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    return draw


def low_rank(draw: Random, rows: int, columns: int, rank: int) -> LowRank:
    return LowRank(draw(rows, rank), draw(rank, columns), 1.7)


def scatter(draw: Random, rows: int, columns: int) -> Scatter:
    index = torch.stack([draw(9).mul(9).long().abs() % rows, draw(9).mul(9).long().abs() % columns])
    return Scatter(index.int(), draw(9))


def recomposed(draw: Random, columns: int) -> Recomposed:
    basis = torch.eye(columns, dtype=torch.float64) * 3 + draw(columns, columns) / 9
    return Recomposed(basis, draw(columns), draw(2, 3).mul(9).long().abs() % columns, draw(3))


@dataclass(frozen=True)
class Kind:
    """A way to make an update and the shape of a weight that it is for, from three small numbers."""

    make: Callable[[Random, int, int, int], tuple[Update, tuple[int, ...]]]
    of_base: bool = False  # its change is that of the unmerged weight, whatever updates came before
    scaled: bool = True  # strength counts


def kernel(draw: Random, n: int, m: int, r: int) -> tuple[Update, tuple[int, ...]]:
    return LowRank(draw(n, r), draw(r, m * 6), 0.3, kernel=(2, 3)), (n, m, 2, 3)


def experts(transposed: bool) -> Kind:
    def make(draw: Random, n: int, m: int, r: int) -> tuple[Update, tuple[int, ...]]:
        update = ExpertLowRank(draw(3 * r, m), draw(n, 3 * r), 3, 0.7, transposed)
        return update, (3, m, n) if transposed else (3, n, m)

    return Kind(make)


def residue(part: str, turned: bool) -> Kind:
    def make(draw: Random, n: int, m: int, r: int) -> tuple[Update, tuple[int, ...]]:
        r = min(r, n, m)
        update = Residual(low_rank(draw, n, m, r), part)
        return (update.turned, (m, n)) if turned else (update, (n, m))

    return Kind(make, of_base=True)


KINDS: dict[str, Kind] = {
    "LowRank": Kind(lambda d, n, m, r: (low_rank(d, n, m, r), (n, m))),
    "LowRank, turned": Kind(lambda d, n, m, r: (low_rank(d, n, m, r).turned, (m, n))),
    "LowRank of a convolution": Kind(kernel),
    "LowRank of matrices on a convolution": Kind(lambda d, n, m, r: (low_rank(d, n, m * 6, r), (n, m, 3, 2))),
    "Add": Kind(lambda d, n, m, r: (Add(d(n, m), 0.4), (n, m))),
    "Add to a bias": Kind(lambda d, n, m, r: (Add(d(n), 0.4), (n,))),
    "Replace": Kind(lambda d, n, m, r: (Replace(d(n, m)), (n, m)), scaled=False),
    "ReplaceRows": Kind(lambda d, n, m, r: (ReplaceRows((n, 0, n - 1), d(3, m)), (n + 1, m)), scaled=False),
    "ExpertLowRank": experts(False),
    "ExpertLowRank, transposed": experts(True),
    "ExpertFactors of a matrix": Kind(lambda d, n, m, r: (ExpertFactors(d(r, m), d(n, r), 3.0), (n, m))),
    "ExpertFactors of one expert": Kind(lambda d, n, m, r: (ExpertFactors(d(r, m + 9), d(n, r), 3.0), (1, n, m + 9))),
    "Magnitude": Kind(lambda d, n, m, r: (Magnitude(low_rank(d, n, m, r), d(n)), (n, m)), of_base=True),
    "Magnitude by column": Kind(
        lambda d, n, m, r: (Magnitude(low_rank(d, n, m, r), d(m), by_column=True), (n, m)), of_base=True
    ),
    "Magnitude, turned": Kind(lambda d, n, m, r: (Magnitude(low_rank(d, n, m, r), d(n)).turned, (m, n)), of_base=True),
    "Magnitude of a convolution": Kind(
        lambda d, n, m, r: (Magnitude(LowRank(d(n, r), d(r, m * 4), 1.0, kernel=(2, 2)), d(n)), (n, m, 2, 2)),
        of_base=True,
    ),
    "Magnitude by input channel": Kind(
        lambda d, n, m, r: (Magnitude(LowRank(d(n, r), d(r, m * 6), 1.0, kernel=(2, 3)), d(m), True), (n, m, 2, 3)),
        of_base=True,
    ),
    "LowRank of a kernel of 1 on a matrix": Kind(
        lambda d, n, m, r: (LowRank(d(n, r), d(r, m), 1.0, kernel=(1, 1)), (n, m))
    ),
    "Hadamard": Kind(lambda d, n, m, r: (Hadamard(d(n, r), d(r, m), d(n, 2), d(2, m), 1.3), (n, m))),
    "Hadamard of a convolution": Kind(
        lambda d, n, m, r: (Hadamard(d(n, r), d(r, m * 6), d(n, 2), d(2, m * 6), 1.3, kernel=(3, 2)), (n, m, 3, 2))
    ),
    "Kronecker": Kind(lambda d, n, m, r: (Kronecker(d(n, r), d(2, m), 0.6), (2 * n, m * r))),
    "Kronecker of a convolution": Kind(
        lambda d, n, m, r: (Kronecker(d(n, r), d(2, m * 4), 0.6, kernel=(2, 2)), (2 * n, m * r, 2, 2))
    ),
    "Kronecker of three dimensions": Kind(
        lambda d, n, m, r: (Kronecker(d(n, r), d(2, m, 3), 0.6, kernel=(3,)), (2 * n, m * r, 3))
    ),
    "Grid": Kind(lambda d, n, m, r: (Grid(d(3, n, 3 * r), d(3, 3 * r, m), 0.9), (3 * n, 3 * m))),
    "Grid, turned": Kind(lambda d, n, m, r: (Grid(d(3, n, 3 * r), d(3, 3 * r, m), 0.9).turned, (3 * m, 3 * n))),
    "Circulant": Kind(lambda d, n, m, r: (Circulant(d(n, m, r)), (n * r, m * r))),
    "Tiled": Kind(lambda d, n, m, r: (Tiled(d(r, n)), (n, m + r))),
    "Tiled over rows too": Kind(lambda d, n, m, r: (Tiled(d(r, n), repeated=True), (3 * n, m + r))),
    "BlockAffine": Kind(lambda d, n, m, r: (BlockAffine(d(n, r, r)), (n * r, m * r))),
    "Pooled": Kind(lambda d, n, m, r: (Pooled(d(n, r), d(r, m), 0.8, 4), (n, 4 * m))),
    "Pooled that is plain": Kind(lambda d, n, m, r: (Pooled(d(n, r), d(r, m), 0.8, 4), (n, m))),
    "Scatter": Kind(lambda d, n, m, r: (scatter(d, n, m), (n, m))),
    "Spectrum": Kind(lambda d, n, m, r: (Spectrum(d(min(r, n * m)), 3.0, 7), (n, m))),
    "Spectrum, turned": Kind(lambda d, n, m, r: (Spectrum(d(min(r, n * m)), 3.0, 7).turned, (n, m))),
    "Shared": Kind(lambda d, n, m, r: (Shared(d(n, r), d(r, m + 2)), (n, m))),
    "Shared, turned": Kind(lambda d, n, m, r: (Shared(d(n, r), d(r, m + 2)).turned, (m, n))),
    "Scale": Kind(lambda d, n, m, r: (Scale(d(n)), (n, m))),
    "Scale by column": Kind(lambda d, n, m, r: (Scale(d(m), by_column=True), (n, m))),
    "Scale, turned": Kind(lambda d, n, m, r: (Scale(d(m), turnable=True).turned, (n, m))),
    "Scale of a bias": Kind(lambda d, n, m, r: (Scale(d(n), dimensions=1), (n,))),
    "Scale of output channels": Kind(lambda d, n, m, r: (Scale(d(n), dimensions=4), (n, m, 2, 3))),
    "Scale of input channels": Kind(lambda d, n, m, r: (Scale(d(m), True, dimensions=4), (n, m, 2, 3))),
    "Modulated": Kind(lambda d, n, m, r: (Modulated(low_rank(d, n, m, r)), (n, m)), of_base=True),
    "Rotation": Kind(lambda d, n, m, r: (Rotation(d(m, r, r)), (n, m * r))),
    "Rotation by one block": Kind(lambda d, n, m, r: (Rotation(d(1, r, r), shared=True), (n, m * r))),
    "Rotation of a convolution": Kind(lambda d, n, m, r: (Rotation(d(2 * m, r, r)), (n, m * r, 2, 1))),
    "Rotation of a convolution's matrix": Kind(
        lambda d, n, m, r: (Rotation(d(2 * m, r, r), of_matrix=True), (n, m * r, 2, 1))
    ),
    "RowRotation": Kind(lambda d, n, m, r: (RowRotation(d(1, n, r, r)), (n * r, m)), of_base=True),
    "RowRotation with lengths, of a convolution": Kind(
        lambda d, n, m, r: (RowRotation(d(1, n, r, r), d(n * r)), (n * r, m, 2, 1)), of_base=True
    ),
    "RowRotation in a butterfly": Kind(
        lambda d, n, m, r: (RowRotation(d(3, 4 * n, 2, 2), d(8 * n), butterfly=True), (8 * n, m)), of_base=True
    ),
    "InputMap": Kind(lambda d, n, m, r: (InputMap(d(m, r), d(r, m), 0.4), (n, m)), of_base=True),
    "InputMap of a convolution": Kind(lambda d, n, m, r: (InputMap(d(m, r), d(r, m), 0.4), (n, m, 2, 3)), of_base=True),
    "Scatter on a convolution": Kind(lambda d, n, m, r: (scatter(d, n, m * 6), (n, m, 2, 3))),
    "Reflections": Kind(lambda d, n, m, r: (Reflections(formulas.units(d(m, r))), (n, m))),
    "Chain": Kind(lambda d, n, m, r: (Chain(Rotation(d(m, r, r)), Scale(d(n))), (n, m * r))),
    "Both": Kind(lambda d, n, m, r: (Both(scatter(d, n, m), low_rank(d, n, m, r)), (n, m))),
    "Both, of the unmerged weight": Kind(
        lambda d, n, m, r: (Both(Modulated(low_rank(d, n, m, r)), Fill(d(n))), (n, m)), of_base=True
    ),
    "Fill": Kind(lambda d, n, m, r: (Fill(d(n)), (n, m))),
    "Fill with one value": Kind(lambda d, n, m, r: (Fill(d(1)), (n, m))),
    "Fill of a bias": Kind(lambda d, n, m, r: (Fill(d(n), dimensions=1), (n,))),
    "Image": Kind(lambda d, n, m, r: (Image(d(m), d(n + r, m), start=r), (n,))),
    "Scatter by number": Kind(lambda d, n, m, r: (Scatter(d(9).mul(9).long().abs() % (n * m), d(9)), (n, m))),
    "Bases": Kind(lambda d, n, m, r: (Bases(d(12, r), d(r, min(n, m)), 0.7), (n, m))),
    "Bases of a square weight": Kind(lambda d, n, m, r: (Bases(d(12, r), d(r, n), 0.7), (n, n))),
    "Bases of a square weight, turned": Kind(lambda d, n, m, r: (Bases(d(12, r), d(r, n), 0.7).turned, (n, n))),
    "Injection": Kind(lambda d, n, m, r: (Injection(d(n, r), d(n, r), d(r, m)), (n, m)), of_base=True),
    "Injection, turned": Kind(lambda d, n, m, r: (Injection(d(n, r), d(n, r), d(r, m)).turned, (m, n)), of_base=True),
    "Injection that only removes": Kind(lambda d, n, m, r: (Injection(d(n, r), d(n, r), None), (n, m)), of_base=True),
    "Network": Kind(
        lambda d, n, m, r: (Network(d(n, r), d(r, n), d(2, r, r), d(2, r, r), torch.tanh, 0.3), (n, m)), of_base=True
    ),
    "Pairs": Kind(lambda d, n, m, r: (Pairs(d(4 * n), d(4 * n), 4), (4 * n, m)), of_base=True),
    "Pairs of a bias": Kind(lambda d, n, m, r: (Pairs(d(4 * n), d(4 * n), 4, dimensions=1), (4 * n,)), of_base=True),
    "Recomposed": Kind(lambda d, n, m, r: (recomposed(d, m), (n, m)), of_base=True),
    "Recomposed, turned": Kind(lambda d, n, m, r: (recomposed(d, m).turned, (m, n)), of_base=True),
    "Wavelet": Kind(lambda d, n, m, r: (Wavelet(d(min(r, n * m)), 3.0, 7, 1), (n, m))),
    "Wavelet of order 3, turned": Kind(lambda d, n, m, r: (Wavelet(d(min(r, n * m)), 3.0, 7, 3).turned, (n, m))),
    "Wavelet without a transform": Kind(lambda d, n, m, r: (Wavelet(d(min(r, n * m)), 3.0, 7, 0), (n, m))),
    **{f"Residual, {part}": residue(part, False) for part in (residual.PRINCIPAL, residual.MINOR, residual.TRIANGULAR)},
    "Residual, triangular, turned": residue(residual.TRIANGULAR, True),
}
SIZES = st.integers(1, 5)


def blocks_of(weight: Tensor, fold: int, size: int) -> WeightRows:
    matrix = as_matrix(weight, fold)

    def rows(first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        stop = matrix.shape[0] if count is None else first + count
        return ((at, matrix[at : min(at + size, stop)]) for at in range(first, stop, size))

    return rows


def as_matrix(weight: Tensor, fold: int) -> Tensor:
    return weight.reshape(math.prod(weight.shape[:fold]), -1)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 20), st.integers(1, 20), st.floats(-2, 2), st.booleans(), st.integers(0, 99))
def test_rows_change_as_the_definition_says(
    name: str, n: int, m: int, r: int, first: int, count: int, strength: float, changed: bool, seed: int
) -> None:
    """Any block of rows, at any strength, of a weight that other updates may have changed before."""
    kind, draw = KINDS[name], random(seed)
    given, shape = kind.make(draw, n, m, r)
    base = draw(*shape)
    unprepared = given.fit(shape)
    assert unprepared is not None
    ready = unprepared.needs_weight
    fitted = unprepared.prepared(blocks_of(base, unprepared.fold, 3)) if ready else unprepared
    weight = base + draw(*shape) if changed else base
    strength = strength if kind.scaled else 1.0
    of = base if kind.of_base else weight
    definition = (unprepared if kind.of_base else fitted).delta(of)
    wanted = as_matrix(weight + strength * definition, fitted.fold)
    if isinstance(given, Magnitude) and changed:
        wanted = as_matrix(weight.lerp(dora(given, base, weight), strength), 1)
    first = min(first, wanted.shape[0] - 1)
    part = slice(first, first + count)
    block = as_matrix(weight, fitted.fold)[part].clone()
    fitted.add_rows(block, first, strength, as_matrix(base, fitted.fold)[part])
    torch.testing.assert_close(block, wanted[part])


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("Spectrum")])
def test_an_update_changes_a_weight_alike_with_and_without_preparation(name: str) -> None:
    """Of those that are prepared; the places of a spectrum are drawn only then."""
    given, shape = KINDS[name].make(random(5), 4, 3, 2)
    weight = random(6)(*shape)
    fitted = given.fit(shape)
    assert fitted is not None
    prepared = fitted.prepared(blocks_of(weight, fitted.fold, 3)).delta(weight)
    torch.testing.assert_close(fitted.delta(weight), prepared.reshape(shape))


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith(("Replace", "Image"))])
def test_a_change_depends_on_the_weight_where_it_is_another_one_for_another_weight(name: str) -> None:
    given, shape = KINDS[name].make(random(5), 4, 3, 2)
    changes = []
    for seed in (6, 7):
        weight, fitted = random(seed)(*shape), given.fit(shape)
        assert fitted is not None
        changes.append(fitted.prepared(blocks_of(weight, fitted.fold, 3)).delta(weight))
    assert given.depends_on_weight == (not torch.allclose(changes[0], changes[1]))


ORDERS = {"heads by halves": RowOrder(2), "parts of groups": RowOrder(2, (1, 1))}
MATRICES = [name for name, kind in KINDS.items() if len(kind.make(random(5), 4, 4, 2)[1]) == 2]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [name for name in MATRICES if name != "ReplaceRows"])
def test_rows_in_another_order_get_the_change_of_the_rows_of_the_model(name: str, order: str) -> None:
    """The oracle moves the whole weight: it orders the rows, changes them, and puts them back."""
    given, shape = KINDS[name].make(random(5), 4, 4, 2)
    weight = random(6)(*shape)
    fitted = given.fit(shape)
    assert fitted is not None
    stored = torch.from_numpy(ORDERS[order].numbers(shape[0]))
    wanted = weight + fitted.prepared(blocks_of(weight, 1, 3)).delta(weight)
    reordered = Reordered(fitted, ORDERS[order], shape[0]).prepared(blocks_of(weight[stored], 1, 3))
    torch.testing.assert_close(weight[stored] + reordered.delta(weight[stored]), wanted[stored])
    block = weight[stored][1:]
    reordered.add_rows(block, 1, 1.0, weight[stored][1:])
    torch.testing.assert_close(block, wanted[stored][1:])


def dora(update: Magnitude, base: Tensor, weight: Tensor) -> Tensor:
    """m/‖W + ΔW‖ ⊙ (weight + ΔW), the norm being that of the unmerged W."""
    change = update.inner.delta(base)
    moved, axis = base + change, 1 if update.by_column else 0
    norms = moved.square().sum(dim=[at for at in range(base.dim()) if at != axis], keepdim=True).sqrt()
    return (weight + change) * update.magnitude.reshape(norms.shape) / norms


@pytest.mark.parametrize("name", KINDS)
def test_an_update_fits_no_weight_of_another_size(name: str) -> None:
    given, shape = KINDS[name].make(random(1), 4, 3, 2)
    assert given.fit(shape) is not None
    assert given.fit(()) is None
    for at, size in enumerate(given.shape[: len(shape)]):
        if size != ANY and name != "Pooled that is plain":
            changed = (*shape[:at], shape[at] + 1, *shape[at + 1 :])
            assert given.fit(changed) is None, changed


# One way round alone fits a weight that is not square, for `Bases` go by its longer side.
TURNABLE = [name for name, kind in KINDS.items() if kind.make(random(0), 3, 2, 2)[0].turnable and name != "Bases"]


@pytest.mark.parametrize("name", TURNABLE)
def test_a_turned_update_is_the_transpose(name: str) -> None:
    given, shape = KINDS[name].make(random(4), 5, 3, 2)
    weight = random(6)(*shape)
    one, other = given.fit(shape), given.turned.fit(shape[::-1])
    assert one
    assert other
    one, other = one.prepared(blocks_of(weight, 1, 2)), other.prepared(blocks_of(weight.T, 1, 2))
    torch.testing.assert_close(other.delta(weight.T), one.delta(weight).T)


def test_definition_is_the_formula_of_lora() -> None:
    b, a = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    wanted = torch.zeros(6, 5, dtype=torch.float64)
    for i in range(6):
        for j in range(5):
            wanted[i, j] = 2.0 * sum(float(b[i, k] * a[k, j]) for k in range(3))
    torch.testing.assert_close(LowRank(b, a, 2.0).delta(wanted), wanted)


def test_stacked_updates_are_the_sum_of_all() -> None:
    draw = random(3)
    updates = [(low_rank(draw, 6, 5, rank), strength) for rank, strength in ((2, 1.0), (3, -0.5), (1, 4.0))]
    zero = torch.zeros(6, 5, dtype=torch.float64)
    stacked = stack(updates)
    assert stacked.rank == 6
    torch.testing.assert_close(stacked.delta(zero), sum(strength * u.delta(zero) for u, strength in updates))


def test_norm_is_that_of_the_product() -> None:
    update = low_rank(random(5), 40, 30, 4)
    product = update.delta(torch.zeros(40, 30, dtype=torch.float64))
    assert update.norm() == pytest.approx(float(torch.linalg.matrix_norm(product)), rel=1e-12)
    assert LowRank(torch.zeros(3, 2), torch.ones(2, 3), 1.0).norm() == 0.0
    assert math.isinf(Replace(product).norm())


@pytest.mark.parametrize("by_column", [False, True])
def test_a_row_or_column_of_zeros_stays_zero_under_dora(by_column: bool) -> None:
    draw = random(8)
    update, weight = low_rank(draw, 6, 5, 2), draw(6, 5)
    update.up[2], weight[2] = 0.0, 0.0
    update.down[:, 3], weight[:, 3] = 0.0, 0.0
    dora = Magnitude(update, torch.ones(5 if by_column else 6, dtype=torch.float64), by_column)
    dora_ready = dora.prepared(blocks_of(weight, 1, 4))
    merged = weight.clone()
    dora_ready.add_rows(merged, 0, 1.0, weight)
    assert bool(merged.isfinite().all())
    assert not merged[2].any()
    assert not merged[:, 3].any()
    norms = merged.norm(dim=0 if by_column else 1)
    torch.testing.assert_close(norms[norms > 0], torch.ones(4 if by_column else 5, dtype=torch.float64))


@pytest.mark.parametrize("part", [residual.PRINCIPAL, residual.MINOR, residual.TRIANGULAR])
def test_what_a_residual_takes_away_comes_back_when_the_factors_are_those_of_the_start(part: str) -> None:
    """An adapter that was never trained leaves the weight as it was: the initialisation keeps W = W − part + part."""
    weight = random(9)(7, 5)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    q, r = torch.linalg.qr(weight)
    starts = {
        residual.PRINCIPAL: (u[:, :2] * s[:2], v[:2]),
        residual.MINOR: (u[:, 3:] * s[3:], v[3:]),
        residual.TRIANGULAR: (q[:, :2], r[:2]),
    }
    update = Residual(LowRank(*starts[part], 1.0), part).prepared(blocks_of(weight, 1, 2))
    merged = weight.clone()
    update.add_rows(merged, 0, 1.0, weight)
    torch.testing.assert_close(merged, weight)
