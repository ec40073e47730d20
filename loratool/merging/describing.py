"""A plan as what a person or a script is shown of it: names and numbers, with no file open and no update held."""

from __future__ import annotations

from functools import cache

from loratool.bases.decoded import Decoded
from loratool.bases.edits import Edit
from loratool.grouping import by_key
from loratool.merging.merge_options import MergeOptions
from loratool.merging.output_layout import ShardPlan, Span
from loratool.merging.plan import Plan
from loratool.merging.resources import estimated_memory
from loratool.results.plan import MergePlan, PlannedAdapter, PlannedEdit, PlannedTensor, SourceFile


def described(plan: Plan, options: MergeOptions) -> MergePlan:
    """What a merge with these options would do. Sizes of files that are here for now alone are taken at once."""
    workers = options.workers if isinstance(options.workers, int) else None
    base, files = plan.base, {shard.name: shard.layout.size for shard in plan.shards}
    packed, plain = base.weights if isinstance(base, Decoded) else {}, frozenset(plan.plain)
    adapters = zip(plan.adapters, plan.weights, strict=True)
    source = cache(SourceFile)  # one for all tensors of a file
    spans = tuple(
        planned_tensor(plan, shard, span, source(span.source.path)) for shard in plan.shards for span in shard.spans
    )
    return MergePlan(
        base=base.name,
        base_files=len(base.shards),
        adapters=tuple(PlannedAdapter(each.name, weight, len(each.updates)) for each, weight in adapters),
        spans=spans,
        edits=tuple(edit for span in spans for edit in span.edits),
        copied=plan.copied,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        bytes_read_again=sum(files.values()) * options.sha256 + plan.bytes_written * options.verify,
        peak_memory=estimated_memory(plan.spans, options.device, workers, options.max_memory),
        files=files,
        side_files=tuple(file.name for file in plan.side_files),
        left_out=plan.left_out,
        notes=plan.notes,
        rounding=plan.rounding,
        plain=plan.plain,
        requantized=plan.anew,
        packing=base.title if isinstance(base, Decoded) else "",
        left_packed=len(packed) - len(plain) - len(plan.anew),
        decoded=by_key(
            (span.placed.dtype, span.placed.name)
            for span in plan.spans
            if span.placed.name in plain and span.carried is None
        ),
    )


def planned_tensor(plan: Plan, shard: ShardPlan, span: Span, source: SourceFile) -> PlannedTensor:
    edits = tuple(
        PlannedEdit(
            plan.adapters[edit.adapter].name, edit.target, str(edit.rule), span.placed.name, part_of(edit, span)
        )
        for edit in span.edits
    )
    numbers = tuple(edit.adapter for edit in span.edits)
    return PlannedTensor(span.placed, shard.name, shard.place(span), span.shape, source, edits, numbers)


def part_of(edit: Edit, span: Span) -> str:
    """The rows and columns that an edit covers, as a slice; nothing for all of them."""
    rows = "" if edit.rows == span.rows else f"{edit.first_row}:{edit.first_row + edit.rows}"
    if edit.columns == slice(None):
        return rows
    start, stop, step = edit.columns.start or 0, edit.columns.stop, edit.columns.step
    columns = f"{start}:{'' if stop is None else stop}" + (f":{step}" if step else "")
    return f"{rows or ':'}, {columns}"
