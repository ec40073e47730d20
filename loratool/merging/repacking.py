"""Edited weights packed anew in the format of the base: W + ΔW in float32, and each value put to the nearest packed one.

That is done with the base's own scales and, where the weight's tensors lie in one output file, with new ones, made of the
merged values; what is farther from W + ΔW, as the Frobenius norm tells, is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from loratool.algebra.rounding import bits_of
from loratool.bases.packed import Requantizable
from loratool.bases.weights import Room
from loratool.files.open_sources import OpenSources
from loratool.files.seen import summed
from loratool.files.stopwatch import lap
from loratool.lazy import Tensor, torch
from loratool.merging.addends import Place, modules_in
from loratool.merging.edited_spans import EditedSpan
from loratool.merging.gain import kept_of
from loratool.merging.resources import rows_of_block
from loratool.merging.row_blocks import Worker
from loratool.merging.totals import BlockSeen


@dataclass
class Attempt:
    """A merged weight packed with certain parameters, as far as its lines have come, and what that loses."""

    weight: Requantizable
    parameters: Mapping[str, Tensor]
    packed: list[Tensor] = field(default_factory=list)  # bytes, on the CPU
    lost: float = 0.0  # ‖what the packed values are − (W + ΔW)‖²
    seen: BlockSeen = field(default_factory=BlockSeen)

    def take(self, before: Tensor, after: Tensor, first: int, modules: list[tuple[str, Place]]) -> None:
        """Pack some rows, (n, width) of float32, of which the first is row `first` of the weight."""
        lines = before.shape[1] // self.weight.line  # in a row
        packed = self.weight.encode(after.view(-1, self.weight.line), first * lines, self.parameters)
        values = self.weight.decode_packed(packed, first * lines, len(after) * lines, self.parameters)
        values = values.view(after.shape)
        seen = self.seen
        seen.changed = seen.changed or not torch.equal(values, before)
        error, change = values.sub_(after), after - before
        self.lost += float(torch.linalg.vector_norm(error)) ** 2
        seen.weight += float(torch.linalg.vector_norm(before)) ** 2
        seen.change += float(torch.linalg.vector_norm(change)) ** 2
        rows = torch.arange(first, first + len(after), device=after.device)
        seen.kept = summed([seen.kept, kept_of(change, error.add_(change), rows, modules, 1)])
        self.packed.append(packed.cpu())

    def tensors(self) -> dict[str, Tensor]:
        """The bytes of each tensor of the weight, (bytes,) of uint8, by name."""
        values = self.weight.tensors[0].info.name
        others = {name: value.contiguous().flatten().view(torch.uint8) for name, value in self.parameters.items()}
        return {**others, values: self.weight.laid_out(torch.cat(self.packed)).contiguous().flatten().view(torch.uint8)}


def pack_anew(worker: Worker, work: EditedSpan, sources: OpenSources, block: int, renew: bool) -> dict[str, Tensor]:
    """The bytes of all tensors of an edited weight, by name, accounted for in the totals.

    Args:
        worker: computes the merged rows.
        work: the weight and its edits.
        sources: the base's files.
        block: bytes of rows that are computed at a time.
        renew: whether new parameters may take the place of the base's own.
    """
    weight = work.span.matrix
    assert isinstance(weight, Requantizable), "others are refused when the merge is planned"
    modules = modules_in(work.span.edits, work.span.width)
    own = weight.parameters(Room(sources, held=work.held))
    chosen, measured = Attempt(weight, own), list[Tensor]()
    for first, before, after in merged_rows(worker, work, weight, sources, block):
        chosen.take(before, after, first, modules)
        if renew:
            measured.append(weight.measure(after.view(-1, weight.line)))
        lap("repack")
    if renew:
        new = weight.new_parameters(torch.cat(measured), own)
        if any(not torch.equal(bits_of(value), bits_of(own[name])) for name, value in new.items()):
            other = Attempt(weight, new)
            for first, before, after in merged_rows(worker, work, weight, sources, block):
                other.take(before, after, first, modules)
                lap("repack")
            chosen = min(chosen, other, key=lambda each: each.lost)
    work.merged(chosen.seen)
    work.totals.lost[work.span.placed.name] = chosen.lost, chosen.seen.change
    return chosen.tensors()


def merged_rows(
    worker: Worker, work: EditedSpan, weight: Requantizable, sources: OpenSources, block: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, W and W + ΔW of each block, (n, width) of float32; the next block overwrites them."""
    span = work.span
    together = max(1, weight.together // (span.width // weight.line))
    step = max(1, rows_of_block(span, block) // together) * together
    for first in range(0, span.rows, step):
        yield first, *worker.both_rows(work, first, min(step, span.rows - first), sources)
