"""`Plan`: all that a merge will do, as what the engine and a proof work by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from loratool.adapters.adapter import Adapter
from loratool.bases.decoded import Decoded
from loratool.bases.side_files import OutputFile
from loratool.files.checkpoint import Checkpoint
from loratool.files.pipelines import identities, itself
from loratool.merging.output_layout import ShardPlan, Span
from loratool.notes import Note
from loratool.shown import Shown


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """All that a merge will do. What a person or a script is shown of it is a `MergePlan`."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    dtype: str
    shards: tuple[ShardPlan, ...]
    side_files: tuple[OutputFile, ...]
    left_out: tuple[str, ...]
    notes: tuple[Note, ...]
    naming: tuple[object, ...] = ()  # what the caller said about names and orientation
    rounding: str = "nearest"
    plain: tuple[str, ...] = ()  # weights that are packed in the base and plain in the output
    anew: tuple[str, ...] = ()  # edited weights that are packed in the output too
    accepts_loss: bool = False  # whether they may lose most of the update
    packed_by: str = "--requantize"  # the option that asked for it

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        return tuple(span for shard in self.shards for span in shard.spans)

    @cached_property
    def edited(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.edits)

    @property
    def copied(self) -> int:
        """Tensors that are carried over byte for byte."""
        return sum(span.untouched for span in self.spans)

    @property
    def converted(self) -> int:
        """Tensors that only change their dtype."""
        return sum(not (span.edits or span.untouched or span.packed) for span in self.spans)

    @property
    def replaces(self) -> bool:
        """Whether a tensor begins as what an adapter saved, so that the output is not the base."""
        own = identities(self.base.shards)
        return any(id(itself(tensor.file)) not in own for span in self.spans for tensor in span.weight.tensors)

    def check_packed(self, spans: Iterable[Span]) -> list[Note]:
        """Notes on those of some weights that tools decode differently; of each packed one its scales are read.

        Raises `InputError` naming all that cannot be decoded.
        """
        if not isinstance(self.base, Decoded):
            return []
        base = self.base
        names = (span.placed.name for span in spans if span.carried is None)
        weights = (base.packed[name][0] if name in base.packed else name for name in names)  # of tensors packed anew
        return base.check(name for name in dict.fromkeys(weights) if name in base.weights)

    @property
    def bytes_read(self) -> int:
        return sum(tensor.info.nbytes for span in self.spans for tensor in span.weight.tensors) + sum(
            a.file.layout.size for a in self.adapters
        )

    @cached_property
    def bytes_written(self) -> int:
        return sum(shard.layout.size for shard in self.shards) + sum(file.size for file in self.side_files)
