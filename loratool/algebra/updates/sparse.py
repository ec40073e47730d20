"""Updates that are known by a few numbers and their places, in the weight or in a transform of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loratool.algebra.updates.additive import Add
from loratool.algebra.updates.base import ANY, Sized, Update, WeightRows
from loratool.errors import FitError
from loratool.lazy import Tensor, numpy as np, torch

LARGEST_ORDER = 10  # of Daubechies' wavelets, as PEFT has them


@dataclass(frozen=True)
class Scatter(Update):
    """ΔW[index] = values, added up where an index is there twice: SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175)."""

    index: Tensor  # (2, n): rows and columns; or (n,): numbers of elements, counted along rows
    values: Tensor  # (n,)
    size: tuple[int, ...] = (ANY, ANY)  # of the weight, once fitted

    needs_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        return replace(self, size=shape) if super().fit(shape) else None

    def prepared(self, weight: WeightRows) -> Update:  # noqa: ARG002
        """The same by rows and columns, with every index checked to be inside of the weight."""
        rows, columns = self.places()
        for at, size in ((rows, self.size[0]), (columns, self.columns)):
            if at.numel() and not 0 <= int(at.min()) <= int(at.max()) < size:
                raise FitError(
                    f"the adapter changes single elements {int(at.min())} to {int(at.max())} of a dimension of size "
                    f"{size}: it was trained on a weight of another shape than {list(self.size)}"
                )
        return replace(self, index=torch.stack([rows, columns]))

    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns."""
        index = self.index.long()
        if len(index.shape) == 2:
            return index[0], index[1]
        return index.div(self.columns, rounding_mode="floor"), index % self.columns

    @property
    def columns(self) -> int:
        """Of the weight as a matrix."""
        return math.prod(self.size[1:])

    def delta(self, weight: Tensor) -> Tensor:
        result = (weight * 0).flatten(1)
        rows, columns = self.places()
        return result.index_put((rows, columns), self.values.to(weight.dtype), accumulate=True).reshape(weight.shape)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        own, columns = self.places()
        at = own - first_row
        here = (at >= 0) & (at < rows.shape[0])
        places = (at[here], columns[here])
        rows.index_put_(places, (self.values[here] * strength).to(rows.dtype), accumulate=True)


@dataclass(frozen=True)
class Coefficients(Sized):
    """One that is known by some coefficients of a transform, which are at random places: the rest of them are zero."""

    spectrum: Tensor  # (n,)
    scale: float
    seed: int

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        fits = len(shape) == 2 and super().fit(shape) and self.spectrum.shape[0] <= math.prod(shape)
        return replace(self, size=shape) if fits else None


@dataclass(frozen=True)
class Spectrum(Coefficients):
    """ΔW = scale · Re(inverse 2-d Fourier transform of F), F being zero but for `spectrum` at random places.

    FourierFT (Gao et al. 2024, arXiv:2405.03003). The places are the first of a permutation of all elements of
    the (out, in) weight, which torch draws from `seed`.
    """

    places: Tensor | None = None  # (2, n): rows and columns of F, once prepared

    rank = 2

    def prepared(self, weight: WeightRows) -> Update:  # noqa: ARG002
        out_in = self.size[::-1] if self.in_out else self.size
        places = drawn(out_in, self.spectrum.shape[0], self.seed)
        return replace(self, places=(places.flip(0) if self.in_out else places).to(self.spectrum.device))

    def delta(self, weight: Tensor) -> Tensor:
        assert self.places is not None, "prepare the update first"
        dense = weight * 0
        dense[self.places[0], self.places[1]] = self.spectrum.to(weight.dtype)
        transformed: Tensor = torch.fft.ifft2(dense).real
        return self.scale * transformed

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        assert self.places is not None, "prepare the update first"
        own = torch.arange(first_row, first_row + rows.shape[0], device=rows.device)
        turns = (own[:, None] * self.places[0]) % self.size[0]  # whole numbers: no digit of the phase is lost
        phase = turns.double() * (2 * math.pi / self.size[0])
        terms = torch.polar(self.spectrum.double().expand(phase.shape), phase).to(rows.dtype.to_complex())
        half = torch.zeros(rows.shape, dtype=terms.dtype, device=rows.device)
        half.index_add_(1, self.places[1], terms)
        rows.add_(torch.fft.ifft(half, dim=1).real, alpha=self.scale * strength / self.size[0])


def drawn(shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """(2, count): rows and columns of the first elements of a permutation of all, which torch draws from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randperm(math.prod(shape), generator=generator)[:count]
    return torch.stack([elements // shape[1], elements % shape[1]])


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
