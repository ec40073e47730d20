"""The names that a table of renames makes of one. Models have few templates, so what takes long is done once for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from loratool.bases.binding.places import Step
from loratool.files.safefile import TensorInfo
from loratool.grouping import by_key
from loratool.layouts.architectures import (
    LEADING_WRAPPERS,
    PACKED_CODES,
    PACKED_ENDS,
    PACKED_WEIGHTS,
    PACKED_WITHIN,
    PREFIXES,
    WRAPPERS,
)
from loratool.layouts.renames import RENAMES
from loratool.templates import Numbers, template_of

WRAPPED = re.compile("|".join(sorted(WRAPPERS | LEADING_WRAPPERS)))


def unwrapped(name: str) -> str:
    """The name without the components that wrappers add in training."""
    if not WRAPPED.search(name):
        return name
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in LEADING_WRAPPERS:
        del parts[0]
    return ".".join(parts)


def by_template(targets: Iterable[str]) -> dict[str, list[tuple[str, Numbers]]]:
    """Template of a target's name → the targets that have it, each with its numbers."""
    named = ((target, template_of(unwrapped(target))) for target in targets)
    return by_key((template, (target, numbers)) for target, (template, numbers) in named)


class Disk:
    """The base's tensors by name and by template."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.templates: dict[str, dict[Numbers, str]] = {}
        self.lists: dict[tuple[str, int], dict[Numbers, list[str]]] = {}
        self.families: dict[str, list[str]] = {}
        for name in tensors:
            if "#" not in name:  # no name of a model that anybody has seen; it can still be matched exactly
                template, numbers = template_of(unwrapped(name))
                found = self.templates.setdefault(template, {})
                if found.setdefault(numbers, name) != name and unwrapped(name) == name:
                    found[numbers] = name

    @cached_property
    def components(self) -> frozenset[str]:
        """Every component of a name of the base."""
        return frozenset[str]().union(*map(components, (*self.templates, *self.packed)))

    @cached_property
    def packed(self) -> Mapping[str, str]:
        """The template of a weight → that of the packed tensor that the base has in its stead."""
        found: dict[str, str] = {}
        for template in self.templates:
            module, _, leaf = template[:-1].rpartition(".")
            if leaf in PACKED_WEIGHTS or leaf in PACKED_CODES:
                found[f"{module}.weight."] = template
            if PACKED_WITHIN in template:
                found[template.partition(PACKED_WITHIN)[0] + ".weight."] = template
            for end in PACKED_ENDS:
                if leaf.endswith(end):
                    found[f"{module}.{leaf.removesuffix(end)}."] = template
        return found

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """Those of the known prefixes that a name of the base begins with."""
        beginnings = {".".join(t.split(".")[1 : 1 + n]) for t in self.templates for n in (1, 2)}
        return tuple(prefix for prefix in PREFIXES if prefix in beginnings)

    def members(self, template: str, position: int) -> Mapping[Numbers, list[str]]:
        """The numbers at `position` that tensors of a template have, by their other numbers."""
        key = (template, position)
        if key not in self.lists:
            self.lists[key] = by_key(
                (numbers[:position] + numbers[position + 1 :], numbers[position])
                for numbers in self.templates.get(template, {})
            )
        return self.lists[key]

    def kin(self, template: str, position: int) -> list[str]:
        """The templates that are the same as one up to its number at `position`, that one among them."""
        key = "#".join(template.split("#")[: position + 1]) + "#"
        if key not in self.families:
            self.families[key] = [name for name in self.templates if name.startswith(key)]
        return self.families[key]


@dataclass(frozen=True)
class Alias:
    """A template that means the same as another, and the renames that lead to it."""

    template: str
    moves: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Move:
    """One direction of a row of the table of renames."""

    old: str  # with a dot at each end, as all that a template is compared with
    new: str
    at_start: bool
    step: Step

    @cached_property
    def brings(self) -> frozenset[str]:
        """The components that a name has after it and need not have before."""
        return components(self.new) - self.takes

    @cached_property
    def takes(self) -> frozenset[str]:
        """The components that a name must have before it."""
        return components(self.old)

    @cached_property
    def first(self) -> str:
        """The component that is looked for in a name."""
        return self.old.split(".")[1]


def components(dotted: str) -> frozenset[str]:
    return frozenset(dotted.split(".")) - {"", "#"}


IN_PREFIXES = frozenset[str]().union(*map(components, PREFIXES))
MOVES = tuple(
    Move(f".{old}.", f".{new}.", one.startswith("^"), ("renamed", f"renamed {old} → {new}"))
    for pair in RENAMES
    for one, other in (pair, pair[::-1])
    for old, new in [(one.lstrip("^"), other.lstrip("^"))]
)


class Moves:
    """The renames that may lead to names of one base, by how many more may follow.

    A rename that brings a component is of use only where the base has it, or where a later rename takes it away.
    """

    def __init__(self, wanted: frozenset[str], prefixes: tuple[str, ...], depth: int) -> None:
        self.prefixes = prefixes
        self.levels: list[dict[str, list[Move]]] = []  # first component of what is looked for → renames
        for _ in range(depth):
            useful = [move for move in MOVES if move.brings <= wanted]
            self.levels.append(by_key((move.first, move) for move in useful))
            wanted = wanted.union(*(move.takes for move in useful), IN_PREFIXES)

    def aliases(self, template: str) -> Iterator[list[Alias]]:
        """The templates that 0, 1, 2, … renames make of one, breadth first, each but once."""
        seen = {template}
        level = [Alias(template)]
        for index in reversed(self.levels):
            yield level
            following: dict[str, Alias] = {}
            for alias in level:
                for renamed, move in self.neighbours(alias.template, index):
                    if renamed not in seen:
                        seen.add(renamed)
                        following[renamed] = Alias(renamed, (*alias.moves, move))
            level = list(following.values())
        yield level

    def neighbours(self, template: str, index: Mapping[str, list[Move]]) -> Iterator[tuple[str, Step]]:
        """The templates that are one rename away, each with the rename."""
        parts = template.split(".")
        for first in dict.fromkeys(parts):
            for move in index.get(first, ()):
                at = template.find(move.old)
                if at == 0 or (at > 0 and not move.at_start):
                    yield template[:at] + move.new + template[at + len(move.old) :], move.step
        for prefix in (parts[1], ".".join(parts[1:3])):
            if prefix in PREFIXES:
                yield template[len(prefix) + 1 :], ("prefix-dropped", f"prefix {prefix}. dropped")
        for prefix in self.prefixes:
            yield f".{prefix}{template}", ("prefix-added", f"prefix {prefix}. added")
