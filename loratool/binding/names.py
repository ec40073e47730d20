"""Names as templates with numbers, and the names that a table of renames makes of one.

`model.layers.3.mlp.experts.7.w1.weight` is the template `.model.layers.#.mlp.experts.#.w1.weight.` with the
numbers 3 and 7. Models have few templates, so what takes long is done once for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from loratool.layouts.architectures import LEADING_WRAPPERS, PREFIXES, WRAPPERS
from loratool.layouts.renames import RENAMES

if TYPE_CHECKING:
    from loratool.safefile import TensorInfo

NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
WRAPPED = re.compile("|".join(sorted(WRAPPERS | LEADING_WRAPPERS)))
Numbers = tuple[str, ...]


@lru_cache(maxsize=1 << 17)  # names of one model; emptied when its binding is done
def template_of(name: str) -> tuple[str, Numbers]:
    """A name's template and its numbers."""
    dotted = f".{name}."
    return NUMBER.sub("#", dotted), tuple(NUMBER.findall(dotted))


def shown(template: str) -> str:
    """A template as people read it."""
    return template.strip(".").replace("#", "N")


def unwrapped(name: str) -> str:
    """The name without the components that wrappers add in training."""
    if not WRAPPED.search(name):
        return name
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in LEADING_WRAPPERS:
        del parts[0]
    return ".".join(parts)


class Disk:
    """The base's tensors by name and by template."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.templates: dict[str, dict[Numbers, str]] = {}
        self.lists: dict[tuple[str, int], dict[Numbers, list[str]]] = {}
        for name in tensors:
            if "#" not in name:  # no name of a model that anybody has seen; it can still be matched exactly
                template, numbers = template_of(unwrapped(name))
                found = self.templates.setdefault(template, {})
                if found.setdefault(numbers, name) != name and unwrapped(name) == name:
                    found[numbers] = name

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """Those of the known prefixes that a name of the base begins with."""
        beginnings = {".".join(t.split(".")[1 : 1 + n]) for t in self.templates for n in (1, 2)}
        return tuple(prefix for prefix in PREFIXES if prefix in beginnings)

    def members(self, template: str, position: int) -> Mapping[Numbers, list[str]]:
        """The numbers at `position` that tensors of a template have, by their other numbers."""
        key = (template, position)
        if key not in self.lists:
            found: dict[Numbers, list[str]] = {}
            for numbers in self.templates.get(template, {}):
                found.setdefault(numbers[:position] + numbers[position + 1 :], []).append(numbers[position])
            self.lists[key] = found
        return self.lists[key]


@dataclass(frozen=True)
class Alias:
    """A template that means the same as another, and the renames that lead to it."""

    template: str
    moves: tuple[str, ...] = ()


# (what is looked for, what takes its place, the row as it is shown), both directions of every row
MOVES = tuple(
    (f".{one.lstrip('^')}.", f".{other.lstrip('^')}.", one.startswith("^"), f"{one.lstrip('^')} → {other.lstrip('^')}")
    for pair in RENAMES
    for one, other in (pair, pair[::-1])
)


def aliases(template: str, disk: Disk, depth: int) -> Iterator[list[Alias]]:
    """The templates that 0, 1, … `depth` renames make of one, breadth first, each but once."""
    seen = {template}
    level = [Alias(template)]
    for _ in range(depth):
        yield level
        following: dict[str, Alias] = {}
        for alias in level:
            for renamed, move in neighbours(alias.template, disk):
                if renamed not in seen:
                    seen.add(renamed)
                    following[renamed] = Alias(renamed, (*alias.moves, move))
        level = list(following.values())
    yield level


def neighbours(template: str, disk: Disk) -> Iterator[tuple[str, str]]:
    """The templates that are one rename away, each with the rename."""
    for old, new, at_start, move in MOVES:
        at = template.find(old)
        if at == 0 or (at > 0 and not at_start):
            yield template[:at] + new + template[at + len(old) :], f"renamed {move}"
    for prefix in PREFIXES:
        if template.startswith(f".{prefix}."):
            yield template[len(prefix) + 1 :], f"prefix {prefix}. dropped"
    for prefix in disk.prefixes:
        yield f".{prefix}{template}", f"prefix {prefix}. added"


def fill(template: str, numbers: Numbers) -> str:
    """A template with its numbers put in."""
    pieces = template.split("#")
    return "".join(piece for pair in zip(pieces, (*numbers, ""), strict=True) for piece in pair)
