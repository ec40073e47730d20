"""The small numbers that packed weights are made of, and how they lie in bytes: both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from loratool.bases.codecs.bit_fields import unpacked
from loratool.bases.codecs.byte_values import (
    E2M1,
    E2M3,
    OFFSET_INT4,
    SIGNED_INT4,
    bit_fields,
    e4m3,
    looked_up,
    nibbles,
    packed_fields,
    packed_nibbles,
)
from loratool.lazy import Tensor, torch


@dataclass(frozen=True)
class Numbers:
    """A kind of small numbers, and how those of a line lie in its bytes."""

    title: str  # such as "int4"
    floats: Callable[[Tensor], Tensor]  # (lines, bytes) of uint8 → (lines, numbers) of float32, perhaps some more
    bytes: Callable[[Tensor], Tensor]  # (lines, numbers) of float32 → (lines, bytes) of uint8: of the nearest numbers
    least: float
    greatest: float
    paired: bool = False  # a byte holds numbers of two lines, the low nibble that of the first, not of two columns

    @property
    def span(self) -> float:
        """What the largest magnitude of a block is divided by for its scale, as compressed-tensors does it."""
        return (self.greatest - self.least) / 2

    def clamped(self, values: Tensor) -> Tensor:
        """Values within the range of the numbers; what is none, as 0/0, is 0."""
        return values.nan_to_num(0.0, self.greatest, self.least).clamp_(self.least, self.greatest)


def e4m3_bytes(values: Tensor) -> Tensor:
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def e5m2_floats(packed: Tensor) -> Tensor:
    return packed.view(torch.float8_e5m2).float()


def e5m2_bytes(values: Tensor) -> Tensor:
    return values.to(torch.float8_e5m2).view(torch.uint8)


def int8_floats(packed: Tensor) -> Tensor:
    return packed.view(torch.int8).float()


def int8_bytes(values: Tensor) -> Tensor:
    return values.round().to(torch.int8).view(torch.uint8)


def e2m1_floats(packed: Tensor) -> Tensor:
    return nibbles(packed, E2M1)


def e2m1_bytes(values: Tensor) -> Tensor:
    return packed_nibbles(nearest_codes(values, E2M1))


def e2m3_floats(packed: Tensor) -> Tensor:
    return looked_up(bit_fields(packed, 6), E2M3)


def e2m3_bytes(values: Tensor) -> Tensor:
    return packed_fields(nearest_codes(values, E2M3), 6)[:, : values.shape[1] * 3 // 4]


def int4_floats(packed: Tensor) -> Tensor:
    return nibbles(packed, SIGNED_INT4)


def int4_bytes(values: Tensor) -> Tensor:
    return packed_nibbles(values.round().to(torch.int8).view(torch.uint8) & 15)


def offset_floats(packed: Tensor, bits: int) -> Tensor:
    """Unsigned integers that lie one after the other, less 2^(bits − 1)."""
    if bits == 4:
        return nibbles(packed, OFFSET_INT4)
    if bits == 8:
        return packed.bitwise_xor(128).view(torch.int8).float()
    fields = unpacked(packed, bits) if bits < 4 and packed.shape[1] % bits == 0 else bit_fields(packed, bits)
    return fields.float().sub_(1 << bits - 1)


def offset_bytes(values: Tensor, bits: int) -> Tensor:
    """The other way; each line is filled up with zeros to whole words of 32 bits."""
    unsigned = values.round().to(torch.int16).add_(1 << bits - 1).to(torch.uint8)
    width = -(-values.shape[1] * bits // 32) * 4
    packed = packed_fields(unsigned, bits)
    return torch.nn.functional.pad(packed, (0, width - packed.shape[1]))


def nearest_codes(values: Tensor, numbers: tuple[float, ...]) -> Tensor:
    """The codes of the nearest numbers, as uint8; ties go to even codes.

    The first half of `numbers` are the magnitudes, by code, and the second half the same below zero.
    """
    half = len(numbers) // 2
    magnitudes = torch.tensor(numbers[:half], device=values.device)
    borders = (magnitudes[1:] + magnitudes[:-1]) / 2
    below = torch.nextafter(borders, torch.zeros_like(borders))
    even_above = torch.arange(half - 1, device=values.device) % 2 == 1  # a tie belongs to the code above
    codes = torch.bucketize(values.abs(), torch.where(even_above, below, borders), out_int32=True)
    return codes.add_(half * values.signbit()).to(torch.uint8)


def offset_integers(bits: int) -> Numbers:
    """Integers of compressed-tensors: unsigned, with 2^(bits − 1) added, one bit after the other."""
    half = 1 << bits - 1
    both = partial(offset_floats, bits=bits), partial(offset_bytes, bits=bits)
    return Numbers(f"int{bits}", *both, -half, half - 1)


FP8 = Numbers("FP8", e4m3, e4m3_bytes, -448, 448)
FP8_E5M2 = Numbers("FP8 E5M2", e5m2_floats, e5m2_bytes, -57344, 57344)
FP6 = Numbers("FP6", e2m3_floats, e2m3_bytes, -7.5, 7.5)
FP4 = Numbers("FP4", e2m1_floats, e2m1_bytes, -6, 6)
INT8 = Numbers("int8", int8_floats, int8_bytes, -128, 127)
FP4_OF_TWO_ROWS = Numbers("FP4", e2m1_floats, e2m1_bytes, -6, 6, paired=True)
INT4_OF_TWO_ROWS = Numbers("int4", int4_floats, int4_bytes, -8, 7, paired=True)
