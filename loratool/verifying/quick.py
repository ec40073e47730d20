"""Most blocks of a merge, compared in a fraction of the time that merging them takes.

A sum in float32 that is rounded is the formula's once rounded but for a few elements, all next to a tie: one in thirty
thousand of bfloat16, and in ten thousand of float16. So it is enough to know where that is another number than the merged
model's; of the elements found, those next to a tie are decided exactly, as a merge does. Others next to a tie may count
as equal in a model that was merged in float32; they are 1 ulp apart at most.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from loratool.algebra.rounding import bits_of
from loratool.lazy import Tensor, numpy, torch
from loratool.merging.bounds import GENEROUS, ROUNDOFF
from loratool.verifying.distances import Elements, Found

if TYPE_CHECKING:
    from loratool.merging.addends import Stack
    from loratool.merging.exact_rows import ExactSum
    from loratool.merging.loaded_edits import LoadedEdits

MANY = 64  # where more than one of so many elements differs, float32 decides most of them
TILE = 1 << 17  # elements that are computed at a time: they stay in a core's cache


def product_of(loaded: LoadedEdits, first: int, count: int) -> Stack | None:
    """The one product that is all that is added to some rows; None where a merge computes more than that."""
    total = loaded.sum
    if total is None or loaded.rounded is not total or loaded.replacements or total.work != torch.float32:
        return None
    return None if loaded.at_random else total.only_product(first, count)


def compare(
    total: ExactSum, product: Stack, before: Tensor, theirs: Tensor, first: int, rounded: Tensor
) -> Found | None:
    """What differs between a block of the merged model and W + one product; None where nothing does.

    Args:
        total: the product alone, for single elements.
        product: it covers all rows.
        before: (n, width) W as it is stored.
        theirs: (n, width) W' of the merged model, of 16 bits.
        first: the first row.
        rounded: memory of the shape and dtype of `theirs`.
    """
    from loratool.merging.kernels import compiled, round_sums as run

    assert product.down is not None
    own, (count, width) = first - product.place.first, before.shape
    memory = torch.empty(min(count, max(1, TILE // width)), width)
    compiled(run)(before, product.up[own : own + count], product.down, product.scale, memory, rounded)
    places = unequal_places(rounded, theirs.contiguous())
    if not len(places):
        return None
    weights, every = before.reshape(-1)[places], places + first * width
    if len(places) * MANY > before.numel():
        ours = single_sums(total, product, every, weights.float(), sums_at(product, before, own, places, memory))
    else:
        ours = exact_sums(total, product, every, weights.float())
    return Elements(places, weights, ours, theirs.reshape(-1)[places]).unequal().measured(first, width, total)


def sums_at(product: Stack, before: Tensor, own: int, places: Tensor, memory: Tensor) -> Tensor:
    """W + ΔW in float32 at some places of a block, which rise, by way of all elements."""
    assert product.down is not None
    width, tile = before.shape[1], len(memory)
    found = torch.empty(len(places))
    edges = torch.searchsorted(places, torch.arange(0, len(before) + tile, tile) * width).tolist()
    for number, (start, stop) in enumerate(pairwise(edges)):
        rows = before[number * tile : (number + 1) * tile]
        sums = memory[: len(rows)].copy_(rows)
        at = own + number * tile
        sums.addmm_(product.up[at : at + len(rows)], product.down, alpha=product.scale)
        found[start:stop] = sums.view(-1)[places[start:stop] - number * tile * width]
    return found


def single_sums(total: ExactSum, product: Stack, places: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
    """W + ΔW of single elements rounded once, from what float32 gives; those next to a tie by `exact_sums`."""
    margins = (weights.abs() + sums.abs()).add_(product.reach).mul_((product.terms + 4) * ROUNDOFF[4] * GENEROUS)
    low, high = ((sums + sign * (margins + total.underflow)).to(total.target) for sign in (-1, 1))
    near = (bits_of(low) != bits_of(high)) | ~weights.isfinite()
    low[near] = exact_sums(total, product, places[near], weights[near])
    return low


def unequal_places(ours: Tensor, theirs: Tensor) -> Tensor:
    """Where two blocks of 16 bits differ, in the flat order. Numpy finds that several times faster than torch."""
    one, two = (bits_of(each).numpy().reshape(-1) for each in (ours, theirs))
    if any(count % 4 for count in (len(one), ours.storage_offset(), theirs.storage_offset())):
        return torch.from_numpy(numpy.flatnonzero(one != two))
    found = numpy.flatnonzero(one.view(numpy.uint64) != two.view(numpy.uint64))
    found = (found[:, None] * 4 + numpy.arange(4)).reshape(-1)
    return torch.from_numpy(found[one[found] != two[found]])


def exact_sums(total: ExactSum, product: Stack, places: Tensor, weights: Tensor) -> Tensor:
    """W + ΔW of single elements rounded once, in the target dtype: in float64, and without error next to a tie.

    `places` are those in the whole weight.
    """
    assert product.down is not None
    rows, columns = places // total.width - product.place.first, places % total.width
    left, right = product.up[rows].double(), product.down[:, columns].double().T
    values = (left * right).sum(1).mul_(product.scale).add_(weights.double())
    margins = (weights.double().abs() + values.abs() + product.reach) * ((product.terms + 4) * ROUNDOFF[8] * GENEROUS)
    found, finite = values.to(total.target), weights.isfinite()
    some = (places[finite], values[finite], weights[finite], (margins + total.underflow)[finite])
    found[finite] = total.singles.rounded(*some)
    return found
