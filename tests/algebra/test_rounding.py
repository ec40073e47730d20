"""Rounding is that of exact arithmetic: compared with rational numbers, ties and near-ties planted."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch
from exactly import exact_products, nearest_value, spelled

from loratool.algebra.rational import nearest
from loratool.algebra.rounding import FEW, exact_sums, round_once

NARROW = [torch.bfloat16, torch.float16]
EVERY = [*NARROW, torch.float32, torch.float64]


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """Float64 numbers that are hard to round to `dtype`: ties, half a step ± 2⁻⁶⁰, subnormals, the ends of the range."""
    generator = torch.Generator().manual_seed(0)
    about = torch.finfo(dtype)
    values = torch.randn(300, generator=generator, dtype=torch.float64)
    sizes = torch.cat([values, values * about.smallest_normal, values[:20] * about.smallest_normal * about.eps])
    near = sizes.to(dtype)
    step = (near.double().abs().log2().floor().exp2() * about.eps).clamp(min=about.smallest_normal * about.eps)
    ties = near.double() + step / 2
    largest = torch.tensor([about.max], dtype=torch.float64)
    edge = largest * (1 + about.eps * torch.tensor([0, 0.2, 0.25, 0.26, 0.5, 0.51, 1], dtype=torch.float64))
    every = [sizes, ties, ties * (1 + 2.0**-50), ties * (1 - 2.0**-50), edge, -ties, torch.tensor([0.0, -0.0])]
    values = torch.cat(every)
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
def test_float64_is_rounded_once(dtype: torch.dtype) -> None:
    values = awkward(dtype)
    rounded = round_once(values, dtype)
    for value, got in zip(values.tolist(), rounded.double().tolist(), strict=True):
        wanted = nearest_value(Fraction(value), dtype) if value else value
        assert spelled(got) == spelled(wanted), value


def test_by_way_of_float32_some_would_be_rounded_twice() -> None:
    values = awkward(torch.bfloat16)
    assert not torch.equal(values.to(torch.bfloat16), round_once(values, torch.bfloat16))


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=torch.float64)
    assert [spelled(v) for v in round_once(values, dtype).double().tolist()] == ["inf", "-inf", "nan"]


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_rational_numbers_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    for value in awkward(dtype)[::7].tolist():
        for exact in (Fraction(value), Fraction(value) * (1 + Fraction(1, 2**200)), Fraction(value) / 3):
            assert nearest(exact, dtype) == nearest_value(exact, dtype)


@pytest.mark.parametrize("scale", [2.0, 0.3, -1 / 3, 2.0**-70])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_sums_of_products_are_those_of_rational_numbers(dtype: torch.dtype, stored: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    count, rank = 60, 3
    left, right = (torch.randn(rank, count, generator=generator).to(stored).double() for _ in range(2))
    start = torch.randn(count, generator=generator).to(torch.bfloat16).double()
    start[:20] = -((left * right).sum(0) * scale)[:20]  # nothing is left but what float64 took away
    check(start, left, right, scale, dtype)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_ties_go_to_the_even_number_and_near_ties_to_the_nearer(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    start = torch.tensor([1.0, 1.0 + eps, 1.0, 1.0, -1.0, -1.0 - eps, -1.0], dtype=torch.float64)
    tiny = 2.0**-120
    left = torch.tensor([[eps / 2] * 4 + [-eps / 2] * 3, [0, 0, tiny, -tiny, 0, 0, tiny]], dtype=torch.float64)
    check(start, left, torch.ones_like(left), 1.0, dtype)
    check(start, left / 2, torch.ones_like(left), 2.0, dtype)


@pytest.mark.parametrize("size", [2.0**-700, 2.0**700])
def test_factors_near_the_ends_of_float64_are_exact_too(size: float) -> None:
    left = torch.tensor([[size, size], [1.0, 3.0]], dtype=torch.float64)
    right = torch.tensor([[1 / size / 3, 1 / size], [1e-9, 1.0]], dtype=torch.float64)
    check(torch.tensor([1.0, 2.0], dtype=torch.float64), left, right, 1.0, torch.bfloat16)


def test_a_zero_keeps_its_sign_only_where_it_was_one() -> None:
    start = torch.tensor([0.0, -0.0, 1.0, -0.0], dtype=torch.float64)
    left = torch.tensor([[0.0, 0.0, -1.0, 1.0], [0.0, -0.0, 0.0, -1.0]], dtype=torch.float64)
    got = exact_sums(start.numpy(), [(left.numpy(), numpy.ones((2, 4)), 1.0)], torch.bfloat16)
    assert [spelled(v) for v in got.tolist()] == ["0.0", "-0.0", "0.0", "-0.0"]


@pytest.mark.parametrize("many", [1, FEW + 1])
def test_what_is_rounded_to_zero_has_the_sign_of_the_sum_wherever_it_began(many: int) -> None:
    """Error-free sums lose 2⁻¹⁴⁰ beside 1 and 2⁻⁶⁰, which cancel."""
    terms = torch.tensor([1, 2.0**-60, 2.0**-140, -1, -(2.0**-60)], dtype=torch.float64)
    left = torch.stack([terms, terms, -terms, -terms], 1).repeat(1, many).numpy()
    start = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=torch.float64).repeat(many)
    got = exact_sums(start.numpy(), [(left, numpy.ones_like(left), 1.0)], torch.float16)
    assert [spelled(v) for v in got.tolist()] == ["0.0", "0.0", "-0.0", "-0.0"] * many


def check(start: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
    """Few elements and many come by their sums in different ways."""
    many = FEW // len(start) + 1
    got = exact_sums(start.numpy(), [(left.numpy(), right.numpy(), scale)], dtype)
    lefts, rights = (factor.repeat(1, many).numpy() for factor in (left, right))
    again = exact_sums(start.repeat(many).numpy(), [(lefts, rights, scale)], dtype)
    assert len(start) <= FEW < len(again)
    assert torch.equal(again, got.repeat(many))
    for at, value in enumerate(got.double().tolist()):
        exact = Fraction(float(start[at])) + exact_products(left[:, at].tolist(), right[:, at].tolist(), scale)
        assert value == nearest_value(exact, dtype), at
