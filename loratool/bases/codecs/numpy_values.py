"""What the bytes of packed values stand for, by numpy: weights are decoded without torch where that is all a merge needs.

The bits are those that `byte_values` and `bit_fields` give.
"""

from __future__ import annotations

import math
from typing import Any

from loratool.lazy import NDArray, numpy

SIGN_AND_SEVEN = 0x87F00000 - (1 << 32)  # the bits of a float32 that an e4m3 comes to


def look_up(values: NDArray[Any], packed: NDArray[Any], table: NDArray[Any]) -> None:
    """Put what packed values stand for into (n,) of float32, two at a time: `table` has the bits of both as int64."""
    numpy.take(table, packed, out=values.view(numpy.int64), mode="clip")  # which takes no other memory


def pairs(high: NDArray[Any], low: NDArray[Any]) -> NDArray[Any]:
    """(n,) and (m,) of float32 → (n · m,) of int64: the bits of one of `low`, and then of one of `high`."""
    both = numpy.stack([numpy.tile(low, len(high)), numpy.repeat(high, len(low))], 1)
    found: NDArray[Any] = both.view(numpy.int64).reshape(-1)
    return found


def e4m3(values: NDArray[Any], packed: NDArray[Any]) -> None:
    """Put (n,) of uint8 into (n,) of float32."""
    bits = values.view(numpy.int32)
    bits[:] = packed.view(numpy.int8)  # four bits of exponent and three of mantissa below the sign
    bits <<= 20
    bits &= SIGN_AND_SEVEN
    numpy.multiply(values, numpy.float32(2.0**120), out=values)  # as float32 has another bias; exact
    nan = packed & 0x7F == 0x7F
    if nan.any():
        values[nan] = math.nan


def nibbles(packed: NDArray[Any]) -> NDArray[Any]:
    """(…, n) of uint8 → (…, 2n) of uint8: both nibbles of each, the low one first."""
    spread = packed.astype(numpy.uint16)
    spread |= spread << 4
    spread &= 0x0F0F
    found: NDArray[Any] = spread.view(numpy.uint8)
    return found


def multiply(values: NDArray[Any], scales: NDArray[Any], width: int) -> None:
    """Scale lines in place, (n, line), by blocks of so many columns; `scales` are (n, blocks). The last may be cut."""
    whole = values.shape[1] // width
    parted = values[:, : whole * width].reshape(len(values), whole, width)  # a view, where no block is cut
    if whole * width == values.shape[1]:
        numpy.multiply(parted, scales[:, :, None], out=parted)
    else:
        values *= numpy.repeat(scales, width, 1)[:, : values.shape[1]]
