"""Weights of blocks: the factor of a weight of an image model, by the block that it lies in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratool.errors import UsageError, printable
from loratool.layouts.diffusion.blocks import BASE, KINDS, LISTS, MID, PRESETS, block_of

BLOCK = re.compile(rf"(?P<kind>{'|'.join(KINDS)})(?P<number>\d{{1,4}})?")
RANGE = re.compile(r"(?P<first>[A-Z]+\d+)-(?P<last>[A-Z]+\d+)")
FLAG = "--block-weights"
NUMBERED = frozenset(LISTS[26])  # all blocks of U-Nets


@dataclass(frozen=True)
class BlockWeights:
    """A factor for some blocks, by their names; 1 for all others."""

    factors: Mapping[str, float]
    listed: bool = False  # whether a list or preset is among them that is for U-Nets

    @classmethod
    def of(cls, words: Sequence[str]) -> BlockWeights:
        """What words mean: a preset's name, a list of numbers, or `BLOCK=FACTOR`, `FIRST-LAST=FACTOR`, `KIND=FACTOR`.

        A list comes first; later words count over earlier ones. Raises `UsageError` for any other word.
        """
        numbers = [word for word in words if "=" not in word and word.strip().upper() not in PRESETS]
        if numbers and len(numbers) not in LISTS:
            values = [number_in(word, word) for word in numbers]
            raise UsageError(f"{FLAG}: a list has {', '.join(map(str, LISTS))} numbers (got {len(values)})")
        blocks = LISTS[len(numbers)] if numbers else ()
        found = {block: number_in(word, word) for block, word in zip(blocks, numbers, strict=True)}
        listed = bool(NUMBERED.intersection(blocks))
        for word in words:
            name, divided, factor = (part.strip() for part in word.partition("="))
            if divided:
                named = blocks_named(name.upper(), word)
                found = {block: number for block, number in found.items() if kind_of(block) not in named}
                found |= dict.fromkeys(named, number_in(factor, word))
            elif name.upper() in PRESETS:
                found |= zip(LISTS[17], map(float, PRESETS[name.upper()].split(",")), strict=True)
                listed = True
        return cls(found, listed)

    def named(self, block: str) -> float | None:
        """The factor of a block, or of all blocks of its kind; None where it has none."""
        return self.factors.get(block, self.factors.get(kind_of(block)))

    def factor(self, name: str) -> float:
        """The factor for a weight or module."""
        found = self.named(block_of(name))
        return 1.0 if found is None else found

    def check(self, names: Iterable[str]) -> None:
        """Raise `UsageError` where none of some weights lies in a block that has a factor, or a list leaves out its block."""
        there = {block_of(name) for name in names}
        left = sorted(block for block in there & NUMBERED if self.named(block) is None)
        if self.listed and left:
            raise UsageError(
                f"{FLAG}: the list has no number for {', '.join(left)}, where adapted weights lie; the tools that such "
                f"lists come from multiply these by 0: add {','.join(f'{block}=0' for block in left)}, or other factors"
            )
        if self.factors and all(self.named(block) is None for block in there):
            found = ", ".join(sorted(there)[:12])
            raise UsageError(f"{FLAG}: no adapted weight lies in {', '.join([*self.factors][:6])}; they are in {found}")


def kind_of(block: str) -> str:
    return block.rstrip("0123456789")


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
    if name in (BASE, MID, "M00"):
        return [BASE if name == BASE else MID]
    if match := RANGE.fullmatch(name):
        first, last = (BLOCK.fullmatch(match[end]) for end in ("first", "last"))
        if first and last and first["kind"] == last["kind"]:
            ends = sorted((int(first["number"]), int(last["number"])))
            return [f"{first['kind']}{number:02d}" for number in range(ends[0], ends[1] + 1)]
    elif match := BLOCK.fullmatch(name):
        return [f"{match['kind']}{int(match['number']):02d}" if match["number"] else match["kind"]]
    raise UsageError(
        f"{FLAG}: {printable(repr(word))} names no block; they are {BASE}, {MID} and {', '.join(KINDS)} with numbers"
    )
