"""Most blocks of a merge, compared in a fraction of the time that merging them takes.

A sum in float32 that is rounded is the formula's once rounded but for a few elements in a million, all next to a tie.
So it is enough to know where that is another number than the merged model's; of the elements found, those next to a tie
are decided exactly, as a merge does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.algebra.rounding import bits_of, round_once
from loratool.lazy import Tensor, numpy, torch
from loratool.merging.parts import GENEROUS, ROUNDOFF
from loratool.verifying.distances import Elements, Found

if TYPE_CHECKING:
    from loratool.merging.exact_rows import ExactSum
    from loratool.merging.loaded_edits import LoadedEdits
    from loratool.merging.parts import Stack

TILE = 1 << 17  # elements that are computed at a time: they stay in a core's cache


def product_of(loaded: LoadedEdits, first: int, count: int) -> Stack | None:
    """The one product that is all that is added to some rows; None where a merge computes more than that."""
    total = loaded.sum
    if total is None or loaded.rounded is not total or loaded.replacements or total.work != torch.float32:
        return None
    return None if loaded.at_random else total.only_product(first, count)


def compare(total: ExactSum, product: Stack, before: Tensor, theirs: Tensor, first: int) -> Found | None:
    """What differs between a block of the merged model and W + one product; None where nothing does.

    Args:
        total: the product alone, for single elements.
        product: it covers all rows.
        before: (n, width) W as it is stored.
        theirs: (n, width) W' of the merged model, of 16 bits.
        first: the first row.
    """
    places, sums = unequal_sums(product, before, theirs.contiguous(), first - product.place.first)
    if not len(places):
        return None
    weights = before.reshape(-1)[places]
    ours = round_sums(total, product, places + first * total.width, sums, weights.float())
    return Elements(places, weights, ours, theirs.reshape(-1)[places]).unequal().measured(first, total.width, total)


def unequal_sums(product: Stack, before: Tensor, theirs: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Where W + one product, computed in float32 and rounded, is not what the merged model has: places, and the sums.

    Rows of both are those of the product from `own` on. Numpy compares and finds several times faster than torch.
    """
    assert product.down is not None
    count, width = before.shape
    tile = min(count, max(1, TILE // width))
    memory, rounded = torch.empty(tile, width), torch.empty(tile, width, dtype=theirs.dtype)
    kind = numpy.uint64 if width % 4 == 0 and theirs.storage_offset() % 4 == 0 else numpy.uint16
    bits, other = (bits_of(each).numpy() for each in (rounded, theirs))
    places, sums = [], []
    for at in range(0, count, tile):
        rows = before[at : at + tile]
        some = memory[: len(rows)].copy_(rows)
        some.addmm_(product.up[own + at : own + at + len(rows)], product.down, alpha=product.scale)
        rounded[: len(rows)].copy_(some)
        one, two = bits[: len(rows)], other[at : at + tile]
        if len(found := numpy.flatnonzero(one.view(kind) != two.view(kind))):
            if kind is numpy.uint64:
                found = (found[:, None] * 4 + numpy.arange(4)).reshape(-1)
                found = found[one.reshape(-1)[found] != two.reshape(-1)[found]]
            here = torch.from_numpy(found)
            places.append(here + at * width)
            sums.append(some.view(-1)[here])
    if not places:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return torch.cat(places), torch.cat(sums)


def round_sums(total: ExactSum, product: Stack, places: Tensor, sums: Tensor, weights: Tensor) -> Tensor:
    """W + ΔW of single elements rounded once, in the target dtype, from what float32 gives.

    Those next to a tie are computed in float64, and those that it leaves open without any error. `places` are those in
    the whole weight.
    """
    assert product.down is not None
    sizes = (weights.abs() + sums.abs()).add_(product.reach)
    steps = (product.terms + 4) * GENEROUS
    low, high = (sums + sign * (sizes * (steps * ROUNDOFF[4]) + total.underflow) for sign in (-1, 1))
    result = low.to(total.target)
    near = torch.nonzero(bits_of(result) != bits_of(high.to(total.target))).view(-1)
    if len(near):
        rows, columns = places[near] // total.width - product.place.first, places[near] % total.width
        left, right = product.up[rows].double(), product.down[:, columns].double().T
        values = weights[near].double() + product.scale * (left * right).sum(1)
        margins = sizes[near].double() * (steps * ROUNDOFF[8]) + total.underflow
        below, above = round_once(values - margins, total.target), round_once(values + margins, total.target)
        open_yet = bits_of(below) != bits_of(above)
        if bool(open_yet.any()):
            below[open_yet] = total.singles.exactly(places[near[open_yet]], weights[near[open_yet]])
        result[near] = below
    return torch.where(weights.isfinite(), result, sums.to(total.target))
