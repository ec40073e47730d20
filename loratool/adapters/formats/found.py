"""`Found`: what has been read of an adapter's file, on the way to an `Adapter`, whatever the format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratool.adapters.adapter import FACTOR_NAMES, StoredTensor, is_scale
from loratool.adapters.reading import AS_STORED, Reading
from loratool.algebra.updates.base import Update
from loratool.errors import Problem, printable
from loratool.files.heads import HasNames
from loratool.files.safefile import SafeFile
from loratool.notes import Note

MISSING_PARTNER, NO_ALPHA = "missing-partner", "alpha-missing"  # codes of problems


@dataclass
class Found:
    """What has been read of one file."""

    file: SafeFile
    reading: Reading = AS_STORED
    notes: list[Note] = field(default_factory=list)
    updates: dict[str, Update] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    told: set[str] = field(default_factory=set)  # tensors that a problem, or a reason, is about

    def stored(self, name: str) -> StoredTensor:
        home = self.file.home(name)
        return StoredTensor(home, home.tensors[name])

    def partners(self, module: str, a: str, b: str) -> tuple[StoredTensor, StoredTensor] | None:
        """(A, B) of a module by the ends of their names; None where one is missing, which is a problem."""
        names = (module + a, module + b)
        self.told.update(names)
        if missing := [name for name in names if name not in self.file.tensors]:
            self.refuse(module, f"{printable(missing[0])} is missing", MISSING_PARTNER)
            return None
        return self.stored(names[0]), self.stored(names[1])

    def pair(self, module: str, a: str, b: str, dimensions: int = 2) -> tuple[StoredTensor, StoredTensor] | None:
        """The same, both of floats and of one rank; None where a problem was told.

        Args:
            module: the beginning of both names.
            a: the end of the name of A, (…, rank, in); it may hold several such, one below the other.
            b: the end of the name of B, (…, out, rank).
            dimensions: of both.
        """
        if (both := self.partners(module, a, b)) is None:
            return None
        first, last = both
        shapes = f"{a.strip('.')} is {list(first.shape)}, {b.strip('.')} is {list(last.shape)}"
        if {first.info.dtype, last.info.dtype} - FACTOR_NAMES.keys():
            self.refuse(module, f"stored as {first.info.dtype} and {last.info.dtype}; expected floats")
        elif {len(first.shape), len(last.shape)} != {dimensions} or 0 in first.shape + last.shape:
            self.refuse(module, f"{shapes}; expected {dimensions} dimensions")
        elif first.shape[-2] % last.shape[-1]:
            self.refuse(module, f"{shapes}; expected one rank")
        else:
            return both
        return None

    def lengths(self, name: str, rows: int) -> StoredTensor | None:
        """DoRA's lengths of `rows` rows; None where there are none, or a problem was told."""
        if name not in self.file.tensors:
            return None
        stored = self.stored(name)
        if stored.shape != (rows,) or stored.info.dtype not in FACTOR_NAMES:
            self.refuse(name, f"is {stored.info.dtype} {list(stored.shape)}; expected {rows} floats")
            return None
        return stored

    def refuse(self, name: str, why: str, code: str = "malformed") -> None:
        """Tell what is wrong with a tensor or a module."""
        self.told.add(name)
        self.problems.append(Problem(f"{printable(name)}: {why}", code))

    def add(self, target: str, update: Any, names: Sequence[str]) -> None:
        """Take up the update of a target."""
        if target in self.updates:
            self.refuse(names[0], f"{printable(target)} has a second update")
            return
        self.updates[target] = update
        self.sources[target] = tuple(names)

    def alpha(self, own: object, where: str) -> float:
        """α of all modules: the one the settings hold, else the caller's; 0 where a problem was told."""
        given = self.reading.input_alpha
        if own is not None:
            if not is_scale(own):
                self.problems.append(Problem(f"{where} is {printable(repr(own))}; expected a finite number"))
                return 0.0
            if given is not None:
                text = f"{where} is {own:g}, so --input-alpha {given:g} is ignored"
                self.notes.append(Note("input-alpha-not-used", text))
            return float(own)
        if given is None:
            text = f"alpha is not recorded ({where} is missing); pass --input-alpha with the alpha it was trained with"
            self.problems.append(Problem(text, NO_ALPHA))
            return 0.0
        return given

    def left_over(self) -> list[str]:
        """The tensors that nothing was made of, and nothing told."""
        used = self.told.union(*self.sources.values())
        return [name for name in self.file.tensors if name not in used]


def modules_with(file: HasNames, ends: Sequence[str]) -> Iterator[str]:
    """The modules that have a tensor whose name ends so, sorted."""
    yield from sorted({name.removesuffix(end) for name in file.tensors for end in ends if name.endswith(end)})
