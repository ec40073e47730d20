"""The part of an update that rounding leaves, measured on sampled rows while they are rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from loratool.errors import FitError, printable
from loratool.files.safefile import FLOAT_DIGITS
from loratool.files.seen import Pairs, Seen
from loratool.lazy import Tensor, torch
from loratool.merging.addends import Place
from loratool.merging.plan import Plan
from loratool.notes import Note
from loratool.templates import listed

SAMPLED = 1 << 18  # elements of a weight whose rounding is looked at: gains are right to 0.01 and better
LEAST_GAIN = 0.9  # less than this of an update is worth a warning
LEAST_KEPT, MOST_ADDED = 0.5, 1.0  # of an update that is packed anew: less, or more beside it, is a loss to agree to
MANY = 10.0  # times the whole: too many percent to read
UNSURE = 0.1  # a gain with a larger standard error is no measurement
STEP = 1.5  # of a dtype with d binary digits at the size of a number, on average, times 2⁻ᵈ of that number


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

    total: float | None  # of all that was sampled and can be measured; None where nothing was
    modules: dict[str, float]
    # modules whose gain cannot be measured → how many times smaller their updates are than the steps of the format
    hidden: dict[str, float] = field(default_factory=dict)


def gains_of(plan: Plan, seen: Seen) -> Gains:
    """The gains of a merge, from what was seen of its weights."""
    every = hidden_updates(plan, seen)
    hidden = {name: every[name] for name in seen.kept if name in every}
    kept = {name: pair for name, pair in seen.kept.items() if name not in hidden}
    products, squares = sum(one for one, _ in kept.values()), sum(other for _, other in kept.values())
    modules = {name: product / squared for name, (product, squared) in kept.items() if squared}
    return Gains(products / squares if squares else None, modules, hidden)


def hidden_updates(plan: Plan, seen: Seen) -> dict[str, float]:
    """Modules whose gain cannot be measured, each with how many times smaller its update is than a step of the format.

    With E = W' − (W + ΔW), a gain has the standard error ‖E‖ / (‖ΔW‖ √n) on n elements, since E is as good as random
    where W is on no value of the format: then it says nothing of an update that is much smaller than the format's steps.
    Where weights were packed anew, ‖E‖ is known, for all rows were looked at.
    """
    found: dict[str, float] = {}
    for span in plan.edited:
        name, elements = span.placed.name, span.rows * span.width
        digits = FLOAT_DIGITS.get(span.placed.dtype, math.inf)
        if name in seen.lost:
            squared = seen.lost[name][0]  # ‖E‖²
        elif name in seen.norms and FLOAT_DIGITS.get(span.weight.exact, 0) > digits:  # W has values that are rounded
            squared = seen.norms[name][0] * (STEP / 2**digits) ** 2 / 12
            elements = min(elements, SAMPLED)
        else:
            continue
        for edit in span.edits:
            part = edit.rows / span.rows
            change = seen.kept.get(edit.target, (0.0, 0.0))[1]
            noise = math.sqrt(squared * part / change) if change else 0.0
            if noise > UNSURE * math.sqrt(max(1.0, elements * part)):
                found[edit.target] = max(found.get(edit.target, 0.0), noise * math.sqrt(12))
    return found


@dataclass(frozen=True)
class Errors:
    """The error that packing anew adds: ‖W' − (W + ΔW)‖ / ‖ΔW‖, of all weights that were, and of each tensor."""

    total: float | None
    tensors: dict[str, float]

    @classmethod
    def of(cls, lost: Pairs) -> Errors:
        """From both numbers of every tensor, squared."""
        errors, changes = (sum(pair[at] for pair in lost.values()) for at in (0, 1))
        tensors = {name: math.sqrt(error / change) for name, (error, change) in lost.items() if change}
        return cls(math.sqrt(errors / changes) if changes else None, tensors)


def check_loss(plan: Plan, gains: Gains, errors: Errors) -> None:
    """Raise `FitError` where packing anew takes more than half of an update away, or adds an error as large as it."""
    if plan.accepts_loss or errors.total is None or (gains.total is None and not gains.hidden):
        return
    if (gains.total is None or gains.total >= LEAST_KEPT) and errors.total <= MOST_ADDED:
        return
    worst = sorted(errors.tensors, key=lambda name: -errors.tensors[name])
    kept = f"keep {100 * gains.total:.0f} % of the update and " if gains.total is not None else ""
    raise FitError(
        f"requantised weights {kept}add an error of {shown(errors.total)} of the update's size; leave out "
        f"{plan.packed_by} to write edited weights plain, or pass --accept-loss; tensors with the largest errors first:",
        [f"{printable(name)}: {shown(errors.tensors[name])}" for name in worst],
    )


def shown(share: float) -> str:
    """A share in percent, or, where it is many times the whole, as that."""
    return f"{100 * share:.0f} %" if share < MANY else f"{share:.2g} times"


def gain_notes(plan: Plan, gains: Gains) -> Iterator[Note]:
    """Warnings where rounding takes much of the update away, and where that cannot be told."""
    finer = "--dtype float32" if plan.rounding == "compensated" else "--rounding compensated, or --dtype float32,"
    way = f"leave out {plan.packed_by}" if plan.anew else f"pass {finer}"
    every = len(gains.modules) + len(gains.hidden)
    low = {module: gain for module, gain in gains.modules.items() if gain < LEAST_GAIN}
    if low and gains.total is not None:
        text = (
            f"rounding keeps {100 * gains.total:.0f} % of the update in total, and less than {100 * LEAST_GAIN:.0f} % in "
            f"{len(low)} of {every} modules: {listed(low)}; {way} to keep it"
        )
        yield Note("update-lost-in-rounding", text)
    if gains.hidden:
        least, most = min(gains.hidden.values()), max(gains.hidden.values())
        times = f"{most:.2g}" if f"{least:.2g}" == f"{most:.2g}" else f"{least:.2g} to {most:.2g}"
        text = (
            f"how much of the update survives rounding is not measurable in {len(gains.hidden)} of {every} modules: "
            f"{listed(gains.hidden)}; the update is {times} times smaller than the steps of its format; {way} to keep it"
        )
        yield Note("gain-not-measurable", text)
