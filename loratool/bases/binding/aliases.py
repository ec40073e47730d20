"""The other names of a model's weights, from the tables of its layouts: an adapter may use those of either layout.

A name of the one layout may be some rows of a tensor, or the rows of several tensors, of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from loratool.algebra.updates.base import Update
from loratool.bases.binding import fusing
from loratool.bases.binding.fusing import Misfit
from loratool.bases.binding.places import Match, Place, Rule
from loratool.errors import printable
from loratool.files.safefile import TensorInfo
from loratool.layouts.diffusion.rows import Family, Row
from loratool.layouts.diffusion.words import OPTIONAL
from loratool.templates import template_of

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor that are the next rows of an alias."""

    tensor: str
    first_row: int
    rows: int
    whole: bool = True
    transposed: bool = False  # the tensor holds the alias's columns as rows


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Entry:
    """One side of a row of a table, ready to be compared with names."""

    row: Row
    part: int  # which of the parts this is; −1 for the original
    stem: str
    numbers: tuple[str, ...]  # in the stem; # for any
    open: bool  # whatever follows belongs to it

    @classmethod
    def of(cls, row: Row, part: int) -> Entry:
        name = row.original if part < 0 else row.parts[part]
        stem = name.removesuffix(".*")
        numbers = tuple(part for part in stem.split(".") if part == "#" or part.isdigit())
        return cls(row, part, stem, numbers, stem != name)


@dataclass(frozen=True)
class Hit:
    """A name of which a side of a row is the beginning."""

    entry: Entry
    numbers: tuple[str, ...]  # those that # stands for
    rest: str  # what follows in the name, with its dot

    def named(self, side: str) -> str:
        """Another side of the same row, for the same numbers."""
        numbers = iter(self.numbers)
        stem = side.removesuffix(".*")
        return ".".join(next(numbers) if part == "#" else part for part in stem.split(".")) + self.rest


@cache
def entries_of(family: Family) -> Mapping[str, tuple[Entry, ...]]:
    """Template of a stem → the sides of rows that have it."""
    found: dict[str, tuple[Entry, ...]] = {}
    for row in family.rows:
        for part in range(-1, len(row.parts)):
            entry = Entry.of(row, part)
            template = template_of(entry.stem)[0]
            found[template] = (*found.get(template, ()), entry)
    return found


def hits(family: Family, name: str) -> Iterator[Hit]:
    """The sides of rows that a tensor's name begins with: as a whole, but for its parameter, or at an open end."""
    entries, parts = entries_of(family), name.split(".")
    for count in range(len(parts), 0, -1):
        template, numbers = template_of(".".join(parts[:count]))
        for entry in entries.get(template, ()):
            if not entry.open and count < len(parts) - 1:
                continue
            if all(wanted in ("#", given) for wanted, given in zip(entry.numbers, numbers, strict=True)):
                free = tuple(g for wanted, g in zip(entry.numbers, numbers, strict=True) if wanted == "#")
                yield Hit(entry, free, "".join(f".{part}" for part in parts[count:]))


def family_of(names: Iterable[str], families: Iterable[Family]) -> Family | None:
    """The first family one of whose marks is in the names."""
    modules = {template_of(name.rpartition(".")[0])[0] for name in names}
    for family in families:
        if any(all(template_of(module)[0] in modules for module in mark) for mark in family.marks):
            return family
    return None


@dataclass(frozen=True)
class Aliases:
    """The other names of a component's weights, each with the rows that it means."""

    diffusers: Mapping[str, Pieces]  # names in the layout of diffusers of what is stored in another
    others: Mapping[str, Pieces]

    @cached_property
    def names(self) -> Mapping[str, Pieces]:
        return {**self.others, **self.diffusers}


def aliases_of(tensors: Tensors, family: Family | None, is_text: bool = False) -> Aliases:
    """The aliases of a component's tensors.

    A name that is both one tensor's own and, in the other layout, another's is among them too.
    """
    diffusers: dict[str, Pieces] = {}
    others: dict[str, Pieces] = {}
    groups: dict[tuple[Row, tuple[str, ...], str], dict[int, str]] = {}
    for name, info in tensors.items():
        for hit in hits(family, name) if family is not None else ():
            if hit.entry.part < 0:
                for other, pieces in parts_of(hit.entry.row, hit, info, tensors):
                    diffusers.setdefault(other, pieces)
            else:
                groups.setdefault((hit.entry.row, hit.numbers, hit.rest), {})[hit.entry.part] = name
    for (row, numbers, rest), members in groups.items():
        if len(members) == len(row.parts):
            original = Hit(Entry.of(row, -1), numbers, rest).named(row.original)
            pieces = pieces_of(row, [tensors[members[part]] for part in range(len(row.parts))], tensors)
            others.setdefault(original, pieces)
    found = {**others, **diffusers}
    for other, name in spelt_otherwise((*tensors, *found), is_text):
        others.setdefault(other, found[name] if name in found else whole(tensors[name]))
    return Aliases(elsewhere(diffusers), elsewhere(others))


def elsewhere(found: Mapping[str, Pieces]) -> dict[str, Pieces]:
    """Those aliases that are not simply the name of what they mean."""
    return {name: pieces for name, pieces in found.items() if [piece.tensor for piece in pieces] != [name]}


def whole(info: TensorInfo) -> Pieces:
    return (Piece(info.name, 0, info.rows),)


def parts_of(row: Row, hit: Hit, info: TensorInfo, tensors: Tensors) -> Iterator[tuple[str, Pieces]]:
    """The names in diffusers of what a tensor of the original layout holds."""
    if len(row.parts) == 1:
        yield hit.named(row.parts[0]), pieces_of(row, [info], tensors)
        return
    sizes = sizes_of(row, shape_of_weight(info, tensors))
    at = 0
    for part, size in zip(row.parts, sizes, strict=False):
        yield hit.named(part), (Piece(info.name, at, size, whole=False),)
        at += size


def pieces_of(row: Row, infos: list[TensorInfo], tensors: Tensors) -> Pieces:
    """The rows of tensors that together are the other side of a row."""
    if len(infos) > 1:
        return tuple(Piece(info.name, 0, info.rows) for info in infos)
    (info,) = infos
    if row.transposed:
        return (Piece(info.name, 0, info.rows, transposed=True),)
    shape = shape_of_weight(info, tensors)
    half = info.rows // 2
    if row.swapped and len(shape) > 1 and shape[0] == 2 * shape[1]:
        return (Piece(info.name, half, half, whole=False), Piece(info.name, 0, half, whole=False))
    return whole(info)


def shape_of_weight(info: TensorInfo, tensors: Tensors) -> tuple[int, ...]:
    """The shape of the weight that a bias belongs to, or of the tensor itself."""
    weight = tensors.get(info.name.removesuffix("bias") + "weight")
    return weight.shape if weight is not None and weight.shape[:1] == info.shape[:1] else info.shape


def sizes_of(row: Row, shape: tuple[int, ...]) -> list[int]:
    """Rows of each part of a weight of this shape; nothing where it cannot be divided so."""
    letters = row.sizes or "a" * len(row.parts)
    if not shape or ("h" in letters and len(shape) < 2):
        return []
    own = shape[1] if "h" in letters else 0
    rest, uneven = divmod(shape[0] - letters.count("h") * own, len(letters) - letters.count("h"))
    if uneven or rest <= 0:
        return []
    return [own if letter == "h" else rest for letter in letters]


def spelt_otherwise(names: Iterable[str], is_text: bool) -> Iterator[tuple[str, str]]:
    """(other spelling, name) of names that tools also write another way."""
    for name in names:
        if name.endswith(".scale"):
            yield name.removesuffix("scale") + "weight", name
        elif not name.endswith((".weight", ".bias")):  # such as modulation, whose change is modulation.diff
            yield f"{name}.weight", name
        if is_text:
            bare = next((name[len(start) :] for start in OPTIONAL if name.startswith(start)), name)
            yield from ((other, name) for other in (bare, f"text_model.{bare}", f"model.{bare}") if other != name)


def match_of(pieces: Pieces, update: Update, tensors: Tensors, rule: Rule) -> Match:
    """The places of an update of an alias; all of a model's weights that have one are stored (out, in)."""
    infos = [tensors[piece.tensor] for piece in pieces]
    first = pieces[0]
    if len(pieces) == 1 and first.transposed:
        turned = fusing.turned(update, infos[0].shape)
        if turned is None:
            raise Misfit(
                f"the update is {fusing.described(update)}, but {printable(first.tensor)} is its transpose, {list(infos[0].shape)}"
            )
        return Match((fusing.all_of(turned, infos[0], rule),))
    if len(pieces) == 1 and first.whole:
        found = fusing.whole(update, infos[0], rule)
        if not found.straight:
            raise Misfit(
                f"the update is {fusing.described(update)}, but {printable(first.tensor)} is {list(infos[0].shape)}"
            )
        return Match(found.straight)
    if any(info.shape[1:] != infos[0].shape[1:] or not info.shape for info in infos):
        raise Misfit("its parts in the base differ in more than their rows")
    shape = (sum(piece.rows for piece in pieces), *infos[0].shape[1:])
    fitted = update.fit(shape)
    if fitted is None or fitted.fold != 1:
        where = " + ".join(f"{printable(p.tensor)}[{p.first_row}:{p.first_row + p.rows}]" for p in pieces)
        raise Misfit(f"the update is {fusing.described(update)}, but {where} is {list(shape)}")
    step = (
        ("part-of-fused", "rows of a fused tensor")
        if len(pieces) == 1
        else ("split-into-parts", "split over the rows of its parts")
    )
    placed, at = list[Place](), 0
    for piece in pieces:
        placed.append(Place(piece.tensor, rule.then(*step), fitted, piece.first_row, piece.rows, at))
        at += piece.rows
    return Match(tuple(placed))
