"""Which tensor of the base a target means.

Decided from names on disk: the exact name, a rename that a release of transformers made while
loading, or one prefix for the whole adapter (a checkpoint saved without its head has no
`transformer.` or `bert.` before its names).
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.errors import MOST_SHOWN, printable
from loratool.layouts.architectures import CONV1D_MODEL_TYPES, CONV1D_MODULES, OUTPUT_HEADS
from loratool.layouts.renames import RENAMES

if TYPE_CHECKING:
    from loratool.adapter import Adapter
    from loratool.checkpoint import Checkpoint
    from loratool.updates import Update

ALL = slice(None)
MOST_COMPARED = 500  # names that a search for the nearest one looks at


@dataclass(frozen=True)
class Place:
    """Where an update, or some rows of one, goes.

    The tensor is seen as a matrix whose rows are its first `fold` dimensions together: rows `first_row` …
    `first_row + rows` of it, at `columns`, take the rows of `update` from `update_row` on.
    """

    tensor: str
    rule: str  # how it was found
    update: Update  # fitted to the tensor, or to the part of it
    first_row: int
    rows: int
    update_row: int = 0
    columns: slice = field(default_factory=lambda: ALL)
    fold: int = 1


@dataclass(frozen=True)
class Bound:
    """What became of an adapter's targets: each is a key of `places` or of `problems`, but for optional ones."""

    places: Mapping[str, tuple[Place, ...]]
    problems: Mapping[str, str]
    notes: tuple[str, ...] = ()


def bind(adapter: Adapter, base: Checkpoint, *, fan_in_fan_out: bool | None = None) -> Bound:
    """Find the place of every target of `adapter`, from the names and shapes of the base's tensors alone.

    Args:
        adapter: its updates are fitted here to how the base stores its weights.
        base: only its headers and its config are looked at.
        fan_in_fan_out: whether linear weights that shapes and architecture leave open are stored (in, out).
    """
    names = list(base.tensors)
    found = match_names(adapter.updates, names)
    turned = orientation(adapter, found, base, fan_in_fan_out)
    places: dict[str, tuple[Place, ...]] = {}
    problems: dict[str, str] = {}
    for target, given in adapter.updates.items():
        if target not in found:
            if target in adapter.optional:
                continue
            # looking for the nearest name takes a while: only for problems that will be shown
            problems[target] = why_unbound(target, names if len(problems) < MOST_SHOWN else [])
            continue
        tensor, rule = found[target]
        info = base.tensors[tensor]
        update = given.turned if target in turned else given
        if (fitted := update.fit(info.shape)) is None:
            problems[target] = f"update is {list(update.shape)}, {printable(tensor)} is {list(info.shape)}"
            continue
        rows = math.prod(info.shape[: fitted.fold]) if fitted.fold > 1 else info.rows
        places[target] = (Place(tensor, rule, fitted, 0, rows, fold=fitted.fold),)
    return Bound(places, problems)


def match_names(targets: Iterable[str], tensors: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Target → (tensor, rule), for every target that has exactly one; the others are absent."""
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
                bound[target] = (names[name][0], rule)
    return bound


def why_unbound(target: str, names: Sequence[str]) -> str:
    module = target.rpartition(".")[0].rpartition(".")[2]
    if module in OUTPUT_HEADS:
        return "the base has no such weight; its head is tied to the input embedding, and untying is not supported yet"
    near = nearest(target, names)
    return "the base has no such weight" + (f"; nearest is {printable(near)}" if near else "")


def orientation(
    adapter: Adapter, found: Mapping[str, tuple[str, str]], base: Checkpoint, given: bool | None
) -> set[str]:
    """The targets whose weight is stored (in, out), as Conv1D of GPT-2 does.

    Shapes decide; square weights go by the base's architecture, else by the adapter's other
    weights, else by what the caller says, else by the config's `fan_in_fan_out`.
    """
    turned: set[str] = set()
    straight = 0
    square: list[str] = []
    for target, update in adapter.updates.items():
        if not update.turnable or target not in found:
            continue
        shape = base.tensors[found[target][0]].shape
        fits, fits_turned = bool(update.fit(shape)), bool(update.turned.fit(shape))
        if fits and fits_turned:
            square.append(target)
        elif fits_turned:
            turned.add(target)
        else:
            straight += fits
    if square:
        turned.update(t for t in square if stored_in_out(t, adapter, base, bool(turned), bool(straight), given))
    return turned


def stored_in_out(
    target: str, adapter: Adapter, base: Checkpoint, any_turned: bool, any_straight: bool, given: bool | None
) -> bool:
    """Whether a square weight is stored (in, out)."""
    module = target.rpartition(".")[0].rpartition(".")[2]
    if base.model_type:
        return base.model_type in CONV1D_MODEL_TYPES and module in CONV1D_MODULES
    if any_turned != any_straight:
        return any_turned
    return bool(adapter.config.get("fan_in_fan_out", False)) if given is None else given


def aliases(tensors: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Every name that a tensor may go by. A name that two tensors could go by is nobody's."""
    names = {tensor: (tensor, "exact") for tensor in tensors}
    twice: set[str] = set()
    renames = [(re.compile(pattern), replacement) for pattern, replacement in RENAMES]
    for tensor in tensors:
        for pattern, replacement in renames:
            alias, count = pattern.subn(replacement, tensor)
            if count and alias != tensor:
                if alias in names:
                    twice.add(alias)
                names[alias] = (tensor, "renamed by transformers 5")
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
