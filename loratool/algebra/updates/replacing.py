"""Updates that put saved values in the weight's place. Strength does not scale them."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.algebra.updates.base import ANY, Update
from loratool.lazy import Tensor


@dataclass(frozen=True)
class Replace(Update):
    """W becomes `value`, whatever it was: `modules_to_save` of PEFT."""

    value: Tensor  # any shape

    replaces = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.dtype) - weight

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        rows.copy_(self.value.reshape(-1, rows.shape[1])[first_row : first_row + rows.shape[0]])


@dataclass(frozen=True)
class ReplaceRows(Update):
    """Some rows of W become those of `values`: the trainable tokens of PEFT."""

    index: tuple[int, ...]  # row numbers, in the order of `values`
    values: Tensor  # (len(index), columns)

    replaces = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (ANY, self.values.shape[1])

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        if super().fit(shape) is None:
            return None
        inside = not self.index or (min(self.index) >= 0 and max(self.index) < shape[0])
        return self if inside else None

    def delta(self, weight: Tensor) -> Tensor:
        result = weight * 0
        for row, value in zip(self.index, self.values, strict=True):
            result[row] = value.to(weight.dtype) - weight[row]
        return result

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        own = [(at, row - first_row) for at, row in enumerate(self.index) if 0 <= row - first_row < rows.shape[0]]
        for at, row in own:
            rows[row] = self.values[at]
