"""The small numbers that packed weights are made of, and how they lie in bytes: both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from loratool.bases.codecs import bit_fields
from loratool.bases.codecs.byte_values import (
    E2M1,
    E2M3,
    OFFSET_INT4,
    SIGNED_INT4,
    e4m3,
    looked_up,
    nibbles,
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


def stored_floats(packed: Tensor, dtype: str) -> Tensor:
    """Numbers of a dtype of torch, by its name there."""
    return packed.view(getattr(torch, dtype)).float()


def stored_bytes(values: Tensor, dtype: str) -> Tensor:
    """The other way."""
    return values.to(getattr(torch, dtype)).view(torch.uint8)


def int8_bytes(values: Tensor) -> Tensor:
    return stored_bytes(values.round(), "int8")


def int4_bytes(values: Tensor) -> Tensor:
    return packed_nibbles(int8_bytes(values) & 15)


def e2m1_bytes(values: Tensor) -> Tensor:
    return packed_nibbles(nearest_codes(values, E2M1))


def e2m3_floats(packed: Tensor) -> Tensor:
    return looked_up(bit_fields.unpacked(packed, 6), E2M3)


def e2m3_bytes(values: Tensor) -> Tensor:
    return bit_fields.packed(nearest_codes(values, E2M3), 6).view(torch.uint8)[:, : values.shape[1] * 3 // 4]


def offset_floats(packed: Tensor, bits: int) -> Tensor:
    """Unsigned integers that lie one after the other, less 2^(bits − 1)."""
    if bits == 4:
        return nibbles(packed, OFFSET_INT4)
    if bits == 8:
        return packed.bitwise_xor(128).view(torch.int8).float()
    return bit_fields.unpacked(packed, bits).float().sub_(1 << bits - 1)


def offset_bytes(values: Tensor, bits: int) -> Tensor:
    """The other way; each line is padded with zeros to whole words of 32 bits."""
    unsigned = values.round().to(torch.int16).add_(1 << bits - 1).to(torch.uint8)
    return bit_fields.packed(unsigned, bits).view(torch.uint8)


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


FP8 = Numbers("FP8", e4m3, partial(stored_bytes, dtype="float8_e4m3fn"), -448, 448)
E5M2 = partial(stored_floats, dtype="float8_e5m2"), partial(stored_bytes, dtype="float8_e5m2")
FP8_E5M2 = Numbers("FP8 E5M2", *E5M2, -57344, 57344)
FP6 = Numbers("FP6", e2m3_floats, e2m3_bytes, -7.5, 7.5)
FP4 = Numbers("FP4", partial(nibbles, values=E2M1), e2m1_bytes, -6, 6)
INT8 = Numbers("int8", partial(stored_floats, dtype="int8"), int8_bytes, -128, 127)
FP4_OF_TWO_ROWS = replace(FP4, paired=True)
INT4_OF_TWO_ROWS = Numbers("int4", partial(nibbles, values=SIGNED_INT4), int4_bytes, -8, 7, paired=True)
BY_DTYPE = {"I8": INT8, "F8_E4M3": FP8, "F8_E5M2": FP8_E5M2}  # of tensors with a number in each byte
