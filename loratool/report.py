"""Any result as text for people or as plain data for JSON."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratool.inspecting import AdapterFacts, CheckpointFacts
    from loratool.merging import MergeReport
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
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def plain(value: Any) -> Any:
    """`value` as JSON takes it: dataclasses become objects, paths text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return os.fspath(value)
    return value


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


def plan_text(plan: MergePlan, memory: int) -> str:
    """What a merge would do, for people."""
    from loratool.errors import printable

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
    edits = Counter(
        (pattern(e.target), e.rule, pattern(span.placed.name), "×".join(map(str, span.info.shape)), span.placed.dtype)
        for span in plan.edited
        for e in span.edits
    )
    listing = [
        f"  {printable(target)} → {rule} → {printable(tensor)}  {shape} {dtype}  ×{count}"
        for (target, rule, tensor, shape, dtype), count in list(edits.items())[:MOST_LINES]
    ]
    if len(edits) > MOST_LINES:
        listing.append(f"  … and {len(edits) - MOST_LINES} more patterns")
    return "\n".join([aligned(rows), "edits:", *listing])


def plan_data(plan: MergePlan, memory: int) -> dict[str, Any]:
    """What a merge would do, for scripts."""
    return {
        "base": plan.base.name,
        "adapters": [
            {"name": a.name, "weight": w, "updates": len(a.updates)}
            for a, w in zip(plan.adapters, plan.weights, strict=True)
        ],
        "edits": [
            {"adapter": plan.adapters[e.adapter].name, "target": e.target, "rule": e.rule, "tensor": span.placed.name}
            for span in plan.edited
            for e in span.edits
        ],
        "copied": plan.copied,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": memory,
        "files": {shard.name: shard.layout.size for shard in plan.shards},
        "side_files": [file.name for file in plan.side_files],
        "left_out": list(plan.left_out),
        "notes": list(plan.notes),
    }


def pattern(name: str) -> str:
    """A tensor name with its layer number replaced, so that layers can be counted together."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def adapter_text(facts: AdapterFacts) -> str:
    """What is in an adapter, for people."""
    rows: list[tuple[str, object]] = [
        ("adapter", facts.path),
        ("format", f"{facts.format}, {facts.peft_type}" + "".join(f", {v}" for v in facts.variants)),
        ("base", facts.base or "not named"),
        ("rank", spread(facts.ranks)),
        ("alpha", spread(facts.alphas)),
        ("scaling", spread(facts.scalings) + (" (rsLoRA: alpha/√r)" if facts.rslora else "")),
        *(("target", f"{name}: {shape} ×{count}") for name, shape, count in facts.targets),
        *(("saved whole", name) for name in facts.saved),
        ("parameters", f"{facts.parameters:,}"),
        ("size", size(facts.bytes)),
        ("dtypes", ", ".join(f"{dtype} ×{count}" for dtype, count in facts.dtypes.items())),
        *(("not mergeable", reason) for reason in facts.unsupported),
        *(("note", note) for note in facts.notes),
    ]
    return aligned(rows)


def checkpoint_text(facts: CheckpointFacts) -> str:
    """What is in a checkpoint, for people."""
    rows: list[tuple[str, object]] = [
        ("checkpoint", facts.path),
        ("architecture", facts.architecture or "not named"),
        ("tensors", f"{facts.tensors:,}"),
        ("parameters", f"{facts.parameters:,}"),
        ("size", size(facts.bytes)),
        ("dtypes", ", ".join(f"{dtype} ×{count}" for dtype, count in facts.dtypes.items())),
        *(("file", f"{name}: {size(nbytes)}") for name, nbytes in list(facts.files.items())[:MOST_LINES]),
        *(("left out", name) for name in facts.left_out),
        *(("note", note) for note in facts.notes),
    ]
    return aligned(rows)


def spread(values: Mapping[str, int]) -> str:
    """Counted values: `16`, or `16 ×200, 32 ×24` where there are several."""
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ×{count}" for value, count in values.items()) or "none"
