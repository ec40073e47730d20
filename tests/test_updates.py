"""What an update does to rows is what its definition says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.updates import LowRank, Replace, Update, stack


def low_rank(generator: torch.Generator, rows: int, columns: int, rank: int) -> LowRank:
    up = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return LowRank(up, torch.randn(rank, columns, generator=generator, dtype=torch.float64), scale=1.7)


def replace(generator: torch.Generator, rows: int, columns: int, rank: int) -> Replace:
    return Replace(torch.randn(rows, columns, generator=generator, dtype=torch.float64))


KINDS: dict[str, Callable[[torch.Generator, int, int, int], Update]] = {"LowRank": low_rank, "Replace": replace}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 7), st.integers(1, 12), st.integers(0, 8), st.integers(1, 9), st.integers(0, 99)
)
def test_rows_change_as_the_definition_says(
    kind: str, rows: int, columns: int, rank: int, first: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    update = KINDS[kind](generator, rows, columns, rank)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    assert update.shape == tuple(weight.shape)
    first = min(first, rows - 1)
    block = weight[first : first + count].clone()
    update.add_rows(block, first, 1.0, weight[first : first + count])
    torch.testing.assert_close(block, (weight + update.delta(weight))[first : first + count])


def test_strength_scales_a_low_rank_update() -> None:
    update = low_rank(torch.Generator().manual_seed(0), 5, 4, 2)
    block = torch.zeros(5, 4, dtype=torch.float64)
    update.add_rows(block, 0, -0.25, block)
    torch.testing.assert_close(block, -0.25 * update.scale * (update.up @ update.down))


def test_definition_is_the_formula_of_lora() -> None:
    b, a = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    wanted = torch.zeros(6, 5, dtype=torch.float64)
    for i in range(6):
        for j in range(5):
            wanted[i, j] = 2.0 * sum(float(b[i, k] * a[k, j]) for k in range(3))
    torch.testing.assert_close(LowRank(b, a, 2.0).delta(wanted), wanted)


def test_stacked_updates_are_the_sum_of_all() -> None:
    generator = torch.Generator().manual_seed(3)
    updates = [(low_rank(generator, 6, 5, rank), strength) for rank, strength in ((2, 1.0), (3, -0.5), (1, 4.0))]
    zero = torch.zeros(6, 5, dtype=torch.float64)
    stacked = stack(updates)
    assert stacked.rank == 6
    torch.testing.assert_close(stacked.delta(zero), sum(strength * u.delta(zero) for u, strength in updates))


def test_turned_update_is_the_transpose() -> None:
    update = low_rank(torch.Generator().manual_seed(4), 6, 5, 2)
    zero = torch.zeros(6, 5, dtype=torch.float64)
    torch.testing.assert_close(update.turned.delta(zero.T), update.delta(zero).T)


def test_norm_is_that_of_the_product() -> None:
    update = low_rank(torch.Generator().manual_seed(5), 40, 30, 4)
    product = update.delta(torch.zeros(40, 30, dtype=torch.float64))
    assert update.norm() == pytest.approx(float(torch.linalg.matrix_norm(product)), rel=1e-12)
    assert LowRank(torch.zeros(3, 2), torch.ones(2, 3), 1.0).norm() == 0.0
    assert math.isinf(Replace(product).norm())
