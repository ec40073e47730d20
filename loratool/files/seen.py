"""What is seen of an output file while its bytes go by, as journals and records of parts keep it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Pairs = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of a file, of a part of one, or of several."""

    changed: bool = False  # whether any weight, in this file or in one before it, differs from the base's
    device: str = ""  # the kind that edited weights were computed on; empty where there are none
    norms: Pairs = field(default_factory=dict)  # edited tensor → ‖W‖² and ‖ΔW‖²
    kept: Pairs = field(default_factory=dict)  # module → ⟨W' − W, ΔW⟩ and ‖ΔW‖², sampled
    lost: Pairs = field(default_factory=dict)  # packed anew → ‖W' − (W + ΔW)‖² and ‖ΔW‖²
    nonfinite: Mapping[str, int] = field(default_factory=dict)  # edited tensor → NaN and inf that the base itself holds
    effective: Sequence[tuple[int, str]] = ()  # updates, as (adapter's number, target), that change an element

    @property
    def ratios(self) -> dict[str, float]:
        """Tensor → ‖ΔW‖/‖W‖, where W is not zero; 0 where something replaces W."""
        return {name: math.sqrt(change / weight) for name, (weight, change) in self.norms.items() if weight > 0}

    def table(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        return {**vars(self)}

    @classmethod
    def of_table(cls, entry: Mapping[str, Any]) -> Seen:
        """What such a table says; what is none of it is passed over."""
        return Seen(
            changed=bool(entry.get("changed")),
            device=str(entry.get("device", "")),
            norms=pairs_in(entry.get("norms")),
            kept=pairs_in(entry.get("kept")),
            lost=pairs_in(entry.get("lost")),
            nonfinite=numbers_in(entry.get("nonfinite")),
            effective=updates_in(entry.get("effective")),
        )


def together(every: Iterable[Seen]) -> Seen:
    """What was seen of several files, or of all parts of one."""
    seen = [*every]
    nonfinite: Counter[str] = Counter()
    for each in seen:
        nonfinite.update(each.nonfinite)
    return Seen(
        changed=any(each.changed for each in seen),
        device=max((each.device for each in seen), default=""),  # "cuda" where any was
        norms=summed(each.norms for each in seen),
        kept=summed(each.kept for each in seen),
        lost=summed(each.lost for each in seen),
        nonfinite=dict(nonfinite),
        effective=sorted({effect for each in seen for effect in each.effective}),
    )


def summed(tables: Iterable[Pairs]) -> dict[str, tuple[float, float]]:
    """Pairs of numbers of the same name, added up."""
    found: dict[str, tuple[float, float]] = {}
    for table in tables:
        for name, (one, other) in table.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = before[0] + one, before[1] + other
    return found


def numbers_in(table: object) -> dict[str, Any]:
    """The entries of a table whose values are numbers, and no more."""
    entries = table.items() if isinstance(table, Mapping) else ()
    return {name: value for name, value in entries if type(value) in (int, float)}


def pairs_in(table: object) -> dict[str, tuple[float, float]]:
    """The entries of a table whose values are two numbers, and no more."""
    entries = table.items() if isinstance(table, Mapping) else ()
    pairs = ((name, value) for name, value in entries if isinstance(value, list) and len(value) == 2)
    return {name: (one, other) for name, (one, other) in pairs if type(one) is float and type(other) is float}


def updates_in(table: object) -> tuple[tuple[int, str], ...]:
    """The entries of a list that name an update, and no more."""
    entries = table if isinstance(table, list) else ()
    return tuple((e[0], e[1]) for e in entries if isinstance(e, list) and [*map(type, e)] == [int, str])
