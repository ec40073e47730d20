"""Weights of blocks: which block of an image model a weight lies in, by its name in any dialect, and its factor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratool.errors import UsageError, printable
from loratool.layouts.diffusion.blocks import BASE, KINDS, LISTS, MID, PATTERNS, PRESETS, TEXT

TEXT_NAME = re.compile(TEXT)
NAMES = tuple((re.compile(pattern), kind, factors, first) for pattern, kind, factors, first in PATTERNS)
BLOCK = re.compile(rf"(?P<kind>{'|'.join(KINDS)})(?P<number>\d{{1,4}})?")
RANGE = re.compile(r"(?P<first>[A-Z]+\d+)-(?P<last>[A-Z]+\d+)")
FLAG = "--block-weights"


def block_of(name: str) -> str:
    """The block of a weight or module; BASE where it is in none."""
    if TEXT_NAME.search(name):
        return BASE
    for pattern, kind, factors, first in NAMES:
        if match := pattern.search(name):
            numbers = map(int, match.groups())
            return (
                kind if kind == MID else f"{kind}{first + sum(map(math.prod, zip(factors, numbers, strict=True))):02d}"
            )
    return BASE


@dataclass(frozen=True)
class BlockWeights:
    """A factor for some blocks, by their names; 1 for all others."""

    factors: Mapping[str, float]

    @classmethod
    def of(cls, words: Sequence[str]) -> BlockWeights:
        """What words mean: a preset's name, a list of numbers, or `BLOCK=FACTOR`, `FIRST-LAST=FACTOR`, `KIND=FACTOR`.

        Later ones count over earlier ones. Raises `UsageError` for any other word.
        """
        found: dict[str, float] = {}
        numbers: list[float] = []
        for word in words:
            name, divided, factor = word.partition("=")
            if not divided and name.strip().upper() in PRESETS:
                values = map(float, PRESETS[name.strip().upper()].split(","))
                found |= zip(LISTS[17], values, strict=True)
            elif not divided:
                numbers.append(number_in(name, word))
            else:
                found |= dict.fromkeys(blocks_named(name.strip().upper(), word), number_in(factor, word))
        if numbers:
            if len(numbers) not in LISTS:
                known = ", ".join(map(str, LISTS))
                raise UsageError(f"{FLAG}: a list has {known} numbers (got {len(numbers)})")
            found |= zip(LISTS[len(numbers)], numbers, strict=True)
        return cls(found)

    def factor(self, name: str) -> float:
        """The factor for a weight or module: that of its block, or of all blocks of its kind."""
        block = block_of(name)
        return self.factors.get(block, self.factors.get(block.rstrip("0123456789"), 1.0))

    def check(self, names: Iterable[str]) -> None:
        """Raise `UsageError` where none of some weights lies in a block that has a factor."""
        there = {block_of(name) for name in names}
        if self.factors and not any(b in self.factors or b.rstrip("0123456789") in self.factors for b in there):
            found = ", ".join(sorted(there)[:12])
            raise UsageError(f"{FLAG}: no adapted weight lies in {', '.join([*self.factors][:6])}; they are in {found}")


def number_in(text: str, word: str) -> float:
    """A finite number; raises `UsageError` for any other text."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"{FLAG}: expected a preset ({', '.join(PRESETS)}), a list of numbers, or BLOCK=FACTOR such as IN04=0.5, "
            f"OUT03-OUT05=0 or S=0.8 (got {printable(repr(word))})"
        )
    return number


def blocks_named(name: str, word: str) -> list[str]:
    """The blocks that a name or a range stands for; a kind stands for all of its blocks."""
    if name in (BASE, MID):
        return [name]
    if match := RANGE.fullmatch(name):
        first, last = (BLOCK.fullmatch(match[end]) for end in ("first", "last"))
        if first and last and first["kind"] == last["kind"]:
            return [f"{first['kind']}{n:02d}" for n in range(int(first["number"]), int(last["number"]) + 1)]
    elif match := BLOCK.fullmatch(name):
        return [f"{match['kind']}{int(match['number']):02d}" if match["number"] else match["kind"]]
    raise UsageError(
        f"{FLAG}: {printable(repr(word))} names no block; they are {BASE}, {MID} and {', '.join(KINDS)} with numbers"
    )
