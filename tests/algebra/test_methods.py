"""Methods of `combine` on matrices small enough to be written out, against what their papers define.

The oracle is dense and in float64, and knows neither factors nor core spaces nor tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import draw, written_out
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from oracle import off
from torch import Tensor

from loratool.algebra.lowrank.joint import joint
from loratool.algebra.lowrank.products import Product, padded, side_by_side
from loratool.algebra.methods import stacks
from loratool.algebra.methods.chance import uniform
from loratool.algebra.methods.mixture import Combination, Mixture, mix, mix_factors
from loratool.algebra.methods.stacks import Formed, Held
from loratool.algebra.methods.table import ELEMENTWISE, FACTORWISE, METHODS
from loratool.errors import UsageError
from loratool.reworking.combine_options import CombineOptions, combination_of

Array = NDArray[np.float64]
ROWS, COLUMNS = 26, 19
FULL = min(ROWS, COLUMNS)
RANKS = (3, 5, 2)
RANDOM = ("dare_linear", "dare_ties", "della")
PLAIN = [name for name, row in METHODS.items() if row.family != FACTORWISE]
ENTRIES = [name for name, row in METHODS.items() if row.family == ELEMENTWISE]
IN_PLACES = [(name, space) for name in ENTRIES for space in ("dense", "core", "knots")]
EVERY = [(name, None) for name in PLAIN if name not in ENTRIES] + IN_PLACES  # methods on updates, in every space


def combination_for(method: str, count: int, **dials: Any) -> Combination:
    return combination_of(CombineOptions(method=method, **dials), count)


def some(
    seed: int = 0, ranks: Sequence[int] = RANKS, sizes: Sequence[float] = (), rows: int = ROWS, columns: int = COLUMNS
) -> list[Product]:
    """Products of these ranks and norms (1 each by default)."""
    found = []
    for at, rank in enumerate(ranks):
        up, down = draw(1000 * seed + 2 * at, rows, rank), draw(1000 * seed + 2 * at + 1, rank, columns)
        size = sizes[at] if sizes else 1.0
        found.append(Product(up * (size / float((up @ down).norm())), down))
    return found


def mixed(method: str, products: Sequence[Product], weights: Sequence[float] | None = None, **dials: Any) -> Mixture:
    return mix(joint(products), list(weights or [1.0] * len(products)), combination_for(method, len(products), **dials))


def result(method: str, products: Sequence[Product], weights: Sequence[float] | None = None, **dials: Any) -> Array:
    """The matrix that the method makes."""
    return written_out([mixed(method, products, weights, **dials).product])[0]


def sum_of(weights: Sequence[float], deltas: Sequence[Array]) -> Array:
    total: Array = np.sum([w * d for w, d in zip(weights, deltas, strict=True)], axis=0)
    return total


def compact(matrix: Array, most: int | None = None) -> tuple[Array, Array, Array]:
    """U, S, Vᵀ of the directions that are there, by a dense SVD."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = int((s > 1e-10 * s[0]).sum()) if s[0] else 0
    kept = min(kept, most or kept)
    return u[:, :kept], s[:kept], vt[:kept]


def truncated(matrix: Array, rank: int) -> Array:
    u, s, vt = compact(matrix, rank)
    return (u * s) @ vt


# ---- inner products: Σ c ΔW ----


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_and_cat_are_the_weighted_sum(method: str) -> None:
    products, weights = some(), [0.7, -1.3, 2.0]
    found = mixed(method, products, weights)
    assert found.product.rank == sum(RANKS)
    assert found.lost == 0.0
    assert off(written_out([found.product])[0], sum_of(weights, written_out(products))) < 1e-14


def test_linear_divides_by_the_weights_where_that_is_asked_for() -> None:
    products, weights = some(), [0.7, 1.3, 2.0]
    wanted = sum_of([w / 4.0 for w in weights], written_out(products))
    assert off(result("linear", products, weights, normalize=True), wanted) < 1e-14


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.integers(0, 99),
)
def test_the_default_is_the_sum_to_rounding_for_any_ranks_and_weights(
    ranks: list[int], weights: list[float], seed: int
) -> None:
    products = some(seed, ranks)
    found = result("linear", products, weights[: len(ranks)])
    scale = sum(abs(w) for w in weights[: len(ranks)])
    wanted = sum_of(weights[: len(ranks)], written_out(products))
    assert np.abs(found - wanted).max() <= 1e-12 * scale


@pytest.mark.parametrize("rank", [1, 3, 7, 10, 15])
def test_a_cut_sum_is_the_truncated_svd_and_its_error_is_told(rank: int) -> None:
    products, weights = some(), [0.7, -1.3, 2.0]
    whole = sum_of(weights, written_out(products))
    for method in ("linear", "cat", "svd"):
        found = mixed(method, products, weights, rank=rank)
        assert found.product.rank == rank
        assert off(written_out([found.product])[0], truncated(whole, rank)) < 1e-12
        error = np.linalg.norm(whole - truncated(whole, rank)) / np.linalg.norm(whole)
        assert found.lost == pytest.approx(error, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.2, 0.8], [3.0, 1.0]])
def test_slerp_turns_one_update_into_the_other_on_the_sphere(weights: list[float]) -> None:
    products = some(1, (3, 5))
    one, other = written_out(products)
    t = weights[1] / sum(weights)
    angle = math.acos(float((one * other).sum()) / (np.linalg.norm(one) * np.linalg.norm(other)))
    wanted = (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)
    for method in ("slerp", "nuslerp"):
        assert off(result(method, products, weights), wanted) < 1e-12


def test_slerp_goes_straight_between_updates_that_are_nearly_parallel() -> None:
    (one,) = some(2, (3,))
    other = side_by_side([one.scaled(1.5), some(3, (2,))[0].scaled(1e-3)])
    a, b = written_out([one, other])
    assert off(result("slerp", [one, other], [0.25, 0.75]), 0.25 * a + 0.75 * b) < 1e-12
    turned = result("nuslerp", [one, other], [0.25, 0.75])
    angle = math.acos(float((a * b).sum()) / (np.linalg.norm(a) * np.linalg.norm(b)))
    wanted = (math.sin(0.25 * angle) * a + math.sin(0.75 * angle) * b) / math.sin(angle)
    assert off(turned, wanted) < 1e-9


def test_row_wise_nuslerp_has_an_angle_for_each_row() -> None:
    products = some(4, (3, 5))
    products[0].up[5] = 0.0  # a row that one adapter leaves alone
    one, other = written_out(products)
    wanted = np.empty_like(one)
    for row, (a, b) in enumerate(zip(one, other, strict=True)):
        size = np.linalg.norm(a) * np.linalg.norm(b)
        if not size:
            wanted[row] = 0.7 * a + 0.3 * b
            continue
        angle = math.acos(float(a @ b) / size)
        wanted[row] = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    assert off(result("nuslerp", products, [0.7, 0.3], row_wise=True), wanted) < 1e-12


def test_karcher_is_where_the_pulls_of_all_on_the_sphere_cancel() -> None:
    products, weights = some(5, (3, 5, 2), (1.0, 4.0, 0.5)), np.array([1.0, 2.0, 0.5])
    shares = weights / weights.sum()
    deltas = written_out(products)
    sizes = [float(np.linalg.norm(d)) for d in deltas]
    units = [d / size for d, size in zip(deltas, sizes, strict=True)]
    found = result("karcher", products, list(weights))
    assert np.linalg.norm(found) == pytest.approx(float(shares @ np.array(sizes)), rel=1e-9)
    mean = found / np.linalg.norm(found)
    pull = np.zeros_like(mean)
    for share, unit in zip(shares, units, strict=True):
        cosine = float((mean * unit).sum())
        angle = math.acos(cosine)
        pull += share * angle * (unit - cosine * mean) / math.sin(angle)
    assert np.linalg.norm(pull) < 1e-3, "the logarithms of all at the mean have no sum there"


def test_karcher_of_two_is_their_middle() -> None:
    products = some(6, (3, 4))
    a, b = written_out(products)
    wanted = (a + b) / np.linalg.norm(a + b)
    assert off(result("karcher", products), wanted) < 1e-9


def related(seed: int, count: int, apart: float) -> list[Product]:
    """Updates with a part in common."""
    common, *own = some(seed, (3, *[2] * count), (1.0, *[apart] * count))
    return [side_by_side([common, each]) for each in own]


def test_model_stock_shrinks_the_mean_by_the_mean_cosine() -> None:
    products = related(7, 3, 0.6)
    deltas = written_out(products)
    pairs = [(i, j) for i in range(3) for j in range(i)]
    cosine = np.mean(
        [(deltas[i] * deltas[j]).sum() / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j]) for i, j in pairs]
    )
    t = 3 * cosine / (1 + 2 * cosine)
    assert 0.2 < cosine < 0.9
    assert off(result("model_stock", products), t * sum_of([1 / 3] * 3, deltas)) < 1e-12


# ---- entries ----


def largest(values: Array, count: int) -> NDArray[np.bool_]:
    """Where the `count` largest values are; the values of these tests are all different."""
    mask = np.zeros(values.size, dtype=bool)
    mask[np.argsort(values, axis=None)[::-1][:count]] = True
    return mask.reshape(values.shape)


def trim(delta: Array, density: float) -> Array:
    return delta * largest(np.abs(delta), int(density * delta.size))


def elect(
    kept: Sequence[Array], weights: Sequence[float], frequency: bool = False, mean: bool = True, importance: Any = None
) -> Array:
    """TIES after trimming: whose sign the majority has, and the weighted mean of those that agree."""
    total = np.zeros_like(kept[0])
    for row, column in np.ndindex(*total.shape):
        entries = [w * k[row, column] for w, k in zip(weights, kept, strict=True)]
        vote = sum(np.sign(entries)) if frequency else sum(entries)
        sign = 1.0 if vote >= 0 else -1.0
        shares = importance if importance is not None else np.ones(len(weights))
        agreeing = [at for at, entry in enumerate(entries) if entry * sign > 0]
        numerator = sum(shares[at] * entries[at] for at in agreeing)
        divisor = sum(abs(shares[at] * weights[at]) for at in agreeing) if mean else 1.0
        total[row, column] = numerator / divisor if agreeing else 0.0
    return total


def ties(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    return elect([trim(d, 0.3) for d in deltas], weights)


def ties_by_count(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """Three adapters with all their entries: no vote ends in a draw."""
    return elect(deltas, weights, frequency=True)


def ties_sum(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    return elect([trim(d, 0.3) for d in deltas], weights, mean=False)


def magnitude_prune(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    return sum_of(weights, [trim(d, 0.3) for d in deltas])


def breadcrumbs(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """Of all entries 4 % are too large, and 60 % are what comes after them."""
    kept = []
    for delta in deltas:
        top = int(0.04 * delta.size)
        size = np.abs(delta)
        kept.append(delta * (largest(size, top + round(0.6 * delta.size)) & ~largest(size, top)))
    return sum_of(weights, kept)


def sce(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """Select by variance, calculate coefficients by energy, erase the minority's signs (arXiv:2408.07990)."""
    chosen = largest(np.var(np.stack(deltas), axis=0), round(0.4 * deltas[0].size))
    selected = [d * chosen for d in deltas]
    energies = np.array([float((s**2).sum()) for s in selected])
    return elect(selected, weights, importance=energies / energies.sum())


RULES: dict[str, tuple[Callable[[Sequence[Array], Sequence[float]], Array], str, dict[str, Any]]] = {
    "ties": (ties, "ties", {"density": 0.3}),
    "ties, adapters counted": (ties_by_count, "ties", {"density": 1.0, "sign": "frequency"}),
    "ties, summed": (ties_sum, "ties", {"density": 0.3, "normalize": False}),
    "magnitude_prune": (magnitude_prune, "magnitude_prune", {"density": 0.3}),
    "breadcrumbs": (breadcrumbs, "breadcrumbs", {"density": 0.6, "outliers": 0.04}),
    "sce": (sce, "sce", {"density": 0.4}),
}
WEIGHTS = {"equal": [1.0, 1.0, 1.0], "of both signs": [0.7, -1.3, 2.0]}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", RULES)
def test_entries_of_the_whole_weight_are_treated_as_defined(name: str, weights: str) -> None:
    rule, method, dials = RULES[name]
    products = some(8, sizes=(1.0, 2.0, 0.7))
    wanted = rule(written_out(products), WEIGHTS[weights])
    found = mixed(method, products, WEIGHTS[weights], rank=FULL, **dials)
    assert off(written_out([found.product])[0], wanted) < 1e-6
    assert found.lost < 1e-6


@pytest.mark.parametrize("name", RULES)
def test_a_dense_result_is_cut_to_the_nearest_of_its_rank_and_says_what_that_costs(name: str) -> None:
    rule, method, dials = RULES[name]
    products = some(8, sizes=(1.0, 2.0, 0.7))
    whole = rule(written_out(products), [1.0] * 3)
    found = mixed(method, products, rank=4, **dials)
    assert found.product.rank == 4
    best = np.linalg.norm(whole - truncated(whole, 4)) / np.linalg.norm(whole)
    assert off(written_out([found.product])[0], whole) == pytest.approx(best, rel=2e-4)
    assert found.lost == pytest.approx(best, rel=2e-4)


def core_of(deltas: Sequence[Array]) -> tuple[Array, list[Array], Array]:
    """U, the matrices and V: left and right singular vectors of all canonical factors side by side."""
    parts = [compact(d) for d in deltas]
    left = compact(np.concatenate([u * np.sqrt(s) for u, s, _ in parts], 1))[0]
    right = compact(np.concatenate([vt.T * np.sqrt(s) for _, s, vt in parts], 1))[0]
    return left, [left.T @ d @ right for d in deltas], right


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", RULES)
def test_entries_in_core_space_are_treated_as_defined(name: str, weights: str) -> None:
    rule, method, dials = RULES[name]
    products = some(9, sizes=(1.0, 2.0, 0.7))
    left, matrices, right = core_of(written_out(products))
    wanted = left @ rule(matrices, WEIGHTS[weights]) @ right.T
    found = mixed(method, products, WEIGHTS[weights], space="core", **dials)
    assert found.product.rank <= sum(RANKS)
    assert off(written_out([found.product])[0], wanted) < 1e-10


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", RULES)
def test_entries_on_knots_are_treated_as_defined(name: str, weights: str) -> None:
    """[ΔW₁ … ΔWₙ] = U S [V₁ … Vₙ]ᵀ by a dense SVD, and the rule on S Vᵢᵀ."""
    rule, method, dials = RULES[name]
    products = some(10, sizes=(1.0, 2.0, 0.7))
    u, s, vt = compact(np.concatenate(written_out(products), 1))
    parts = np.split(s[:, None] * vt, 3, axis=1)
    found = mixed(method, products, WEIGHTS[weights], space="knots", **dials)
    assert found.product.rank <= sum(RANKS)
    assert off(written_out([found.product])[0], u @ rule(parts, WEIGHTS[weights])) < 1e-10


# ---- entries kept at random ----


def test_dare_keeps_an_entry_larger_by_its_chance_or_not_at_all() -> None:
    products = some(11, (3,), rows=60, columns=50)
    (delta,) = written_out(products)
    found = result("dare_linear", products, density=0.7, rank=50)
    kept = np.abs(found) > np.abs(delta) / 2
    assert np.abs(found - kept * delta / 0.7).max() < 1e-6 * np.abs(delta).max()
    assert abs(kept.mean() - 0.7) < 4 * math.sqrt(0.7 * 0.3 / delta.size)


def test_della_keeps_the_larger_entries_of_a_row_with_better_chances() -> None:
    products = some(12, (3,), rows=400, columns=11)
    (delta,) = written_out(products)
    place = np.abs(delta).argsort(1).argsort(1)
    chance = 0.6 - 0.2 + 0.4 * place / 10
    found = result("della", products, density=0.6, window=0.2, rank=11)
    kept = np.abs(found) > np.abs(delta) / 2
    assert np.abs(found - kept * delta / chance).max() < 1e-6 * np.abs(delta).max()
    for at in range(11):
        p = 0.4 + 0.04 * at
        assert abs(kept[place == at].mean() - p) < 4 * math.sqrt(p * (1 - p) / 400)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_kept_entries_of_two_adapters_are_summed_or_elected(method: str) -> None:
    """Every entry is what the method makes of one of the four subsets of two adapters."""
    products, weights = some(13, (2, 3)), [0.8, 1.1]
    a, b = written_out(products)
    if method == "della":
        places = [np.abs(d).argsort(1).argsort(1) / (COLUMNS - 1) for d in (a, b)]
        chances = [0.7 - 0.1 + 0.2 * place for place in places]
    else:
        chances = [np.full_like(a, 0.7)] * 2
    options = []
    for first in (0, 1):
        for second in (0, 1):
            kept = [first * a / chances[0], second * b / chances[1]]
            options.append(sum_of(weights, kept) if method == "dare_linear" else elect(kept, weights))
    found = result(method, products, weights, density=0.7, rank=FULL, **({"window": 0.1} if method == "della" else {}))
    assert np.abs(np.stack(options) - found).min(0).max() < 1e-6


@pytest.mark.parametrize(("method", "space"), [("dare_linear", s) for s in ("dense", "core", "knots")])
def test_dare_is_right_in_the_mean(method: str, space: str) -> None:
    products, weights = some(14, (2, 2), rows=9, columns=8), [1.0, -0.5]
    wanted = sum_of(weights, written_out(products))
    count = 200
    mean = np.mean(
        [result(method, products, weights, density=0.5, space=space, seed=at, rank=8) for at in range(count)], axis=0
    )
    # the noise of one pass is about ‖Δ‖ at a density of a half
    assert off(mean, wanted) < 4 / math.sqrt(count)


def test_random_numbers_are_uniform_and_independent_between_rows_columns_and_keys() -> None:
    one = uniform("0/a/0", 0, 200, 100, torch.device("cpu")).double()
    assert one.min() >= 0
    assert one.max() < 1
    assert torch.histc(one, 10, 0, 1).sub(2000).abs().max() < 4 * math.sqrt(2000)
    others = [uniform(key, 0, 200, 100, torch.device("cpu")).double() for key in ("0/a/1", "0/b/0", "1/a/0")]
    pairs = [(one, other) for other in others]  # of another adapter, another weight, another seed
    pairs += [(one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[2:, 3:], one[:-2, :-3])]
    for first, second in pairs:
        correlation = float(((first - 0.5) * (second - 0.5)).mean()) * 12
        assert abs(correlation) < 4 / math.sqrt(first.numel())
    rows = torch.corrcoef(one).fill_diagonal_(0)
    assert rows.abs().max() < 6 / math.sqrt(100)


def test_the_random_numbers_of_rows_do_not_depend_on_where_a_tile_begins() -> None:
    whole = uniform("key", 0, 40, 7, torch.device("cpu"))
    assert torch.equal(uniform("key", 13, 9, 7, torch.device("cpu")), whole[13:22])
    assert torch.equal(uniform("key", 13, 9, 5, torch.device("cpu")), whole[13:22, :5])


def test_random_numbers_are_the_same_everywhere() -> None:
    """Written down once: a result is to be made again next year, on another device."""
    found = (uniform("0/model.layers.0.weight/1", 3, 2, 3, torch.device("cpu")) * 2**24).int().tolist()
    assert found == [[lowbias(3 + r, c) for c in range(3)] for r in range(2)]


def lowbias(row: int, column: int) -> int:
    """The same by Python's whole numbers."""
    import hashlib

    def mix(x: int) -> int:
        x ^= x >> 16
        x = (x * 0x7FEB352D) % 2**32
        x ^= x >> 15
        x = (x * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    start = int.from_bytes(hashlib.blake2b(b"0/model.layers.0.weight/1", digest_size=4).digest(), "little")
    return mix((mix(mix(row) ^ start) + mix(column ^ 0xFFFFFFFF)) % 2**32) >> 8


@pytest.mark.parametrize("method", ENTRIES)
def test_the_size_of_tiles_and_the_number_of_threads_change_nothing(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    products, weights = some(15, rows=24, columns=20), [1.0, 0.5, 2.0]
    monkeypatch.setattr(stacks, "CPU_TILE", 1 << 20)
    wanted = result(method, products, weights, rank=20)
    before = torch.get_num_threads()
    try:
        for tile, threads in ((1, 1), (3 * 20 * 7, 2), (3 * 20 * 23, 1)):
            monkeypatch.setattr(stacks, "CPU_TILE", tile)
            torch.set_num_threads(threads)
            assert off(result(method, products, weights, rank=20), wanted) < 2e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_gives_the_same_result_again_and_another_seed_another(seed: int) -> None:
    products = some(16)
    for method in RANDOM:
        one, again = (result(method, products, seed=seed, density=0.6) for _ in range(2))
        assert np.array_equal(one, again)
        assert off(result(method, products, seed=seed + 7, density=0.6), one) > 0.1


# ---- thresholds ----


def tiles_of(products: Sequence[Product]) -> Tensor:
    """Entries as a stack forms them: another product of the same factors may differ in a last digit."""
    return torch.cat([tile for _, tile in Formed(products).tiles()], 1)


@pytest.mark.parametrize("tile", [1, 400, 1 << 20])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_kth_largest_entry_is_found_exactly(tile: int, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    whole = data.draw(st.booleans())  # small whole numbers: many ties, many zeros
    seed = data.draw(st.integers(0, 999))
    ranks = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    products = some(seed, ranks, rows=rows, columns=columns)
    if whole:
        products = [Product(p.up.sign(), (p.down * 0.7).round()) for p in products]
    counts = [data.draw(st.integers(1, rows * columns)) for _ in ranks]
    before = stacks.CPU_TILE
    stacks.CPU_TILE = tile
    try:
        found = Formed(products).largest(lambda _, part: part.abs(), counts)
    finally:
        stacks.CPU_TILE = before
    for value, matrix, count in zip(found, tiles_of(products), counts, strict=True):
        wanted = matrix.abs().flatten().kthvalue(matrix.numel() - count + 1).values
        assert torch.equal(value, wanted) if whole or tile > 1000 else torch.isclose(value, wanted, rtol=3e-7)


@pytest.mark.parametrize("count", [1, 2, 50, 99, 100])
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e30])
def test_thresholds_are_exact_over_the_whole_range_of_float32(scale: float, count: int) -> None:
    products = [p.scaled(scale) for p in some(17, (2, 3), rows=10, columns=10)]
    found = Formed(products).largest(lambda _, part: part.abs(), [count, 101 - count])
    held = Held(tiles_of(products)).largest(lambda _, part: part.abs(), [count, 101 - count])
    assert torch.equal(found, held)
    for value, matrix, k in zip(found, tiles_of(products), (count, 101 - count), strict=True):
        assert torch.equal(value, matrix.abs().flatten().sort(descending=True).values[k - 1])


def test_the_threshold_of_zeros_is_zero() -> None:
    zero = Product(torch.zeros(6, 2, dtype=torch.float64), draw(1, 2, 5))
    for count in (1, 15, 30):
        assert float(Formed([zero]).largest(lambda _, part: part.abs(), [count])) == 0.0


# ---- singular values and vectors ----


def polar(columns: Array) -> Array:
    u, _, vt = compact(columns)
    return u @ vt


def tsv(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """Singular vectors of all side by side, made orthogonal, with their own values; null directions are none."""
    parts = [compact(w * d) for w, d in zip(weights, deltas, strict=True) if w * np.abs(d).max()]
    if sum(len(s) for _, s, _ in parts) > FULL:
        parts = [(u[:, :k], s[:k], vt[:k]) for u, s, vt in parts for k in [FULL // len(parts)]]
    left = polar(np.concatenate([u for u, _, _ in parts], 1))
    right = polar(np.concatenate([vt.T for _, _, vt in parts], 1))
    merged: Array = (left * np.concatenate([s for _, s, _ in parts])) @ right.T
    return merged


def iso_c(deltas: Sequence[Array], weights: Sequence[float], beta: float = 1.0) -> Array:
    u, s, vt = compact(sum_of(weights, deltas))
    drawn: Array = (u * ((1 - beta) * s + beta * s.mean())) @ vt
    return drawn


def iso_cts(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """Of a budget of R: 80 % to what the sum has, the rest shared by what each has beside that."""
    budget, count = sum(RANKS), len(deltas)
    own = max(1, round((budget - int(0.8 * budget)) / count))
    u, s, vt = compact(sum_of(weights, deltas), budget - own * count)
    lefts, values, rights = [u], [s], [vt]
    for weight, delta in zip(weights, deltas, strict=True):
        du, ds, dvt = compact(weight * (delta - u @ (u.T @ delta)), own)
        lefts, values, rights = [*lefts, du], [*values, ds], [*rights, dvt]
    sigma = float(np.concatenate(values).mean())
    merged: Array = sigma * polar(np.concatenate(lefts, 1)) @ polar(np.concatenate(rights, 0).T).T
    return merged


def pico(deltas: Sequence[Array], weights: Sequence[float], rule: Callable[..., Array] = sum_of) -> Array:
    """Directions of [w ΔW …] divided by 1 + (n − 1) of their part of its energy, then any rule at the mean norm."""
    each = [w * d for w, d in zip(weights, deltas, strict=True)]
    u, s, _ = np.linalg.svd(np.concatenate(each, 1))
    part = np.zeros(ROWS)
    part[: len(s)] = s**2 / (s**2).sum()
    less = u @ np.diag(1 / (1 + (len(each) - 1) * part)) @ u.T
    down = [less @ d for d in deltas]
    merged = rule(weights, down) if rule is sum_of else rule(down, weights)
    scaled: Array = merged * (np.mean([np.linalg.norm(d) for d in each]) / np.linalg.norm(merged))
    return scaled


SPECTRA: dict[str, tuple[Callable[[Sequence[Array], Sequence[float]], Array], str, dict[str, Any]]] = {
    "tsv": (tsv, "tsv", {}),
    "iso_c": (iso_c, "iso_c", {}),
    "iso_c, half of the way": (lambda d, w: iso_c(d, w, 0.5), "iso_c", {"iso_beta": 0.5}),
    "iso_c, no step": (lambda d, w: sum_of(w, d), "iso_c", {"iso_beta": 0.0}),
    "iso_cts": (iso_cts, "iso_cts", {}),
    "pico": (pico, "pico", {}),
    "pico, then tsv": (lambda d, w: pico(d, w, tsv), "pico", {"rule": "tsv"}),
    "pico, then iso_c": (lambda d, w: pico(d, w, iso_c), "pico", {"rule": "iso_c"}),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", SPECTRA)
def test_spectral_methods_are_what_they_are_on_the_whole_weight(name: str, weights: str) -> None:
    rule, method, dials = SPECTRA[name]
    products = some(18, sizes=(1.0, 2.0, 0.7))
    found = mixed(method, products, WEIGHTS[weights], **dials)
    assert off(written_out([found.product])[0], rule(written_out(products), WEIGHTS[weights])) < 1e-10
    assert found.product.rank <= sum(RANKS)


def test_pico_does_not_depend_on_how_a_product_is_shared_by_its_factors() -> None:
    products = some(41, sizes=(1.0, 2.0, 0.7))
    turned = [Product(p.up @ g, torch.linalg.inv(g) @ p.down) for p in products for g in [draw(7, p.rank, p.rank)]]
    assert off(result("pico", turned), result("pico", products)) < 1e-10


def test_pico_takes_no_rule_on_factors_and_a_rule_needs_pico() -> None:
    with pytest.raises(UsageError, match="--rule must be one of"):
        combination_for("pico", 2, rule="ties-factors")
    with pytest.raises(UsageError, match="--rule applies only to pico"):
        combination_for("linear", 2, rule="tsv")


def test_tsv_shares_the_room_equally_where_ranks_are_more_than_the_weight_has() -> None:
    products = some(19, (8, 9, 7))
    assert off(result("tsv", products), tsv(written_out(products), [1.0] * 3)) < 1e-10


def test_tsv_lets_every_adapter_keep_its_rank_where_adapters_share_directions() -> None:
    """The stack has rank 5, the ranks add up to 8, the weight has room for 19."""
    common, *own = some(20, (1, 2, 2))
    up, down = common.up, common.down
    products = [side_by_side([Product(up, down * size), each]) for size, each in zip((1.0, 0.4), own, strict=True)]
    assert off(result("tsv", products), tsv(written_out(products), [1.0, 1.0])) < 1e-9


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts"])
def test_a_spectral_method_stays_in_the_span_of_what_it_is_given(method: str) -> None:
    """Elsewhere they average over null directions, which rounding chooses."""
    products = some(21, (3, 4), rows=80, columns=60)
    deltas = written_out(products)
    found = result(method, products)
    left = compact(np.concatenate(deltas, 1))[0]
    right = compact(np.concatenate(deltas, 0))[2]
    assert off(left @ (left.T @ found @ right.T) @ right, found) < 1e-10
    single = result(method, [p.to(torch.float32) for p in products])
    assert off(single, found) < 2e-5


def test_svc_counts_a_direction_that_several_share_once() -> None:
    products = related(22, 3, 0.5)
    deltas = written_out(products)
    merged = sum_of([1.0] * 3, deltas)
    u, s, vt = compact(merged)
    values = np.empty_like(s)
    for r in range(len(s)):
        a = u[:, r] @ merged
        parts = [u[:, r] @ d for d in deltas]
        values[r] = s[r] * 3 / sum(max(0.1, float(a @ p) / float(p @ p)) for p in parts)
    found = result("linear", products, svc=True)
    assert off(found, (u * values) @ vt) < 1e-10
    assert np.linalg.norm(found) < np.linalg.norm(merged)


def test_svc_of_updates_with_nothing_in_common_keeps_their_sum() -> None:
    """Orthogonal on both sides, each has a singular direction of the sum to itself."""
    q = [np.linalg.qr(np.asarray(draw(30 + at, n, 6)))[0] for at, n in enumerate((ROWS, COLUMNS))]
    halves = [(q[0][:, :3] * [3.0, 2.0, 1.0]) @ q[1][:, :3].T, (q[0][:, 3:] * [2.5, 1.5, 0.5]) @ q[1][:, 3:].T]
    products = [Product(torch.from_numpy(u * s), torch.from_numpy(vt)) for u, s, vt in map(compact, halves)]
    assert off(result("linear", products, svc=True), halves[0] + halves[1]) < 1e-10


def test_svc_of_copies_is_one_of_them() -> None:
    (product,) = some(23, (4,))
    assert off(result("linear", [product] * 3, svc=True), written_out([product])[0]) < 1e-10


# ---- ranks chosen beforehand ----


def energies(found: Product, products: Sequence[Product]) -> list[float]:
    """The part of each update that lies in the spaces of the result."""
    u, _, vt = compact(written_out([found])[0])
    kept = [u.T @ d @ vt.T for d in written_out(products)]
    return [float((k**2).sum() / (d**2).sum()) for k, d in zip(kept, written_out(products), strict=True)]


def falling(seed: int, size: float, rows: int = 96, columns: int = 80) -> Product:
    """An update of rank 8 whose singular values fall, as those of trained ones do."""
    left, right = (np.linalg.qr(np.asarray(draw(seed + at, n, 8)))[0] for at, n in enumerate((rows, columns)))
    values = 0.7 ** np.arange(8)
    up, down = left * (values * size / np.linalg.norm(values)), right.T
    return Product(torch.from_numpy(up), torch.from_numpy(down))


def test_ctm_keeps_a_part_of_small_adapters_that_truncation_drops() -> None:
    """As measured for the reference at norms 10 : 3 : 1 : 0.3: truncation keeps .98 .69 .00 .00 of four of rank 16."""
    products = [falling(100 + 2 * at, size) for at, size in enumerate((10.0, 3.0, 1.0, 0.3))]
    cut = energies(mixed("linear", products, rank=8).product, products)
    found = mixed("linear", products, rank=8, rank_policy="ctm").product
    even = energies(found, products)
    assert found.rank == 8
    assert cut[0] > 0.9
    assert max(cut[2:]) < 0.1
    assert min(even) > 0.4
    assert even[0] > even[3]


@pytest.mark.parametrize("method", [name for name in PLAIN if name not in ("slerp", "nuslerp")])
def test_ctm_gives_any_method_the_rank_that_was_asked_for(method: str) -> None:
    products = related(25, 3, 0.8)
    for rank in (1, 4, FULL):
        found = mixed(method, products, rank=rank, rank_policy="ctm")
        assert found.product.rank == rank
        assert np.isfinite(written_out([found.product])[0]).all()


def test_ctm_at_full_rank_is_the_method_in_core_space() -> None:
    products = some(26)
    for method in ("linear", "ties", "tsv", "iso_c"):
        wanted = result(method, products, space="core" if method == "ties" else None)
        found = mixed(method, products, rank=sum(RANKS), rank_policy="ctm")
        assert off(written_out([found.product])[0], wanted) < 1e-10
        assert found.lost < 1e-10


def test_what_ctm_loses_is_told_of_the_whole_result() -> None:
    products = some(27)
    whole = result("linear", products)
    found = mixed("linear", products, rank=4, rank_policy="ctm")
    assert found.lost == pytest.approx(off(written_out([found.product])[0], whole), rel=1e-9)


# ---- what holds for all methods ----

ALIKE: dict[str, dict[str, Any]] = {  # dials at which one adapter with weight 1 comes out as it went in
    **{name: {} for name in ("linear", "cat", "svd", "tsv", "pico")},
    "iso_c": {"iso_beta": 0.0},
    **{name: {"density": 1.0} for name in ("ties", "dare_linear", "dare_ties", "sce", "magnitude_prune")},
    "della": {"density": 1.0, "window": 0.0},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0},
}


@pytest.mark.parametrize(("method", "space"), [(m, s) for m, s in EVERY if m in ALIKE])
@pytest.mark.parametrize("svc", [False, True])
def test_one_adapter_with_weight_1_is_itself(method: str, space: str | None, svc: bool) -> None:
    (product,) = some(28, (4,))
    found = mixed(method, [product], space=space, svc=svc, **ALIKE[method])
    assert found.product.rank == 4
    limit = 1e-6 if space == "dense" else 1e-12
    assert off(written_out([found.product])[0], written_out([product])[0]) < limit
    assert found.lost < limit


def test_every_method_that_takes_one_adapter_is_looked_at() -> None:
    assert {name for name in PLAIN if METHODS[name].least == 1} == set(ALIKE)


def of_two(method: str) -> dict[str, Any]:
    return {"row_wise": True} if method == "nuslerp" else {}


def for_method(method: str, seed: int) -> list[Product]:
    """As many adapters as the method takes, with a part in common."""
    return related(seed, 2 if METHODS[method].most == 2 else 3, 0.8)


@pytest.mark.parametrize(("method", "space"), EVERY)
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 99))
def test_how_an_adapter_shares_itself_between_its_factors_changes_nothing(
    method: str, space: str | None, seed: int
) -> None:
    products = for_method(method, seed)
    turned = []
    for at, product in enumerate(products):
        g = draw(seed + 50 + at, product.rank, product.rank) * 3.0**at
        turned.append(Product(product.up @ g, torch.linalg.solve(g, product.down)))
    dials = {"space": space, **of_two(method)}
    limit = 5e-5 if space == "dense" else 1e-6
    assert off(result(method, turned, **dials), result(method, products, **dials)) < limit


@pytest.mark.parametrize(("method", "space"), [(m, s) for m, s in EVERY if m not in RANDOM])
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 99), st.permutations(range(3)))
def test_the_order_of_adapters_does_not_matter(method: str, space: str | None, seed: int, order: list[int]) -> None:
    products, weights = for_method(method, seed), [1.0, 0.6, 1.7]
    order = [at for at in order if at < len(products)]
    found = result(method, [products[at] for at in order], [weights[at] for at in order], space=space)
    limit = 1e-5 if space == "dense" else 1e-7
    assert off(found, result(method, products, weights[: len(products)], space=space)) < limit


@pytest.mark.parametrize(("method", "space"), EVERY)
def test_float32_factors_give_what_float64_factors_give(method: str, space: str | None) -> None:
    products = for_method(method, 29)
    dials = {"space": space, **of_two(method)}
    wanted = result(method, products, **dials)
    found = result(method, [p.to(torch.float32) for p in products], **dials)
    # the sign or the place of an entry near a threshold may be another one
    assert off(found, wanted) < (0.02 if space else 2e-5)


@pytest.mark.parametrize(("method", "space"), EVERY)
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 100))
def test_larger_updates_give_a_result_larger_by_as_much(method: str, space: str | None, seed: int, size: float) -> None:
    products = for_method(method, seed)
    dials = {"space": space, **of_two(method)}
    wanted = size * result(method, products, **dials)
    limit = 5e-5 if space == "dense" else 1e-6
    assert off(result(method, [p.scaled(size) for p in products], **dials), wanted) < limit


LINEAR_IN_WEIGHTS = ("linear", "cat", "svd", "dare_linear", "magnitude_prune", "breadcrumbs", "tsv", "iso_c", "iso_cts")


@pytest.mark.parametrize(("method", "space"), [(m, s) for m, s in EVERY if m in LINEAR_IN_WEIGHTS])
def test_weights_twice_as_large_give_twice_the_result(method: str, space: str | None) -> None:
    products, weights = some(31), [1.0, -0.6, 1.7]
    found = result(method, products, [2 * w for w in weights], space=space)
    assert off(found, 2 * result(method, products, weights, space=space)) < (1e-6 if space == "dense" else 1e-10)


@pytest.mark.parametrize(("method", "space"), EVERY)
def test_lambda_multiplies_and_a_norm_can_be_asked_for(method: str, space: str | None) -> None:
    products = for_method(method, 32)
    weights = [1.0, 0.6, 1.7][: len(products)]
    sizes = [w * float(np.linalg.norm(d)) for w, d in zip(weights, written_out(products), strict=True)]
    once = result(method, products, weights, space=space)
    assert off(result(method, products, weights, space=space, factor=-0.5), -0.5 * once) < 1e-12
    for match, wanted in (("mean", np.mean(sizes)), ("max", max(sizes)), ("sum", sum(sizes))):
        found = result(method, products, weights, space=space, match_norm=match, rank=5)
        assert np.linalg.norm(found) == pytest.approx(float(wanted), rel=1e-9)


def zeros(rank: int = 2) -> Product:
    """B = 0, as before the first step of training."""
    return Product(torch.zeros(ROWS, rank, dtype=torch.float64), draw(3, rank, COLUMNS))


def cancelling() -> Product:
    """Zero too, by factors that are not."""
    up, down = draw(4, ROWS, 1), draw(5, 1, COLUMNS)
    return Product(torch.cat([up, up / 3], 1), torch.cat([down / 3, -down]))


def hard_cases() -> Iterator[tuple[str, list[Product]]]:
    one, other = some(33, (3, 4))
    yield "two copies", [one, one]
    yield "opposites", [one, one.scaled(-1.0)]
    yield "zero first", [zeros(), other]
    yield "zero last", [one, zeros(5)]
    yield "nothing but zeros", [zeros(), zeros()]
    yield "a zero that cancels", [one, cancelling()]
    yield "zeros that cancel", [cancelling(), cancelling()]
    yield "a rank padded with zeros", [padded(one, 9), other]
    yield "very different sizes", [one.scaled(1e12), other.scaled(1e-12)]
    yield "very small", [one.scaled(1e-30), other.scaled(1e-30)]
    yield "ranks above those of the weight", some(34, (30, 25))
    yield "one row", some(35, (1, 1), rows=1)
    yield "one column", some(36, (1, 3), columns=1)
    yield "one entry", some(37, (1, 2), rows=1, columns=1)


CASES = dict(hard_cases())
SETTINGS: list[dict[str, Any]] = [
    {},
    {"svc": True},
    {"rank": 1},
    {"rank": 1, "rank_policy": "ctm"},
    {"match_norm": "mean"},
]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_ever_no_number(name: str) -> None:
    """Nor larger than a few times what went in. Of methods by settings the cases take another half in turn."""
    products = CASES[name]
    size = max(float(np.linalg.norm(d)) for d in written_out(products))
    for at, ((method, space), setting) in enumerate(itertools.product(EVERY, SETTINGS)):
        if setting.get("rank_policy") and space in ("dense", "knots"):
            continue
        if (at + list(CASES).index(name)) % 2:
            continue
        both = ([1.0, 1.0], [0.0, 1.0])
        for weights in both if METHODS[method].family != ELEMENTWISE else both[at % 2 :][:1]:
            found = mixed(method, products, weights, space=space, **setting)
            (matrix,) = written_out([found.product])
            assert np.isfinite(matrix).all(), (method, space, setting, weights)
            within = 0 <= found.lost <= 1 + 1e-9 or setting.get("rank_policy")  # which is no projection
            assert within, (method, space, setting, weights)
            assert np.linalg.norm(matrix) <= 8 * size + 1e-12, (method, space, setting, weights)


INDIFFERENT = ("linear", "cat", "tsv", "iso_c", "magnitude_prune", "breadcrumbs", "ties", "sce", "karcher")


@pytest.mark.parametrize("zero", [zeros(), zeros(7)], ids=["zero", "of a larger rank"])
@pytest.mark.parametrize(("method", "space"), [(m, s) for m, s in EVERY if m in INDIFFERENT])
def test_an_adapter_of_zeros_takes_no_part(method: str, space: str | None, zero: Product) -> None:
    products = some(38, (3, 4))
    dials: dict[str, Any] = {"space": space, "rank": FULL if space == "dense" else None}
    # variance and the division by weights see an adapter more; all is kept and added up instead
    dials |= {"density": 1.0} if method == "sce" else {}
    wanted = result(method, products, **dials)
    assert off(result(method, [*products, zero], **dials), wanted) < (1e-5 if space == "dense" else 1e-7)


@pytest.mark.parametrize("method", ["linear", "cat", "iso_c", "ties", "tsv"])
def test_opposites_leave_nothing_for_a_norm_to_enlarge(method: str) -> None:
    """The rounding of a sum that is zero has no direction that means anything."""
    (one,) = some(39, (3,))
    turned = draw(6, 3, 3)
    other = Product(one.up @ turned, -torch.linalg.solve(turned, one.down))
    if method in ("linear", "cat", "iso_c"):
        assert np.linalg.norm(result(method, [one, other], match_norm="mean")) < 1e-10
    assert np.isfinite(result(method, [one, other], match_norm="mean")).all()


def test_copies_of_an_adapter_are_orthogonalised_to_the_adapter() -> None:
    """polar([U U]) = [U U]/√2: the halves of two copies add up to one."""
    (one,) = some(40, (4,))
    assert off(result("tsv", [one, one]), written_out([one])[0]) < 1e-10
    assert off(result("tsv", [one, one.scaled(1.0)], rank=4), written_out([one])[0]) < 1e-10


def test_large_singular_values_are_not_clamped() -> None:
    """Others cut off the largest entries of the factors, which costs up to 39 % of an exact factorisation."""
    u, v = torch.zeros(ROWS, 1, dtype=torch.float64), torch.zeros(1, COLUMNS, dtype=torch.float64)
    u[3], v[0, 2] = 20.0, 30.0
    spike = side_by_side([Product(u, v), some(41, (3,))[0]])
    for method, space in EVERY:
        if method in ALIKE and method not in RANDOM:
            assert off(result(method, [spike], space=space, **ALIKE[method]), written_out([spike])[0]) < 1e-6


# ---- PEFT's methods on factors ----


def test_linear_on_factors_adds_cross_terms() -> None:
    """(Σ √w B)(Σ √w A) is Σ w BA and two products of strangers."""
    products, weights = some(42, (3, 3)), [4.0, 9.0]
    (b1, a1), (b2, a2) = ((p.up, p.down) for p in products)
    wanted = np.asarray(4 * b1 @ a1 + 9 * b2 @ a2 + 6 * (b1 @ a2 + b2 @ a1))
    found = mix_factors([b1, b2], [a1, a2], weights, combination_for("linear-factors", 2))
    assert off(written_out([found.product])[0], wanted) < 1e-12


@pytest.mark.parametrize("method", ["dare_linear-factors", "dare_ties-factors"])
def test_dare_on_factors_keeps_entries_by_chance_and_is_right_in_the_mean(method: str) -> None:
    (product,) = some(43, (2,), rows=40, columns=30)
    ups, downs = [], []
    for seed in range(200):
        found = mix_factors(
            [product.up], [product.down], [1.0], combination_for(method, 1, density=0.5, seed=seed)
        ).product
        for kept, whole in ((found.up, product.up), (found.down, product.down)):
            assert bool(((kept == 0) | torch.isclose(kept, 2 * whole)).all())
        ups.append(found.up)
        downs.append(found.down)
    for every, whole in ((ups, product.up), (downs, product.down)):
        assert off(np.asarray(torch.stack(every).mean(0)), np.asarray(whole)) < 4 / math.sqrt(200)
        part = float((torch.stack(every) != 0).double().mean())
        assert abs(part - 0.5) < 4 * 0.5 / math.sqrt(200 * whole.numel())
    # B and A draw for themselves
    assert (ups[0][:30] == 0).tolist() != (downs[0].T == 0).tolist()
