"""What `inspect` found, as text that fits 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from loratool.errors import escaped, printable
from loratool.report import MOST_LINES, size, spread

if TYPE_CHECKING:
    from loratool.fitting import BaseFacts
    from loratool.health import Finding
    from loratool.inspecting.facts import (
        AdapterFacts,
        CheckpointFacts,
        ModuleFacts,
        PlaceFacts,
        TensorFacts,
        UnreadableFacts,
        WeightFacts,
    )
    from loratool.measuring import Measured, Values

COLUMNS = 80
MOST_MODULES = 12  # rows of the table of modules before the rest is counted


def wrapped(rows: Iterable[tuple[str, object]]) -> str:
    """`name  value` lines, values in one column and broken between words where they are longer than the line."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0) + 2
    lines = []
    for name, value in pairs:
        start = f"{name:<{width}}"
        lines.append(fill(str(value), start, " " * width))
    return "\n".join(lines)


def fill(text: str, first: str, later: str) -> str:
    """Text in lines of 80 columns; a word that is longer, such as a path, stays whole."""
    found = textwrap.fill(
        escaped(text),
        COLUMNS,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return found or first.rstrip()


def adapter_text(facts: AdapterFacts) -> str:
    """What is in an adapter, for people."""
    rows: list[tuple[str, object]] = [
        ("adapter", facts.path),
        ("format", ", ".join(filter(None, [facts.format, facts.peft_type, *facts.variants]))),
        ("base", facts.base or "not named"),
        *([("task", facts.task)] if facts.task else []),
        *([("initialised", facts.initialisation)] if facts.initialisation else []),
        *low_rank_rows(facts),
        *(("saved whole", name) for name in shortened(facts.saved)),
        *([("bias", facts.bias)] if facts.bias != "none" else []),
        ("parameters", f"{facts.parameters:,}"),
        ("size", size(facts.bytes)),
        ("dtypes", counted(facts.dtypes)),
        *(("not mergeable", reason) for reason in facts.unsupported),
        *(("note", note) for note in facts.notes if facts.findings is None),  # else a finding is made of it
    ]
    parts = [wrapped(rows)]
    if facts.against:
        parts += base_text(facts.against, facts.modules)
    if facts.values:
        parts.append(values_text(facts.values))
    if facts.tensors is not None:
        parts.append(tensors_text(facts.tensors))
    if facts.findings is not None:
        parts.append(findings_text(facts.findings))
    return "\n\n".join(parts)


def low_rank_rows(facts: AdapterFacts) -> Iterable[tuple[str, object]]:
    if facts.ranks:
        yield "rank", spread(facts.ranks)
        yield "alpha", spread(facts.alphas)
        yield "scaling", spread(facts.scalings) + (" (rsLoRA: alpha/√r)" if facts.rslora else "")
    for name, pattern in (("rank_pattern", facts.rank_pattern), ("alpha_pattern", facts.alpha_pattern)):
        if pattern:
            yield name, ", ".join(shortened([f"{key}: {value:g}" for key, value in pattern.items()], 8))
    for target in facts.targets:
        yield "target", weight_line(target)
    others = [m.kind for m in facts.modules if m.rank is None and m.kind != "saved whole"]
    for kind in dict.fromkeys(others):
        yield "target", f"{kind} ×{others.count(kind)}"


def weight_line(weight: WeightFacts) -> str:
    return f"{weight.name}: {'×'.join(map(str, weight.shape)) or 'scalar'} ×{weight.count}"


def counted(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ×{count}" for value, count in values.items())


def shortened(names: Sequence[str], most: int = MOST_LINES) -> list[str]:
    """The first names, and how many more there are."""
    return [*names[:most], *([f"… and {len(names) - most} more"] if len(names) > most else [])]


def checkpoint_text(facts: CheckpointFacts) -> str:
    """What is in a checkpoint, for people."""
    rows: list[tuple[str, object]] = [
        ("checkpoint", facts.path),
        ("architecture", facts.architecture or "not named"),
        *([("made by", facts.made_by)] if facts.made_by else []),
        *([("quantised", facts.quantisation)] if facts.quantisation else []),
        ("tensors", f"{facts.tensors:,}"),
        ("parameters", f"{facts.parameters:,}"),
        ("size", size(facts.bytes)),
        ("dtypes", counted(facts.dtypes)),
        *(("weight", line) for line in shortened([weight_line(weight) for weight in facts.weights])),
        *(("file", line) for line in shortened([f"{name}: {size(nbytes)}" for name, nbytes in facts.files.items()])),
        *(("left out", name) for name in facts.left_out),
        *(("note", note) for note in facts.notes if facts.findings is None),
    ]
    parts = [wrapped(rows)]
    if facts.listing is not None:
        parts.append(tensors_text(facts.listing))
    if facts.findings is not None:
        parts.append(findings_text(facts.findings))
    return "\n\n".join(parts)


def unreadable_text(facts: UnreadableFacts) -> str:
    """What keeps a path from being read, for people."""
    return f"{wrapped([('path', facts.path)])}\n\n{findings_text(facts.findings)}"


def base_text(base: BaseFacts, modules: Sequence[ModuleFacts]) -> list[str]:
    """Parameters as PEFT prints them, and where each kind of module lands."""
    rows: list[tuple[str, object]] = [
        (
            "against",
            f"{base.path}: {base.architecture or 'not named'}, {base.parameters:,} parameters, by its {base.source}",
        ),
    ]
    rows += [("no place", problem) for problem in base.problems]
    parts = [f"{wrapped(rows)}\n{base.line}"]
    landed = [(module.target, place) for module in modules for place in module.places or ()]
    if landed:
        parts.append("lands on:\n" + "\n".join(landing_lines(landed)))
    return parts


def landing_lines(landed: Sequence[tuple[str, PlaceFacts]]) -> list[str]:
    """Target → tensor; those that differ in numbers alone share a line."""
    from loratool.binding import grouped, template_of

    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for target, place in landed:
        tensor = place.tensor
        found.setdefault((template_of(target)[0], template_of(tensor)[0]), []).append((target, tensor))
    lines = []
    for members in found.values():
        targets, tensors = (grouped(dict.fromkeys(m[side] for m in members)) for side in (0, 1))
        same = targets == tensors
        text = (
            " + ".join(tensors) + f" ×{len(members)}"
            if same
            else f"{' + '.join(targets)} → {' + '.join(tensors)} ×{len(members)}"
        )
        lines.append(fill(text, "  ", "    "))
    template_of.cache_clear()
    return shortened(lines)


def tensors_text(tensors: Sequence[TensorFacts]) -> str:
    """Every tensor: dtype, shape, bytes, name."""
    header = ["dtype", "shape", "bytes", "tensor"]
    rows = [[t.dtype, "×".join(map(str, t.shape)) or "scalar", f"{t.bytes:,}", t.name] for t in tensors]
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], more: int = 0) -> str:
    """Cells in columns to the right, the last column, a name, to the left."""
    every = [header, *([escaped(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in every) for at in range(len(header) - 1)]
    room = COLUMNS - sum(widths) - 2 * len(widths)
    lines = [
        "  ".join([*(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=False)), fitted(row[-1], room)])
        for row in every
    ]
    return "\n".join([*lines, *([f"… and {more} more"] if more > 0 else [])])


def fitted(name: str, room: int) -> str:
    """A name in some columns: of one that is longer the end, which tells most."""
    return name if len(name) <= max(room, 12) else f"…{name[-(max(room, 12) - 1) :]}"


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def values_text(values: Values) -> str:
    """Norms and ranks: by name of module, then the modules that change most, and what to make of it."""
    weighed = any(m.weight for m in values.modules)
    rows: list[tuple[str, object]] = [("‖ΔW‖", f"{values.norm:.6g}, all {len(values.modules)} modules together")]
    if values.norm_base:
        rows.append(
            ("‖W0‖", f"{values.norm_base:.6g} of the weights it changes: {percent(values.norm / values.norm_base)}")
        )
    for kept in values.suggestions:
        told = f"rank {kept.rank}: {size(kept.bytes)} of {size(kept.bytes_now)}; each layer its own: {size(kept.bytes_by_layer)}"
        rows.append((f"{100 * kept.energy:.0f} % energy", told))
    bad = [m for m in values.modules if m.nonfinite]
    rows += [("not finite", f"{m.nonfinite} values in {m.target}") for m in bad[:MOST_MODULES]]
    if subnormal := sum(m.subnormal for m in values.modules):
        rows.append(("subnormal", f"{subnormal:,} values in {sum(bool(m.subnormal) for m in values.modules)} modules"))
    rows += [("not measured", f"{target}: {why}") for target, why in list(values.skipped.items())[:MOST_MODULES]]
    rows.append(
        ("took", f"{values.seconds:.2f} s on {values.device}, torch ready after {values.startup_seconds:.2f} s")
    )
    rows.append(("peak memory", size(values.peak_memory)))
    rows += [("note", note) for note in values.notes]
    parts = [wrapped(rows)]
    if values.modules:
        parts += [by_name(values.modules), largest(values.modules)]
    if weighed:
        parts.append(against_weights(values.modules))
    return "\n\n".join(parts)


Column = tuple[str, Callable[["Measured"], "float | None"]]
SIZES: tuple[Column, ...] = (
    ("‖ΔW‖", lambda m: m.norm),
    ("σ₁", lambda m: m.spectral),
    ("stable", lambda m: m.stable_rank),
    ("entropy", lambda m: m.entropy_rank),
    ("90 %", lambda m: m.energy_ranks[0] if m.energy_ranks else None),
    ("95 %", lambda m: m.energy_ranks[1] if m.energy_ranks else None),
    ("99 %", lambda m: m.energy_ranks[2] if m.energy_ranks else None),
    ("dead", lambda m: m.dead),
    ("‖B‖/‖A‖", lambda m: m.balance),
)
AGAINST: tuple[Column, ...] = (
    ("‖ΔW‖/‖W0‖", lambda m: m.weight.ratio if m.weight else None),
    ("amplified", lambda m: m.weight.amplification if m.weight else None),
    ("unchanged", lambda m: m.weight.unchanged if m.weight else None),
    ("gain", lambda m: m.weight.gain if m.weight else None),
)


def by_name(modules: Sequence[Measured]) -> str:
    """Medians of the modules of each name."""
    rows = [
        [*(number(middle([column(m) for m in members])) for _, column in SIZES), f"{name} ×{len(members)}"]
        for name, members in named(modules).items()
    ]
    return "medians by name, with the ranks that keep a part of ‖ΔW‖²\n" + table([*(h for h, _ in SIZES), "name"], rows)


def largest(modules: Sequence[Measured]) -> str:
    """The modules that change most, by what their names do not have in common."""
    ordered = sorted(modules, key=lambda m: -(m.norm or 0.0))[:MOST_MODULES]
    columns = [SIZES[at] for at in (0, 1, 2, 4, 5, 6)]
    names = [m.target.removesuffix(".weight") for m in ordered]
    start = common_start(names)
    rows = [
        [*(number(column(m)) for _, column in columns), name.removeprefix(start)]
        for m, name in zip(ordered, names, strict=True)
    ]
    header = [*(h for h, _ in columns), "the largest" + (f", in {start.rstrip('.')}" if start else "")]
    return table(header, rows, len(modules) - len(ordered))


def common_start(names: Sequence[str]) -> str:
    """The first parts of paths that all of them have, with the dot behind."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def against_weights(modules: Sequence[Measured]) -> str:
    """Medians against the base's weights, by name."""
    rows = [
        [*(number(middle([column(m) for m in members])) for _, column in AGAINST), f"{name} ×{len(members)}"]
        for name, members in named([m for m in modules if m.weight]).items()
    ]
    text = "medians against the base; unchanged: part of the entries that rounding to its dtype leaves as they were"
    return f"{fill(text, '', '')}\n{table([*(h for h, _ in AGAINST), 'name'], rows)}"


def named(modules: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Modules by the last part of their path."""
    found: dict[str, list[Measured]] = {}
    for m in modules:
        found.setdefault(m.target.removesuffix(".weight").rpartition(".")[2], []).append(m)
    return found


def middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def findings_text(findings: Sequence[Finding]) -> str:
    """Problems and notes, each with what repairs it."""
    problems = sum(finding.level == "problem" for finding in findings)
    notes = len(findings) - problems
    count = f"{problems} problem{'s' * (problems != 1)}, {notes} note{'s' * (notes != 1)}"
    lines = [f"health: {count}" if findings else "health: nothing is wrong"]
    for finding in findings:
        lines.append(fill(f"{finding.code}: {finding.message}", f"  {finding.level:<8}", " " * 10))
        if finding.repair:
            lines.append(fill(printable(finding.repair), "          → ", " " * 12))
    return "\n".join(lines)
