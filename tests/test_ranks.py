"""Which rank each layer gets, against brute force."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import UsageError
from loratool.ranks import RankRule


@dataclass(frozen=True)
class Layer:
    """As much of a layer as a rule looks at."""

    module: str
    rows: int = 10
    columns: int = 10

    @property
    def parameters(self) -> int:
        return self.rows + self.columns


def rule(**given_rule: Any) -> RankRule:
    words = {"rank": None, "energy": None, "error": None, "ratio": None, "budget": None, **given_rule}
    return RankRule.of(**words)


def choose(found: RankRule, energies: dict[str, list[float]], sizes: dict[str, tuple[int, int]] | None = None) -> Any:
    layers = {t: Layer(t.removesuffix(".weight"), *(sizes or {}).get(t, (10, 10))) for t in energies}
    return found.choose(layers, energies, 2)  # type: ignore[arg-type]


SPECTRA = st.lists(st.floats(0, 100), min_size=1, max_size=8).map(lambda values: sorted(values, reverse=True))


@given(SPECTRA, st.floats(0.01, 1))
def test_energy_takes_the_fewest_that_keep_that_part(values: list[float], part: float) -> None:
    (rank,) = choose(rule(energy=part), {"a.weight": values}).values()
    total = math.fsum(values)
    assert math.fsum(values[:rank]) >= part * total * (1 - 1e-9) - 1e-300
    assert rank == 1 or math.fsum(values[: rank - 1]) < part * total * (1 + 1e-9)


@given(SPECTRA, st.floats(0, 0.99))
def test_error_takes_the_fewest_that_lose_no_more(values: list[float], error: float) -> None:
    (rank,) = choose(rule(error=error), {"a.weight": values}).values()
    total = math.fsum(values)
    assert math.fsum(values[rank:]) <= error**2 * total * (1 + 1e-9)
    assert rank == 1 or math.fsum(values[rank - 1 :]) > error**2 * total * (1 - 1e-9)


def test_ratio_keeps_singular_values_above_the_largest_over_it() -> None:
    assert choose(rule(ratio=10), {"a.weight": [100.0, 4.0, 1.01, 0.99, 0.0]}) == {"a.weight": 3}


@pytest.mark.parametrize(
    "found", [rule(energy=1.0), rule(error=0.0), rule(ratio=1e9)], ids=["energy", "error", "ratio"]
)
def test_everything_is_kept_where_nothing_may_be_lost_but_zeros(found: RankRule) -> None:
    assert choose(found, {"a.weight": [3.0, 2.0, 1e-3, 0.0, 0.0]}) == {"a.weight": 3}
    assert choose(found, {"a.weight": [0.0, 0.0]}) == {"a.weight": 1}


@given(st.lists(SPECTRA, min_size=1, max_size=3), st.integers(20, 200))
def test_a_budget_keeps_as_much_as_any_choice_of_ranks_up_to_its_last_item(
    spectra: list[list[float]], budget: int
) -> None:
    sizes = [(10, 10), (20, 5), (3, 40)]
    energies = {f"{at}.weight": values for at, values in enumerate(spectra)}
    shapes = {f"{at}.weight": sizes[at] for at in range(len(spectra))}
    costs = [sum(sizes[at]) for at in range(len(spectra))]
    if min(costs) > budget or not any(values[0] for values in spectra):
        with pytest.raises(UsageError):
            choose(rule(budget=budget), energies, shapes)
        return
    try:
        found = choose(rule(budget=budget), energies, shapes)
    except UsageError:  # what fits has no energy
        assert all(not values[0] for values, cost in zip(spectra, costs, strict=True) if cost <= budget)
        return
    ranks = [found[f"{at}.weight"] for at in range(len(spectra))]
    assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget
    kept = sum(math.fsum(values[:r]) for values, r in zip(spectra, ranks, strict=True))
    best = max(
        sum(math.fsum(values[:r]) for values, r in zip(spectra, chosen, strict=True))
        for chosen in itertools.product(*(range(len(values) + 1) for values in spectra))
        if sum(r * c for r, c in zip(chosen, costs, strict=True)) <= budget
    )
    largest = max(values[0] for values in spectra)
    slack = max(costs) / min(costs)
    assert kept >= best - largest * slack - 1e-9


def test_weights_of_layers_move_a_budget() -> None:
    energies = {"a.q.weight": [4.0, 4.0], "a.v.weight": [3.0, 3.0]}
    assert choose(rule(budget=40), energies) == {"a.q.weight": 2, "a.v.weight": 0}
    assert choose(rule(budget=40, weights={"q": 0.5}), energies) == {"a.q.weight": 0, "a.v.weight": 2}


def test_uniform_gives_every_layer_the_largest_rank() -> None:
    energies = {"a.weight": [1.0, 0.0], "b.weight": [1.0, 1.0]}
    assert choose(rule(energy=0.9, uniform=True), energies) == {"a.weight": 2, "b.weight": 2}


@pytest.mark.parametrize(
    ("text", "number", "in_bytes"),
    [
        (4000, 4000, False),
        ("4M", 4_000_000, False),
        ("1.5k", 1500, False),
        ("16MB", 16_000_000, True),
        ("12MiB", 12 << 20, True),
        ("3 GB", 3_000_000_000, True),
        ("7b", 7, True),
    ],
)
def test_a_budget_is_of_numbers_or_of_bytes(text: Any, number: float, in_bytes: bool) -> None:
    found = rule(budget=text)
    assert (found.number, found.in_bytes) == (number, in_bytes)


def test_bytes_count_by_the_size_of_a_number() -> None:
    energies = {"a.weight": [4.0, 3.0, 2.0]}
    assert choose(rule(budget="80B"), energies) == {"a.weight": 2}  # 20 numbers a rank, 2 bytes each


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "given is none"),
        ({"rank": 4, "energy": 0.9}, "--rank and --energy"),
        ({"rank": 0}, "a whole number from 1 on"),
        ({"rank": -3}, "a whole number from 1 on"),
        ({"energy": 0}, "(0, 1]"),
        ({"energy": 1.5}, "(0, 1]"),
        ({"energy": math.nan}, "(0, 1]"),
        ({"error": 1}, "[0, 1)"),
        ({"error": -0.1}, "[0, 1)"),
        ({"ratio": 1}, "above 1"),
        ({"budget": "much"}, "4M"),
        ({"budget": 0}, "4M"),
        ({"rank": 4, "weights": {"q": 2.0}}, "for a --budget"),
        ({"budget": 9, "weights": {"q": -1.0}}, "no number from 0 on"),
        ({"budget": 9, "weights": {"q": math.inf}}, "no number from 0 on"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        rule(**words)


def test_a_rank_that_a_weight_cannot_have_is_refused_with_the_most_it_can() -> None:
    energies = {"a.weight": [1.0], "b.weight": [1.0]}
    with pytest.raises(UsageError, match=r"4 is the most") as caught:
        choose(rule(rank=6), energies, {"a.weight": (4, 100)})
    assert caught.value.problems == ("a.weight: 4 × 100",)
    assert choose(rule(rank=6, uniform=True), energies, {"a.weight": (4, 100)}) == {"a.weight": 6, "b.weight": 6}


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="nowhere"):
        choose(rule(budget=100, weights={"nowhere": 2.0}), {"a.weight": [1.0]})
    with pytest.raises(UsageError, match="regular expression"):
        choose(rule(budget=100, weights={"(": 2.0}), {"a.weight": [1.0]})
