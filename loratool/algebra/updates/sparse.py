"""Updates that are known by a few numbers and their places, in the weight or in its spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loratool.algebra.updates.base import ANY, Sized, Update, WeightRows
from loratool.errors import FitError
from loratool.lazy import Tensor, torch


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
