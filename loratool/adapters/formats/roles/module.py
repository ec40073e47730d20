"""`Module`: what a file holds of one module, and what is found in it."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from loratool.adapters.adapter import FACTOR_NAMES, INTEGER_NAMES, StoredTensor, is_scale
from loratool.adapters.formats.found import MISSING_PARTNER
from loratool.adapters.formats.roles.names import ALPHA, canonical
from loratool.algebra.updates.base import Update
from loratool.errors import Problem, printable
from loratool.files.open_sources import OpenSources
from loratool.notes import Note

MALFORMED, SAVED_TWICE = "malformed", "saved-twice"  # codes of problems
# How one number of a dtype is unpacked. BF16 is the upper half of an F32.
NUMBERS = {
    "F64": "<d",
    "F32": "<f",
    "F16": "<e",
    "BF16": "<f",
    "F8_E5M2": "<e",
    "F8_E4M3": "",
    "I64": "<q",
    "I32": "<i",
    "I16": "<h",
    "I8": "<b",
    "U8": "<B",
    "BOOL": "<?",
}


def of_e4m3(byte: int) -> float:
    """The number that a byte is with 4 bits of exponent and 3 of fraction, without infinities."""
    exponent, fraction = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    size = math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10)
    return -size if byte & 128 else size


class RoleProblem(Exception):  # noqa: N818 (it carries what a report calls problems)
    """Everything that is wrong with the tensors of one module, each as a `Problem`."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(*self.problems)


# The same for each of thousands of modules.
NO_ALPHA = Note("alpha-missing", "modules without alpha are applied with scale 1, as if it was their rank")
ZERO_ALPHA = Note("alpha-is-zero", "modules with alpha 0 are applied with scale 0, so they change nothing")


@dataclass(frozen=True)
class Module:
    """What a file holds of one module."""

    name: str  # in words of the file, for messages
    roles: Mapping[str, StoredTensor]  # by role, in any spelling
    alpha: float | None = None  # of a header or config, where the module has no tensor `alpha`
    scale: float | None = None  # what multiplies as it is, where the dialect says so; then alpha is not used
    table: bool = False  # an embedding, (rows, width), whose update is the transpose of the product
    dim: int | None = None  # the rank that a header records, for comparison
    constrained: bool = False  # alpha limits the rotation also where it is 0, as in kohya's OFT
    widens: bool = False  # its factors may be of a larger shape than the base's weight, which has zeros there


@dataclass(frozen=True)
class Found:
    """What the tensors of one module come to, by parameter: `weight` or `bias`."""

    updates: Mapping[str, Update]  # several changes of one parameter are one update
    used: Mapping[str, tuple[str, ...]]  # the roles that each was made of, as the module spells them
    rank: int = 0  # of its factors; 0 where it has none
    notes: tuple[Note, ...] = ()  # what was assumed; the same note for every module of which the same is said
    unsupported: tuple[str, ...] = ()  # what is recognised and not merged


@dataclass
class Slots:
    """The tensors of a module by the one name of their role, and what has been found in them so far."""

    module: Module
    sources: OpenSources | None = None
    spelled: dict[str, str] = field(default_factory=dict)  # role → as the module spells it
    notes: list[Note] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    rank: int = 0  # that α was divided by

    def __post_init__(self) -> None:
        for role in self.module.roles:
            name = canonical(role)
            if name in self.spelled:
                both = f"{self.module.roles[self.spelled[name]].info.name} and {self.module.roles[role].info.name}"
                self.fail(f"{printable(both)} are two spellings of the same tensor", SAVED_TWICE)
            self.spelled[name] = role

    def __contains__(self, role: object) -> bool:
        return role in self.spelled

    @property
    def shown(self) -> str:
        return printable(self.module.name)

    def name(self, role: str) -> str:
        """The name of the tensor of a role, for a message."""
        return printable(self.module.roles[self.spelled[role]].info.name)

    def fail(self, what: str, code: str = MALFORMED) -> NoReturn:
        """Refuse the module."""
        raise RoleProblem([Problem(f"{self.shown}: {what}", code)])

    def require(self, condition: bool, what: str, code: str = MALFORMED) -> None:
        """Refuse the module unless something holds."""
        if not condition:
            self.fail(what, code)

    def remark(self, note: Note) -> None:
        """Note something of this module, in words that serve for all modules of which it is true."""
        if note not in self.notes:
            self.notes.append(note)

    def tensor(
        self, role: str, dimensions: Collection[int] = (2,), dtypes: Collection[str] = tuple(FACTOR_NAMES)
    ) -> Any:
        """The tensor of a role, in any of some numbers of dimensions (none: in any)."""
        if role not in self.spelled:
            there = ", ".join(self.name(other) for other in self.spelled)
            self.fail(f"{role} is missing (found only {there})", MISSING_PARTNER)
        stored = self.module.roles[self.spelled[role]]
        shape, dtype = stored.shape, stored.info.dtype
        # of thousands of tensors none is refused as a rule, so that messages are made for those alone that are
        if dtype not in dtypes:
            self.fail(f"{self.name(role)} is stored as {dtype}; expected {' or '.join(dtypes)}")
        if dimensions and len(shape) not in dimensions:
            wanted = " or ".join(map(str, sorted(dimensions)))
            self.fail(f"{self.name(role)} is {list(shape)}; expected {wanted} dimensions")
        if 0 in shape:
            self.fail(f"{self.name(role)} is {list(shape)}, which has no elements")
        return stored

    def indices(self, role: str, dimensions: Collection[int]) -> Any:
        """The tensor of a role that holds whole numbers."""
        return self.tensor(role, dimensions, tuple(INTEGER_NAMES))

    def shape_in(self, role: str) -> tuple[int, ...]:
        """The shape that the tensor of a role holds in whole numbers; its bytes are read."""
        stored = self.indices(role, (1,))
        self.require(stored.shape[0] < 6, f"{self.name(role)} is {list(stored.shape)}; expected the sizes of a weight")
        kind = NUMBERS[stored.info.dtype][1] * stored.shape[0]
        return tuple(struct.unpack(f"<{kind}", self.bytes_of(stored)))

    def bytes_of(self, stored: StoredTensor) -> bytearray:
        """All of a small tensor."""
        raw = bytearray(stored.info.nbytes)
        stored.read(0, memoryview(raw), self.sources)
        return raw

    def number(self, role: str) -> float:
        """The one finite number that the tensor of a role holds; its bytes are read."""
        stored = self.tensor(role, (), tuple(NUMBERS))
        if math.prod(stored.shape) != 1:
            self.fail(f"{self.name(role)} is {list(stored.shape)}; expected one number")
        raw = self.bytes_of(stored)
        if stored.info.dtype == "BF16":
            raw = bytearray(2) + raw
        elif stored.info.dtype == "F8_E5M2":  # the upper half of an F16
            raw = bytearray(1) + raw
        (value,) = (
            [of_e4m3(raw[0])] if stored.info.dtype == "F8_E4M3" else struct.unpack(NUMBERS[stored.info.dtype], raw)
        )
        if not is_scale(number := float(value)):  # some are booleans
            self.fail(f"{self.name(role)} is {number:g}; expected a finite number")
        return number

    @property
    def alpha(self) -> float | None:
        """α as the file or its header has it; None where neither does."""
        if ALPHA in self:
            value = self.number(ALPHA)
            if value < 0:
                self.fail(f"{self.name(ALPHA)} is {value:g}; expected a number that is not negative")
            return value
        return self.module.alpha

    def scale(self, rank: int) -> float:
        """What multiplies a product of a rank: α/r, and 1 without α."""
        self.rank = rank
        if self.module.scale is not None:
            return self.module.scale
        alpha = self.alpha
        if alpha is None:
            self.remark(NO_ALPHA)
            return 1.0
        if alpha == 0:
            self.remark(ZERO_ALPHA)
        return alpha / rank
