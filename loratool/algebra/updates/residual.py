"""Updates that were trained on top of a weight of which a part had been taken away before."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loratool.algebra.updates.additive import LowRank, stack
from loratool.algebra.updates.base import Update, WeightRows, Wrapped, whole
from loratool.lazy import Tensor, torch

ROUNDOFF, GENEROUS = 2.0**-24, 64  # of float32; times what one decomposition loses for its backward error
# What was taken away of W = U S Vᵀ, or W = Q R, by an update of rank r:
PRINCIPAL = "principal"  # the r largest singular values and their vectors: PiSSA (Meng et al. 2024, arXiv:2404.02948)
MINOR = "minor"  # the r smallest ones: KaSA (Wang et al. 2024, arXiv:2412.06071)
TRIANGULAR = "triangular"  # scale · Q[:, :r] @ R[:r]: OLoRA (Büyükakyüz 2024, arXiv:2406.01775)


@dataclass(frozen=True)
class Residual(Wrapped):
    """W' = W − part(W) + ΔW, ΔW being the trained update; the part is worked out again from the unmerged weight."""

    inner: LowRank
    part: str  # one of the constants above
    in_out: bool = False  # how the weight is stored

    needs_weight = True
    depends_on_weight = True

    @property
    def turned(self) -> Residual:
        return replace(self, inner=self.inner.turned, in_out=not self.in_out)

    @property
    def rank(self) -> int:
        return max(self.inner.shape)  # of its memory: the weight, its factors and what a decomposition works with

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        fits = len(shape) == 2 and self.inner.fit(shape)
        return self if fits and self.inner.rank <= min(shape) else None

    def taken(self, weight: Tensor) -> LowRank:
        """The part of a whole weight that the update was trained without."""
        seen, rank = weight.T if self.in_out else weight, self.inner.rank
        if self.part == TRIANGULAR:
            q, r = torch.linalg.qr(seen)
            part = LowRank(q[:, :rank], r[:rank], self.inner.scale)
        else:
            u, s, v = torch.linalg.svd(seen, full_matrices=False)
            kept = slice(rank) if self.part == PRINCIPAL else slice(s.shape[0] - rank, None)
            part = LowRank(u[:, kept] * s[kept], v[kept], 1.0)
        return part.turned if self.in_out else part

    def uncertainty(self, weight: Tensor) -> float:
        """How far an element of the part may be off where somebody decomposes the weight in float32.

        An error E of W turns the vectors on both sides of the cut by ‖E‖ / (their gap) at most (Davis and Kahan 1970,
        doi:10.1137/0707001), and E is some roundings of the largest singular value, spread over all elements.
        """
        if self.part == TRIANGULAR:
            return 0.0
        values = torch.linalg.svdvals(weight)
        cut = self.inner.rank if self.part == PRINCIPAL else len(values) - self.inner.rank
        if not 0 < cut < len(values):
            return 0.0
        inside, outside = float(values[cut - 1]), float(values[cut])
        gap = max(inside - outside, ROUNDOFF * float(values[0]))
        return GENEROUS * ROUNDOFF * float(values[0]) * inside / gap / math.sqrt(weight.numel())

    def prepared(self, weight: WeightRows) -> Update:
        return stack([(self.inner, 1.0), (self.taken(whole(weight)), -1.0)])

    def delta(self, weight: Tensor) -> Tensor:
        return self.inner.delta(weight) - self.taken(weight).delta(weight)
