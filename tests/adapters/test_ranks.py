"""Which rank each layer gets, against brute force."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, strategies as st

from loratool.adapters.ranks import RankRule
from loratool.errors import UsageError
from loratool.reworking.resize import ResizeOptions


@dataclass(frozen=True)
class Layer:
    """As much of a layer as a rule looks at."""

    module: str
    rows: int = 10
    columns: int = 10

    @property
    def parameters(self) -> int:
        return self.rows + self.columns

    @property
    def most(self) -> int:
        return min(self.rows, self.columns)


def rule(weights: dict[str, float] | None = None, uniform: bool = False, **asked: Any) -> RankRule:
    return ResizeOptions(layer_weights=weights, uniform=uniform, **asked).rule()


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
        ("1T", 10**12, False),
        ("2ki", 2048, False),
        ("0.5MiB", 1 << 19, True),
        ("100", 100, False),
        (" 4m ", 4 * 10**6, False),
        ("1gib", 1 << 30, True),
    ],
)
def test_a_budget_is_of_numbers_or_of_bytes_whatever_its_case_and_spaces(
    text: Any, number: float, in_bytes: bool
) -> None:
    found = rule(budget=text)
    assert (found.number, found.in_bytes) == (number, in_bytes)


def test_bytes_count_by_the_size_of_a_number() -> None:
    energies = {"a.weight": [4.0, 3.0, 2.0]}
    assert choose(rule(budget="80B"), energies) == {"a.weight": 2}  # 20 numbers a rank, 2 bytes each


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "(got none)"),
        ({"rank": 4, "energy": 0.9}, "--rank and --energy"),
        ({"rank": 0}, "a whole number of at least 1"),
        ({"rank": -3}, "a whole number of at least 1"),
        ({"energy": 0}, "above 0 and at most 1"),
        ({"energy": 1.5}, "above 0 and at most 1"),
        ({"energy": math.nan}, "above 0 and at most 1"),
        ({"error": 1}, "[0, 1)"),
        ({"error": -0.1}, "a finite number of at least 0"),
        ({"ratio": 1}, "above 1"),
        ({"budget": "much"}, "4M"),
        ({"budget": 0}, "4M"),
        ({"rank": 4, "weights": {"q": 2.0}}, "needs --budget"),
        ({"budget": 9, "weights": {"q": -1.0}}, "must be a number of at least 0"),
        ({"budget": 9, "weights": {"q": math.inf}}, "must be a number of at least 0"),
        ({"rank": 2.5}, "--rank must be a whole number"),
        ({"rank": math.inf}, "a whole number of at least 1"),
        ({"rank": math.nan}, "a whole number of at least 1"),
        ({"energy": -0.1}, "--energy must be above 0"),
        ({"energy": math.inf}, "above 0 and at most 1"),
        ({"error": math.nan}, "a finite number of at least 0"),
        ({"error": 1.5}, "[0, 1)"),
        ({"ratio": 0.5}, "above 1"),
        ({"ratio": math.nan}, "above 1"),
        ({"ratio": -3}, "above 1"),
        ({"budget": -7}, "4M"),
        ({"rank": 1, "energy": 0.5, "budget": 3}, "--rank and --energy and --budget"),
        ({"energy": 0.5, "weights": {"q": 2.0}}, "needs --budget"),
        ({"budget": 9, "weights": {"q": math.nan}}, "must be a number of at least 0"),
        ({"budget": 9, "weights": {"q": "much"}}, "must be a number of at least 0"),
        ({"budget": 9, "weights": {"q": None}}, "must be a number of at least 0"),
        ({"budget": 9, "weights": {"q": True}}, "must be a number of at least 0"),
    ],
)
def test_numbers_out_of_range_and_rules_at_odds_are_refused_by_name(words: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        rule(**words)


def test_a_rank_that_a_weight_cannot_have_is_cut_to_the_most_it_can() -> None:
    """The smaller side of a layer bounds its rank; with `uniform` it is filled up to the rank all the same."""
    energies = {"a.weight": [1.0], "b.weight": [1.0]}
    assert choose(rule(rank=6), energies, {"a.weight": (4, 100)}) == {"a.weight": 4, "b.weight": 6}
    assert choose(rule(rank=6, uniform=True), energies, {"a.weight": (4, 100)}) == {"a.weight": 6, "b.weight": 6}


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="nowhere"):
        choose(rule(budget=100, weights={"nowhere": 2.0}), {"a.weight": [1.0]})
    with pytest.raises(UsageError, match="regular expression"):
        choose(rule(budget=100, weights={"(": 2.0}), {"a.weight": [1.0]})


def brute(values: list[float], fits: Any) -> int:
    return next(rank for rank in range(1, len(values) + 1) if fits(rank))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.sampled_from([0.25, 0.5, 0.75, 0.9, 1.0]))
def test_rules_on_whole_numbers_are_those_of_brute_force(values: list[int], part: float) -> None:
    """Whole numbers and dyadic parts, so that equality is met as often as not."""
    squares = [float(v) for v in sorted(values, reverse=True)]
    total = sum(squares)
    (kept,) = choose(rule(energy=part), {"a.weight": squares}).values()
    assert kept == brute(squares, lambda rank: sum(squares[:rank]) >= part * total - 1e-9)
    (kept,) = choose(rule(error=math.sqrt(1 - part)), {"a.weight": squares}).values()
    assert kept == brute(squares, lambda rank: sum(squares[rank:]) <= (1 - part) * total + 1e-9)
    ratio = 1 / (1 - part / 2)
    (kept,) = choose(rule(ratio=ratio), {"a.weight": squares}).values()
    assert kept == max(1, sum(math.sqrt(v) > math.sqrt(squares[0]) / ratio * (1 + 1e-12) for v in squares))


def test_equal_singular_values_are_kept_as_far_as_is_asked() -> None:
    four = {"a.weight": [2.0, 2.0, 2.0, 2.0]}
    assert choose(rule(energy=0.5), four) == {"a.weight": 2}
    assert choose(rule(energy=0.51), four) == {"a.weight": 3}
    assert choose(rule(error=0.5), four) == {"a.weight": 3}  # what is lost is a quarter of the squares
    assert choose(rule(ratio=1.001), four) == {"a.weight": 4}
    assert choose(rule(budget=60), four) == {"a.weight": 3}


@given(st.lists(SPECTRA, min_size=1, max_size=4), st.integers(20, 400), st.sampled_from([1, 2, 4]))
def test_a_budget_over_layers_of_one_size_is_spent_as_well_as_can_be(
    spectra: list[list[float]], budget: int, itemsize: int
) -> None:
    energies = {f"{at}.weight": values for at, values in enumerate(spectra)}
    layers: Any = {t: Layer(t.removesuffix(".weight")) for t in energies}
    asked = rule(budget=f"{budget * itemsize}B") if itemsize > 1 else rule(budget=budget)
    if not any(values[0] for values in spectra):
        return
    found = asked.choose(layers, energies, itemsize)
    kept = math.fsum(v for t, values in energies.items() for v in values[: found[t]])
    best = math.fsum(sorted((v for values in spectra for v in values), reverse=True)[: budget // 20])
    assert kept == pytest.approx(best, rel=1e-12)
    assert 20 * sum(found.values()) <= budget


@given(st.lists(SPECTRA, min_size=1, max_size=3), st.integers(43, 300))
def test_what_is_left_of_a_budget_buys_no_further_rank(spectra: list[list[float]], budget: int) -> None:
    sizes = [(10, 10), (20, 5), (3, 40)]
    energies = {f"{at}.weight": values for at, values in enumerate(spectra)}
    if not any(values[0] for values in spectra):
        return
    found = choose(rule(budget=budget), energies, {f"{at}.weight": sizes[at] for at in range(len(spectra))})
    costs = {f"{at}.weight": sum(sizes[at]) for at in range(len(spectra))}
    left = budget - sum(found[t] * costs[t] for t in found)
    assert left >= 0
    for target, values in energies.items():
        more = values[found[target] :]
        assert not more or more[0] == 0 or costs[target] > left


def test_a_budget_for_everything_takes_all_that_is_there_and_no_zeros() -> None:
    energies = {"a.weight": [3.0, 1e-9, 0.0], "b.weight": [2.0, 1.0, 1.0], "c.weight": [0.0, 0.0]}
    assert choose(rule(budget="1G"), energies) == {"a.weight": 2, "b.weight": 3, "c.weight": 0}


def test_the_first_pattern_that_matches_weighs_a_layer_and_others_weigh_one() -> None:
    energies = {f"model.{at}.{name}.weight": [1.0] for at in (0, 1) for name in ("q", "v")}

    def first(weights: dict[str, float]) -> list[str]:
        found = choose(rule(budget=20, weights=weights), energies)
        return [target for target, rank in found.items() if rank]

    assert first({"v": 2.0}) == ["model.0.v.weight"]
    assert first({r"model\.1\.v": 3.0, "v": 2.0}) == ["model.1.v.weight"]
    assert first({"v": 0.5, r"model\.1\.v": 3.0}) == ["model.0.q.weight"]  # the second pattern is never reached
    assert first({"q": 0.0, r"model\.0\.v": 0.0}) == ["model.1.v.weight"]


def test_the_squares_of_weights_are_not_taken() -> None:
    energies = {"a.weight": [4.0], "b.weight": [1.5]}
    assert choose(rule(budget=20, weights={"b": 2.0}), energies) == {"a.weight": 1, "b.weight": 0}
    assert choose(rule(budget=20, weights={"b": 3.0}), energies) == {"a.weight": 0, "b.weight": 1}


@pytest.mark.parametrize(
    "text", ["", "M", "-4M", "+4", "4Q", "1e3", "nan", "inf", "4 M B", "0x10", "1,5k", "4MBs", "MB4", "1.k", "½", "0.5"]
)
def test_a_budget_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="a number of parameters such as 4M, or of bytes such as 16MB"):
        rule(budget=text)


def test_a_budget_too_small_is_refused_with_the_least_that_is_enough() -> None:
    sizes = {"a.weight": (30, 40), "b.weight": (10, 15)}
    energies = {"a.weight": [9.0], "b.weight": [1.0]}
    with pytest.raises(UsageError, match=r"^--budget 24 parameters is too small: .* takes 25 parameters"):
        choose(rule(budget=24), energies, sizes)
    assert choose(rule(budget=25), energies, sizes) == {"a.weight": 0, "b.weight": 1}
    with pytest.raises(UsageError, match="takes 50 bytes"):
        choose(rule(budget="49B"), energies, sizes)


@given(st.lists(SPECTRA, min_size=1, max_size=3), st.integers(43, 300))
def test_a_budget_is_a_ceiling_also_where_all_layers_get_one_rank(spectra: list[list[float]], budget: int) -> None:
    sizes = [(10, 10), (20, 5), (3, 40)]
    energies = {f"{at}.weight": values for at, values in enumerate(spectra)}
    try:
        found = choose(
            rule(budget=budget, uniform=True), energies, {f"{at}.weight": sizes[at] for at in range(len(spectra))}
        )
    except UsageError:
        return
    assert sum(found[f"{at}.weight"] * sum(sizes[at]) for at in range(len(spectra))) <= budget
    assert len({rank for rank in found.values() if rank}) == 1
