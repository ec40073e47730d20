"""Weights of blocks: the factor of a weight of an image model, by the block that it lies in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loratool.errors import UsageError, printable
from loratool.layouts.diffusion.blocks import BASE, CLIP, KINDS, LISTS, MID, PRESETS, T5, WIDER, block_of

BLOCK = re.compile(rf"(?P<kind>{'|'.join(KINDS)})(?P<number>\d{{1,4}})?")
RANGE = re.compile(r"(?P<first>[A-Z]+\d+)-(?P<last>[A-Z]+\d+)")
FLAG = "--block-weights"
ALONE = {name: name for name in (BASE, MID, CLIP, T5)} | {"M00": MID}  # names without numbers, and what they mean


@dataclass(frozen=True)
class BlockWeights:
    """A factor for some blocks, by their names; 1 for all others."""

    factors: Mapping[str, float]
    listed: frozenset[str] = frozenset()  # those that a list or preset is for
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # other word → the blocks that it names

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
        listed, spelled = set(blocks), dict[str, tuple[str, ...]]()
        for word in words:
            name, divided, factor = (part.strip() for part in word.partition("="))
            if divided:
                named = spelled[word] = tuple(blocks_named(name.upper(), word))
                again = {CLIP, T5, *listed} if BASE in named else set()  # of what BASE counts for as well
                found = {
                    block: number
                    for block, number in found.items()
                    if kind_of(block) not in named and not (block in again and block in WIDER)
                }
                found |= dict.fromkeys(named, number_in(factor, word))
            elif name.upper() in PRESETS:
                found |= zip(LISTS[17], map(float, PRESETS[name.upper()].split(",")), strict=True)
                listed.update(LISTS[17])
        return cls(found, frozenset(listed), spelled)

    def named(self, block: str) -> float | None:
        """The factor of a block, of all blocks of its kind, or of what it is a part of; None where it has none."""
        return next((self.factors[name] for name in names_of(block) if name in self.factors), None)

    def factor(self, name: str) -> float:
        """The factor for a weight or module."""
        found = self.named(block_of(name))
        return 1.0 if found is None else found

    def check(self, names: Iterable[str]) -> None:
        """Raise `UsageError` where a word names no block of some weights, or a list leaves one of their blocks out."""
        there = {block_of(name) for name in names}
        known = {name for block in there for name in names_of(block)}
        shown = ", ".join(runs(there))
        if idle := [word for word, blocks in self.spelled.items() if known.isdisjoint(blocks)]:
            raise UsageError(
                f"{FLAG}: the adapter changes nothing in {', '.join(map(printable, idle))}; it changes {shown}"
            )
        own = {block for blocks in self.spelled.values() for block in blocks}
        covered = {
            block for block in there if self.listed.intersection((block, WIDER.get(block))) or own & {*names_of(block)}
        }
        left = runs(there - covered - {BASE})
        if self.listed and left:
            raise UsageError(
                f"{FLAG}: the list has no number for {', '.join(left)}, where adapted weights lie; the tools that such "
                f"lists come from multiply these by 0: add {','.join(f'{block}=0' for block in left)}, or other factors"
            )
        if self.factors and all(self.named(block) is None for block in there):
            raise UsageError(
                f"{FLAG}: the adapter changes nothing in {', '.join([*self.factors][:6])}; it changes {shown}"
            )


def runs(blocks: Iterable[str]) -> list[str]:
    """Blocks as they may be typed, those that follow one another as a range."""
    found: list[list[str]] = []
    for block in sorted(blocks):
        number = block.removeprefix(kind_of(block))
        if found and number and found[-1][-1] == f"{kind_of(block)}{int(number) - 1:02d}":
            found[-1].append(block)
        else:
            found.append([block])
    return [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found]


def kind_of(block: str) -> str:
    """The kind of a numbered block; T5 is a name."""
    return block if block == T5 else block.rstrip("0123456789")


def names_of(block: str) -> tuple[str, ...]:
    """The names under which a block may have a factor, the one that counts first."""
    return (block, kind_of(block), WIDER.get(block, block))


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
    if name in ALONE:
        return [ALONE[name]]
    if match := RANGE.fullmatch(name):
        first, last = (BLOCK.fullmatch(match[end]) for end in ("first", "last"))
        if first and last and first["kind"] == last["kind"]:
            ends = sorted((int(first["number"]), int(last["number"])))
            return [f"{first['kind']}{number:02d}" for number in range(ends[0], ends[1] + 1)]
    elif match := BLOCK.fullmatch(name):
        return [f"{match['kind']}{int(match['number']):02d}" if match["number"] else match["kind"]]
    raise UsageError(
        f"{FLAG}: {printable(repr(word))} is not a block; blocks are {BASE}, {CLIP}, {T5}, {MID} and {', '.join(KINDS)} with numbers"
    )
