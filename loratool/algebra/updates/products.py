"""Updates that are products of small tensors in other ways than up @ down."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import ANY, Oriented, Sized, Update, WeightRows, passed
from loratool.algebra.updates.formulas import diagonal
from loratool.lazy import Tensor, torch


@dataclass(frozen=True)
class Hadamard(Update):
    """ΔW = scale · (U₁D₁) ⊙ (U₂D₂): LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

    up1: Tensor  # (rows, rank)
    down1: Tensor  # (rank, columns)
    up2: Tensor
    down2: Tensor
    scale: float
    kernel: tuple[int, ...] = ()  # of a convolution

    @property
    def shape(self) -> tuple[int, ...]:
        return LowRank(self.up1, self.down1, self.scale, kernel=self.kernel).shape

    @property
    def rank(self) -> int:
        return self.down1.shape[0] + self.down2.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        one, other = self.up1 @ self.down1, self.up2 @ self.down2
        return (self.scale * one * other).reshape(weight.shape).to(weight.dtype)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        own = slice(first_row, first_row + rows.shape[0])
        rows.addcmul_(self.up1[own] @ self.down1, self.up2[own] @ self.down2, value=self.scale * strength)


@dataclass(frozen=True)
class Kronecker(Update):
    """ΔW = scale · left ⊗ right: LoKr (Yeh et al. 2023, arXiv:2309.14859).

    The element of row (p, q) and column (c, d) is left[p, c] · right[q, d]. PEFT multiplies a `right` of three
    dimensions, that of a one-dimensional convolution, in another order: row (q, p), column (y, c, z), for
    left[p, c] · right[q, y, z].
    """

    left: Tensor  # (p, c)
    right: Tensor  # (q, d), or (q, y, z)
    scale: float
    kernel: tuple[int, ...] = ()  # of a convolution

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.left.shape[0] * self.right.shape[0], self.left.shape[1] * math.prod(self.right.shape[1:])
        return (rows, columns // math.prod(self.kernel), *self.kernel)

    @property
    def rank(self) -> int:
        return max(self.left.shape[1], self.right.shape[0])

    def delta(self, weight: Tensor) -> Tensor:
        return (self.scale * torch.kron(self.left, self.right)).reshape(weight.shape).to(weight.dtype)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        at = torch.arange(first_row, first_row + rows.shape[0], device=rows.device)
        if len(self.right.shape) == 3:
            left, right = self.left[at % self.left.shape[0]], self.right[at // self.left.shape[0]]
            part = left[:, None, :, None] * right[:, :, None, :]
        else:
            left, right = self.left[at // self.right.shape[0]], self.right[at % self.right.shape[0]]
            part = left[:, :, None] * right[:, None, :]
        rows.add_(part.reshape(rows.shape), alpha=self.scale * strength)


@dataclass(frozen=True)
class Grid(Update):
    """ΔW in n × n blocks: block (p, q) is scale · left[p][:, q's share] @ right[q][p's share] of the rank.

    GraLoRA (Jung et al. 2025, arXiv:2505.20355).
    """

    left: Tensor  # (n, rows / n, rank)
    right: Tensor  # (n, rank, columns / n)
    scale: float
    turnable: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0] * self.left.shape[1], self.right.shape[0] * self.right.shape[2])

    @property
    def rank(self) -> int:
        return self.left.shape[2]

    @property
    def turned(self) -> Grid:
        return replace(self, left=self.right.mT, right=self.left.mT)

    def across(self, p: int) -> Tensor:
        """D with ΔW[rows of p] = scale · left[p] @ D."""
        share = self.rank // self.right.shape[0]
        return diagonal(right[p * share : (p + 1) * share] for right in self.right)

    def delta(self, weight: Tensor) -> Tensor:
        count, share = self.left.shape[0], self.rank // self.left.shape[0]
        blocks = [
            [
                self.left[p][:, q * share : (q + 1) * share] @ self.right[q][p * share : (p + 1) * share]
                for q in range(count)
            ]
            for p in range(count)
        ]
        return (self.scale * torch.cat([torch.cat(row, dim=1) for row in blocks])).to(weight.dtype)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        for p, within, own in passed(first_row, rows.shape[0], self.left.shape[1]):
            part = rows[own]
            part.addmm_(self.left[p][within : within + len(part)], self.across(p), alpha=self.scale * strength)


@dataclass(frozen=True)
class Circulant(Update):
    """ΔW in square blocks: block (m, n) has element kernel[m, n, (column − row) mod size] · scale.

    C3A (Chen et al. 2024, arXiv:2407.19342); its scale is 1 / columns.
    """

    kernel: Tensor  # (rows / size, columns / size, size)

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns, size = self.kernel.shape
        return (rows * size, columns * size)

    @property
    def scale(self) -> float:
        return 1 / self.shape[1]

    def delta(self, weight: Tensor) -> Tensor:
        size = self.kernel.shape[2]
        blocks = torch.stack([self.kernel.roll(row, dims=2) for row in range(size)], dim=1)  # (m, row, n, column)
        return (self.scale * blocks).reshape(weight.shape).to(weight.dtype)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        size = self.kernel.shape[2]
        at = torch.arange(first_row, first_row + rows.shape[0], device=rows.device)
        turn = (torch.arange(size, device=rows.device) - at[:, None]) % size  # (rows, size)
        blocks = self.kernel[at // size]  # (rows, n, size)
        part = blocks.gather(2, turn[:, None, :].expand(blocks.shape))
        rows.add_(part.reshape(rows.shape), alpha=self.scale * strength)


@dataclass(frozen=True)
class Tiled(Update):
    """ΔW[i, j] = block[j mod r, i mod m]: MiSS (Kang and Yin 2024, arXiv:2409.15371), whose m is the number of rows
    but for its `mini` form.
    """

    block: Tensor  # (r, m)
    repeated: bool = False  # the weight may have more rows than m

    @property
    def shape(self) -> tuple[int, ...]:
        return (ANY if self.repeated else self.block.shape[1], ANY)

    @property
    def rank(self) -> int:
        return self.block.shape[0]

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        fitted = super().fit(shape)
        return fitted if fitted and shape[0] % self.block.shape[1] == 0 else None

    def delta(self, weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        times = (-(-rows // self.block.shape[1]), -(-columns // self.block.shape[0]))
        return self.block.T.repeat(times)[:rows, :columns].to(weight.dtype)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        at = torch.arange(first_row, first_row + rows.shape[0], device=rows.device) % self.block.shape[1]
        part = self.block.T[at].repeat(1, -(-rows.shape[1] // self.block.shape[0]))
        rows.add_(part[:, : rows.shape[1]], alpha=strength)


@dataclass(frozen=True)
class Pooled(Update):
    """ΔW[:, j] = scale · groups · (up @ down)[:, j // group] / group: QA-LoRA (Xu et al. 2023, arXiv:2309.14717).

    It is trained on the means of groups of inputs. Where the weight has as many columns as `down`, which no layer
    that PEFT trains this way has, it is plain LoRA.
    """

    up: Tensor  # (rows, rank)
    down: Tensor  # (rank, groups)
    scale: float
    group: int  # columns of the weight for one of `down`

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1] * self.group)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        return super().fit(shape) or LowRank(self.up, self.down, self.scale, turnable=True).fit(shape)

    def delta(self, weight: Tensor) -> Tensor:
        factor = self.scale * self.down.shape[1] / self.group
        return (factor * (self.up @ self.down)).repeat_interleave(self.group, dim=1).to(weight.dtype)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        part = self.up[first_row : first_row + rows.shape[0]] @ self.down
        spread = rows.view(rows.shape[0], -1, self.group)
        spread.add_(part[:, :, None], alpha=self.scale * strength * self.down.shape[1] / self.group)


@dataclass(frozen=True)
class Shared(Oriented):
    """ΔW = up @ down[:, :columns]: `down` also serves layers with more inputs, as in VeRA.

    Kopiczko et al. 2023, arXiv:2310.11454.
    """

    up: Tensor  # (rows, rank)
    down: Tensor  # (rank, most columns)
    columns: int = ANY  # of the (out, in) weight, once fitted

    needs_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = (self.up.shape[0], self.columns)
        return sizes[::-1] if self.in_out else sizes

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        if len(shape) != 2 or super().fit(shape) is None:
            return None
        columns = shape[0] if self.in_out else shape[1]
        return replace(self, columns=columns) if columns <= self.down.shape[1] else None

    def prepared(self, weight: WeightRows) -> Update:  # noqa: ARG002
        """As a plain low-rank update, which adds up with others."""
        whole = LowRank(self.up, self.down[:, : self.columns], 1.0)
        return whole.turned if self.in_out else whole

    def delta(self, weight: Tensor) -> Tensor:
        out, inputs = weight.T.shape if self.in_out else weight.shape
        product = self.up[:out] @ self.down[:, :inputs]
        return (product.T if self.in_out else product).to(weight.dtype)


@dataclass(frozen=True)
class Bases(Sized):
    """ΔW = scale · large @ small, or (large @ small)ᵀ where the weight has more columns than rows: RandLoRA.

    Albert et al. 2025, arXiv:2502.00987. `large` also serves layers whose longer side is longer than this one's.
    """

    large: Tensor  # (longest side, rank)
    small: Tensor  # (rank, shorter side)
    scale: float

    @property
    def rank(self) -> int:
        return self.small.shape[0]

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        fits = (
            len(shape) == 2
            and super().fit(shape) is not None
            and min(shape) == self.small.shape[1]
            and max(shape) <= self.large.shape[0]
            and (shape[0] == shape[1] or not self.in_out)
        )
        # where it is not square, its longer side tells which factor goes where, so that nothing is left to decide
        return replace(self, size=shape, turnable=shape[0] == shape[1]) if fits else None

    def plain(self) -> LowRank:
        rows, columns = self.size
        update = LowRank(self.large[: max(rows, columns)], self.small, self.scale)
        return update.turned if rows < columns or self.in_out else update

    def prepared(self, weight: WeightRows) -> Update:  # noqa: ARG002
        """As a plain low-rank update, which adds up with others."""
        return self.plain()

    def delta(self, weight: Tensor) -> Tensor:
        return self.plain().delta(weight)
