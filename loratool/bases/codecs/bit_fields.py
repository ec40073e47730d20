"""Integers of a few bits that lie one after the other in bytes, lowest bits first, made bytes of their own.

That is how GPTQ packs along a column and compressed-tensors along a row, in words of 32 bits. In memory such words are
little-endian, so their bytes are one stream of bits, in which integers of 3, 5, 6 and 7 bits cross the borders of words.
"""

from __future__ import annotations

from math import gcd

from loratool.lazy import Tensor, torch


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """(rows, bytes) of uint8 → (rows, fields) of uint8, in memory of its own unless `bits` is 8.

    As many fields as fill whole bytes are one integer, with as many bytes as fields. Its upper half moves to the upper
    half of those bytes, then the upper half of each half, and so on until each field has its byte: log2(fields) steps for
    all of them at once. What the last bytes lack to such an integer is read as 0.
    """
    fields = 8 // gcd(8, bits)  # in one integer
    if fields == 1:
        return packed
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[fields]
    size = bits * fields // 8  # bytes of such an integer
    if lacking := -packed.shape[1] % size:
        packed = torch.nn.functional.pad(packed, (0, lacking))
    groups = packed.view(len(packed), -1, size)
    spread = groups[:, :, 0].to(wide, memory_format=torch.contiguous_format)  # also of one integer a row
    for place in range(1, size):
        spread |= groups[:, :, place].to(wide) << 8 * place
    while fields > 1:
        fields //= 2
        low = repeated((1 << fields * bits) - 1, 16 * fields, 8 * wide.itemsize)
        upper = spread << fields * (8 - bits)
        upper &= low << 8 * fields
        spread &= low
        spread |= upper
    return spread.view(torch.uint8)


def packed(fields: Tensor, bits: int) -> Tensor:
    """(rows, fields) of uint8 → (rows, words) of int32, the last of which is padded with zeros: `unpacked`, back."""
    rows, count = fields.shape
    number = 8 // gcd(8, bits)  # in one integer
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[number]
    joined = torch.nn.functional.pad(fields, (0, -count % 32)).clone(memory_format=torch.contiguous_format).view(wide)
    done = 1
    while done < number:
        low = repeated((1 << done * bits) - 1, 16 * done, 8 * wide.itemsize)
        upper = joined >> done * (8 - bits)
        upper &= low << done * bits
        joined &= low
        joined |= upper
        done *= 2
    pieces = joined.view(torch.uint8).view(rows, -1, wide.itemsize)[:, :, : bits * number // 8]
    words = pieces.contiguous().view(rows, -1).view(torch.int32)
    return words[:, : -(-count * bits // 32)].clone(memory_format=torch.contiguous_format)


def repeated(mask: int, distance: int, width: int) -> int:
    """A mask again at each distance, in an integer of `width` bits."""
    return sum(mask << place for place in range(0, width, distance))
