"""The page of `inspect`: what was measured of an adapter, or what is known of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from loratool.pictures.blocks import MOST_ROWS, Block, Column, Facts, Group, Message, Messages, Shown, Table, Tiles
from loratool.pictures.layers import Layers, Map, Measure, ends_of
from loratool.pictures.lines import Axis, Line, Lines, counting, linear, logarithmic, thinned
from loratool.pictures.modules import bare
from loratool.pictures.page import Page, last_part
from loratool.pictures.spectrum import energy_by_rank, energy_of
from loratool.results.facts import AdapterFacts, CheckpointFacts, OneFacts
from loratool.results.findings import Finding
from loratool.results.text import counted, one_of, plural, row_if
from loratool.results.values import Measured, Suggestion
from loratool.shown import size

MOST_LINES = 2000  # of a figure; of more, every second, third … is drawn
MOST_POINTS = 30_000  # of those lines; of more, some are left out

NORM = "‖ΔW‖"
MEASURES = (
    Measure[Measured]("rank", "rank of the factors", lambda m: m.rank),
    Measure[Measured](NORM, "Frobenius norm", lambda m: m.norm),
    Measure[Measured]("σ₁", "largest singular value", lambda m: m.spectral),
    Measure[Measured]("stable", "stable rank: ‖ΔW‖² / σ₁²", lambda m: m.stable_rank),
    Measure[Measured]("entropy", "entropy rank: exp(−Σ p ln p), p = σ/Σσ", lambda m: m.entropy_rank),
    Measure[Measured](
        "90 %", "smallest rank that keeps 90 % of ‖ΔW‖²", lambda m: m.energy_ranks[0] if m.energy_ranks else None
    ),
    Measure[Measured](
        "95 %", "smallest rank that keeps 95 % of ‖ΔW‖²", lambda m: m.energy_ranks[1] if m.energy_ranks else None
    ),
    Measure[Measured](
        "99 %", "smallest rank that keeps 99 % of ‖ΔW‖²", lambda m: m.energy_ranks[2] if m.energy_ranks else None
    ),
    Measure[Measured]("dead", "components below 10⁻⁶ of σ₁", lambda m: m.dead),
    Measure[Measured]("‖B‖/‖A‖", "balance of the factors", lambda m: m.balance),
    Measure[Measured]("‖ΔW‖/‖W₀‖", "relative to the base weight", lambda m: m.weight.ratio if m.weight else None),
    Measure[Measured]("amplified", "‖ΔW‖ / ‖UᵀW₀V‖", lambda m: m.weight.amplification if m.weight else None),
    Measure[Measured](
        "unchanged",
        "fraction of the entries that rounding leaves unchanged",
        lambda m: m.weight.unchanged if m.weight else None,
    ),
    Measure[Measured]("gain", "fraction of ΔW that survives rounding", lambda m: m.weight.gain if m.weight else None),
)
NORMS = Map[Measured](
    "norm",
    "‖ΔW‖ by layer and module",
    "Frobenius norm of the update of every module; the table has the same numbers.",
    MEASURES[1],
)


def page_of(facts: OneFacts) -> Page:
    """The page of one path."""
    blocks = adapter_blocks(facts) if isinstance(facts, AdapterFacts) else other_blocks(facts)
    return Page(last_part(facts.path), "inspect", tuple(blocks))


def adapter_blocks(facts: AdapterFacts) -> Iterator[Block]:
    values = facts.values
    yield Tiles(adapter_tiles(facts))
    if values and values.modules:
        yield from module_blocks(values.modules, values.suggestions)
    yield from found(facts.findings)
    yield Facts(
        "Facts",
        [
            ("path", facts.path),
            ("format", ", ".join(filter(None, [*facts.formats, facts.peft_type, *facts.variants]))),
            ("base", facts.base or "not named"),
            *row_if(facts.models, "model", one_of(facts.models)),
            *row_if(facts.task, "task", facts.task),
            *row_if(facts.saved, "saved whole", ", ".join(facts.saved)),
            ("dtypes", counted(facts.dtypes)),
            *([("parameters", facts.against.line)] if facts.against else []),
            *(("not mergeable", reason) for reason in facts.unsupported),
            *(("note", note) for note in (*facts.notes, *(values.notes if values else ()))),
            *(("not measured", f"{target}: {why}") for target, why in (values.skipped if values else {}).items()),
        ],
    )


def adapter_tiles(facts: AdapterFacts) -> list[tuple[str, str]]:
    """The numbers that a page begins with."""
    scales = {"rank": facts.ranks, "α": facts.alphas, "α/√r" if facts.rslora else "α/r": facts.scalings}
    norm, norm_base = (facts.values.norm, facts.values.norm_base) if facts.values else (None, None)
    return [
        *((name, ends_of(values)) for name, values in scales.items() if facts.ranks),
        ("parameters", f"{facts.parameters:,}"),
        ("size", size(facts.bytes)),
        *([(NORM, f"{norm:.4g}")] if norm is not None else []),
        *([("‖ΔW‖/‖W₀‖", f"{100 * norm / norm_base:.3g} %")] if norm is not None and norm_base else []),
        *([("trainable", f"{facts.against.percent:.4f} %")] if facts.against else []),
    ]


def module_blocks(modules: Sequence[Measured], suggestions: Sequence[Suggestion]) -> Iterator[Block]:
    """The map, the spectra and the table of an adapter's modules."""
    layers = Layers({m.target: m for m in modules})
    order = [*layers.layers.values()]
    yield Group("Layers and modules", "Frobenius norm", [layers.heat_map(NORMS)], chooses=True)
    yield Group(
        "Spectra",
        f"The largest update in front of those of all {plural(len(order), 'module')}",
        spectra(order),
    )
    if suggestions:
        energies = energy_by_rank(modules)
        yield Group(energies.title, "", [energies])
        yield what_resize_keeps(suggestions)
    yield layers.table(MEASURES)


def spectra(modules: Sequence[Measured]) -> tuple[Lines, Lines]:
    """The singular values of every module, and how much of its energy the first of them hold."""
    ranks = max([1, *(len(m.singular_values) for m in modules)])
    most = max(4, MOST_POINTS // min(len(modules), MOST_LINES))
    largest = max(range(len(modules)), key=lambda at: modules[at].norm or 0.0)
    falling = logarithmic("singular value", [value for m in modules for value in m.singular_values])
    values = Lines(
        name="singular-values",
        title="Singular values",
        about="The singular values of the update of every module, on a logarithmic scale.",
        x=counting("index", ranks),
        y=falling,
        lines=lines_of(modules, lambda m: thinned([*enumerate(m.singular_values, 1)], most)),
        chosen=largest,
        says="σ {x} = {y}",
    )
    energy = Lines(
        name="energy",
        title="Energy: the part of ‖ΔW‖² that a rank keeps",
        about="For every module, the part of its squared norm that the best approximation of each rank keeps. Broken "
        "lines are 90, 95 and 99 %.",
        x=Axis("rank", 0, ranks, counting("", ranks).ticks),
        y=linear("% of ‖ΔW‖²", 0, 100),
        lines=lines_of(modules, lambda m: thinned(energy_of(m.singular_values), most)),
        marks=(90, 95, 99),
        chosen=largest,
        says="rank {x} keeps {y} %",
    )
    return values, energy


def lines_of(
    modules: Sequence[Measured], points: Callable[[Measured], tuple[tuple[float, float], ...]]
) -> tuple[Line, ...]:
    drawn = [at for at, m in enumerate(modules[:MOST_ROWS]) if m.singular_values]
    every = max(1, -(-len(drawn) // MOST_LINES))
    return tuple(Line(bare(modules[at].target), points(modules[at]), at) for at in drawn[::every])


def what_resize_keeps(suggestions: Sequence[Suggestion]) -> Table:
    columns = ("energy", "one rank", "factors", "smaller", "rank per layer")
    rows = [
        (
            f"{100 * s.energy:.0f} %",
            s.rank,
            Shown(size(s.bytes), s.bytes),
            Shown(part_of(s.bytes, s.bytes_now), s.bytes / max(1, s.bytes_now)),
            Shown(size(s.bytes_by_layer), s.bytes_by_layer),
        )
        for s in suggestions
    ]
    return Table("What resize would keep", [Column(name) for name in columns], rows, plain=True)


def part_of(part: int, whole: int) -> str:
    return f"−{100 * (1 - part / whole):.0f} %" if whole and part < whole else "unchanged"


def found(findings: Sequence[Finding] | None) -> Iterator[Block]:
    """What `--check` found, where it looked."""
    if findings is None:
        return
    problems = sum(each.level == "problem" for each in findings)
    title = f"Health: {plural(problems, 'problem')}, {plural(len(findings) - problems, 'note')}"
    messages = [Message(f.level == "problem", f.code, f.message, f.repair or "") for f in findings]
    yield Messages(title if findings else "Health: no problems found", messages)


def other_blocks(facts: OneFacts) -> Iterator[Block]:
    """What is known of a checkpoint, or of what cannot be read."""
    told: list[tuple[str, object]] = [("path", facts.path)]
    if isinstance(facts, CheckpointFacts):
        yield Tiles(
            [("parameters", f"{facts.parameters:,}"), ("size", size(facts.bytes)), ("tensors", f"{facts.tensors:,}")]
        )
        told += [
            ("architecture", facts.architecture or "not named"),
            *row_if(facts.made_by, "made by", facts.made_by),
            *row_if(facts.quantisation, "quantised", facts.quantisation),
            ("dtypes", counted(facts.dtypes)),
            *(("left out", name) for name in facts.left_out),
            *(("note", note) for note in facts.notes),
        ]
    yield from found(facts.findings)
    yield Facts("Facts", told)
