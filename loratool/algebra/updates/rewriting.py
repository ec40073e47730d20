"""Updates that are worked out of the whole unmerged weight, and are plain ones once they have seen it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import ANY, Oriented, Update, WeightRows, whole
from loratool.lazy import Tensor, torch


def image(left: Tensor, weight: WeightRows) -> Tensor:
    """(rows, r)ᵀ @ W as (r, columns), summed in float64 over blocks of rows."""
    return reduce(
        torch.add, (left[first : first + len(block)].double().T @ block.double() for first, block in weight())
    )


@dataclass(frozen=True)
class Injection(Oriented):
    """W' = (I − left @ rightᵀ) W + left @ down: DEFT, and without `down` PaRa (Chen et al. 2024, arXiv:2410.21759).

    A part of what the rows of W span is taken out and, in DEFT, something else put into its place.
    """

    left: Tensor  # (rows, r)
    right: Tensor  # (rows, r)
    down: Tensor | None  # (r, columns)

    needs_weight = True
    depends_on_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = (self.left.shape[0], ANY if self.down is None else self.down.shape[1])
        return sizes[::-1] if self.in_out else sizes

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def prepared(self, weight: WeightRows) -> Update:
        if self.in_out:
            seen = torch.cat([block.double() @ self.right.double() for _, block in weight()]).T
        else:
            seen = image(self.right, weight)
        down = -seen if self.down is None else self.down.double() - seen
        plain = LowRank(self.left, down.to(self.left.dtype), 1.0)
        return plain.turned if self.in_out else plain

    def delta(self, weight: Tensor) -> Tensor:
        seen = weight.T if self.in_out else weight
        down = -self.right.T @ seen
        change = self.left @ (down if self.down is None else self.down + down)
        return change.T if self.in_out else change


@dataclass(frozen=True)
class Network(Update):
    """ΔW = scale · up @ f(down @ W): PEANuT (Zhong et al. 2024, arXiv:2410.01870).

    f is `activation`, then a layer and `activation` for each encoder, then the same for each decoder, to whose result
    what went into its encoder is added, the last encoder's first. They act on the columns of down @ W.
    """

    up: Tensor  # (rows, r)
    down: Tensor  # (r, rows)
    encoders: Tensor | None  # (depth, r, r)
    decoders: Tensor | None
    activation: Callable[[Tensor], Tensor]
    scale: float

    needs_weight = True
    depends_on_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], ANY)

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def hidden(self, seen: Tensor) -> Tensor:
        """Of down @ W, (r, columns)."""
        state = self.activation(seen)
        before: list[Tensor] = []
        for layer in () if self.encoders is None else self.encoders.to(seen.dtype):
            before.append(state)
            state = self.activation(layer @ state)
        for layer in () if self.decoders is None else self.decoders.to(seen.dtype):
            state = self.activation(layer @ state) + before.pop()
        return state

    def prepared(self, weight: WeightRows) -> Update:
        return LowRank(self.up, self.hidden(image(self.down.T, weight)).to(self.up.dtype), self.scale)

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * (self.up @ self.hidden(self.down @ weight))


@dataclass(frozen=True)
class Pairs(Update):
    """W'[i] = own[i] · W[i] ± other[i] · W[p(i)]: RoAd (Liao and Monz 2024, arXiv:2409.00119).

    Rows come in groups of `size`; p(i) is the row half a group further on, with −, or half a group back, with +.
    """

    own: Tensor  # (rows,)
    other: Tensor  # (rows,)
    size: int
    dimensions: int = 2  # of the weight; a bias is changed alike

    needs_weight = True
    depends_on_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.own.shape[0], *[ANY] * (self.dimensions - 1))

    @property
    def rank(self) -> int:
        return self.own.shape[0]  # of its memory: the weight once more

    def prepared(self, weight: WeightRows) -> Update:
        return Add(self.delta(whole(weight)))

    def delta(self, weight: Tensor) -> Tensor:
        matrix = weight.reshape(weight.shape[0], -1)
        groups = matrix.reshape(-1, 2, self.size // 2, matrix.shape[1])
        partners = torch.stack([-groups[:, 1], groups[:, 0]], dim=1).reshape(matrix.shape)
        own, other = (factor.to(weight.dtype)[:, None] for factor in (self.own, self.other))
        return (matrix * (own - 1) + partners * other).reshape(weight.shape)


@dataclass(frozen=True)
class Recomposed(Oriented):
    """W' = U (S + diag λ) Vᵀ: FRoD, whose U has the directions of the columns of W V⁻ᵀ, at length 1.

    S is zero but for `values` at `index`.
    """

    basis: Tensor  # V, (columns, columns)
    diagonal: Tensor  # λ, (columns,)
    index: Tensor  # (2, n)
    values: Tensor  # (n,)

    needs_weight = True
    depends_on_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = (ANY, self.diagonal.shape[0])
        return sizes[::-1] if self.in_out else sizes

    @property
    def rank(self) -> int:
        return self.diagonal.shape[0]  # of its memory: the basis, its inverse and the weight once more

    def prepared(self, weight: WeightRows) -> Update:
        return Add(self.delta(whole(weight)))

    def delta(self, weight: Tensor) -> Tensor:
        seen = (weight.T if self.in_out else weight).double()
        basis = self.basis.double()
        try:
            directions = torch.linalg.solve(basis, seen.T).T
        except RuntimeError:  # V has no inverse
            directions = seen @ torch.linalg.pinv(basis, rtol=1e-6).T
        lengths = directions.norm(dim=0)
        directions = directions / lengths.masked_fill(lengths <= SMALLEST_LENGTH, torch.inf)
        core = torch.diag(self.diagonal.double())
        rows, columns = self.index.long()
        core = core.index_put((rows, columns), self.values.double(), accumulate=True)
        change = directions @ core @ basis.T - seen
        result: Tensor = change.T if self.in_out else change
        return result.to(weight.dtype)


SMALLEST_LENGTH = 1e-12  # of a direction of FRoD; shorter ones count as none
