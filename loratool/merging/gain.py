"""The part of an update that rounding leaves, measured on sampled rows while they are rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from loratool.errors import FitError, printable
from loratool.lazy import Tensor, torch
from loratool.merging.addends import Place
from loratool.merging.plan import MergePlan
from loratool.notes import Note
from loratool.templates import listed

SAMPLED = 1 << 18  # elements of a weight whose rounding is looked at: gains are right to 0.01 and better
LEAST_GAIN = 0.9  # less than this of an update is worth a warning


def rows_apart(rows: int, width: int) -> int:
    """Of so many rows of a weight one is looked at."""
    return max(1, rows * width // SAMPLED)


def measure_kept(
    before: Tensor, change: Tensor, after: Tensor, rows: Tensor, modules: Iterable[tuple[str, Place]], times: int
) -> dict[str, tuple[float, float]]:
    """⟨W' − W, ΔW⟩ and ‖ΔW‖² of each module on sampled rows, `times` as much.

    Args:
        before: (n, width) of W.
        change: (n, width) of ΔW, in float32 or float64.
        after: (n, width) of W'.
        rows: (n,) their numbers in the weight.
        modules: each with its place in the weight.
        times: how many rows each stands for.
    """
    return kept_of(change, after.to(change.dtype) - before.to(change.dtype), rows, modules, times)


def kept_of(
    change: Tensor, applied: Tensor, rows: Tensor, modules: Iterable[tuple[str, Place]], times: int
) -> dict[str, tuple[float, float]]:
    """The same by W' − W, `applied`, in the dtype of ΔW."""
    found: dict[str, tuple[float, float]] = {}
    lowest, highest = int(rows[0]), int(rows[-1])
    for module, place in modules:
        wanted, got = change, applied
        if place.first > lowest or place.stop <= highest or place.columns != slice(None):
            inside = (rows >= place.first) & (rows < place.stop)
            wanted, got = (each[inside][:, place.columns] for each in (change, applied))
        product = float((wanted * got).sum(1).sum(dtype=torch.float64)) * times
        squared = float(torch.linalg.vector_norm(wanted)) ** 2 * times
        if math.isfinite(product) and math.isfinite(squared):
            one, other = found.get(module, (0.0, 0.0))
            found[module] = one + product, other + squared
    return found


@dataclass(frozen=True)
class Gains:
    """The part of an update that rounding leaves: ⟨W' − W, ΔW⟩ / ‖ΔW‖², on sampled rows."""

    total: float | None  # of all that was sampled; None where nothing was
    modules: dict[str, float]

    @classmethod
    def of(cls, kept: Mapping[str, tuple[float, float]]) -> Gains:
        """From both numbers of every module."""
        products, squares = sum(one for one, _ in kept.values()), sum(other for _, other in kept.values())
        modules = {name: product / squared for name, (product, squared) in kept.items() if squared}
        return cls(products / squares if squares else None, modules)


LEAST_KEPT, MOST_ADDED = 0.5, 1.0  # of an update that is packed anew: less, or more beside it, is a loss to agree to


@dataclass(frozen=True)
class Errors:
    """The error that packing anew adds: ‖W' − (W + ΔW)‖ / ‖ΔW‖, of all weights that were, and of each tensor."""

    total: float | None
    tensors: dict[str, float]

    @classmethod
    def of(cls, lost: Mapping[str, tuple[float, float]]) -> Errors:
        """From both numbers of every tensor, squared."""
        errors, changes = (sum(pair[at] for pair in lost.values()) for at in (0, 1))
        tensors = {name: math.sqrt(error / change) for name, (error, change) in lost.items() if change}
        return cls(math.sqrt(errors / changes) if changes else None, tensors)


def check_loss(plan: MergePlan, gains: Gains, errors: Errors) -> None:
    """Raise `FitError` where packing anew takes more than half of an update away, or adds an error as large as it."""
    if plan.accepts_loss or errors.total is None or gains.total is None:
        return
    if gains.total >= LEAST_KEPT and errors.total <= MOST_ADDED:
        return
    worst = sorted(errors.tensors, key=lambda name: -errors.tensors[name])
    raise FitError(
        f"requantised weights keep {100 * gains.total:.0f} % of the update and add an error of "
        f"{100 * errors.total:.0f} % of its size; leave out {plan.packed_by} to write edited weights plain, or pass "
        "--accept-loss; tensors with the largest errors first:",
        [f"{printable(name)}: {100 * errors.tensors[name]:.0f} %" for name in worst],
    )


def gain_notes(plan: MergePlan, gains: Gains) -> Iterator[Note]:
    """A warning where rounding takes much of the update away."""
    low = {module: gain for module, gain in gains.modules.items() if gain < LEAST_GAIN}
    if low and gains.total is not None:
        way = "--dtype float32" if plan.rounding == "compensated" else "--rounding compensated, or --dtype float32,"
        way = f"leave out {plan.packed_by}" if plan.anew else f"pass {way}"
        text = (
            f"rounding keeps {100 * gains.total:.0f} % of the update in total, and less than {100 * LEAST_GAIN:.0f} % in "
            f"{len(low)} of {len(gains.modules)} modules: {listed(low)}; {way} to keep it"
        )
        yield Note("update-lost-in-rounding", text)
