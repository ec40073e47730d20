"""Tensors of a merged model that are quantised: each element must be within half a step of its format around the formula.

What half a step is, the format says by packing the formula's own values with the parameters that the merged model has:
no value of the format is nearer to the formula than those.
"""

from __future__ import annotations

import math

from loratool.bases.packed import Packed, Requantizable
from loratool.bases.weights import Held, Room
from loratool.lazy import Tensor, torch
from loratool.verifying.distances import MOST_ROWS, Found

NEARLY = 1 + 2.0**-10  # times the distance of the nearest value: tools compute scales and sums in other orders
LAST_BITS = 2.0**-22  # of the size of the formula's value
SIXTEEN_BITS = 3 * 2.0**-8  # of it: what rounding a weight, its scale and the quotient of both to bfloat16 may add


def is_quantised(weight: object) -> bool:
    return isinstance(weight, Packed)


def aligned(weight: object, width: int, rows: int) -> int:
    """As many rows as may be packed together, at most so many where that is possible."""
    least = least_rows(weight, width)
    return max(1, rows // least) * least


def least_rows(weight: object, width: int) -> int:
    """As many rows as are packed together."""
    if not isinstance(weight, Requantizable):
        return 1
    return weight.together // math.gcd(weight.together, max(1, width // max(1, weight.line)))


def beyond_half_step(
    weight: object, formula: Tensor, theirs: Tensor, first: int, held: Held, room: Room
) -> Found | None:
    """Elements that are farther from the formula than its nearest value; distances are in half steps.

    Those that are farther by more than roundings to 16 bits before the packing may add are `beyond`.

    Args:
        weight: of the merged model, as a matrix like the formula.
        formula: (n, width) of float32, from row `first` on.
        theirs: (n, width), what the merged model has there, decoded.
        first: the first row.
        held: of the weight.
        room: to read its parameters with.
    """
    apart = (theirs - formula).abs()
    if not isinstance(weight, Requantizable):  # of a format that nobody here can pack
        places = torch.nonzero((apart > 0).view(-1)).view(-1)
        return Found(len(places), math.inf, 0.0, len(places), ()) if len(places) else None
    parameters = held.of("parameters of a merged weight", lambda: weight.parameters(room))
    lines = formula.reshape(-1, weight.line)
    at = first * (formula.shape[1] // max(1, weight.line))
    packed = weight.encode(lines, at, parameters)
    nearest = (weight.decode_packed(packed, at, len(lines), parameters).view_as(formula) - formula).abs()
    allowed = nearest * NEARLY + formula.abs() * LAST_BITS
    far = torch.nonzero((~(apart <= allowed)).view(-1)).view(-1)
    if not len(far):
        return None
    beyond = far[~(apart <= allowed + formula.abs() * SIXTEEN_BITS).view(-1)[far]]
    ratio = (apart.view(-1)[far] / allowed.view(-1)[far].clamp(min=1e-30)).nan_to_num(math.inf, math.inf)
    rows = (first + torch.unique(beyond // formula.shape[1])[:MOST_ROWS]).tolist()
    return Found(len(far), float(ratio.max()), 0.0, len(beyond), tuple(rows))
