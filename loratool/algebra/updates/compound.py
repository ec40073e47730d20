"""Updates made of others, and the small parts that they are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.algebra.updates.base import ANY, Product, Update, WeightRows
from loratool.lazy import Tensor


@dataclass(frozen=True)
class Pair(Update):
    """Two updates of one weight; how they go together, its kinds say."""

    first: Update
    second: Update

    @property
    def looks_at_base(self) -> bool:  # type: ignore[override]  # a constant for the other kinds
        return self.first.looks_at_base or self.second.looks_at_base

    @property
    def depends_on_weight(self) -> bool:  # type: ignore[override]  # a constant for the other kinds
        return self.first.depends_on_weight or self.second.depends_on_weight

    @property
    def needs_weight(self) -> bool:
        return self.first.needs_weight or self.second.needs_weight

    @property
    def shape(self) -> tuple[int, ...]:
        one, other = self.first.shape, self.second.shape
        return tuple(max(pair) for pair in zip(one, other, strict=True)) if len(one) == len(other) else one

    @property
    def rank(self) -> int:
        return self.first.rank + self.second.rank

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        first, second = self.first.fit(shape), self.second.fit(shape)
        return replace(self, first=first, second=second) if first and second else None

    def prepared(self, weight: WeightRows) -> Update:
        return replace(self, first=self.first.prepared(weight), second=self.second.prepared(weight))


@dataclass(frozen=True)
class Both(Pair):
    """ΔW = first + second, each being the change of the unmerged weight; neither reads what the other has made."""

    def delta(self, weight: Tensor) -> Tensor:
        return self.first.delta(weight) + self.second.delta(weight)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:
        self.first.add_rows(rows, first_row, strength, base)
        self.second.add_rows(rows, first_row, strength, base)

    @property
    def adds_products(self) -> bool:  # type: ignore[override]  # a constant for the other kinds
        return self.first.adds_products and self.second.adds_products

    def products(self, columns: int) -> tuple[Product, ...]:
        return (*self.first.products(columns), *self.second.products(columns))


@dataclass(frozen=True)
class Chain(Pair):
    """Two updates of one weight, one after the other: a rotation, say, and then a scale for each row."""

    @property
    def turnable(self) -> bool:
        return self.first.turnable and self.second.turnable

    @property
    def turned(self) -> Chain:
        return Chain(self.first.turned, self.second.turned)

    def delta(self, weight: Tensor) -> Tensor:
        between = self.first.delta(weight)
        return between + self.second.delta(weight + between)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:
        changed = rows.clone()
        self.first.add_rows(changed, first_row, 1.0, base)
        self.second.add_rows(changed, first_row, 1.0, base)
        rows.lerp_(changed, strength)


@dataclass(frozen=True)
class Fill(Update):
    """ΔW[i, …] = value[i], the same for all of a row; one value serves for all rows."""

    value: Tensor  # (rows,) or (1,)
    dimensions: int = 2  # of the weight

    @property
    def shape(self) -> tuple[int, ...]:
        count = self.value.shape[0]
        return (ANY if count == 1 else count, *[ANY] * (self.dimensions - 1))

    def of_rows(self, first_row: int, rows: int) -> Tensor:
        return self.value if self.value.shape[0] == 1 else self.value[first_row : first_row + rows]

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        rows.add_(self.of_rows(first_row, rows.shape[0])[:, None], alpha=strength)


@dataclass(frozen=True)
class Image(Update):
    """Δb = W @ vector: a change to a bias that depends on the unmerged weight of its layer, which a plan puts in."""

    vector: Tensor  # (columns,)
    weight: Tensor | None = None  # (rows and more, columns), once it is known
    start: int = 0  # row of `weight` that belongs to the first element

    depends_on_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (ANY,)

    def image(self, first_row: int, rows: int) -> Tensor:
        assert self.weight is not None, "it is not known what W is"
        first = self.start + first_row
        return self.weight[first : first + rows] @ self.vector.to(self.weight.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        return self.image(0, weight.shape[0]).to(weight.dtype)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        rows.add_(self.image(first_row, rows.shape[0])[:, None], alpha=strength)


def images_in(update: Update) -> list[Image]:
    """The parts of an update that wait for a weight."""
    match update:
        case Image(weight=None):
            return [update]
        case Both():
            return [*images_in(update.first), *images_in(update.second)]
    return []


def with_weight(update: Update, weight: Tensor, start: int) -> Update:
    """The update with the weight that its parts wait for, of which row `start` belongs to its first element."""
    match update:
        case Image():
            return replace(update, weight=weight, start=start)
        case Both():
            return Both(with_weight(update.first, weight, start), with_weight(update.second, weight, start))
    return update
