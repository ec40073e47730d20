"""Bases that products share, against the same in NumPy on whole matrices: float64, no factors, no frames."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from checkpoints import draw, written_out

from loratool.algebra.lowrank import shared_bases as solver
from loratool.algebra.lowrank.clusters import affinity, clusterings
from loratool.algebra.lowrank.products import Product
from loratool.algebra.lowrank.shared_bases import Fitter, Shared, energies, frame, shared_bases
from loratool.algebra.lowrank.spending import Choice, Curve, Offer, cost_of, kept_by, spend, spend_least

ROWS, COLUMNS = 48, 40
RANKS = (3, 4, 2, 5, 1)


def some(seed: int, ranks: Sequence[int] = RANKS) -> list[Product]:
    return [Product(draw(seed + 2 * at, ROWS, r), draw(seed + 2 * at + 1, r, COLUMNS)) for at, r in enumerate(ranks)]


def planted(seed: int, directions: int, ranks: Sequence[int] = RANKS) -> list[Product]:
    """Products whose columns and rows lie in the same few directions."""
    u, v = draw(seed, ROWS, directions), draw(seed + 1, directions, COLUMNS)
    return [Product(u @ draw(seed + 2 + at, directions, r), draw(seed + 50 + at, r, directions) @ v) for at, r in enumerate(ranks)]  # fmt: skip


def weights_of(products: Sequence[Product]) -> list[float]:
    return [1 / float(np.linalg.norm(d)) ** 2 for d in written_out(products)]


def solved(products: Sequence[Product], rank: int) -> tuple[Shared, float]:
    """The bases, and Σ ω‖ΔW − U M V‖² of the whole matrices."""
    weights = weights_of(products)
    found = shared_bases(frame(products, weights), rank)
    left, right = np.asarray(found.left), np.asarray(found.right)
    made = [left @ np.asarray(core.matrix()) @ right for core in found.cores]
    losses = [
        w * float(np.linalg.norm(d - m)) ** 2 for w, d, m in zip(weights, written_out(products), made, strict=True)
    ]
    return found, math.fsum(losses)


@pytest.mark.parametrize("rank", [1, 4, 7, 15])
def test_cores_are_the_best_in_orthonormal_bases_and_errors_are_those_of_whole_matrices(rank: int) -> None:
    products = some(100)
    found, _ = solved(products, rank)
    left, right = np.asarray(found.left), np.asarray(found.right)
    assert np.abs(left.T @ left - np.eye(rank)).max() < 1e-12
    assert np.abs(right @ right.T - np.eye(rank)).max() < 1e-12
    for delta, core in zip(written_out(products), found.cores, strict=True):
        matrix, whole = np.asarray(core.matrix()), np.linalg.norm(delta) ** 2
        assert np.abs(matrix - left.T @ delta @ right.T).max() < 1e-12 * np.abs(delta).max()
        error = np.linalg.norm(delta - left @ matrix @ right) ** 2 / whole
        assert 1 - np.linalg.norm(matrix) ** 2 / whole == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_the_loss_lies_between_the_tails_of_the_unfoldings(rank: int) -> None:
    products = some(200)
    weighted = [math.sqrt(w) * d for w, d in zip(weights_of(products), written_out(products), strict=True)]
    tails = [
        float((np.linalg.svd(np.concatenate(side, 1), compute_uv=False)[rank:] ** 2).sum())
        for side in (weighted, [d.T for d in weighted])
    ]
    _, loss = solved(products, rank)
    hosvd = len(products) - energies(frame(products, weights_of(products)), rank)[rank]
    assert max(tails) <= loss <= hosvd <= sum(tails)


def test_directions_that_all_share_are_found_exactly() -> None:
    products = planted(300, 6)
    weights = weights_of(products)
    assert solved(products, 6)[1] < 1e-24
    kept = energies(frame(products, weights), 20)
    assert len(kept) == 7, "there are no more directions than were planted"
    assert kept[6] == pytest.approx(len(products), rel=1e-12)


def test_what_is_kept_by_rank_is_that_of_singular_vectors_of_the_unfoldings() -> None:
    products = some(400)
    weighted = [math.sqrt(w) * d for w, d in zip(weights_of(products), written_out(products), strict=True)]
    u = np.linalg.svd(np.concatenate(weighted, 1))[0]
    v = np.linalg.svd(np.concatenate([d.T for d in weighted], 1))[0]
    found = energies(frame(products, weights_of(products)), 12)
    for rank in (1, 3, 8, 12):
        wanted = sum(np.linalg.norm(u[:, :rank].T @ d @ v[:, :rank]) ** 2 for d in weighted)
        assert found[rank] == pytest.approx(wanted, rel=1e-12)


def test_neither_factors_nor_order_nor_twins_matter() -> None:
    products = [*some(500), some(500)[1]]
    _, loss = solved(products, 5)
    turned = [Product(p.up @ g, torch.linalg.inv(g) @ p.down) for p in products for g in [draw(9, p.rank, p.rank)]]
    assert solved(turned, 5)[1] == pytest.approx(loss, rel=1e-9)
    assert solved(products[::-1], 5)[1] == pytest.approx(loss, rel=1e-9)
    tiny = [*products[:-1], products[-1].scaled(1e-6)]
    assert solved(tiny, 5)[1] == pytest.approx(loss, rel=1e-9)


def test_streaming_is_exact_for_shared_directions_and_near_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    products, shared = some(600, (3,) * 12), planted(700, 6, (3,) * 12)
    _, exact = solved(products, 8)
    monkeypatch.setattr(solver, "EXACT", 0)
    monkeypatch.setattr(solver, "WIDEST", 8)
    weights = weights_of(products)
    found = shared_bases(frame(products, weights, 8), 8)
    assert np.abs(np.asarray(found.left.mT @ found.left) - np.eye(8)).max() < 1e-12
    kept = sum(w * float(core.matrix().square().sum()) for w, core in zip(weights, found.cores, strict=True))
    assert exact * (1 - 1e-9) <= len(products) - kept <= 1.02 * exact
    assert solved(shared, 6)[1] < 1e-20


def test_cores_in_rounded_bases_are_those_of_least_squares() -> None:
    products = some(800)
    found, _ = solved(products, 4)
    left, right = found.left.to(torch.bfloat16).double(), found.right.to(torch.bfloat16).double()
    for product, delta in zip(products, written_out(products), strict=True):
        wanted = np.linalg.pinv(np.asarray(left)) @ delta @ np.linalg.pinv(np.asarray(right))
        assert np.asarray(Fitter.of(left, right).core(product).matrix()) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_affinity_is_the_mean_cosine_of_the_squares_of_both_sides() -> None:
    products = [*planted(900, 6, (3, 3)), *some(950, (3, 2))]
    deltas = written_out(products)
    found = affinity(products)
    for (i, one), (j, other) in itertools.product(enumerate(deltas), enumerate(deltas)):
        pairs = ((one @ one.T, other @ other.T), (one.T @ one, other.T @ other))
        cosines = [float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in pairs]
        assert float(found[i, j]) == pytest.approx(sum(cosines) / 2, rel=1e-4)


def test_families_are_among_the_clusterings_with_all_together_and_each_alone() -> None:
    products = [*planted(1000, 3, (3,) * 3), *planted(1200, 3, (3,) * 4), *some(1400, (3,))]
    found = list(clusterings(affinity(products)))
    assert ((0, 1, 2), (3, 4, 5, 6), (7,)) in found
    assert (tuple(range(8)),) in found
    assert tuple((at,) for at in range(8)) in found


def offers(seed: int, modules: int = 3) -> list[Offer]:
    """Two clusterings of two products each: together, and each alone."""
    rng = np.random.default_rng(seed)

    def curve(steps: int, cost: float) -> Curve:
        kept = np.concatenate([[0.0], np.cumsum(np.sort(rng.random(steps))[::-1])])
        return Curve(tuple(kept.tolist()), tuple(cost * at for at in range(steps + 1)))

    return [((curve(4, 10 + 3 * at),), (curve(3, 8.0 + at), curve(3, 8.0 + at))) for at in range(modules)]


def every_choice(offer: Offer) -> list[Choice]:
    return [
        Choice(at, ranks)
        for at, curves in enumerate(offer)
        for ranks in itertools.product(*(range(len(curve.kept)) for curve in curves))
    ]


@pytest.mark.parametrize("budget", [9.0, 30.0, 55.0, 80.0, 1000.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_kept_to_and_spent_nearly_as_well_as_by_trying_everything(seed: int, budget: float) -> None:
    found = offers(seed, 2)
    choices, price = spend(found, budget)
    best = max(
        (kept_by(found, tried) for tried in itertools.product(*map(every_choice, found)) if cost_of(found, tried) <= budget),
    )  # fmt: skip
    assert cost_of(found, choices) <= budget
    dearest = max(curve.costs[at + 1] - curve.costs[at] for o in found for curves in o for curve in curves for at in range(len(curve.kept) - 1))  # fmt: skip
    assert kept_by(found, choices) >= best - price * 3 * dearest
    if budget == 1000.0:
        assert kept_by(found, choices) == pytest.approx(best)


def test_alone_the_budget_buys_the_largest_for_their_cost() -> None:
    """Greedy, as `resize --budget` is."""
    alone = [(offer[1],) for offer in offers(7)]
    choices, _ = spend(alone, 40.0)
    steps = sorted(
        ((kept - before) / (8.0 + m), m, c)
        for m, (curves,) in enumerate(alone)
        for c, curve in enumerate(curves)
        for before, kept in itertools.pairwise(curve.kept)
    )[::-1]
    left, wanted = 40.0, [[0, 0] for _ in alone]
    full = set()
    for _, m, c in steps:
        if (m, c) in full or 8.0 + m > left:
            full.add((m, c))
            continue
        left -= 8.0 + m
        wanted[m][c] += 1
    assert [list(choice.ranks) for choice in choices] == wanted


@pytest.mark.parametrize("part", [0.3, 0.7, 0.95, 1.0])
def test_enough_is_kept_for_nearly_the_least_that_it_can_cost(part: float) -> None:
    found = offers(11, 2)
    wanted = part * sum(max(choice.kept(offer) for choice in every_choice(offer)) for offer in found) * (1 - 1e-12)
    choices, _ = spend_least(found, wanted)
    tried = itertools.product(*map(every_choice, found))
    least = min(cost_of(found, each) for each in tried if kept_by(found, each) >= wanted)
    assert kept_by(found, choices) >= wanted
    assert cost_of(found, choices) <= least + 10.0, "one direction more"
