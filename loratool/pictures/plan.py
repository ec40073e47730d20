"""The page of a plan: what a merge would change and by which rule, what rounding would leave, and how long it would take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loratool.pictures.bars import Bar, Bars
from loratool.pictures.blocks import Block, Column, Facts, Group, Shown, Table, Tiles, Value
from loratool.pictures.lines import Line, Lines, logarithmic
from loratool.pictures.merge import GAIN, layers_of, map_of, told
from loratool.pictures.modules import bare
from loratool.pictures.page import Page
from loratool.results.plan import MergePlan
from loratool.results.simulation import Simulation, duration
from loratool.results.text import plural
from loratool.shown import size

MOST_FILES = 40  # that get a bar of their own


def page_of(plan: MergePlan) -> Page:
    """The page of one plan."""
    return Page(f"{plan.base} + {' + '.join(a.name for a in plan.adapters)}", "plan", tuple(blocks_of(plan)))


def blocks_of(plan: MergePlan) -> Iterator[Block]:
    yield Tiles(
        [
            ("updates", f"{len(plan.edits):,}"),
            ("copied", f"{plan.copied:,}"),
            *([("gain, forecast", f"{plan.gain_forecast:.4f}")] if plan.gain_forecast is not None else []),
            ("to read", size(plan.bytes_read)),
            ("to write", size(plan.bytes_written)),
            ("peak memory", size(plan.peak_memory)),
        ]
    )
    if plan.simulations:
        yield from simulated(plan.simulations)
    if plan.gains_forecast:
        gains = layers_of({GAIN: plan.gains_forecast}).heat_map(map_of(GAIN, plan.gains_forecast), linked=False)
        yield Group("Gain to be expected", "", [gains])
    yield told(plan.notes)
    if len(plan.files) > 1:
        yield Group("Weight files of the output", "", [files(plan.files)])
    columns = [Column(name) for name in ("target", "tensor", "part", "rule", "adapter")]
    rows = [(bare(e.target), e.tensor, e.part, e.rule, e.adapter) for e in plan.edits]
    about = "The rule is how the weight was found in the base; the part is the rows and columns that are changed."
    yield Table(plural(len(rows), "update"), columns, rows, about)
    yield Facts(
        "Facts",
        [
            ("base", plan.base),
            *(("adapter", f"{a.name}, weight {a.weight:g}") for a in plan.adapters),
            ("rounding", plan.rounding),
            ("weight files", plural(len(plan.files), "file")),
            *(("written plain", name) for name in plan.plain),
            *(("requantised", name) for name in plan.requantized),
            ("other files", ", ".join(plan.side_files) or "none"),
            *(("left out", name) for name in plan.left_out),
        ],
    )


def files(sizes: Mapping[str, int]) -> Bars:
    """The weight files by size; of many, the largest."""
    largest = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:MOST_FILES]
    return Bars(
        name="files",
        title="Weight files of the output",
        about="The files with their sizes, the largest first."
        + (f" {len(sizes) - len(largest)} smaller ones are left out." if len(sizes) > len(largest) else ""),
        bars=tuple(Bar(name, (float(count),), size(count)) for name, count in largest),
    )


def simulated(simulations: Sequence[Simulation]) -> Iterator[Block]:
    """How long some numbers of workers take."""
    if len(simulations) > 1:
        points = sorted((float(each.workers), each.seconds, each.work_seconds) for each in simulations)
        seconds = [second for _, *both in points for second in both]
        yield Group(
            "Time by workers",
            "",
            [
                Lines(
                    name="workers",
                    title="Time by number of workers",
                    about="Seconds until the output is published, and those in which workers work, on logarithmic scales.",
                    x=logarithmic("workers", [workers for workers, *_ in points]),
                    y=logarithmic("seconds", seconds),
                    lines=(
                        Line("until the output is published", tuple((w, s) for w, s, _ in points)),
                        Line("work", tuple((w, work) for w, _, work in points)),
                    ),
                )
            ],
        )
    names = ("workers", "time", "limited by", "start-up", "work", "balanced", "finishing", "parts", "read", "written")
    rows: list[tuple[Value, ...]] = [
        (
            f"{each.workers:,}",
            Shown(duration(each.seconds), each.seconds),
            each.limit,
            *(
                Shown(duration(seconds), seconds)
                for seconds in (each.startup_seconds, each.work_seconds, each.even_seconds, each.finish_seconds)
            ),
            each.parts,
            *(Shown(size(count), count) for count in (each.bytes_read, each.bytes_written)),
        )
        for each in simulations
    ]
    yield Table("Simulated merges", [Column(name) for name in names], rows, plain=True)
