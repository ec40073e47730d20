"""What rounding will leave of the updates, forecast on some rows of the weights before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import math

from loratool.algebra.rounding import round_once
from loratool.bases.weights import Memory, Room
from loratool.files.open_sources import OpenSources
from loratool.files.process import on_all_cores
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.seen import Seen, together
from loratool.lazy import numpy, torch
from loratool.measuring.sampling import sample
from loratool.merging.addends import modules_in
from loratool.merging.gain import Gains, gain_notes, gains_of, measure_kept
from loratool.merging.loaded_edits import LoadedEdit
from loratool.merging.numpy_rounding import rounded_once
from loratool.merging.numpy_sums import Added, readable, suits
from loratool.merging.output_layout import Span
from loratool.merging.plan import Plan
from loratool.merging.resources import itemsize_of
from loratool.merging.shared_updates import SharedUpdates
from loratool.results.plan import MergePlan

MOST_WEIGHTS = 512  # that are looked at; a model of many experts has tens of thousands
SAMPLED = 1 << 17  # elements of a weight: its gain is right to 0.03, and that of all weights to 0.01


def with_forecast(shown: MergePlan, plan: Plan) -> MergePlan:
    """What is shown of a plan, with the gain that is to be expected, and a warning where it is small.

    Nothing is forecast where no update is rounded to the nearest of 16 bits, or where the weights of the base are not on
    this disk. Raises `InputError` naming packed weights that cannot be decoded.
    """
    doubts = plan.check_packed(filter(is_here, plan.spans))
    gains = forecast_gains(plan)
    notes = (*shown.notes, *doubts, *gain_notes(plan, gains))
    return dataclasses.replace(shown, gain_forecast=gains.total, gains_forecast=gains.modules, notes=notes)


def forecast_gains(plan: Plan) -> Gains:
    """⟨W' − W, ΔW⟩ / ‖ΔW‖² on evenly spread rows of the weights, or of some of them, in float64."""
    spans = [span for span in plan.edited if plan.rounding == "nearest" and can_forecast(span)]
    spans.sort(key=lambda span: hashlib.sha256(span.placed.name.encode(errors="surrogatepass")).digest())
    shared = SharedUpdates()

    def look(span: Span) -> Seen:
        by_numpy = suits(span) and span.placed.dtype == "BF16"
        return seen_by_numpy(span) if by_numpy else seen_by_torch(span, shared)

    return gains_of(plan, together(on_all_cores(look, spans[:MOST_WEIGHTS])))


def can_forecast(span: Span) -> bool:
    """Whether a few rows tell what rounding does: not where an update depends on all rows of the weight."""
    each_row = not any(edit.update.replaces or edit.update.needs_weight for edit in span.edits)
    return is_here(span) and each_row and span.placed.dtype in FLOAT_NAMES and itemsize_of(span.placed.dtype) == 2


def is_here(span: Span) -> bool:
    """Whether the files of a weight are on this disk."""
    return all(tensor.file.path.is_file() for tensor in span.weight.tensors)


def seen_by_numpy(span: Span) -> Seen:
    """What some rows of a weight tell of one product added to a weight that goes to the output in bfloat16, without torch."""
    (edit,), weight = span.edits, readable(span.weight)
    assert weight is not None
    added, memory = Added.by(edit, numpy.float64), Memory()
    down = added.down * added.scale
    product, squares = 0.0, [0.0, 0.0]
    runs, times = sampled(span)
    with OpenSources() as memory.sources, numpy.errstate(all="ignore"):
        for first, count in runs:
            rows = numpy.empty((count, span.width), numpy.float32)
            weight.decode_into(rows, first, memory)
            base, change = rows.astype(numpy.float64), added.up[first : first + count] @ down
            product += float(((rounded_once(base + change) - base) * change).sum())
            squares = [one + float(numpy.vdot(each, each)) for one, each in zip(squares, (base, change), strict=True)]
    weights, changes = (times * square for square in squares)
    kept = {edit.target: (times * product, changes)} if math.isfinite(product) and math.isfinite(changes) else {}
    return Seen(kept=kept, norms={span.placed.name: (weights, changes)})


def sampled(span: Span) -> tuple[list[tuple[int, int]], int]:
    """(first row, rows) of runs of a weight's rows, and how many rows each of them stands for."""
    runs = [*sample(span.rows, max(1, SAMPLED // span.width))]
    return runs, max(1, span.rows // sum(count for _, count in runs))


def seen_by_torch(span: Span, shared: SharedUpdates) -> Seen:
    """The same of any edits."""
    device = torch.device("cpu")
    stored, target = (getattr(torch, FLOAT_NAMES[dtype]) for dtype in (span.weight.exact, span.placed.dtype))
    edits = [LoadedEdit(edit, shared.load(edit, device, torch.float64), edit.strength) for edit in span.edits]
    modules = modules_in(span.edits, span.width)
    runs, times = sampled(span)
    found: list[Seen] = []
    with OpenSources() as sources:
        for first, count in runs:
            before = span.matrix.rows(first, count, device, stored, Room(sources))
            base = before.double()
            block = base.clone()
            for each in edits:
                each.apply(block, first, base)
            rows = torch.arange(first, first + count)
            change = block - base
            kept = measure_kept(before, change, round_once(block, target), rows, modules, times)
            own, added = (times * float(torch.linalg.vector_norm(each)) ** 2 for each in (base, change))
            found.append(Seen(kept=kept, norms={span.placed.name: (own, added)}))
    return together(found)
