"""Any result as text for people or as plain data for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.errors import escaped
from loratool.results import plain

if TYPE_CHECKING:
    from loratool.effects import AdapterEffect
    from loratool.merging import MergeReport
    from loratool.placing import Edit, Span
    from loratool.planning import MergePlan

MOST_LINES = 40  # rows of a listing before the rest is counted


def size(count: float) -> str:
    """A number of bytes with its unit, in powers of 1000 as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def aligned(rows: Sequence[tuple[str, object]]) -> str:
    """`name  value` lines with the values in one column."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {escaped(str(value))}" for name, value in rows)


def merge_text(report: MergeReport) -> str:
    """What a merge did, for people."""
    from loratool.errors import printable

    rate = report.bytes_written / max(report.seconds, 1e-9) / 1e9
    rows: list[tuple[str, object]] = [
        ("merged into", printable(report.out)),
        (
            "tensors",
            f"{report.edited} edited, {report.copied} copied"
            + (f", {report.converted} converted" if report.converted else ""),
        ),
        *(("adapter", effect_line(effect)) for effect in report.adapters),
        ("written", f"{size(report.bytes_written)} in {report.seconds:.2f} s ({rate:.2f} GB/s)"),
        ("device", f"{report.device}, {report.workers} workers, torch ready after {report.startup_seconds:.2f} s"),
        ("peak memory", size(report.peak_memory) + (f", GPU {size(report.gpu_memory)}" if report.gpu_memory else "")),
    ]
    if report.resumed:
        rows.append(("continued", f"{len(report.resumed)} finished files of an interrupted run were kept"))
    if report.relative_norms:
        ordered = sorted(report.relative_norms.items(), key=lambda item: item[1])
        for label, (name, ratio) in (("largest ‖ΔW‖/‖W‖", ordered[-1]), ("smallest", ordered[0])):
            rows.append((label, f"{ratio:.3g}  {printable(name)}"))
    if report.nonfinite:
        total = sum(report.nonfinite.values())
        rows.append(("NaN/inf in base", f"{total} values in {len(report.nonfinite)} edited tensors, kept as they are"))
    rows += [("left out", name) for name in report.left_out]
    rows += [("note", note) for note in report.notes]
    return aligned(rows)


def effect_line(effect: AdapterEffect) -> str:
    """What an adapter did, in a line."""
    changed = effect.modules - len(effect.unchanged)
    some = f"{changed} of {effect.modules}" if effect.unchanged else f"{effect.modules}"
    return f"{effect.name}: {some} modules changed, weight {effect.weight:g}"


def plan_text(plan: MergePlan, memory: int) -> str:
    """What a merge would do, for people."""
    rows: list[tuple[str, object]] = [
        ("base", f"{plan.base.name}: {len(plan.base.shards)} files, {len(plan.spans)} tensors"),
        *(
            ("adapter", f"{a.name}: {len(a.updates)} updates, weight {w:g}")
            for a, w in zip(plan.adapters, plan.weights, strict=True)
        ),
        ("would edit", f"{len(plan.edited)} tensors, copy {plan.copied}"),
        ("would read", size(plan.bytes_read)),
        (
            "would write",
            f"{size(plan.bytes_written)} in {len(plan.shards)} weight files and {len(plan.side_files)} others",
        ),
        ("peak memory", f"about {size(memory)}"),
        ("disk needed", size(plan.bytes_written)),
    ]
    rows += [("left out", name) for name in plan.left_out]
    rows += [("note", note) for note in plan.notes]
    listing = edit_lines(plan)
    if len(listing) > MOST_LINES:
        listing = [*listing[:MOST_LINES], f"… and {len(listing) - MOST_LINES} more patterns"]
    return "\n".join([aligned(rows), "edits:", *(f"  {line}" for line in listing)])


def edit_lines(plan: MergePlan) -> list[str]:
    """*adapter's name → rule → tensor[rows]*; edits that differ in numbers alone share a line.

    Rows are those of the tensor seen as a matrix, and shown for the first of a line where they differ.
    """
    from loratool.binding import grouped, template_of
    from loratool.errors import printable

    parts: dict[tuple[int, str, str, str, str], list[str]] = {}
    for span in plan.edited:
        about = f"{'×'.join(map(str, span.info.shape))} {span.placed.dtype}"
        for edit in span.edits:
            key = (edit.adapter, edit.target, edit.rule, span.placed.name, about)
            parts.setdefault(key, []).append(part_of(edit, span))
    lines: dict[tuple[int, str, str, str, str], list[tuple[str, str, str]]] = {}
    for (adapter, target, rule, tensor, about), where in parts.items():
        shown = ", ".join(where[:2]) + (", …" if len(where) > 2 else "")
        like = (adapter, template_of(target)[0], rule, template_of(tensor)[0], about)
        lines.setdefault(like, []).append((target.removesuffix(".weight"), tensor, shown))

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


def plan_data(plan: MergePlan, device: str, workers: int | None, max_memory: int | None) -> dict[str, Any]:
    """What a merge would do, for scripts."""
    from loratool.resources import estimated_memory

    return {
        "base": plan.base.name,
        "adapters": [
            {"name": a.name, "weight": w, "updates": len(a.updates)}
            for a, w in zip(plan.adapters, plan.weights, strict=True)
        ],
        "edits": [
            {
                "adapter": plan.adapters[e.adapter].name,
                "target": e.target,
                "rule": e.rule,
                "tensor": span.placed.name,
                "part": part_of(e, span),
            }
            for span in plan.edited
            for e in span.edits
        ],
        "copied": plan.copied,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": estimated_memory(plan, device, workers, max_memory),
        "files": {shard.name: shard.layout.size for shard in plan.shards},
        "side_files": [file.name for file in plan.side_files],
        "left_out": list(plan.left_out),
        "notes": plain(plan.notes),
    }


def spread(values: Mapping[str, int]) -> str:
    """Counted values: `16`, or `16 ×200, 32 ×24` where there are several."""
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ×{count}" for value, count in values.items()) or "none"
