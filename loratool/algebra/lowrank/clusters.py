"""Which products have directions in common: clusters of them, by average linkage.

SciPy, whose `linkage` does the same, is not needed for anything else, and is larger than all of loratool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loratool.algebra.lowrank.products import Product, by_ranks
from loratool.algebra.lowrank.shared_bases import root
from loratool.lazy import Tensor, torch

Clustering = tuple[tuple[int, ...], ...]  # the products of each cluster, by number
GAPS = 2  # the largest steps between merges at which a clustering is a candidate
LEAST_GAP = 0.5  # part of the affinity that a merge has to lose to the one after it; less is no sign of families


def affinity(products: Sequence[Product]) -> Tensor:
    """(n, n) means over both sides of cos(ΔᵢΔᵢᵀ, ΔⱼΔⱼᵀ): 1 where directions agree, whatever is done with them.

    ΔΔᵀ = (up C)(up C)ᵀ where CCᵀ = down downᵀ, so ⟨ΔᵢΔᵢᵀ, ΔⱼΔⱼᵀ⟩ = ‖(upᵢ Cᵢ)ᵀ upⱼ Cⱼ‖².
    """
    ups, downs = [p.up.float() for p in products], [p.down.float().mT for p in products]  # a rough figure
    sides = [
        [one @ root(other.mT) for one, other in zip(ups, downs, strict=True)],
        [one @ root(other.mT) for one, other in zip(downs, ups, strict=True)],
    ]
    found = torch.zeros(len(products), len(products), dtype=torch.float64)
    for factors in sides:
        every = torch.cat(factors, 1)
        ranks = [factor.shape[1] for factor in factors]
        rows = [torch.stack([part.square().sum() for part in by_ranks(f.mT @ every, ranks)]) for f in factors]
        table = torch.stack(rows).cpu()
        sizes = table.diagonal().sqrt()
        found += table / (sizes[:, None] * sizes[None, :]).clamp_min(1e-300) / 2
    return found


def clusterings(alike: Tensor) -> Iterator[Clustering]:
    """Those worth a try: all together, those before the largest steps between merges, and each alone."""
    count = alike.shape[0]
    merges = list(linked(alike))
    together = (tuple(range(count)),)
    yield together
    heights = [height for height, _ in merges]
    steps = [(1 - heights[at + 1] / heights[at], at) for at in range(len(heights) - 1) if heights[at] > 0]
    for step, at in sorted(steps, reverse=True)[:GAPS]:
        if step > LEAST_GAP:
            yield merges[at][1]
    if count > 1:
        yield tuple((at,) for at in range(count))


def linked(alike: Tensor) -> Iterator[tuple[float, Clustering]]:
    """The affinity of each merge and the clusters after it, from two to one of them."""
    table = alike.clone()
    table.fill_diagonal_(-1.0)
    members: dict[int, tuple[int, ...]] = {at: (at,) for at in range(table.shape[0])}
    while len(members) > 1:
        one, other = sorted(divmod(int(table.argmax()), table.shape[0]))
        height = float(table[one, other])
        sizes = len(members[one]), len(members[other])
        row = (table[one] * sizes[0] + table[other] * sizes[1]) / sum(sizes)
        gone = table[one] < -0.5, table[other] < -0.5  # itself, or merged away
        row[gone[0] | gone[1]] = -1.0
        table[one], table[:, one] = row, row
        table[other], table[:, other] = -1.0, -1.0
        members[one] = tuple(sorted(members[one] + members.pop(other)))
        yield height, tuple(sorted(members.values()))
