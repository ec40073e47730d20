"""A second look at some rows of a tensor that is not the formula's, to find out what it is instead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from loratool.algebra.rounding import round_once
from loratool.bases.edits import Edit
from loratool.bases.packed import Requantizable
from loratool.bases.weights import Room
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import Tensor, torch
from loratool.measuring.sampling import sample
from loratool.merging.output_layout import Span
from loratool.merging.shared_updates import SharedUpdates
from loratool.verifying.distances import ulp_of
from loratool.verifying.pairing import Pair
from loratool.verifying.quantised import least_rows
from loratool.verifying.updates import MOST_MODULES, Updates, doubt_of, modules_of, rounded_twice

MOST_NOISE = 6.0  # times what packing adds: a tensor that is no farther from the formula may be packed by any method
BETWEEN = 0.93  # times a weight: a value between those of its format
SAME_VALUE = 2.0**-18  # of a value of a format: tools decode it in other orders
SAMPLED = 1 << 16  # elements of a tensor that are looked at
STEPS = 6  # of the fit, through the rounding
SURE = 4.0  # standard errors
SLACK = 0.01  # of a factor: what the ways to round differ in
LITTLE = 0.1  # a factor of no more says that an update is not what changed a weight


@dataclass(frozen=True)
class Agreement:
    """How near some rows are to what they would be."""

    equal: float  # share of elements that are the same number
    near: float  # share of those within 2 ulp
    ulp: float  # the largest distance

    @property
    def holds(self) -> bool:
        """Whether it explains nearly all elements."""
        return self.near >= 0.99

    def is_better(self, other: Agreement) -> bool:
        """Whether it explains the rows and another does not, or clearly less of them."""
        return self.holds and (not other.holds or 1 - self.equal < (1 - other.equal) / 2)


@dataclass(frozen=True)
class Fit:
    """How much of each update is in some rows, by least squares."""

    factors: tuple[float, ...]
    errors: tuple[float, ...]  # standard errors
    # of each update, the codes of the causes that make the same values; empty where its error tells
    causes: tuple[tuple[str, ...], ...] = ()

    def having(self, number: int, factor: float) -> Fit:
        """The same with another factor for one update."""
        return dataclasses.replace(self, factors=(*self.factors[:number], factor, *self.factors[number + 1 :]))

    def is_one(self, number: int, slack: float = SLACK) -> bool:
        """Whether an update is in it once, as far as the rows tell."""
        return abs(self.factors[number] - 1) <= SURE * self.errors[number] + slack

    def has(self, number: int) -> bool:
        """Whether any of an update is in it for certain."""
        return abs(self.factors[number]) > SURE * self.errors[number] + LITTLE


class Look:
    """Some rows of a tensor: W, W' of the merged model, and what each module adds."""

    def __init__(self, pair: Pair, beyond: Sequence[int], shared: SharedUpdates | None = None) -> None:
        """`beyond` are rows that are to be among them; `shared` has updates that several tensors share."""
        self.pair, self.span = pair, pair.span
        self.target: torch.dtype = getattr(torch, FLOAT_NAMES[pair.span.placed.dtype])
        self.runs = [*runs_of(pair.span, pair.rows)]
        seen = [range(first, first + count) for first, count in self.runs]
        self.runs += [(row, 1) for row in beyond if row < pair.rows and not any(row in rows for rows in seen)]
        self.first: torch.dtype | None = None  # to which values are taken to be rounded before they are packed
        theirs = pair.theirs.matrix(pair.span.width)
        self.packed = theirs if isinstance(theirs, Requantizable) else None
        if (least := least_rows(theirs, pair.span.width)) > 1:
            self.runs = whole_runs(self.runs, least, pair.span.rows)
        self.stored, self.theirs = self.read()
        self.edits = with_factors(pair.span.edits, shared or SharedUpdates(1))
        self.scales: list[float] = []
        self.weight, self.changes = self.rows_with(None)
        self.modules = modules_of(pair.span.edits)
        self.doubt = doubt_of(pair.span)

    def read(self) -> tuple[Tensor, Tensor]:
        """W as it is stored, and W' of the merged model, (n, width) in float64."""
        span, cpu = self.span, torch.device("cpu")
        exact: torch.dtype = getattr(torch, FLOAT_NAMES[span.weight.exact])
        theirs = self.pair.theirs.matrix(span.width)
        stored, others = [], []
        with OpenSources() as sources:
            own, other = Room(sources), Room(sources)  # each holds parts of one weight
            for first, count in self.runs:
                stored.append(span.matrix.rows(first, count, cpu, exact, own).double())
                others.append(theirs.rows(first, count, cpu, self.target, other).double())
        return torch.cat(stored), torch.cat(others)

    def rows_with(self, edits: Sequence[Edit] | None, dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
        """W, with what replaces some of it, and what each module adds: the span's own edits, or others in their place.

        `dtype` is one to which factors are rounded first.
        """
        updates = Updates(self.span, torch.device("cpu"), self.edits if edits is None else edits, dtype)
        self.scales = updates.scales if edits is None else self.scales
        weights: list[Tensor] = []
        changes: list[list[Tensor]] = []
        at = 0
        for first, count in self.runs:
            weights.append(updates.begin(self.stored[at : at + count], first))
            changes.append(updates.changes(weights[-1], first))
            at += count
        return torch.cat(weights), [torch.cat(each) for each in zip(*changes, strict=True)]

    def once(self, weight: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """W' rounded once, in float64."""
        return self.rounded(sum(changes, weight))

    def rounded(self, values: Tensor) -> Tensor:
        """What becomes of values, (n, width) of float64, that go into the merged model, in float64 again.

        Of a quantised one they are the nearest that its own scales give.
        """
        if self.packed is None:
            return round_once(values, self.target).double()
        if self.first is not None:
            values = round_once(values, self.first).double()
        found, at, lines = [], 0, self.span.width // max(1, self.packed.line)
        for first, count in self.runs:
            rows = values[at : at + count].float().reshape(-1, self.packed.line)
            packed = self.packed.encode(rows, first * lines, self.parameters)
            decoded = self.packed.decode_packed(packed, first * lines, len(rows), self.parameters)
            found.append(decoded.double().reshape(count, -1))
            at += count
        return torch.cat(found)

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """The scales and the like that the merged model has for a quantised weight."""
        assert self.packed is not None
        with OpenSources() as sources:
            return self.packed.parameters(Room(sources))

    @cached_property
    def grain(self) -> Tensor:
        """(n, width) of float64: the square of what rounding adds to an element, on average over elements like it."""
        if self.packed is None:
            return ulp_of(self.theirs.abs(), self.target).square() / 12
        between = self.weight * BETWEEN
        return (self.rounded(between) - between).square()

    def twice(self, coarse: bool = False) -> Agreement:
        """How near the merged model is to W' with each change rounded before it is added; `coarse`: factors were too."""
        weight, changes = self.rows_with(None, self.target) if coarse else (self.weight, self.changes)
        ways = [rounded_twice(weight, changes, self.target, scales) for scales in ((), self.scales)]
        return max((self.agreement(each.double()) for each in ways), key=lambda each: each.equal)

    def agreement(self, formula: Tensor) -> Agreement:
        """How near the merged model is to some values."""
        weight = self.weight
        size = torch.maximum(torch.maximum(weight.abs(), formula.abs()), (formula - weight).abs())
        apart = (self.theirs - formula).abs()
        apart = (apart - self.doubt).clamp(min=0) if self.doubt else apart
        distance = (apart / ulp_of(size, self.target)).nan_to_num(math.inf, math.inf)
        distance[self.theirs.isnan() & formula.isnan()] = 0
        if self.packed is not None:  # another value of the format is another one
            distance = torch.where(apart <= formula.abs() * SAME_VALUE, 0.0, math.inf)
        count = distance.numel()
        return Agreement(
            float((distance == 0).sum()) / count, float((distance <= 2).sum()) / count, float(distance.max())
        )

    def scaled(self, fit: Fit) -> list[Tensor]:
        """The changes, each as often as it was found to be in the merged model."""
        return [change * factor for factor, change in zip(fit.factors, self.changes, strict=True)]

    def fit(self) -> Fit:
        """The factors f with which Σ f ΔW, added to W and rounded once, is nearest to the merged model.

        Least squares on W' − W give f but for what rounding takes from small updates; so the same is done with what
        rounding makes of W + Σ f ΔW, until both give the same. Errors are those of least squares whose residuals are
        what is left, and what rounding leaves of any element.
        """
        finite = self.theirs.isfinite().view(-1) & self.weight.isfinite().view(-1)
        design = torch.stack([change.view(-1)[finite] for change in self.changes], 1)
        sizes = torch.linalg.vector_norm(design, dim=0)  # by which a small update does not vanish beside a large one
        known = sizes != 0
        sizes[~known] = 1
        design, weight = design / sizes, self.weight.view(-1)[finite]
        applied = self.theirs.view(-1)[finite] - weight
        inverse = torch.linalg.pinv(design.T @ design, hermitian=True) / sizes[:, None]
        wanted = design.T @ applied
        factors = 1 + inverse @ (wanted - design.T @ (design @ sizes.where(known, 0)))  # 1 where nothing tells
        best, left = factors, torch.full_like(factors, math.inf)

        def rounded_with(factors: Tensor) -> Tensor:
            total = self.weight + sum(f * change for f, change in zip(factors.tolist(), self.changes, strict=True))
            return self.rounded(total).view(-1)[finite] - weight

        for _ in range(STEPS):
            step = inverse @ (wanted - design.T @ rounded_with(factors))
            if float(step.abs().max()) < float(left.abs().max()):
                best, left = factors, step
            factors = factors + step
        noise = (applied - rounded_with(best)).square() + self.grain.view(-1)[finite]
        spread = inverse @ (design.T @ (design * noise[:, None])) @ inverse.T
        errors = spread.diagonal().clamp(min=0).sqrt() + torch.where(left.isfinite(), left.abs(), 0) + 1e-9
        errors[~known] = math.inf
        return Fit(tuple(best.tolist()), tuple(errors.tolist()))


def pooled(factors: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """One factor from several, by their standard errors, and the standard error of that."""
    weights = [1 / max(error, 1e-12) ** 2 for error in errors]
    total = sum(weights)
    return sum(factor * weight for factor, weight in zip(factors, weights, strict=True)) / total, 1 / math.sqrt(total)


def whole_runs(runs: Sequence[tuple[int, int]], together: int, rows: int) -> list[tuple[int, int]]:
    """Runs of rows that begin and end where rows are not packed together; rows of several of them are there once."""
    found: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        start, stop = first // together * together, min(rows, -(-(first + count) // together) * together)
        start = max(start, found[-1][0] + found[-1][1]) if found else start
        if stop > start:
            found.append((start, stop - start))
    return found


def with_factors(edits: Sequence[Edit], shared: SharedUpdates) -> tuple[Edit, ...]:
    """Edits whose updates are loaded in float64, but for replacements, which are read row by row."""
    cpu = torch.device("cpu")
    others = {id(edit.update): edit for edit in edits if not edit.update.replaces}
    loaded = {key: shared.load(edit, cpu, torch.float64) for key, edit in others.items()}
    return tuple(dataclasses.replace(edit, update=loaded.get(id(edit.update), edit.update)) for edit in edits)


def runs_of(span: Span, rows: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of runs that are spread over what each edit covers, and over what none does."""
    ends = (row for edit in span.edits for row in (edit.first_row, edit.first_row + edit.rows))
    cuts = {0, rows, *(min(row, rows) for row in ends)}
    edges = sorted(cuts) if len(cuts) <= MOST_MODULES + 1 else [0, rows]
    wanted = max(1, SAMPLED // max(1, span.width) // (len(edges) - 1))
    for start, stop in pairwise(edges):
        yield from ((start + first, count) for first, count in sample(stop - start, wanted) if count)
