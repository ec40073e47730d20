"""Flattened targets: names of the base with underscores for dots. They are looked up, and never taken apart by guessing."""

from __future__ import annotations

from collections.abc import Iterable

from loratool.adapters.adapter import Flattened
from loratool.errors import printable
from loratool.grouping import by_key

MOST_SEARCHED = 64  # names for which near ones are searched: more than a message shows
MOST_COMPARED = 500  # names that a search looks at
MOST_NEAR = 3


def look_up(targets: Iterable[str], names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """For each flattened target the one name that it is made of; for others of them the reason that there is none."""
    flat = [target for target in targets if isinstance(target, Flattened)]
    index: dict[str, list[str]] = by_key((Flattened.of(name), name) for name in (names if flat else ()))
    owners = {target: target for target in targets}  # name → the target that has it
    found: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for target in flat:
        match index.get(target, []):
            case [name] if (owner := owners.setdefault(name, target)) is target:
                found[target] = name
            case [name]:
                reasons[target] = f"{printable(name)} is edited by {printable(owner)} already"
            case []:
                reasons[target] = missing(target, index if len(reasons) < MOST_SEARCHED else {})
            case several:
                reasons[target] = f"it may be any of {', '.join(map(printable, several))}"
    return found, reasons


def missing(target: str, index: dict[str, list[str]]) -> str:
    """That no name gives this when it is flattened, with those that come nearest."""
    from difflib import get_close_matches

    end = target.rpartition("_")[2]
    known = [flat for flat in index if flat.rpartition("_")[2] == end] or list(index)
    near = get_close_matches(target, known[:MOST_COMPARED], n=MOST_NEAR)
    nearest = f"; nearest: {', '.join(printable(index[flat][0]) for flat in near)}" if near else ""
    return f"no weight of the base has this name once dots are written as underscores{nearest}"
