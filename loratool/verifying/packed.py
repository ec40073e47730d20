"""What one quantised tensor of a merged model is: the formula's, or something that has a name.

What quantisation adds to W + ΔW is as good as random, so least squares on ΔW tell how much of an update is in a tensor
whatever packed it. A format rounds to few values, though: where a tensor was packed to the nearest ones, the right formula
gives all of its elements, and any other one does not.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from loratool.bases.packed import Requantizable
from loratool.lazy import torch
from loratool.merging.plan import Plan
from loratool.merging.shared_updates import SharedUpdates
from loratool.verifying.distances import Distances
from loratool.verifying.explaining import (
    ELEMENTS,
    FACTOR,
    GUESS,
    PARAMETERS,
    QUANTISED,
    UNEXPLAINED,
    Explained,
    best_guess,
    known_fit,
    with_factors,
)
from loratool.verifying.guesses import Guess, guesses
from loratool.verifying.looking import MOST_NOISE, SLACK, SURE, Fit, Look
from loratool.verifying.options import TWICE
from loratool.verifying.pairing import Pair
from loratool.verifying.updates import modules_of

VAGUE = (ELEMENTS, QUANTISED, UNEXPLAINED)  # what a scale that is off may look like
KNOWN_WELL = 0.1  # a factor with a larger error is not told from a tensor that was not packed to the nearest values


@dataclass(frozen=True)
class Survived:
    """What is left of an update after it was quantised."""

    gain: float  # ⟨W' − W, ΔW⟩ / ‖ΔW‖²
    error: float  # ‖W' − W − ΔW‖ / ‖ΔW‖


def explain_packed(pair: Pair, distances: Distances, plan: Plan, shared: SharedUpdates) -> Explained:
    """What a quantised tensor is some of whose elements are not the nearest to the formula."""
    if not isinstance(pair.theirs, Requantizable):
        return Explained("different", QUANTISED, "", tuple(modules_of(pair.span.edits)), packed=True)
    found = dataclasses.replace(explained(Look(pair, distances.rows, shared), distances, plan), packed=True)
    if distances.parameters and (found.status != "different" or found.kind in VAGUE):
        return dataclasses.replace(found, status="different", kind=PARAMETERS, rounding="")
    return found


def explained(look: Look, distances: Distances, plan: Plan) -> Explained:
    """The same of some rows of a tensor of a format that can be packed."""
    modules = tuple(look.modules)
    fit = look.fit() if modules else None
    as_meant = fit is None or all(map(fit.is_one, range(len(modules))))
    if as_meant and not distances.beyond:
        return Explained("rounded-twice", rounding=TWICE, modules=modules, fit=fit)
    for look.first in (None, torch.bfloat16, torch.float16):
        if found := exactly(look, fit, plan, distances):
            return found
    look.first = None
    noise = MOST_NOISE * float(look.grain.sum())
    left = off_by(look, fit)
    if left**2 <= noise:
        odd = fit is not None and not as_meant and max(fit.errors) <= KNOWN_WELL
        return Explained("different", FACTOR if odd else QUANTISED, "", modules, fit)
    if guess := best_in_noise(look, plan, noise):
        return Explained("different", GUESS, "", modules, fit, guess)
    size = float(torch.linalg.vector_norm(look.weight))
    return Explained("different", UNEXPLAINED, "", modules, fit, residual=left / size if size else math.inf)


def exactly(look: Look, fit: Fit | None, plan: Plan, distances: Distances) -> Explained | None:
    """What gives nearly all elements of a tensor that was packed to the nearest values; None where nothing does."""
    modules = tuple(look.modules)
    once = look.agreement(look.once(look.weight, look.changes))
    best = look.agreement(look.once(look.weight, look.scaled(fit))) if fit is not None else once
    known = known_fit(look, fit, best, plan) if fit is not None else None
    told = look.agreement(look.once(look.weight, look.scaled(known))) if known is not None else once
    guess = best_guess(look, plan, max(once, best, told, key=lambda each: each.equal))
    if guess is not None:
        return Explained("different", GUESS, "", modules, fit, guess)
    if once.holds and not told.is_better(once):
        if not distances.beyond:
            return Explained("rounded-twice", rounding=TWICE, modules=modules, fit=fit)
        return Explained("different", ELEMENTS, "", modules, fit)
    found = with_factors(look, known, plan)
    return dataclasses.replace(found, fit=surely(found.fit)) if found and found.fit else None


def surely(fit: Fit) -> Fit:
    """Factors that give what 1 does not: their errors are no reason to take them for 1."""
    errors = (
        min(error, abs(factor - 1) / (2 * SURE)) if abs(factor - 1) > SLACK else error
        for factor, error in zip(fit.factors, fit.errors, strict=True)
    )
    return dataclasses.replace(fit, errors=tuple(errors))


def best_in_noise(look: Look, plan: Plan, noise: float) -> Guess | None:
    """The guess that leaves least of W' − W, where that is no more than what packing adds."""
    found: dict[float, Guess] = {}
    for guess in guesses(dataclasses.replace(look.span, edits=look.edits), plan):
        weight, changes = look.rows_with(guess.edits)
        found[float((look.theirs - sum(changes, weight)).square().sum())] = guess
    return found[min(found)] if found and min(found) <= noise else None


def off_by(look: Look, fit: Fit | None) -> float:
    """‖W' − W − Σ f ΔW‖, the smaller one of what f = 1 and what the fitted factors leave."""
    formulas = [look.changes, *([look.scaled(fit)] if fit is not None else [])]
    totals = [sum(changes, look.weight) for changes in formulas]
    return min(float(torch.linalg.vector_norm(look.theirs - total)) for total in totals)


def survived(look: Look) -> Survived | None:
    """What is left of all updates of a tensor together, on the rows that are looked at."""
    change = torch.stack(look.changes).sum(0) if look.changes else torch.zeros_like(look.weight)
    squared = float(change.square().sum())
    if not squared:
        return None
    applied = look.theirs - look.weight
    return Survived(float((applied * change).sum()) / squared, float((applied - change).norm()) / math.sqrt(squared))
