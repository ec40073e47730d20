"""Which tensor of the base a target means.

Decided from names on disk: the exact name, a rename that a release of transformers made while
loading, or one prefix for the whole adapter (a checkpoint saved without its head has no
`transformer.` or `bert.` before its names).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loratool.layouts.renames import RENAMES

MOST_COMPARED = 500  # names that a search for the nearest one looks at


@dataclass(frozen=True)
class Binding:
    """A tensor of the base, and the rule that found it."""

    tensor: str
    rule: str


def bind(targets: Iterable[str], tensors: Sequence[str]) -> dict[str, Binding]:
    """Target → its tensor, for every target that has exactly one; the others are absent."""
    names = aliases(tensors)
    wanted = list(targets)
    bound = {target: names[target] for target in wanted if target in names}
    rest = [target for target in wanted if target not in bound]
    if rest and (prefix := common_prefix(rest, names)):
        removed, added = prefix
        for target in rest:
            name = added + target.removeprefix(removed)
            if target.startswith(removed) and name in names:
                rule = f"prefix {added}… added" if added else f"prefix {removed}… removed"
                bound[target] = Binding(names[name].tensor, rule)
    return bound


def aliases(tensors: Sequence[str]) -> dict[str, Binding]:
    """Every name that a tensor may go by. A name that two tensors could go by is nobody's."""
    names = {tensor: Binding(tensor, "exact") for tensor in tensors}
    twice: set[str] = set()
    renames = [(re.compile(pattern), replacement) for pattern, replacement in RENAMES]
    for tensor in tensors:
        for pattern, replacement in renames:
            alias, count = pattern.subn(replacement, tensor)
            if count and alias != tensor:
                if alias in names:
                    twice.add(alias)
                names[alias] = Binding(tensor, "renamed by transformers 5")
    for alias in twice - set(tensors):
        del names[alias]
    return names


def common_prefix(targets: Sequence[str], names: Iterable[str]) -> tuple[str, str] | None:
    """The (removed, added) pair that gives most targets a tensor; None where two do equally well."""
    known = set(names)
    candidates: set[tuple[str, str]] = set()
    for target in [*targets[:3], *targets[-3:]]:
        candidates.update(("", name[: -len(target)]) for name in known if name.endswith(f".{target}"))
        parts = target.split(".")
        for cut in range(1, len(parts) - 1):
            if ".".join(parts[cut:]) in known:
                candidates.add((".".join(parts[:cut]) + ".", ""))
    hits: Counter[tuple[str, str]] = Counter()
    for removed, added in candidates:
        hits[removed, added] = sum(t.startswith(removed) and added + t.removeprefix(removed) in known for t in targets)
    match hits.most_common(2):
        case [(prefix, _)]:
            return prefix
        case [(prefix, first), (_, second)] if first > second:
            return prefix
        case _:
            return None


def nearest(target: str, tensors: Sequence[str]) -> str | None:
    """The tensor whose name is most like `target`, for an error message."""
    tail = target.split(".")[-2:]
    alike = [name for name in tensors if name.split(".")[-2:] == tail] or list(tensors)
    found = difflib.get_close_matches(target, alike[:MOST_COMPARED], n=1, cutoff=0.5)
    return found[0] if found else None
