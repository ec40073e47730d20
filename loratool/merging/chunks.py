"""Chunks of output tensors, which have a digest each: where their bytes go, and where they are from."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from loratool.adapters.adapter import StoredTensor
from loratool.files.digests import chunk_cuts
from loratool.files.safefile import SafeFile
from loratool.merging.output_layout import ShardPlan, Span


@dataclass(frozen=True)
class Chunk:
    """Bytes of an output tensor that have a digest of their own."""

    span: Span
    number: int
    start: int  # byte of the tensor
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def blocks(self, step: int, window: int) -> Iterator[list[tuple[int, int]]]:
        """Its rows in blocks of `step` as (first row, rows), those of each next `window` rows together."""
        row = self.span.placed.nbytes // self.span.rows
        last = self.stop // row
        for begin in range(self.start // row, last, window):
            end = min(begin + window, last)
            yield [(first, min(step, end - first)) for first in range(begin, end, step)]

    @property
    def source(self) -> StoredTensor:
        """The tensor that it is a copy of, or is computed from."""
        return self.span.carried or self.span.weight.tensors[0]

    @property
    def source_start(self) -> int:
        """The byte of that tensor's file at which it begins, where it is a copy."""
        return self.source.file.position(self.source.info) + self.start

    @property
    def origin(self) -> Hashable:
        """What chunks have in common that are made of the same bytes."""
        return id(self.source.file), self.source.info.name, self.span.placed.dtype, self.start, self.stop


def chunks_of(span: Span) -> list[Chunk]:
    """The chunks of an output tensor; one of a tensor without bytes."""
    return [Chunk(span, number, *cut) for number, cut in enumerate(pairwise(chunk_cuts(span.placed)))]


def chunks_in(plan: ShardPlan, span: Span) -> list[Chunk]:
    """Those of them that have bytes, and that are made where only a part of a file is."""
    every, cut = [chunk for chunk in chunks_of(span) if chunk.size], plan.cut
    return [chunk for chunk in every if cut is None or cut[0] <= plan.place(span, chunk.start) < cut[1]]


def bytes_in(plan: ShardPlan) -> int:
    """Bytes of tensors that are made of a file."""
    if plan.cut is None:
        return sum(span.placed.nbytes for span in plan.spans)
    return sum(chunk.size for span in plan.spans for chunk in chunks_in(plan, span))


def ranges_behind(chunk: Chunk) -> Iterator[tuple[SafeFile, int, int]]:
    """Where the rows lie that a chunk is computed from, as file, start and count; nothing of a weight with other rows."""
    span = chunk.span
    row = span.placed.nbytes // span.rows
    first, last = chunk.start // row, chunk.stop // row
    for tensor in span.weight.tensors:
        if tensor.info.rows == span.rows and tensor.info.nbytes % span.rows == 0:
            stored = tensor.info.nbytes // span.rows
            yield tensor.file, tensor.file.position(tensor.info) + first * stored, (last - first) * stored


def ranges_of(chunks: Iterable[Chunk]) -> list[tuple[SafeFile, int, int]]:
    """Where chunks that are copied lie in input files, as file, start and count; neighbours are one range."""
    found: list[tuple[SafeFile, int, int]] = []
    for chunk in chunks:
        file, start, count = chunk.source.file, chunk.source_start, chunk.size
        if found and found[-1][0] is file and sum(found[-1][1:]) == start:
            _, start, before = found.pop()
            count += before
        found.append((file, start, count))
    return found
