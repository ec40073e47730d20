"""Random numbers that belong to an entry: the same on every device, in every tile and on every pass."""

from __future__ import annotations

import hashlib

from loratool.lazy import Tensor, torch

WORD = 0xFFFF_FFFF


def uniform(key: str, first_row: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) for the entries of a tile, of float32, from a hash of `key`, row and column."""
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)
    column = torch.arange(columns, dtype=torch.int64, device=device)
    of_row = mixed(mixed(row) ^ start)
    entries = mixed((of_row[:, None] + mixed(column ^ WORD)[None, :]) & WORD)
    return (entries >> 8).float() * 2.0**-24


def of_each(key: str, first_row: int, matrices: Tensor) -> Tensor:
    """The same for tiles of several matrices, each with numbers of its own: (n, rows, columns)."""
    _, rows, columns = matrices.shape
    each = (uniform(f"{key}/{at}", first_row, rows, columns, matrices.device) for at in range(len(matrices)))
    return torch.stack(list(each))


def mixed(words: Tensor) -> Tensor:
    """A bijection of 32-bit words that spreads every bit over all others (`lowbias32`, C. Wellons, public domain)."""
    words = words ^ (words >> 16)
    words = (words * 0x7FEB352D) & WORD
    words = words ^ (words >> 15)
    words = (words * 0x846CA68B) & WORD
    return words ^ (words >> 16)
