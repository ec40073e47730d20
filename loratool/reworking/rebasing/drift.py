"""How far two bases differ where an adapter changes them, and how much of its update the newer one already holds; and what
differs where it changes nothing: tokenizers, norms, embeddings.

With D = W₂ − W₁ and ΔW of a module, c = ⟨ΔW, D⟩ / ‖ΔW‖² is what W₂ holds of ΔW. D that has nothing to do with ΔW gives
|z| < 3 for z = c √(d k) ‖ΔW‖ / ‖D‖. All of it comes from one pass over the rows of both weights.
"""

from __future__ import annotations

import filecmp
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from loratool.adapters.adapter import load_update
from loratool.algebra.lowrank.products import Product, decompose
from loratool.bases.decoded import weight_of
from loratool.bases.edits import rows_at
from loratool.bases.weights import Held, Plain, Room, plain_of
from loratool.files.checkpoint import Checkpoint
from loratool.files.model_files import TOKENIZER_FILES, VOCABULARIES
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import TensorInfo
from loratool.lazy import Tensor, torch
from loratool.measuring.delta_statistics import blocks, low_rank
from loratool.notes import Note
from loratool.templates import listed

if TYPE_CHECKING:
    from loratool.bases.binding import Place


@dataclass(frozen=True)
class Drift:
    """Sums over the entries of one weight, or of several."""

    old: float = 0.0  # ‖W₁‖²
    new: float = 0.0  # ‖W₂‖²
    between: float = 0.0  # ⟨W₁, W₂⟩
    apart: float = 0.0  # ‖D‖²
    update: float = 0.0  # ‖ΔW‖²
    held: float = 0.0  # ⟨ΔW, D⟩
    chance: float = 0.0  # ‖ΔW‖² ‖D‖² / (d k): the variance of ⟨ΔW, D⟩ for a D of no direction
    seen_apart: float = 0.0  # ‖D V‖² with V the right singular vectors of ΔW
    seen_old: float = 0.0  # ‖W₁ V‖²
    core: float = 0.0  # ‖Uᵀ D V‖² d k / r²: ‖D‖² for a D of no direction
    core_of: float = 0.0  # ‖D‖² where the core is known

    def __add__(self, other: Drift) -> Drift:
        return Drift(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def equal(self) -> bool:
        """Whether the weights are the same, bit for bit but for the sign of zeros."""
        return not self.apart

    @property
    def relative(self) -> float | None:
        """‖D‖ / ‖W₁‖."""
        return math.sqrt(self.apart / self.old) if self.old else None

    @property
    def over_update(self) -> float | None:
        """‖D‖ / ‖ΔW‖."""
        return math.sqrt(self.apart / self.update) if self.update else None

    @property
    def cosine(self) -> float | None:
        """Of W₁ and W₂."""
        sizes = math.sqrt(self.old) * math.sqrt(self.new)
        return self.between / sizes if sizes else None

    @property
    def c(self) -> float | None:
        """⟨ΔW, D⟩ / ‖ΔW‖²."""
        return self.held / self.update if self.update else None

    @property
    def z(self) -> float | None:
        """⟨ΔW, D⟩ in standard deviations of a D of no direction."""
        return self.held / math.sqrt(self.chance) if self.chance else None

    @property
    def seen(self) -> float | None:
        """‖D V‖ / ‖W₁ V‖: how far the bases differ where ΔW reads; ‖D‖ / ‖W₁‖ for a D of no direction."""
        return math.sqrt(self.seen_apart / self.seen_old) if self.seen_old else None

    @property
    def in_core(self) -> float | None:
        """‖Uᵀ D V‖² d k / (r² ‖D‖²): how much D lies in the directions of ΔW; 1 for a D of no direction."""
        return self.core / self.core_of if self.core_of else None


def drift_of(
    places: Sequence[tuple[Place, Place]], bases: tuple[Checkpoint, Checkpoint], device: torch.device
) -> Drift:
    """The sums of a module; each pair is where the two bases have the same part of it."""
    with OpenSources() as sources:
        return sum((drift_at(pair, bases, device, sources) for pair in places), Drift())


def drift_at(
    pair: tuple[Place, Place], bases: tuple[Checkpoint, Checkpoint], device: torch.device, sources: OpenSources
) -> Drift:
    """The sums of a part of a weight, in float64."""
    place = pair[0]
    old, new = (rows_at(p, weight_of(base, p.tensor)) for p, base in zip(pair, bases, strict=True))
    rooms = Room(sources, held=Held()), Room(sources, held=Held())
    width = old.whole.shape[1]
    loaded = load_update(low_rank(place.update) or place.update, device, torch.float64)
    basis = directions(place, width, device)
    parts: list[Drift] = []
    core = torch.zeros((), dtype=torch.float64)
    for first, count in blocks(place.rows, 2 * width):
        w1, w2 = (
            weight.rows(first, count, device, torch.float64, room)
            for weight, room in zip((old, new), rooms, strict=True)
        )
        w1, w2 = w1[:, place.columns], w2[:, pair[1].columns]
        d = w2 - w1
        delta = torch.zeros_like(d)
        loaded.add_rows(delta, first + place.update_row, 1.0, w1)
        seen = [0.0, 0.0]
        if basis is not None:
            left, right = basis
            read = d @ right.mT
            seen = [squared(read), squared(w1 @ right.mT)]
            at = first + place.update_row
            core = core + (left[at : at + count].mT @ read).cpu()
        parts.append(
            Drift(squared(w1), squared(w2), inner(w1, w2), squared(d), squared(delta), inner(delta, d), 0.0, *seen)
        )
    return with_chance(parts, place.rows * width, core, basis)


def with_chance(parts: Iterable[Drift], entries: int, core: Tensor, basis: tuple[Tensor, Tensor] | None) -> Drift:
    """Their sum, with what a difference of no direction would give."""
    found = sum(parts, Drift())
    more = Drift(chance=found.update * found.apart / entries if entries else 0.0)
    if basis is not None:
        rank = basis[1].shape[0]
        more = more + Drift(core=squared(core) * entries / rank**2, core_of=found.apart)
    return found + more


def directions(place: Place, width: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(U, Vᵀ) of a low-rank update that covers all columns of its weight; None for any other."""
    factors = low_rank(place.update)
    if factors is None or factors.down.shape[1] != width:
        return None
    loaded = load_update(factors, device, torch.float64)
    found = decompose(Product(loaded.up, loaded.down))
    kept = max(1, found.significant)
    return found.left[:, :kept], found.right[:kept]


def squared(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum())


NORMS = re.compile(r"(?:^|[._])(?:\w*norm\w*|ln_\w+)\.(?:weight|bias)$", re.IGNORECASE)
EMBEDDINGS = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe|word_embeddings|tok_embeddings)\.weight$", re.IGNORECASE)
SAMPLE = 1 << 16  # bytes of a tensor that are compared at a time
PARTS = 16  # places of a large one


def changed_beside(old: Checkpoint, new: Checkpoint) -> Iterator[Note]:
    """A note for each kind of thing that differs."""
    names = sorted(TOKENIZER_FILES | VOCABULARIES)
    both = [name for name in names if (old.root / name).is_file() or (new.root / name).is_file()]
    if files := [name for name in both if not same_files(old, new, name)]:
        yield Note("tokenizer-changed", f"the bases have different tokenizers: {listed(files)}")
    for pattern, code, what in ((NORMS, "norms-changed", "norms"), (EMBEDDINGS, "embeddings-changed", "embeddings")):
        mine = {name: info for name, info in old.stored.items() if pattern.search(name)}
        if differing := [name for name, info in mine.items() if not same(old, new, name, info, new.stored)]:
            yield Note(
                code,
                f"{len(differing)} of {len(mine)} {what} differ between the bases, such as {listed(differing[:1])}",
            )


def same_files(old: Checkpoint, new: Checkpoint, name: str) -> bool:
    one, other = old.root / name, new.root / name
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def same(old: Checkpoint, new: Checkpoint, name: str, info: TensorInfo, others: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is the same in both: all of a small one, evenly spread parts of a large one."""
    other = others.get(name)
    if other is None or (other.dtype, other.shape) != (info.dtype, info.shape):
        return False
    count = info.nbytes
    spread = [(part * (count - SAMPLE) // (PARTS - 1), SAMPLE) for part in range(PARTS)]
    places = spread if count > PARTS * SAMPLE else [(0, count)]
    one, two = plain_of(old, name), plain_of(new, name)
    return all(bytes_of(one, start, size) == bytes_of(two, start, size) for start, size in places)


def bytes_of(tensor: Plain, start: int, size: int) -> bytes:
    found = bytearray(size)
    tensor.read(start, memoryview(found))
    return bytes(found)
