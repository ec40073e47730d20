"""Small tensors of a weight file that is elsewhere, kept as they arrive.

How the weights of a checkpoint are packed is told by tensors of a few bytes, one or more for each of them. Those that
have the same last name are asked for together, several at a time.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator

from loratool.files.safefile import Layout, TensorInfo

SMALL = 1 << 20  # bytes of a tensor that is not worth its file
TINY = 4096  # bytes of a tensor that comes together with those of the same last name
GAP = 1 << 18  # bytes between two tensors that are read along with both: they come in the time of one more request
RANGE = 4 << 20  # bytes that are asked for together
READERS = 8  # ranges that are asked for at the same time

ReadRange = Callable[[int, int], bytes]  # (first byte of the file, how many) → the bytes


class SmallTensors:
    """The tensors of a file that have at most `most` bytes, kept as they arrive."""

    def __init__(self, layout: Layout, read: ReadRange, most: int = SMALL) -> None:
        self.layout, self.ask, self.most, self.lock = layout, read, most, threading.Lock()
        self.kept: dict[str, bytes] = {}
        self.in_order = layout.in_order
        self.starts = [info.start for info in self.in_order]

    def read(self, start: int, count: int, into: memoryview) -> bool:
        """Fill `into` with bytes of a small tensor, from byte `start` of the file on; False where they are of none."""
        at = start - self.layout.data_start
        info = self.in_order[max(bisect_right(self.starts, at) - 1, 0)]
        if info.nbytes > self.most or not info.start <= at <= at + count <= info.stop:
            return False
        with self.lock:
            if info.name not in self.kept:
                self.fetch(self.like(info))
            into[:count] = self.kept[info.name][at - info.start :][:count]
        return True

    def like(self, info: TensorInfo) -> Iterable[TensorInfo]:
        """A tensor, and where it is tiny those with the same last name, in the order of their bytes."""
        if info.nbytes > TINY:
            return [info]
        ending = info.name.rpartition(".")[2]
        return [each for each in self.in_order if each.nbytes <= TINY and each.name.rpartition(".")[2] == ending]

    def fetch(self, infos: Iterable[TensorInfo]) -> None:
        """Keep these tensors."""

        def bring(group: list[TensorInfo]) -> None:
            first, last = group[0].start, group[-1].stop
            found = self.ask(self.layout.data_start + first, last - first) if last > first else b""
            for info in group:
                self.kept[info.name] = found[info.start - first : info.stop - first]

        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(bring, neighbours(infos)))


def neighbours(infos: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Tensors in the order of their bytes, in groups that one range holds with little between them."""
    group: list[TensorInfo] = []
    for info in infos:
        if group and (info.start - group[-1].stop > GAP or info.stop - group[0].start > RANGE):
            yield group
            group = []
        group.append(info)
    if group:
        yield group
