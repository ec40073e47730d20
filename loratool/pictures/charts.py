"""Which figures of a result's page a terminal shows below its text: those that say at a glance what the text lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loratool.pictures.bars import Bar, Bars
from loratool.pictures.drawing import Figure
from loratool.pictures.heat_map import HeatMap
from loratool.pictures.layers import Layers, Map, Measure
from loratool.pictures.page import page_of
from loratool.results.estimate import Estimate
from loratool.results.merge import MergeReport
from loratool.results.text import size

LEAST_GAIN = 0.995  # a map of gains above it would be of one colour
# The kind of a result → names of figures of its page, in the order in which a terminal shows them.
SHOWN = {
    "AdapterFacts": ("energy-by-rank", "norm"),
    "ResizeReport": ("energy", "ranks"),
    "ExtractReport": ("energy", "difference"),
    "CombineReport": ("energy-by-adapter", "energy"),
    "CompareReport": ("cosine-1", "cosine-2", "cosine-3", "cosine"),
    "FleetFacts": ("norms", "ranks"),
}


def charts_of(result: Any) -> Iterator[Figure]:
    """The figures of one result; none where its kind has none for a terminal."""
    if isinstance(result, MergeReport):
        yield from of_merge(result)
    elif isinstance(result, Estimate):
        yield memory(result)
    elif (kind := type(result).__name__) in SHOWN:
        found = {figure.name: figure for figure in page_of(result).figures if not is_of_two(figure)}
        yield from (found[name] for name in SHOWN[kind] if name in found)


def is_of_two(figure: Figure) -> bool:
    """Whether it is the matrix of two adapters, which is one number."""
    return isinstance(figure, HeatMap) and figure.numbers and len(figure.rows) < 3


def of_merge(report: MergeReport) -> Iterator[Figure]:
    counts = {"edited": report.edited, "copied": report.copied, "converted": report.converted}
    bars = tuple(Bar(name, (float(count),), f"{count:,}") for name, count in counts.items() if count)
    yield Bars(name="tensors", title="Tensors of the output", bars=bars)
    if report.relative_norms:
        ratio = Measure[float]("‖ΔW‖/‖W‖", "", float)
        yield Layers(report.relative_norms).heat_map(Map("relative-norm", "‖ΔW‖/‖W‖ by layer and module", "", ratio))
    if any(gain < LEAST_GAIN for gain in report.gains.values()):
        gain = Measure[float]("gain", "", float)
        title = "Part of the update that rounding leaves, by layer and module"
        yield Layers(report.gains).heat_map(Map("gain", title, "", gain, (None, 1.0)))


def memory(result: Estimate) -> Bars:
    totals = {"full fine-tuning": result.full.total}
    totals |= {f"LoRA, r = {one.rank}": one.lora.total for one in result.ranks}
    totals |= {f"QLoRA, r = {one.rank}": one.qlora.total for one in result.ranks}
    bars = tuple(Bar(name, (float(count),), size(count)) for name, count in totals.items())
    return Bars(name="memory", title="Memory for training, activations not included", bars=bars)
