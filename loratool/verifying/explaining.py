"""What one tensor of a merged model is: the formula's, rounded in another way, or something that has a name."""

from __future__ import annotations

import dataclasses
import math
from copy import copy
from dataclasses import dataclass

from loratool.grouping import by_key
from loratool.lazy import Tensor, torch
from loratool.merging.plan import Plan
from loratool.merging.shared_updates import SharedUpdates
from loratool.results.verify import TensorProof
from loratool.verifying.causes import known_causes
from loratool.verifying.distances import Distances
from loratool.verifying.guesses import Guess, all_turned, guesses, part_alone
from loratool.verifying.halves import in_halves, off_in_part, takes_part
from loratool.verifying.looking import SURE, Agreement, Fit, Look, pooled
from loratool.verifying.options import AUTO, RESIDUAL, TWICE
from loratool.verifying.pairing import Pair
from loratool.verifying.updates import modules_of

NEAREST = "nearest"
FEW = 0.01  # of a tensor's elements: where no more are off, and the formula itself is known to few digits, all others are it
NEAR = 0.25  # of a factor: known ones that are no farther are tried as well
FACTOR, GUESS, COARSE, ELEMENTS, UNEXPLAINED = "factor", "guess", "coarse", "elements", "unexplained"
SINGLE = "single"
PART = "part"
QUANTISED = "quantised"
PARAMETERS = "parameters"


@dataclass(frozen=True)
class Explained:
    """What was found out about an edited tensor."""

    status: str  # as of `TensorProof`
    kind: str = ""  # of what is wrong: factor, guess, coarse, single, part, elements, quantised, parameters or unexplained; empty where nothing is
    rounding: str = NEAREST
    modules: tuple[tuple[int, str], ...] = ()  # that have a factor: the adapter's number and the target
    fit: Fit | None = None
    guess: Guess | None = None
    packed: bool = False  # whether it is quantised
    trained: bool = (
        False  # whether the factors are those of what was trained, and the part that was taken is there once
    )
    # ‖W' − W − Σ f ΔW‖ / ‖W‖, or, of a part that was taken from W, by how much of its size that is another one
    residual: float = 0.0

    def factors(self, adapters: int) -> tuple[float | None, ...]:
        """How much of each adapter is in the tensor, its modules together."""
        known: dict[int, list[tuple[float, float]]] = {}
        if self.fit is not None:
            own = zip(self.modules, self.fit.factors, self.fit.errors, strict=True)
            known = by_key((whose, (factor, error)) for (whose, _), factor, error in own if math.isfinite(error))
        pairs = [known.get(adapter) for adapter in range(adapters)]
        return tuple(pooled(*zip(*some, strict=True))[0] if some else None for some in pairs)

    def proof(self, distances: Distances, adapters: int) -> TensorProof:
        return TensorProof(self.status, distances.ulp, distances.equal, self.factors(adapters))


def as_it_should(pair: Pair, rounding: str = NEAREST) -> Explained:
    """Of a tensor all of whose elements are the formula's, where tensors like it are rounded in one way."""
    modules = tuple(modules_of(pair.span.edits))
    how = RESIDUAL if rounding == RESIDUAL and in_halves(pair.span.edits) else NEAREST
    return Explained("proven", rounding=how, modules=modules, fit=Fit((1.0,) * len(modules), (0.0,) * len(modules)))


def explain(pair: Pair, distances: Distances, plan: Plan, rounding: str, shared: SharedUpdates) -> Explained:
    """What a plain tensor is some of whose elements are not the formula's; some rows of it are read again."""
    look = Look(pair, distances.rows, shared)
    modules = tuple(look.modules)
    fit = look.fit() if modules else None
    once = look.agreement(look.once(look.weight, look.changes))
    scaled = look.scaled(fit) if fit is not None else []
    best = look.agreement(look.once(look.weight, scaled)) if fit is not None else once
    damaged = single_elements(distances) and not best.is_better(once)
    if fit is None or all(map(fit.is_one, range(len(modules)))):
        if found := as_meant(look, distances, fit, once, rounding):
            return found
        if not damaged and (off := off_in_part(look)) is not None:
            return Explained("different", PART, "", modules, fit, residual=off)
        few = takes_part(look.edits) and distances.beyond <= FEW * distances.elements
        damaged = damaged or few or (once.holds and not best.is_better(once))
    if damaged:  # one element that is far off may change every factor of a fit
        return Explained("different", ELEMENTS, "", modules, fit)
    if guess := best_guess(look, plan, best):
        return Explained("different", GUESS, "", modules, fit, guess)
    known = known_fit(look, fit, best, plan) if fit is not None else None
    if found := with_factors(look, known, plan):
        return found
    return Explained("different", UNEXPLAINED, "", modules, fit, residual=residual(look, scaled))


def single_elements(distances: Distances) -> bool:
    """Whether a few elements are far from the formula, or one of a small tensor, and all others are its values."""
    count = distances.unequal
    return 0 < count == distances.beyond < distances.elements and count <= max(1, FEW * distances.elements)


def with_factors(look: Look, known: Fit | None, plan: Plan) -> Explained | None:
    """What a tensor is that contains updates times `known` factors, or what was trained alone times others; else None."""
    fit = known or trained_fit(look, plan)
    return Explained("different", FACTOR, "", tuple(look.modules), fit, trained=known is None) if fit else None


def as_meant(look: Look, distances: Distances, fit: Fit | None, once: Agreement, rounding: str) -> Explained | None:
    """What a tensor is that contains each update once; None where rounding does not explain it."""
    modules, how = tuple(look.modules), RESIDUAL if rounding == RESIDUAL and in_halves(look.edits) else NEAREST
    if modules and rounding == AUTO and look.target.itemsize == 2:  # wider ones differ by the arithmetic alone
        twice = look.twice()
        how = TWICE if twice.equal > once.equal else NEAREST
        if how == TWICE and 1 < distances.ulp <= 2 and twice.ulp <= 2:
            return Explained("rounded-twice", rounding=how, modules=modules, fit=fit)
        if distances.ulp > 1 and look.twice(coarse=True).is_better(twice if how == TWICE else once):
            return Explained("different", COARSE, "", modules, fit)
    if distances.ulp <= 1:
        return Explained("proven", rounding=how, modules=modules, fit=fit)
    if look.target.itemsize == 8 and not distances.beyond_single:
        return Explained("different", SINGLE, "", modules, fit)
    return None


def best_guess(look: Look, plan: Plan, factor: Agreement) -> Guess | None:
    """The guess that explains some rows better than any factor; None where none does."""
    found, best = None, factor
    span = dataclasses.replace(look.span, edits=look.edits)  # whose factors are loaded
    for guess in guesses(span, plan):
        agreement = look.agreement(look.once(*look.rows_with(guess.edits)))
        if agreement.is_better(best):
            found, best = guess, agreement
    return found


def known_fit(look: Look, fit: Fit, best: Agreement, plan: Plan) -> Fit | None:
    """The factors that explain some rows, each a known one if that explains them as well; None where none do.

    Where an update is smaller than a step of the dtype, many factors round to nearly the same numbers.
    """
    again = look.agreement(look.once(look.once(look.weight, look.changes), look.changes))
    if again.holds and again.equal > best.equal:  # rounded in between
        return Fit((2.0,) * len(fit.factors), fit.errors)
    found = fit if best.holds else None
    edits = {(edit.adapter, edit.target): edit for edit in look.span.edits}
    named: list[tuple[str, ...]] = []
    for number, module in enumerate(look.modules):
        edit, factor = edits.get(module), fit.factors[number]
        numbers = known_causes(edit, plan.adapters[module[0]].training.rslora) if edit else ()
        alike: list[str] = []
        for cause in sorted(numbers, key=lambda cause: abs(cause.factor - factor)):
            far = abs(cause.factor - factor) > max(SURE * fit.errors[number], NEAR * abs(factor))
            if far and look.packed is None:  # values of few bits keep too little of an update for least squares
                continue
            snapped = fit.having(number, cause.factor)
            agreement = look.agreement(look.once(look.weight, look.scaled(snapped)))
            if not agreement.holds or (found is not None and agreement.equal < best.equal):
                continue
            if agreement.equal > best.equal or not alike or look.packed is None:
                fit, best, found, alike = snapped, agreement, snapped, []
            alike.append(cause.code)
        named.append(tuple(alike))
    return dataclasses.replace(found, causes=tuple(named)) if found and look.packed is not None else found


def trained_fit(look: Look, plan: Plan) -> Fit | None:
    """The factors of what was trained alone, where updates also take a part of W away; None where none explain the rows.

    Least squares on W' − (W − part), of which that part is no matter.
    """
    taken = all_turned(look.edits, part_alone)
    if not taken:
        return None
    weight, parts = look.rows_with(taken)
    trained = [change - part for change, part in zip(look.changes, parts, strict=True)]
    own = copy(look)
    own.weight, own.changes = sum(parts, weight), trained
    fit = own.fit()
    return known_fit(own, fit, own.agreement(own.once(own.weight, own.scaled(fit))), plan)


def residual(look: Look, scaled: list[Tensor]) -> float:
    """What is left of W' − W, over ‖W‖, whatever part of the updates is taken away."""
    size = float(torch.linalg.vector_norm(look.weight))
    formulas = [look.once(look.weight, changes) for changes in (scaled, look.changes, [])]
    left = min(float(torch.linalg.vector_norm(look.theirs - each)) for each in formulas)
    return left / size if size else float("inf")
