"""Updates that are known by a few coefficients of a wavelet transform."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratool.algebra.updates.additive import Add
from loratool.algebra.updates.base import Update, WeightRows
from loratool.algebra.updates.sparse import Coefficients, drawn
from loratool.lazy import Tensor, numpy as np, torch

LARGEST_ORDER = 10  # of Daubechies' wavelets, as PEFT has them


@dataclass(frozen=True)
class Wavelet(Coefficients):
    """ΔW = scale · one step of an inverse wavelet transform of F, F being zero but for `spectrum` at random places.

    WaveFT of PEFT. The places are drawn as FourierFT's are. F is a bit larger than the (out, in) weight, which is
    the middle of what the transform gives. Of order 0 there is no transform: ΔW = scale · F.
    """

    order: int  # of Daubechies' wavelet, which has 2 · order values

    @property
    def rank(self) -> int:
        return max(self.size)  # of its memory: two matrices of the weight's size

    def prepared(self, weight: WeightRows) -> Update:  # noqa: ARG002
        change = self.change()
        return Add(change.T.contiguous() if self.in_out else change)

    def delta(self, weight: Tensor) -> Tensor:
        change = self.change().to(weight.dtype)
        return change.T if self.in_out else change

    def change(self) -> Tensor:
        """ΔW as (out, in)."""
        shape = self.size[::-1] if self.in_out else self.size
        places = drawn(shape, self.spectrum.shape[0], self.seed).to(self.spectrum.device)
        if not self.order:
            dense = self.spectrum.new_zeros(shape)
            dense[places[0], places[1]] = self.spectrum
            return self.scale * dense
        padded = tuple(size + 2 * (self.order - 1) for size in shape)
        padded = tuple(size + size % 2 for size in padded)
        before = [(large - size) // 2 for large, size in zip(padded, shape, strict=True)]
        dense = self.spectrum.new_zeros(padded)
        dense[places[0] + before[0], places[1] + before[1]] = self.spectrum
        result = self.reconstructed(dense)
        cut = [(large - size) // 2 for large, size in zip(result.shape, shape, strict=True)]
        return self.scale * result[cut[0] : cut[0] + shape[0], cut[1] : cut[1] + shape[1]]

    def reconstructed(self, dense: Tensor) -> Tensor:
        """The inverse transform of four quarters: coarse; high by row, by column, and by both."""
        low = dense.new_tensor(daubechies(self.order))
        high = low.flip(0) * dense.new_tensor([(-1.0) ** k for k in range(low.shape[0])])
        filters = [torch.outer(a, b) for a, b in ((low, low), (high, low), (low, high), (high, high))]
        quarters = [half.chunk(2, dim=1) for half in dense.chunk(2, dim=0)]
        coarse, by_row, by_column, by_both = *quarters[0], *quarters[1]
        stacked = torch.stack([coarse, by_row, by_column, by_both])[None]
        whole = torch.nn.functional.conv_transpose2d(stacked, torch.stack(filters)[:, None], stride=2)[0, 0]
        edge = 2 * self.order - 2
        return whole[edge : whole.shape[0] - edge, edge : whole.shape[1] - edge]


def daubechies(order: int) -> list[float]:
    """The scaling filter of Daubechies' wavelet with `order` vanishing moments, for reconstruction (Daubechies 1988).

    (1 + z)^order times the factors for the zeros inside the unit circle of Σ C(order − 1 + k, k) yᵏ, with
    y = (2 − z − 1/z) / 4; its values add up to √2.
    """
    from numpy.polynomial.polynomial import polyroots

    half = polyroots([math.comb(order - 1 + k, k) for k in range(order)])
    inside = [min(polyroots([1, 4 * y - 2, 1]), key=abs) for y in half]
    values = np.poly([-1] * order + inside).real
    found: list[float] = (math.sqrt(2) / values.sum() * values).tolist()
    return found
