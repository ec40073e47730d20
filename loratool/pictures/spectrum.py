"""The singular values of all modules of an adapter together, in figures that a card or a terminal has room for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from loratool.pictures.bars import Bar, Bars
from loratool.pictures.colours import SERIES
from loratool.pictures.lines import Line, Lines, counting, logarithmic
from loratool.results.text import kept
from loratool.results.values import Measured, named

OTHERS = "others"  # kinds beyond those that have a colour


def spectrum_by_kind(modules: Sequence[Measured]) -> Lines:
    """A line for each kind of module: the i-th singular values of its modules as their root mean square."""
    kinds = {name: [m for m in members if m.norm] for name, members in named(modules).items()}
    ordered = sorted(
        (name for name, members in kinds.items() if members),
        key=lambda name: -math.hypot(*(m.norm or 0.0 for m in kinds[name])),
    )
    shown, rest = (
        (ordered, []) if len(ordered) <= len(SERIES) else (ordered[: len(SERIES) - 1], ordered[len(SERIES) - 1 :])
    )
    groups = {name: kinds[name] for name in shown}
    if rest:
        groups[OTHERS] = [m for name in rest for m in kinds[name]]
    lines = tuple(Line(f"{name} ×{len(members)}", root_mean_squares(members)) for name, members in groups.items())
    return Lines(
        name="spectrum",
        title="Singular values of the update ΔW",
        about="Root mean square over the modules of each kind, those with the largest updates first.",
        x=counting("index", max((len(line.points) for line in lines), default=1)),
        y=logarithmic("singular value", [value for line in lines for _, value in line.points]),
        lines=lines,
    )


def root_mean_squares(modules: Sequence[Measured]) -> tuple[tuple[float, float], ...]:
    """(i, σᵢ) as long as one is not 0; a module of a lower rank has zeros behind its last."""
    ranks = max(len(m.singular_values) for m in modules)
    sums = [
        math.fsum(m.singular_values[at] ** 2 for m in modules if at < len(m.singular_values)) for at in range(ranks)
    ]
    return tuple((float(at), math.sqrt(value / len(modules))) for at, value in enumerate(sums, 1) if value > 0)


def energy_by_rank(modules: Sequence[Measured]) -> Bars:
    """How much of ‖ΔW‖² would be kept at smaller ranks, the same for every module."""
    spectra = [[value**2 for value in m.singular_values] for m in modules if m.norm]
    total = math.fsum(value for spectrum in spectra for value in spectrum)
    largest = max(map(len, spectra), default=0)
    bars = []
    for rank in (2**at for at in range(largest.bit_length())) if total else ():
        part = math.fsum(value for spectrum in spectra for value in spectrum[:rank]) / total
        bars.append(Bar(f"rank {rank}", (part,), kept(part)))
    return Bars(
        name="energy-by-rank",
        title="Energy kept at a smaller rank",
        about="The part of ‖ΔW‖² of all modules together that is kept if every module gets the same rank.",
        bars=tuple(bars),
        longest=1.0,
    )


def energy_of(values: Sequence[float]) -> list[tuple[float, float]]:
    """(rank, percentage of the squares that so many values hold), from rank 0 on."""
    whole = sum(value * value for value in values)
    held = accumulate(value * value for value in values)
    return [(0.0, 0.0), *((rank, 100 * part / whole if whole else 0.0) for rank, part in enumerate(held, 1))]
