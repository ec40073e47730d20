"""A merge made again and held against the files that an earlier one wrote: the same plan, another sink.

`verify` tells whether a finished output is, byte for byte, what its inputs give on this machine. It proves besides that
the engine and its arithmetic know nothing of files.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING

from loratool.devices import start_torch
from loratool.errors import InputError, printable
from loratool.files.safefile import LocalSource
from loratool.files.sink import Arrived, Destination, Memory, piece_of, pieces_of
from loratool.files.source import expect
from loratool.files.stand_ins import stand_in
from loratool.files.untrusted import open_regular
from loratool.merging.engine import Engine
from loratool.merging.tasks import Job

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loratool.files.digests import Digest
    from loratool.files.safefile import Layout
    from loratool.files.seen import Seen
    from loratool.files.source import Source
    from loratool.merging.plan import Plan

HEADER = ""  # stands for the header where a tensor's name is told


@dataclasses.dataclass(frozen=True, order=True)
class Difference:
    """The first byte in which a tensor of a finished output is not what the merge makes."""

    file: str
    at: int  # byte of the file
    tensor: str  # empty for the header, and for what follows the last tensor
    byte: int  # of the tensor's bytes, or of the file where there is no tensor

    def __str__(self) -> str:
        where = f"tensor {printable(self.tensor)}" if self.tensor else "outside its tensors"
        return f"{printable(self.file)}: {where} differs from byte {self.byte} on (byte {self.at} of the file)"


def verify(plan: Plan, folder: Path, device: str = "auto") -> tuple[Difference, ...]:
    """Where the weight files in `folder` differ from what a plan makes, in the order of files and bytes; none if equal.

    Nothing is written. Files that are missing or too short differ from their first missing byte on. Side files are
    not looked at.
    """
    comparison = Comparison(folder)
    Engine([Job(plan, comparison)], start_torch(device), None, None, None).run()
    return tuple(sorted(comparison.differences.values()))


class Comparison(Destination):
    """The files of a finished output as the destination of a merge."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ours, self.theirs = folder, Memory(), Memory()
        self.differences: dict[tuple[str, str], Difference] = {}  # the first of each tensor
        self.noting = threading.Lock()

    def open(self, name: str, layout: Layout, stop: threading.Event) -> ComparedFile:
        return ComparedFile(self, name, layout, stop)

    def note(self, found: Difference) -> None:
        """Keep the first difference of each tensor, whichever thread finds it."""
        with self.noting:
            key = found.file, found.tensor
            self.differences[key] = min(found, self.differences.get(key, found))


class ComparedFile:
    """The sink that compares: parts of one output file with a file that is there."""

    def __init__(self, whole: Comparison, name: str, layout: Layout, stop: threading.Event) -> None:
        self.whole, self.name, self.layout = whole, name, layout
        self.infos = layout.in_order
        self.starts = [layout.data_start + info.start for info in self.infos]
        self.arrived = Arrived(stop)
        try:
            self.descriptor = open_regular(whole.folder / name)
        except InputError:
            self.descriptor = -1  # a file that is missing has no bytes
        there = stand_in(whole.folder / name)
        self.theirs = there.source(layout) if there else LocalSource(whole.folder / name, self.descriptor)
        self.there = self.theirs.size if self.descriptor >= 0 else 0
        if self.there > layout.size:
            self.note(layout.size)
        self.compare(memoryview(layout.header), 0)
        self.arrived.add(len(layout.header))

    def part(self, at: int, count: int) -> ComparedPart:
        expect(self.theirs, at, max(0, min(count, self.there - at)))
        return ComparedPart(self, at)

    def compare(self, part: memoryview, at: int) -> None:
        """Note the first byte of each tensor in which a part is not what the file holds at byte `at`."""
        count = max(0, min(len(part), self.there - at))
        theirs = self.whole.theirs.of(count)
        if count:
            self.theirs.read(at, count, theirs)
        if count == len(part) and theirs == part:
            return
        for start, stop in self.tensors_in(at, at + len(part)):
            ours, other = part[start - at : stop - at], theirs[start - at : stop - at]
            if ours != other:
                self.note(start + first_unequal(ours, other))

    def tensors_in(self, at: int, stop: int) -> list[tuple[int, int]]:
        """A range of the file, cut where tensors begin."""
        cuts = self.starts[bisect_right(self.starts, at) : bisect_right(self.starts, stop - 1)]
        edges = [at, *dict.fromkeys(cuts), stop]
        return [(one, other) for one, other in pairwise(edges) if one < other]

    def note(self, at: int) -> None:
        """Note that byte `at` of the file is not what it should be."""
        number = bisect_right(self.starts, at) - 1
        info = self.infos[number] if number >= 0 and at < self.layout.size else None
        name, byte = (info.name, at - self.starts[number]) if info else (HEADER, at)
        self.whole.note(Difference(self.name, at, name, byte))

    def finish(self) -> bool:
        done = self.arrived.wait_for(self.layout.size)
        if done:
            self.close()
        return done

    def close(self) -> None:
        """Close the file; where it is closed already, nothing happens."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def record(self, seen: Seen, digest: Digest) -> None:
        """Nothing is kept of what was seen."""


class ComparedPart:
    """A part of a file that is compared."""

    def __init__(self, file: ComparedFile, at: int) -> None:
        self.file, self.at = file, at

    def put(self, memory: memoryview) -> None:
        piece = piece_of(memory, self.at)
        self.file.compare(piece, self.at)
        self.file.arrived.add(len(piece))
        self.at += len(piece)

    def copy(self, source: Source, start: int, count: int, look: Callable[[memoryview], None] | None) -> None:
        for at, held in pieces_of(source, start, count, self.at, self.file.whole.ours):
            if look is not None:
                look(piece_of(held, at))
            self.put(held)


def first_unequal(one: memoryview, other: memoryview) -> int:
    """The first place at which two pieces of bytes differ; the shorter's length where one is the other's beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # one[:low] == other[:low]; halves are compared as wholes, which is quick
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
