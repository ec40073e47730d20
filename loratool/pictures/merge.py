"""The page of a merge: how much every weight changed and what rounding left of that, what else was done, and its cost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from loratool.errors import printable
from loratool.files.stopwatch import Spent
from loratool.notes import Note
from loratool.pictures.bars import Bar, Bars
from loratool.pictures.blocks import Block, Column, Facts, Group, Message, Messages, Table, Tiles
from loratool.pictures.layers import Layers, Map, Measure
from loratool.pictures.modules import bare
from loratool.pictures.page import Page
from loratool.results.merge import AdapterEffect, MergeReport
from loratool.results.profile import Profile
from loratool.results.stream import StreamReport
from loratool.results.text import memory, plural, row_if
from loratool.shown import size

RATIO, GAIN, ADDED = "‖ΔW‖/‖W‖", "gain", "error added"
LOWEST = 0.5  # a gain that stands out as much as any
LEAST = 0.02  # of all time: what a stage must have taken to have a bar of its own
IDLE = "wait"  # the stage of a thread that has nothing to do
Weight = Mapping[str, float]  # measure → what was measured of a weight


def page_of(report: MergeReport | StreamReport) -> Page:
    """The page of a merge into a folder, or to the Hub."""
    if isinstance(report, StreamReport):
        blocks = [*beginning(report), told(report.notes), stream_facts(report)]
        return Page(report.repo, "merge", tuple(blocks))
    blocks = [*beginning(report), told(report.notes), *times(report.profile), facts_of(report)]
    return Page(os.path.basename(os.path.realpath(report.out)) or str(report.out), "merge", tuple(blocks))


def measures_of(report: MergeReport | StreamReport) -> dict[str, Mapping[str, float]]:
    """What was measured of the edited weights: measure → weight → value."""
    found: dict[str, Mapping[str, float]] = {GAIN: report.gains}
    if isinstance(report, MergeReport):
        found = {RATIO: report.relative_norms, GAIN: report.gains, ADDED: report.errors_added}
    return {what: values for what, values in found.items() if values}


def layers_of(measures: Mapping[str, Mapping[str, float]]) -> Layers[Weight]:
    """What was measured of each weight."""
    names = dict.fromkeys(name for values in measures.values() for name in values)
    return Layers({name: {what: v[name] for what, v in measures.items() if name in v} for name in names})


def beginning(report: MergeReport | StreamReport) -> Iterator[Block]:
    """What both kinds of merge have: numbers, maps, adapters, and the table of weights."""
    yield Tiles(tiles_of(report))
    measures = measures_of(report)
    layers = layers_of(measures)
    if measures:
        maps = [layers.heat_map(map_of(what, values)) for what, values in measures.items()]
        yield Group(
            "Layers and modules", "How much every weight changed, and how much of the update survived rounding.", maps
        )
    yield what_became(report)
    if report.adapters:
        yield adapters_table(report.adapters)
    if measures:
        yield layers.table([measure_of(what) for what in measures], "edited weight")


def tiles_of(report: MergeReport | StreamReport) -> list[tuple[str, str]]:
    """The numbers that the page begins with."""
    norms = report.relative_norms if isinstance(report, MergeReport) else {}
    return [
        ("edited", f"{report.edited:,}"),
        ("copied", f"{report.copied:,}"),
        *([("gain", f"{report.gain:.4f}")] if report.gain is not None else []),
        *([(f"largest {RATIO}", f"{max(norms.values()):.3g}")] if norms else []),
        ("written", size(report.bytes_written)),
        ("time", f"{report.cost.seconds:.2f} s"),
        ("peak memory", memory(report.cost.peak_memory)),
    ]


MAPS = {  # measure → name of the figure, its title, and what it shows
    RATIO: (
        "relative-norm",
        "Relative norm of the update, ‖ΔW‖/‖W‖",
        "The Frobenius norm of the update over that of the base's weight.",
    ),
    GAIN: (
        "gain",
        "Gain: the part of the update that rounding leaves",
        "⟨W' − W, ΔW⟩ / ‖ΔW‖² on sampled rows: 1 where the whole update survives, 0 where rounding removes it.",
    ),
    ADDED: (
        "error-added",
        "Error added by requantising",
        "‖W' − (W + ΔW)‖ / ‖ΔW‖ of every weight that was packed again.",
    ),
}


def measure_of(what: str) -> Measure[Weight]:
    return Measure(what, MAPS[what][2], lambda weight: weight.get(what))


def map_of(what: str, values: Mapping[str, float]) -> Map[Weight]:
    """The map of one measure; of gains the lowest stand out."""
    if what == GAIN:
        return Map(*MAPS[what], measure_of(what), (min(LOWEST, *values.values()), 1.0), "down")
    return Map(*MAPS[what], measure_of(what))


def what_became(report: MergeReport | StreamReport) -> Group:
    """How many tensors were edited, copied and converted."""
    counts = {"edited": report.edited, "copied byte for byte": report.copied}
    if isinstance(report, MergeReport) and report.converted:
        counts["converted to another dtype"] = report.converted
    bars = tuple(Bar(name, (float(count),), f"{count:,}", f"s{at}") for at, (name, count) in enumerate(counts.items()))
    figure = Bars(
        name="tensors",
        title="Tensors of the output",
        about="How many tensors of the output the adapters changed, and what happened to the others.",
        bars=bars,
    )
    return Group("Tensors of the output", "", [figure])


def adapters_table(effects: Sequence[AdapterEffect]) -> Table:
    """What each adapter did."""
    columns = [
        Column("adapter"),
        Column("weight", "what its updates were multiplied by"),
        Column("modules", "weights and biases that it updates"),
        Column("unchanged", "those of them in which it alone changes no element, after rounding"),
    ]
    rows = [(each.name, float(each.weight), each.modules, len(each.unchanged)) for each in effects]
    return Table("Adapters", columns, rows, plain=True)


def told(notes: Sequence[Note]) -> Messages:
    """What was guessed, assumed, renamed or left out."""
    title = (
        f"{plural(len(notes), 'note')}: what was assumed, guessed or left out"
        if notes
        else "Nothing was assumed or guessed"
    )
    return Messages(title, [Message(note.is_warning, note.code, note.text) for note in notes])


def times(profile: Profile) -> Iterator[Group]:
    """Where the time of all threads went."""
    spent = {stage: each for stage, each in profile.stages.items() if stage != IDLE}
    whole = sum(each.wall for each in spent.values())
    if not whole:
        return
    rest = Spent()
    for stage in [stage for stage, each in spent.items() if each.wall < LEAST * whole]:
        rest.add(spent.pop(stage))
    stages = [*sorted(spent.items(), key=lambda item: -item[1].wall), *([("all others", rest)] if rest.wall else [])]
    bars = [
        Bar(
            stage,
            (min(each.processor, each.wall), max(0.0, each.wall - each.processor)),
            f"{each.wall:.2f} s" + (f", {size(each.bytes)}" if each.bytes and each is not rest else ""),
        )
        for stage, each in stages
    ]
    figure = Bars(
        name="time",
        title="Where the time went",
        about="Seconds that each stage took, of all threads together: on the processor, and waiting for it or for a disk.",
        series=("on the processor", "waiting"),
        bars=tuple(bars),
    )
    yield Group("Where the time went", "", [figure])


def facts_of(report: MergeReport) -> Facts:
    """Everything else that the report has."""
    gpu = f", GPU {size(report.gpu_memory)}" if report.gpu_memory else ""
    unchanged = [(effect, bare(name)) for effect in report.adapters for name in effect.unchanged]
    return Facts(
        "Facts",
        [
            ("merged into", printable(report.out)),
            ("read", size(report.bytes_read)),
            ("written", size(report.bytes_written)),
            (
                "device",
                f"{report.cost.device}, {plural(report.workers, 'worker')}, start-up {report.cost.startup_seconds:.2f} s",
            ),
            ("peak memory", memory(report.cost.peak_memory) + gpu),
            *row_if(report.verified, "verified", f"{report.verified} files read again, each as it was written"),
            *row_if(
                report.resumed, "continued", f"{len(report.resumed)} finished files of an interrupted run were kept"
            ),
            *(("unchanged", f"{name} by {effect.name}") for effect, name in unchanged),
            *(("NaN/inf in base", f"{count} in {name}") for name, count in report.nonfinite.items()),
            *(("left out", name) for name in report.left_out),
            *(("digest", f"{name}: {root}") for name, root in report.digests.items()),
        ],
    )


def stream_facts(report: StreamReport) -> Facts:
    return Facts(
        "Facts",
        [
            ("merged into", report.repo),
            ("commit", report.commit or "not pushed"),
            ("on this disk", f"at most {size(report.most_on_disk)} of weights at a time"),
            ("device", report.cost.device),
            *(("left out", name) for name in report.left_out),
            *(("digest", f"{name}: {root}") for name, root in report.digests.items()),
        ],
    )
