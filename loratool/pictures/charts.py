"""Which charts a terminal shows below the text of a result."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from loratool.pictures.modules import common, order_of, place_of
from loratool.pictures.terminal import Chart, Row
from loratool.results.blocks import block_of, is_of_images, place
from loratool.results.combine import CombineReport
from loratool.results.compare import CompareReport
from loratool.results.estimate import Estimate
from loratool.results.extract import ExtractReport
from loratool.results.facts import AdapterFacts
from loratool.results.fleet import FleetFacts
from loratool.results.matrix import MOST_ROWS, grouped, groups_of, label
from loratool.results.merge import MergeReport
from loratool.results.resize import ResizeReport
from loratool.results.text import counts, figure, kept, percentage, plural, size
from loratool.results.values import Values, last_words

Numbers = Mapping[str, "float | None"]
Words = Callable[["float | None"], str]
Scale = tuple["float | None", "float | None"]  # None: the smallest or the largest of the values
Together = Callable[[Sequence[float]], float]  # several values as one

FEW = 3  # pairs whose cosines are shown layer by layer
MOST_ADAPTERS = 24  # that get a bar each; of more, those of one rank are counted
ITS_OWN: Scale = (None, None)
OF_A_WHOLE: Scale = (None, 1.0)
MOST_NUMBERS = 8  # adapters of a matrix that has its numbers next to the cells
LONGEST_LABEL = 30
LEAST_GAIN = 0.995  # a chart of gains above it would be of one colour
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def charts_of(result: Any) -> list[Chart]:
    """The charts of a result; there are none where they would not say more than the text."""
    return [chart for chart in CHARTS[type(result)](result) if chart.rows] if type(result) in CHARTS else []


def of_inspect(facts: AdapterFacts) -> Iterator[Chart]:
    if facts.values is None:
        return
    yield energy_by_rank(facts.values)
    yield by_layer("‖ΔW‖ by layer", {m.target: m.norm for m in facts.values.modules}, figure, root_of_squares)


def energy_by_rank(values: Values) -> Chart:
    """How much of ‖ΔW‖² would be kept at smaller ranks, the same for every module."""
    spectra = [[value**2 for value in m.singular_values] for m in values.modules if m.norm]
    total = math.fsum(value for spectrum in spectra for value in spectrum)
    largest = max(map(len, spectra), default=0)
    ranks = [rank for rank in (2**at for at in range(largest.bit_length())) if rank <= largest]
    rows = []
    for rank in ranks if total and largest > 1 else ():
        part = math.fsum(value for spectrum in spectra for value in spectrum[:rank]) / total
        rows.append(Row(f"rank {rank}", (part,), kept(part)))
    return Chart("energy kept at a smaller rank, all modules together", tuple(rows))


def of_merge(report: MergeReport) -> Iterator[Chart]:
    tensors = {"edited": report.edited, "copied": report.copied, "converted": report.converted}
    whole = sum(tensors.values())
    shown = [Row(name, (count / whole,), f"{count:,}") for name, count in tensors.items() if count]
    yield Chart("tensors of the output", tuple(shown) if len(shown) > 1 else ())
    yield by_layer("‖ΔW‖/‖W‖ by layer", report.relative_norms, percentage, mean)
    if any(gain < LEAST_GAIN for gain in report.gains.values()):
        yield by_layer("fraction of the update that rounding leaves", report.gains, kept, mean, OF_A_WHOLE)


def of_resize(report: ResizeReport) -> Iterator[Chart]:
    energy = {target: 1 - layer.achieved**2 for target, layer in report.modules.items()}
    yield by_layer("energy kept by layer", energy, kept, mean, OF_A_WHOLE)
    ranks: Numbers = {target: float(layer.rank) for target, layer in report.modules.items()}
    if len(set(ranks.values())) > 1:
        yield by_layer("rank by layer", ranks, figure, mean)


def of_extract(report: ExtractReport) -> Iterator[Chart]:
    energy = {target: 1 - layer.achieved**2 for target, layer in report.modules.items()}
    yield by_layer("energy kept by layer", energy, kept, mean, OF_A_WHOLE)
    yield by_layer("‖M‖/‖W‖ by layer", {t: layer.relative for t, layer in report.modules.items()}, percentage, mean)


def of_combine(report: CombineReport) -> Iterator[Chart]:
    shares = report.totals.energy_kept
    yield bars("energy of each adapter that the result keeps", shares, kept, whole=True)
    least = {
        target: min((part.energy_kept for part in layer.parts.values() if part.energy_kept is not None), default=None)
        for target, layer in report.modules.items()
    }
    yield by_layer("least energy kept of an adapter, by layer", least, kept, mean, OF_A_WHOLE)


def of_compare(report: CompareReport) -> Iterator[Chart]:
    names = report.adapters
    if 1 < len(report.totals) <= FEW or len(names) == 2:
        for pair in report.totals:
            cosines = {target: found[pair].cosine for target, found in report.modules.items() if pair in found}
            yield by_layer(f"cosine by layer, {pair}", cosines, signed, mean, (0.0, 1.0))
    if len(names) > 2:
        _, groups = zip(*grouped(len(names), report.tree, max(0, len(names) - MOST_ROWS)), strict=True)
        cells = groups_of(report.matrix.cosine, groups)
        numbers = len(groups) <= MOST_NUMBERS
        rows = [
            Row(label(names, group, LONGEST_LABEL), tuple(row), " ".join(map(signed, row)) if numbers else "")
            for group, row in zip(groups, cells, strict=True)
        ]
        yield Chart("cosine of every two, in the order of the dendrogram", tuple(rows), "0", "1")


def of_fleet(facts: FleetFacts) -> Iterator[Chart]:
    """‖ΔW‖ of each adapter where it was measured; of many, how many have which rank."""
    measured = [row for row in facts.adapters if row.norm is not None]
    if 1 < len(measured) <= MOST_ADAPTERS:
        yield bars("‖ΔW‖", {row.name: row.norm for row in measured}, figure)
    ranks = counts(max(row.rank) for row in facts.adapters if row.rank)
    if len(ranks) > 1:
        found = {f"rank {rank}": float(ranks[rank]) for rank in sorted(ranks, key=int)}
        yield bars("adapters by rank", found, lambda count: plural(int(count or 0), "adapter"))


def of_estimate(result: Estimate) -> Iterator[Chart]:
    totals = {"full fine-tuning": float(result.full.total)}
    totals |= {f"LoRA, r = {one.rank}": float(one.lora.total) for one in result.ranks}
    totals |= {f"QLoRA, r = {one.rank}": float(one.qlora.total) for one in result.ranks}
    yield bars("memory for training, activations not included", totals, lambda value: size(value or 0.0))


CHARTS: Mapping[type, Callable[[Any], Iterable[Chart]]] = {
    AdapterFacts: of_inspect,
    MergeReport: of_merge,
    ResizeReport: of_resize,
    ExtractReport: of_extract,
    CombineReport: of_combine,
    CompareReport: of_compare,
    FleetFacts: of_fleet,
    Estimate: of_estimate,
}


def bars(title: str, values: Numbers, words: Words, whole: bool = False) -> Chart:
    """A bar for each value, the largest as long as there is room; of fractions of a `whole`, 1 is."""
    most = 1.0 if whole else max((value for value in values.values() if value is not None), default=0.0) or 1.0
    rows = (Row(name, (None if value is None else value / most,), words(value)) for name, value in values.items())
    return Chart(title, tuple(rows))


def by_layer(title: str, values: Numbers, words: Words, together: Together, scale: Scale = ITS_OWN) -> Chart:
    """A row for each kind of module and a cell for each layer; of image models, for each block.

    Args:
        title: ending in "layer".
        values: by target.
        words: a value as text.
        together: the values of one cell as one, and those of a row for its end.
        scale: the values of the emptiest and the fullest cell.
    """
    cells: dict[str, dict[tuple[Any, ...], list[float]]] = {}
    images = is_of_images(values)
    for target, value in values.items():
        column, kind = block_place(target) if images else layer_place(target)
        if value is not None:
            cells.setdefault(kind, {}).setdefault(column, []).append(value)
    columns = sorted({column for row in cells.values() for column in row})
    table = {kind: {column: together(found) for column, found in row.items()} for kind, row in cells.items()}
    every = [value for row in table.values() for value in row.values()] or [0.0]
    low, high = (
        chosen if chosen is not None else own for chosen, own in zip(scale, (min(every), max(every)), strict=True)
    )
    if len(columns) == 1 or low == high:  # bars, which begin at 0; or one colour
        low = 0.0
    start = common([*table])
    rows = (
        Row(
            kind.removeprefix(start),
            tuple((row[column] - low) / ((high - low) or 1.0) if column in row else None for column in columns),
            words(together([value for found in cells[kind].values() for value in found])),
        )
        for kind, row in sorted(table.items(), key=lambda item: (images, order_of(item[0])))
    )
    ends = [f"{column[-1]}" for column in (columns[0], columns[-1]) if column[-1] != math.inf] if columns else []
    named = title.replace("layer", "block") if images else title
    return Chart(f"{named}, {' to '.join(ends)}" if len(ends) > 1 else named, tuple(rows), words(low), words(high))


def layer_place(target: str) -> tuple[tuple[Any, ...], str]:
    """The layer of a target and its kind; experts of one layer are of one kind."""
    layer, kind = place_of(target)
    return (math.inf if layer is None else layer,), NUMBER.sub("*", kind)


def block_place(target: str) -> tuple[tuple[Any, ...], str]:
    """The block of a target of an image model, in the order of the model, and the last words of its name."""
    return place(block_of(target)), last_words(target)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def root_of_squares(values: Sequence[float]) -> float:
    """The norm of several updates together."""
    return math.hypot(*values)


def signed(value: float | None) -> str:
    return "    –" if value is None else f"{round(value, 2) + 0.0:5.2f}"  # no −0.00
