"""The factors of LoHa and LoKr, which PEFT and LyCORIS store alike: whole, as products, or with a Tucker core."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Protocol

from loratool.adapters.adapter import Derived
from loratool.algebra.updates import formulas


class Tensors(Protocol):
    """The tensors of one module by role; what is wrong with them raises the error of the format that they are of."""

    def __contains__(self, role: object) -> bool: ...

    def tensor(self, role: str, dimensions: Collection[int] = (2,)) -> Any:
        """The tensor of a role, in any of some numbers of dimensions."""

    def require(self, condition: bool, what: str) -> None:
        """Refuse the module unless something holds."""


CORES = (3, 4, 5)  # dimensions of a Tucker core: two of ranks, and those of a kernel


def hadamard_factor(tensors: Tensors, side: str) -> tuple[Any, Any, tuple[int, ...]]:
    """One of the two products of LoHa, as two matrices, and the kernel of its Tucker core."""
    a, b, core = tensors.tensor(f"hada_w{side}_a"), tensors.tensor(f"hada_w{side}_b"), f"hada_t{side}"
    kernel: tuple[int, ...] = ()
    if core in tensors:
        t = tensors.tensor(core, CORES)
        tensors.require(
            (t.shape[0], t.shape[1]) == (a.shape[0], b.shape[0]), f"{core} is {list(t.shape)}; the rank is {a.shape[0]}"
        )
        kernel = tuple(t.shape[2:])
        b = Derived((a.shape[0], b.shape[1] * math.prod(kernel)), (t, b), formulas.along_kernel)
        a = a.T
    tensors.require(a.shape[1] == b.shape[0], f"hada_w{side}_a and hada_w{side}_b have different ranks")
    return a, b, kernel


def kronecker_factor(tensors: Tensors, side: str) -> Any:
    """w1 or w2 of LoKr: stored whole, as a product, or as a Tucker core and two matrices.

    w2 of a convolution has its dimensions where it is whole or has a core, and is a matrix where it is a product.
    """
    whole, a, b = f"lokr_w{side}", f"lokr_w{side}_a", f"lokr_w{side}_b"
    if whole in tensors:
        tensors.require(a not in tensors and b not in tensors, f"{whole} is stored both whole and as a product")
        return tensors.tensor(whole, (2,) if side == "1" else (2, 3, 4, 5))
    left, right = tensors.tensor(a), tensors.tensor(b)
    if side == "2" and "lokr_t2" in tensors:
        core = tensors.tensor("lokr_t2", CORES)
        tensors.require(
            (core.shape[0], core.shape[1]) == (left.shape[0], right.shape[0]),
            f"lokr_t2 is {list(core.shape)}; the rank is {left.shape[0]}",
        )
        return Derived((left.shape[1], right.shape[1], *core.shape[2:]), (core, left, right), formulas.rebuilt)
    tensors.require(left.shape[1] == right.shape[0], f"{a} and {b} have different ranks")
    return Derived((left.shape[0], right.shape[1]), (left, right), formulas.product)


def kronecker_rank(tensors: Tensors) -> int:
    """The rank of the half that is a product; 0 where both are whole."""
    ranks = {
        side: tensors.tensor(f"lokr_w{side}_b").shape[0]
        for side in ("1", "2")
        if f"lokr_w{side}_b" in tensors or f"lokr_w{side}_a" in tensors
    }
    tensors.require(
        len(set(ranks.values())) < 2,
        f"lokr_w1_b and lokr_w2_b have different ranks: {' and '.join(map(str, ranks.values()))}",
    )
    return next(iter(ranks.values()), 0)


def as_matrix(factor: Any) -> Any:
    """A factor as a matrix: its first dimension, and all others together."""
    if len(factor.shape) == 2:
        return factor
    return Derived((factor.shape[0], math.prod(factor.shape[1:])), (factor,), formulas.as_matrix)
