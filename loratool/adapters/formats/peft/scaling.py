"""α over the rank, for every module, under `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loratool.adapters.adapter import is_scale
from loratool.adapters.formats.peft.draft import Draft, UnusableError, is_whole
from loratool.adapters.formats.peft.files import AGAINST_TENSORS
from loratool.adapters.patterns import match_patterns
from loratool.errors import Problem, printable
from loratool.files.safefile import SafeFile
from loratool.notes import Note
from loratool.templates import some


class Scaling:
    """α/r, or α/√r with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732); r is the rank that the tensors have.

    What is wrong in the config goes to the draft's problems; scales are then meaningless.
    """

    def __init__(self, draft: Draft, paths: Iterable[str], alpha: str = "lora_alpha") -> None:
        """Read the config's fields and match its patterns with `paths`; `alpha` is what the method calls it."""
        self.draft = draft
        self.rank: int | None = draft.config.get("r")
        self.base_alpha: float = draft.config.get(alpha, 8)
        self.rslora = False
        self.ranks: dict[str, tuple[int, Any]] = {}  # pattern → its place in the config, and what it says
        self.alphas: dict[str, tuple[int, Any]] = {}
        self.found: dict[str, set[str]] = {}
        self.valid = False
        if alpha not in draft.config:
            draft.notes.append(Note("alpha-missing", f"the config has no {alpha}; PEFT's default of 8 is used"))
        with draft.noting():
            if "r" in draft.config:
                draft.whole("r", 8)
            draft.number(alpha, 8)
            self.rslora = draft.flag("use_rslora")
            self.ranks, self.alphas = self.pattern("rank_pattern", is_whole), self.pattern("alpha_pattern", is_scale)
            self.match(paths)
            self.valid = True

    def match(self, paths: Iterable[str]) -> None:
        """Match the patterns with the modules, and tell those that match none, or say several things of one."""
        draft = self.draft
        try:
            self.found = match_patterns([*self.ranks, *self.alphas], paths)
        except ValueError as error:
            raise UnusableError(f"{draft.where}: rank_pattern or alpha_pattern: {error}", AGAINST_TENSORS) from None
        used = set[str]().union(*self.found.values())
        if idle := ", ".join(printable(repr(p)) for p in self.ranks if p not in used):
            text = f"{draft.where}: patterns in rank_pattern that match no module of the adapter: {idle}"
            draft.problems.append(Problem(text, AGAINST_TENSORS))
        if idle := ", ".join(printable(repr(p)) for p in self.alphas if p not in used):
            draft.notes.append(
                Note("idle-alpha-patterns", f"patterns in alpha_pattern that match no adapted module: {idle}")
            )
        self.tell_rivals()

    def pattern(self, name: str, valid: Any) -> dict[str, tuple[int, Any]]:
        """`rank_pattern` or `alpha_pattern`, checked."""
        table = self.draft.config.get(name) or {}
        if not isinstance(table, dict):
            raise UnusableError(f"{self.draft.where}: {name} is not an object", AGAINST_TENSORS)
        for pattern, value in table.items():
            if not valid(value):
                raise UnusableError(
                    f"{self.draft.where}: {name}: {printable(repr(pattern))} has the value {printable(repr(value))}",
                    AGAINST_TENSORS,
                )
        return {pattern: (place, value) for place, (pattern, value) in enumerate(table.items())}

    def said(self, table: Mapping[str, tuple[int, Any]], path: str) -> list[Any]:
        """What patterns say of a module, in the order of the config."""
        return [value for _, value in sorted(table[p] for p in self.found.get(path, ()) if p in table)]

    def expected(self, path: str) -> Collection[int]:
        """The ranks that the config may mean for a module: sorting its patterns lost which of them came first."""
        return self.said(self.ranks, path) or ([self.rank] if self.rank else [])

    def alpha(self, path: str) -> float:
        """α of a module: of several patterns that match the first in the file's order, as PEFT reads it."""
        return float(next(iter(self.said(self.alphas, path)), self.base_alpha))

    def tell_rivals(self) -> None:
        """Say which modules several patterns give another α, and which of them is used."""
        rivals: dict[tuple[float, ...], list[str]] = {}
        for path in self.found:
            alphas = tuple(self.said(self.alphas, path))
            if len(set(alphas)) > 1:
                rivals.setdefault(alphas, []).append(path)
        for alphas, paths in rivals.items():
            self.draft.notes.append(
                Note(
                    "ambiguous-alpha",
                    f"{some(paths, 1)}: several alpha patterns match ({', '.join(map(str, alphas))}); "
                    f"{alphas[0]} is used, as in PEFT when it loads the adapter; training may have used another, "
                    "because saving sorts them",
                )
            )

    def scale(self, path: str, rank: int, narrowed: bool = False) -> float:
        """The factor of a module whose tensors have `rank`; raises `UnusableError` where the config says another.

        `narrowed` says that an initialisation left a module all the rank that its weight has: r may be larger, and counts.
        """
        if not self.valid:
            return 0.0
        ranks = self.expected(path)
        if narrowed and ranks and min(ranks) > rank:
            ranks = [rank := next(iter(ranks))]
        if ranks and rank not in ranks:
            raise UnusableError(
                f"{printable(path)}: {self.draft.where} says r = {next(iter(ranks))}, but the tensors have rank {rank}",
                AGAINST_TENSORS,
            )
        return self.alpha(path) / (math.sqrt(rank) if self.rslora else rank)


def scales_in(
    file: SafeFile, config: Mapping[str, Any], ranks: Mapping[str, int], where: str
) -> tuple[dict[str, float], list[Note], list[Problem]]:
    """The scaling of modules by their ranks, under a config that is not in a file of its own but `where`."""
    draft = Draft(file, config=config, where=where)
    scaling = Scaling(draft, ranks)
    found: dict[str, float] = {}
    for path, rank in ranks.items():
        with draft.noting():
            found[path] = scaling.scale(path, rank)
    return found, draft.notes, draft.problems
