"""How adapters are written for torchtune: its names, and the rows of queries and keys in its order, which takes the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapters.formats.format import Parts, Shape, Spelling, most_common
from loratool.adapters.layers import Form, Kind
from loratool.adapters.training import Training
from loratool.algebra.lowrank.products import Product
from loratool.errors import FitError, printable
from loratool.files.tensor_writer import TensorFile, Triple, tensor_file
from loratool.lazy import Tensor

if TYPE_CHECKING:
    from loratool.adapters.formats.format import Format

A, B, M = ".lora_a.weight", ".lora_b.weight", ".magnitude"


@dataclass
class OrderedFile(TensorFile):
    """A file in which rows of some tensors are put into another order as they are written."""

    heads: Mapping[str, int] | None = None  # by the last part of a module's name

    def add(self, name: str, dtype: str, shape: tuple[int, ...], content: memoryview | bytes) -> None:
        module = name.removesuffix(B).removesuffix(M)
        count = (self.heads or {}).get(module.rpartition(".")[2])
        if count is not None and module != name and len(shape) in (1, 2):
            content = in_pairs(bytes(content), shape[0], count)
        super().add(name, dtype, shape, content)


def in_pairs(content: bytes, rows: int, heads: int) -> bytes:
    """Rows of each head from rotary positions in halves (transformers') to interleaved ones (Meta's): row i + h · width / 2
    becomes row 2i + h.
    """
    each, half = len(content) // rows, rows // heads // 2
    order = (head * 2 * half + part * half + at for head in range(heads) for at in range(half) for part in range(2))
    return b"".join(content[row * each : (row + 1) * each] for row in order)


@contextmanager
def ordered_file(
    path: Path, announced: Iterable[Triple], metadata: Mapping[str, str], heads: Mapping[str, int]
) -> Iterator[TensorFile]:
    """A file as `tensor_file` makes it."""
    with tensor_file(path, announced, metadata) as file:
        yield OrderedFile(file.path, file.descriptor, file.reserved, file.metadata, heads=heads)


class TorchtuneNames(Spelling):
    """Names of an adapter that is written for torchtune; `FitError` for what it has no module for."""

    reader = "torchtune"

    def __init__(
        self,
        form: Format,
        kinds: Mapping[str, Kind],
        modules: Mapping[str, str],
        settings: Callable[[int, float, str], dict[str, Any]],
    ) -> None:
        """`modules` are torchtune's by target, `settings` makes a config of rank, α and base."""
        self.form, self.kinds, self.modules, self.settings = form, kinds, modules, settings
        if odd := [t for t, kind in kinds.items() if kind is not Kind.LINEAR or t not in modules]:
            raise FitError("torchtune cannot adapt these layers:", map(printable, odd))

    def factors(self, target: str) -> tuple[str, str]:
        return self.modules[target] + A, self.modules[target] + B

    def shapes(self, form: Form) -> tuple[Shape, Shape]:
        return (form.rank, form.columns), (form.rows, form.rank)

    def stored(self, form: Form, found: Product) -> tuple[Tensor, Tensor]:  # noqa: ARG002 (all alike)
        return found.down.contiguous(), found.up.contiguous()

    def magnitude(self, target: str) -> str:
        return self.modules[target] + M

    def describe_new(self, training: Training, parts: Parts) -> dict[str, Any]:
        rank = max(parts.ranks.values())
        return self.settings(rank, rank * most_common(parts.scales.values()), training.base)
