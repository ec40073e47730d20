"""One budget over many weights: how many directions each cluster of products gets, and which clustering each weight.

Each weight offers curves, what is kept against what it costs. The best choice at a price μ for a byte is the largest
kept − μ cost of every curve by itself, and the price is found by bisection; what that leaves of the budget is spent step
by step. Each product alone is among the clusterings, which is truncation, so that sharing never keeps less.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

STEPS = 200  # of bisection
CHEAPEST = 1e-12  # of the dearest price: below it, what is kept is rounding


@dataclass(frozen=True)
class Curve:
    """What a cluster keeps with 0, 1, … directions, Σ ω‖·‖², and what they cost."""

    kept: tuple[float, ...]
    costs: tuple[float, ...]

    @cached_property
    def corners(self) -> tuple[list[int], list[float]]:
        """The numbers of directions that some price makes the best, and the prices below which each of them is."""
        ranks, prices = [0], [math.inf]
        for rank in range(1, len(self.kept)):
            while len(ranks) > 1 and self.slope(ranks[-1], rank) >= prices[-1]:
                ranks.pop()
                prices.pop()
            if (price := self.slope(ranks[-1], rank)) > 0:
                ranks.append(rank)
                prices.append(price)
        return ranks, [-price for price in prices]

    def slope(self, first: int, last: int) -> float:
        """What directions keep for their cost; those that cost nothing are worth any price."""
        gain, cost = self.kept[last] - self.kept[first], self.costs[last] - self.costs[first]
        if cost > 0:
            return gain / cost
        return math.inf if gain > 0 else 0.0

    def best(self, price: float) -> int:
        """How many directions are worth a price."""
        ranks, prices = self.corners
        return ranks[max(0, bisect_left(prices, -price) - 1)]

    def dearest(self) -> float:
        """The price above which nothing is worth it."""
        return -min(self.corners[1][1:2], default=0.0)

    def step(self, rank: int) -> tuple[float, float]:
        """What one direction more keeps and costs; (0, ∞) where there is none."""
        if rank + 1 >= len(self.kept):
            return 0.0, math.inf
        return self.kept[rank + 1] - self.kept[rank], self.costs[rank + 1] - self.costs[rank]


Offer = Sequence[Sequence[Curve]]  # of a weight: the curves of each clustering


@dataclass(frozen=True)
class Choice:
    """What a weight gets: a clustering, and the directions of each of its clusters."""

    clustering: int
    ranks: tuple[int, ...]

    def kept(self, offer: Offer) -> float:
        return math.fsum(curve.kept[rank] for curve, rank in zip(offer[self.clustering], self.ranks, strict=True))

    def cost(self, offer: Offer) -> float:
        return math.fsum(curve.costs[rank] for curve, rank in zip(offer[self.clustering], self.ranks, strict=True))


def kept_by(offers: Sequence[Offer], choices: Sequence[Choice]) -> float:
    return math.fsum(choice.kept(offer) for choice, offer in zip(choices, offers, strict=True))


def cost_of(offers: Sequence[Offer], choices: Sequence[Choice]) -> float:
    return math.fsum(choice.cost(offer) for choice, offer in zip(choices, offers, strict=True))


def at_price(offers: Sequence[Offer], price: float) -> list[Choice]:
    """The best choice of every weight at a price."""
    found = []
    for offer in offers:
        each = [Choice(at, tuple(curve.best(price) for curve in curves)) for at, curves in enumerate(offer)]
        found.append(max(each, key=lambda choice, offer=offer: choice.kept(offer) - price * choice.cost(offer)))  # type: ignore[misc]
    return found


def spend(offers: Sequence[Offer], budget: float) -> tuple[list[Choice], float]:
    """The choices that keep most for at most `budget`, and the price μ from which they are the best."""
    _, choices, price = bisected(offers, lambda found: cost_of(offers, found) <= budget)
    return with_rest(offers, choices, budget=budget), price


def spend_least(offers: Sequence[Offer], wanted: float) -> tuple[list[Choice], float]:
    """The cheapest choices that keep at least `wanted`, and their price."""
    enough, too_little, price = bisected(offers, lambda found: kept_by(offers, found) < wanted)
    stepped = with_rest(offers, too_little, wanted=wanted)
    fits = kept_by(offers, stepped) >= wanted and cost_of(offers, stepped) <= cost_of(offers, enough)
    return stepped if fits else enough, price


def bisected(
    offers: Sequence[Offer], holds: Callable[[Sequence[Choice]], bool]
) -> tuple[list[Choice], list[Choice], float]:
    """Choices on both sides of the price from which something holds: the last without and the first with it, and the price."""
    high = 2 * max((curve.dearest() for offer in offers for curves in offer for curve in curves), default=0.0)
    low = CHEAPEST * high
    below = at_price(offers, low)
    if holds(below):
        return below, below, low
    above = at_price(offers, high)
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        if middle <= low or middle >= high:
            break
        choices = at_price(offers, middle)
        if holds(choices):
            above, high = choices, middle
        else:
            below, low = choices, middle
    return below, above, high


def with_rest(
    offers: Sequence[Offer], choices: Sequence[Choice], budget: float = math.inf, wanted: float = math.inf
) -> list[Choice]:
    """The same with one direction more wherever that keeps most for its cost, within a budget, until enough is kept."""
    ranks = [list(choice.ranks) for choice in choices]
    spent, held = cost_of(offers, choices), kept_by(offers, choices)
    queue: list[tuple[float, int, int]] = []

    def offer_step(at: int, cluster: int) -> None:
        gain, cost = offers[at][choices[at].clustering][cluster].step(ranks[at][cluster])
        if gain > 0 and spent + cost <= budget:
            heapq.heappush(queue, (-gain / cost, at, cluster))

    for at, choice in enumerate(choices):
        for cluster in range(len(choice.ranks)):
            offer_step(at, cluster)
    while queue and held < wanted:
        _, at, cluster = heapq.heappop(queue)
        gain, cost = offers[at][choices[at].clustering][cluster].step(ranks[at][cluster])
        if spent + cost > budget:
            continue  # its later ones are worth less still
        spent, held = spent + cost, held + gain
        ranks[at][cluster] += 1
        offer_step(at, cluster)
    return [Choice(choice.clustering, tuple(rank)) for choice, rank in zip(choices, ranks, strict=True)]
