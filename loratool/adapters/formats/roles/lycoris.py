"""Updates of LyCORIS (Yeh et al. 2023, arXiv:2309.14859), as its forward pass applies them, and of tools like it.

What LyCORIS merges differs from that for LoHa and LoKr, where it multiplies by the scale twice.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from loratool.adapters.adapter import derived
from loratool.adapters.formats.found import MISSING_PARTNER
from loratool.adapters.formats.roles.factors import product_of
from loratool.adapters.formats.roles.module import Slots
from loratool.adapters.formats.roles.names import ALPHA, ON_INPUT, WEIGHT
from loratool.adapters.formats.roles.products import (
    as_matrix,
    hadamard_factor,
    kronecker_factor,
    kronecker_rank,
)
from loratool.algebra.updates import formulas
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.compound import Both
from loratool.algebra.updates.multiplying import InputMap, Rotation, RowRotation, Scale
from loratool.algebra.updates.products import Hadamard, Kronecker
from loratool.notes import Note

TERMS = 5  # of the series by which OneTrainer works out a rotation, which no file records


def loha(slots: Slots) -> Update:
    """The product of two products, element by element; each may have a Tucker core."""
    (up1, down1, kernel), (up2, down2, other) = (hadamard_factor(slots, side) for side in "12")
    sides = [up1.shape[0], down1.shape[1]], [up2.shape[0], down2.shape[1]]
    slots.require(
        sides[0] == sides[1] and kernel == other,
        f"its two products have different shapes: {sides[0]} and {sides[1]}",
    )
    return Hadamard(up1, down1, up2, down2, slots.scale(down1.shape[0]), kernel)


def lokr(slots: Slots) -> Update:
    """The Kronecker product of two matrices, each whole or a product; where both are whole there is no rank, and no α."""
    left, right = (kronecker_factor(slots, side) for side in "12")
    rank, kernel = kronecker_rank(slots), tuple(right.shape[2:])
    if rank:
        scale = slots.scale(rank)
    else:
        scale = 1.0 if slots.module.scale is None else slots.module.scale
        tell_idle_alpha(slots)
    return Kronecker(left, as_matrix(right), scale, kernel)


def tell_idle_alpha(slots: Slots) -> None:
    """Note an α that LyCORIS does not use, where it is not the rank that LyCORIS would have stored in its place."""
    alpha, dim = slots.alpha, slots.module.dim
    if alpha is None or alpha == dim or (dim is None and alpha > 1 and alpha.is_integer()):
        return
    slots.remark(
        Note(
            "lokr-alpha-ignored",
            "LoKr modules with both factors whole are applied with scale 1, as in LyCORIS, whatever their alpha; if "
            "the tool that trained them multiplied by alpha / rank, pass that as the adapter's weight",
        )
    )


def ia3(slots: Slots) -> Update:
    """1 + factor for each output, or for each input. LyCORIS leaves the bias as it is."""
    slots.require(WEIGHT in slots, f"{WEIGHT} is missing (found only {slots.name(ON_INPUT)})", MISSING_PARTNER)
    stored, of_inputs = slots.tensor(WEIGHT, (1, 3, 4, 5)), slots.number(ON_INPUT)
    slots.require(of_inputs in (0, 1), f"{slots.name(ON_INPUT)} is {of_inputs:g}; expected 0 or 1")
    count, dimensions = math.prod(stored.shape), max(2, len(stored.shape))
    slots.require(
        stored.shape in ((count,), (1, count, *[1] * (dimensions - 2))),
        f"{slots.name(WEIGHT)} is {list(stored.shape)}; expected one value for each output or input",
    )
    return Scale(derived((count,), formulas.one_more, stored), bool(of_inputs), dimensions, turnable=dimensions == 2)


def glora(slots: Slots) -> Update:
    """The sum of a product, and of W times a product.

    An older LyCORIS has the factors of each product in the other order. Where the weight is square, shapes fit both
    readings, of which only the one with the smaller rank makes sense.
    """
    roles = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    a1, a2, b1, b2 = (slots.tensor(role, (2, 3, 4, 5)) for role in roles)
    shapes = ", ".join(f"{role} {list(t.shape)}" for role, t in zip(roles, (a1, a2, b1, b2), strict=True))
    newer, older = multiplies(a1, a2, b1, b2), multiplies(a2, a1, b2, b1)
    slots.require(newer or older, f"its factors do not multiply: {shapes}")
    if newer and older:
        slots.require(
            a2.shape[0] != a1.shape[0],
            f"its factors are all square ({shapes}), which two releases of LyCORIS multiply in different orders; "
            "train it with a smaller rank",
        )
        newer = a2.shape[0] < a1.shape[0]
    if not newer:
        a1, a2, b1, b2 = a2, a1, b2, b1
        slots.remark(
            Note(
                "glora-older-order", "GLoRA factors are multiplied in the order of older LyCORIS, as their shapes show"
            )
        )
    scale = slots.scale(a2.shape[0])
    core = slots.tensor("bm.weight", (3, 4, 5)) if "bm.weight" in slots else None
    return Both(product_of(slots, b1, b2, scale, core), InputMap(as_matrix(a1), as_matrix(a2), scale))


def multiplies(a1: Any, a2: Any, b1: Any, b2: Any) -> bool:
    """Whether a1 @ a2 is (in, in) and b1 @ b2 has as many columns, with one rank for both."""
    return bool(
        a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]
        and a1.shape[0] == a2.shape[1] == b2.shape[1]
        and {*a1.shape[2:], *a2.shape[2:], *b1.shape[2:]} <= {1}
    )


def oft(slots: Slots) -> Update:
    """Rotations of blocks of outputs: one after the other (diag-OFT), or in a butterfly (BOFT).

    α is no strength here: times the number of outputs it is the most that the generator of all rotations may measure.
    """
    stored = slots.tensor("oft_blocks", (3, 4))
    count, size, other = stored.shape[-3:]
    shape = f"{slots.name('oft_blocks')} is {list(stored.shape)}"
    slots.require(size == other, f"{shape}; expected square blocks")
    butterfly = len(stored.shape) == 4
    stages, rows = stored.shape[0] if butterfly else 1, count * size
    reach = size * 2 ** (stages - 1)  # rows that the last stage mixes
    slots.require(not butterfly or (size % 2 == 0 and rows % reach == 0), f"{shape}, which makes no butterfly")
    alpha = slots.alpha
    if slots.module.constrained:
        slots.require(alpha is not None, f"{ALPHA} is missing, which limits the rotation", MISSING_PARTNER)
    limit = alpha * rows if alpha is not None and (alpha > 0 or slots.module.constrained) else None
    rotations = partial(formulas.output_rotations, limit=limit, inverse=not butterfly)
    blocks = derived((stages, count, size, size), rotations, stored)
    lengths = None
    if "rescale" in slots:
        rescale = slots.tensor("rescale", (1, 2, 3, 4, 5))
        slots.require(
            math.prod(rescale.shape) == rescale.shape[0] == rows,
            f"{slots.name('rescale')} is {list(rescale.shape)}; expected {rows} values",
        )
        lengths = derived((rows,), formulas.flat, rescale)
    return RowRotation(blocks, lengths, butterfly)


def oft_of_inputs(slots: Slots) -> Update:
    """Rotations of blocks of inputs, from the upper triangles of their generators: OFT of OneTrainer and PEFT."""
    role, marker = "oft_R.weight", "oft_R.scaled_oft"
    stored = slots.tensor(role)
    count, elements = stored.shape
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    slots.require(
        size * (size - 1) // 2 == elements,
        f"{slots.name(role)} is {list(stored.shape)}; no square matrix has such upper triangles",
    )
    if marker in slots and slots.number(marker):
        stored = derived(stored.shape, partial(formulas.times, 0.5 / math.sqrt(size - 1)), stored)
    blocks = derived((count, size, size), partial(formulas.rotations, size, TERMS, None, True), stored)
    slots.remark(
        Note("oft-series", f"OFT of inputs is computed with {TERMS} terms of its series, as OneTrainer and PEFT do")
    )
    return Rotation(blocks, shared=count == 1, of_matrix=True)
