"""`MergePlan`: all that a merge will do, as data, as text for people and as data for scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import Adapter
from loratool.bases.decoded import Decoded
from loratool.bases.edits import Edit
from loratool.bases.side_files import OutputFile
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.pipelines import identities, itself
from loratool.grouping import by_key
from loratool.merging.merge_options import ProofOptions
from loratool.merging.options import RunOptions
from loratool.merging.output_layout import ShardPlan, Span
from loratool.merging.resources import estimated_memory
from loratool.notes import Note
from loratool.results.base import SCHEMA, Result, plain
from loratool.results.text import MOST_LINES, aligned, plural
from loratool.shown import size
from loratool.templates import first_few, grouped, listed, template_of

if TYPE_CHECKING:
    from loratool.results.plan import PlanTable
    from loratool.results.simulation import Simulation


@dataclass(frozen=True, repr=False)
class MergePlan(Result):
    """All that a merge will do."""

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
    gain_forecast: float | None = None  # the part of the updates that rounding is expected to leave; None: not forecast
    gains_forecast: Mapping[str, float] = field(default_factory=dict)  # the same by module, of those looked at
    run: RunOptions = field(default=RunOptions(), repr=False)  # what the merge may use
    proof: ProofOptions = field(default=ProofOptions(), repr=False)  # how its output is made sure of
    simulations: tuple[Simulation, ...] = ()  # how long it takes with some numbers of workers

    def to_dict(self) -> dict[str, Any]:
        """What `loratool merge --dry-run --json` prints; `peak_memory` is that of a merge with these settings."""
        table: PlanTable = {
            "base": self.base.name,
            "adapters": [
                {"name": a.name, "weight": w, "updates": len(a.updates)}
                for a, w in zip(self.adapters, self.weights, strict=True)
            ],
            "edits": [
                {
                    "adapter": self.adapters[e.adapter].name,
                    "target": e.target,
                    "rule": e.rule,
                    "tensor": span.placed.name,
                    "part": part_of(e, span),
                }
                for span in self.edited
                for e in span.edits
            ],
            "copied": self.copied,
            "plain": list(self.plain),
            "requantized": list(self.anew),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "bytes_read_again": self.bytes_read_again,
            "gain_forecast": self.gain_forecast,
            "gains_forecast": dict(self.gains_forecast),
            "peak_memory": self.peak_memory,
            "files": {shard.name: shard.layout.size for shard in self.shards},
            "side_files": [file.name for file in self.side_files],
            "left_out": list(self.left_out),
            "simulations": plain(self.simulations),
            "notes": plain(self.notes),
            "cost": plain(self.cost),
        }
        return {"schema": SCHEMA, **table}

    def __str__(self) -> str:
        """What a merge would do, for people."""
        from loratool.results.merge import gain_row  # here, as a merge or `verify` shows no plan
        from loratool.results.simulation import simulation_text

        rows: list[tuple[str, object]] = [
            ("base", f"{self.base.name}: {plural(len(self.base.shards), 'file')}, {plural(len(self.spans), 'tensor')}"),
            *(
                ("adapter", f"{a.name}: {plural(len(a.updates), 'update')}, weight {w:g}")
                for a, w in zip(self.adapters, self.weights, strict=True)
            ),
            ("would edit", f"{plural(len(self.edited), 'tensor')}, copy {self.copied}"),
            *packing_rows(self),
            ("would read", size(self.bytes_read)),
            (
                "would write",
                f"{size(self.bytes_written)} in {plural(len(self.shards), 'weight file')} and {plural(len(self.side_files), 'other file')}",
            ),
            *([("would read again", f"{size(self.bytes_read_again)} of the output")] if self.bytes_read_again else []),
            ("peak memory", f"about {size(self.peak_memory)}"),
            ("disk needed", size(self.bytes_written)),
        ]
        if self.gain_forecast is not None:
            rows.append(gain_row("gain forecast", self.gain_forecast, self.gains_forecast))
        rows += [("left out", name) for name in self.left_out]
        rows += [("note", note) for note in self.notes]
        listing = edit_lines(self)
        if len(listing) > MOST_LINES:
            listing = [*listing[:MOST_LINES], f"… and {len(listing) - MOST_LINES} more patterns"]
        shown = "\n".join([aligned(rows), "edits:", *(f"  {line}" for line in listing)])
        return f"{shown}\n\n{simulation_text(self.simulations)}" if self.simulations else shown

    @property
    def peak_memory(self) -> int:
        """Bytes that the merge is expected to keep resident."""
        workers = self.run.workers if isinstance(self.run.workers, int) else None
        return estimated_memory(self.spans, self.run.device, workers, self.run.max_memory)

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

    @property
    def bytes_read_again(self) -> int:
        """Bytes of the output that are read once it is written: for the SHA-256 of weight files, and to compare all files."""
        weights = sum(shard.layout.size for shard in self.shards)
        return weights * self.proof.sha256 + self.bytes_written * self.proof.verify

    @cached_property
    def bytes_written(self) -> int:
        return sum(shard.layout.size for shard in self.shards) + sum(file.size for file in self.side_files)


def packing_rows(plan: MergePlan) -> list[tuple[str, object]]:
    """What becomes of packed weights, where the base has any."""
    if not isinstance(plan.base, Decoded):
        return []
    kept = len(plan.base.weights) - len(plan.plain) - len(plan.anew)
    rows: list[tuple[str, object]] = [("quantised", f"{plan.base.title}; stay as they are: {kept}")]
    dtypes = by_key(
        (span.placed.dtype, span.placed.name)
        for span in plan.spans
        if span.placed.name in plan.plain and span.carried is None
    )
    if plan.anew:
        rows.append(("requantised", f"{len(plan.anew)}: {listed(plan.anew)}"))
    rows += [("become plain", f"{len(names)} in {dtype}: {listed(names)}") for dtype, names in dtypes.items()]
    return rows


def edit_lines(plan: MergePlan) -> list[str]:
    """*adapter's name → rule → tensor[rows]*; edits that differ in numbers alone share a line.

    Rows are those of the tensor seen as a matrix, and shown for the first of a line where they differ.
    """
    parts: dict[tuple[int, str, str, str, str], list[str]] = {}
    for span in plan.edited:
        about = f"{'×'.join(map(str, span.shape))} {span.placed.dtype}"
        for edit in span.edits:
            key = (edit.adapter, edit.target, edit.rule, span.placed.name, about)
            parts.setdefault(key, []).append(part_of(edit, span))
    lines = by_key(
        (
            (adapter, template_of(target)[0], rule, template_of(tensor)[0], about),
            (target.removesuffix(".weight"), tensor, first_few(where, 2)),
        )
        for (adapter, target, rule, tensor, about), where in parts.items()
    )

    def line(like: tuple[int, str, str, str, str], members: Sequence[tuple[str, str, str]]) -> str:
        targets, tensors = (grouped(dict.fromkeys(m[side] for m in members)) for side in (0, 1))
        rows = members[0][2] + (", …" if any(m[2] != members[0][2] for m in members) else "")
        whose = f"{plan.adapters[like[0]].name}: " if len(plan.adapters) > 1 else ""
        found = " + ".join(map(printable, tensors)) + (f"[{rows}]" if rows else "")
        return f"{whose}{' + '.join(map(printable, targets))} → {like[2]} → {found}  {like[4]}  ×{len(members)}"

    return [line(like, members) for like, members in lines.items()]


def part_of(edit: Edit, span: Span) -> str:
    """The rows and columns that an edit covers, as a slice; nothing for all of them."""
    rows = "" if edit.rows == span.rows else f"{edit.first_row}:{edit.first_row + edit.rows}"
    if edit.columns == slice(None):
        return rows
    start, stop, step = edit.columns.start or 0, edit.columns.stop, edit.columns.step
    columns = f"{start}:{'' if stop is None else stop}" + (f":{step}" if step else "")
    return f"{rows or ':'}, {columns}"
