"""Tied tensors: which tensors are one in memory, and what becomes of them when an adapter changes one of them.

An adapter that was trained on a tied model changes the embedding, the head, or both by themselves; only where it
changes both alike is the result still tied. Else each gets a tensor of its own, and the config says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import Adapter, Derived, StoredTensor, same_bytes, same_values
from loratool.adapters.model_settings import language_parts, model_types
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.replacing import ReplaceRows
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.layouts.architectures import GENERATIVE, INPUT_EMBEDDINGS, TASK_CLASSES
from loratool.layouts.ties import TIE_FLAGS, TIED_BY_DEFAULT, TIED_FOREVER, TIES, Tie

if TYPE_CHECKING:
    from loratool.bases.edits import Edit

Edits = dict[str, list["Edit"]]  # tensor → its edits
Saved = dict[str, dict[int, StoredTensor]]  # tensor → adapter → the tensor it saved to begin from


@dataclass(frozen=True)
class Group:
    """Tensors that may be one in memory; the first is on disk."""

    names: tuple[str, ...]
    missing: frozenset[str]  # the names that no file holds, since they are tied to the first
    one_role: bool = False  # a bias with two names: the model uses one of them


@dataclass(frozen=True)
class Ties:
    """What the model of a base may tie."""

    base: Checkpoint
    groups: tuple[Group, ...]
    flag: bool | None  # what the config says
    generative: bool  # has a head that turns hidden states into tokens, as far as class names tell

    def together(self, group: Group) -> tuple[str, ...]:
        """The names of a group that are one tensor: those not on disk, and those with the same values.

        Where the config says neither, a head on disk is a tensor of its own but in families that always tie.
        """
        if self.flag is False:
            return group.names[:1]
        from loratool.bases.decoded import weight_of

        tie = self.flag or self.base.model_type in TIED_BY_DEFAULT
        first = weight_of(self.base, group.names[0]).tensors
        return group.names[:1] + tuple(
            name
            for name in group.names[1:]
            if name in group.missing or (tie and all(map(same_bytes, first, weight_of(self.base, name).tensors)))
        )


@dataclass
class Settled:
    """How tied tensors come out of a merge."""

    untied: bool = False
    added: tuple[tuple[str, str], ...] = ()  # tensors that no file holds, each with the one that it was tied to
    kept: tuple[tuple[str, str], ...] = ()  # tensors that change as the one does that they stay tied to
    problems: tuple[str, ...] = ()


def find_ties(base: Checkpoint, adapters: Iterable[Adapter]) -> Ties:
    """What the model ties: by the names on disk, its config and its class, or else the class that was trained."""
    classes = [*base.architectures, *(trained_class(adapter) for adapter in adapters)]
    flag, generative = tie_flag(base.config), is_generative(classes)
    groups: list[Group] = []
    if generative:
        known: set[str] = set()
        for tensor in base.tensors:
            *parts, parameter = tensor.split(".")
            if parameter != "weight" or tensor in known or any(part.isdigit() for part in parts):
                continue
            if (found := find_tie(".".join(parts), base)) is None:
                continue
            tie, heads, bias = found
            names = (tensor, *(f"{head}.weight" for head in heads))
            known.update(names)
            groups.append(make_group(names, base, flag))
            if tie.bias and bias in base.tensors:
                groups.append(replace(make_group((bias, f"{heads[0]}.bias"), base, flag), one_role=True))
    return Ties(base, tuple(groups), flag, generative)


def find_tie(module: str, base: Checkpoint) -> tuple[Tie, tuple[str, ...], str] | None:
    """The first row of the table that an embedding fits, the modules tied to it and their bias."""
    types = model_types(base.config)
    for tie in TIES:
        if tie.types and types.isdisjoint(tie.types):  # first, as patterns take longer
            continue
        if (match := re.fullmatch(tie.embedding, module)) is None:
            continue
        at = match.groupdict().get("at") or ""
        beside = re.compile(tie.beside.replace("{at}", re.escape(at)))
        if tie.beside and not any(beside.match(name) for name in base.tensors):
            continue
        return tie, tuple(head.replace("{at}", at) for head in tie.heads), tie.bias.replace("{at}", at)
    return None


def make_group(names: tuple[str, ...], base: Checkpoint, flag: bool | None) -> Group:
    absent = frozenset(name for name in names if name not in base.tensors)
    if flag is False:
        return Group(tuple(name for name in names if name not in absent), frozenset())
    return Group(names, absent)


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """Whether the config ties: it does where any of its parts does; None where none says anything."""
    said = [part[key] for _, part in language_parts(config) for key in TIE_FLAGS if isinstance(part.get(key), bool)]
    return any(said) if said else None


def trained_class(adapter: Adapter) -> str:
    """The class that was trained, or the end of its name; empty where the adapter does not tell."""
    return adapter.training.model_class or TASK_CLASSES.get(adapter.training.task, "")


def is_generative(classes: Sequence[str]) -> bool:
    """Whether any of the classes has a head that turns hidden states into tokens; True where none is known."""
    known = [name for name in classes if name]
    return not known or any(part in name for name in known for part in GENERATIVE)


def settle(ties: Ties, edits: Edits, saved: Saved, adapters: int, keeps_head: bool) -> Settled:
    """Decide whether what is tied stays so, and give each tensor its edits.

    Args:
        ties: of the base.
        edits: changed in place. Those of a tensor that no file holds go where it stays tied.
        saved: changed in place likewise.
        adapters: their number.
        keeps_head: whether the class of the output still turns hidden states into tokens.
    """
    untied: list[Group] = []
    kept: list[tuple[str, str]] = []
    for group in ties.groups:
        if not any(name in edits or name in saved for name in group.names):
            continue
        names = ties.together(group)
        share(names, edits, saved, adapters, group.one_role)
        if not keeps_head and not any(name in edits or name in saved for name in names[1:]):
            continue
        if all(alike(names[0], name, edits, saved, adapters) for name in names[1:]):
            kept += [(name, names[0]) for name in sorted(group.missing) if name in edits or name in saved]
            for name in group.missing:
                edits.pop(name, None)
                saved.pop(name, None)
        else:
            untied.append(group)
    problems = [*untieable(ties, untied), *unknown_heads(ties, edits)]
    if not untied or problems:
        return Settled(problems=tuple(problems), kept=tuple(kept))
    for group in ties.groups:  # the flag is one for all of them
        share(ties.together(group), edits, saved, adapters, group.one_role)
    added = tuple((name, group.names[0]) for group in ties.groups for name in group.names if name in group.missing)
    return Settled(True, added, kept=tuple(kept))


def share(names: Sequence[str], edits: Edits, saved: Saved, adapters: int, one_role: bool) -> None:
    """What an adapter did to one of some tied tensors and by doing so to all of them.

    That is: the weights that training began with; the rows of trained tokens, where the head has none of its own;
    and everything about a bias that has two names.
    """
    for adapter in range(adapters):
        begun = [saved[name][adapter] for name in names if adapter in saved.get(name, {})]
        own = {name: [e for e in edits.get(name, ()) if e.adapter == adapter] for name in names}
        given = next((found for found in own.values() if found), []) if one_role else own[names[0]]
        for name in names:
            if begun:
                saved.setdefault(name, {}).setdefault(adapter, begun[0])
            if one_role:
                new = given if not own[name] else []
            else:
                has_rows = any(isinstance(e.update, ReplaceRows) for e in own[name])
                new = [] if has_rows else [e for e in given if isinstance(e.update, ReplaceRows)]
            if new:
                edits.setdefault(name, []).extend(replace(e, weight=name) for e in new)


def alike(one: str, other: str, edits: Edits, saved: Saved, adapters: int) -> bool:
    """Whether every adapter does the same to two tensors that were one."""

    def done(name: str, adapter: int) -> tuple[object, ...]:
        own = [e for e in edits.get(name, ()) if e.adapter == adapter]
        changes = ((e.first_row, e.rows, e.update_row, e.columns, e.fold, e.update) for e in own)
        return saved.get(name, {}).get(adapter), tuple(changes)

    return all(same_change(done(one, adapter), done(other, adapter)) for adapter in range(adapters))


def same_change(one: object, other: object) -> bool:
    """Whether two changes, or parts of them, have the same values; those of tensors are read."""
    if one is other:
        return True
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        return same_values(one, other)
    if isinstance(one, (Derived, Update)) and type(one) is type(other):
        names = [f.name for f in fields(one) if f.compare]  # type: ignore[arg-type]  # every update is a dataclass
        return all(same_change(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same_change, one, other))
    return bool(one == other)


def has_head(base: Checkpoint) -> bool:
    """Whether llama.cpp loads a GGUF model of this kind with a head of its own."""
    from loratool.files.gguf import GgufFile
    from loratool.layouts.gguf import ARCHITECTURES

    file = base.shards[0]
    kind = ARCHITECTURES.get(file.text("general.architecture")) if isinstance(file, GgufFile) else None
    return kind is None or kind.has_head


def untieable(ties: Ties, untied: Sequence[Group]) -> list[str]:
    """Why what must be untied cannot be."""
    if ties.base.is_gguf and not has_head(ties.base):
        return [
            f"the base ties {', '.join(map(printable, group.names))}; the adapter changes them differently, and "
            f"llama.cpp does not load a {ties.base.model_type} model with a head of its own"
            for group in untied
        ]
    if ties.base.model_type not in TIED_FOREVER:
        return []
    return [
        f"the base ties {', '.join(map(printable, group.names))}; the adapter changes them differently, and a "
        f"{ties.base.model_type} model computes something else when they are untied"
        for group in untied
    ]


def unknown_heads(ties: Ties, edits: Edits) -> list[str]:
    """Edits of embeddings to which something may be tied, nobody knows what."""
    if ties.flag is False or not ties.generative:
        return []
    known = {name for group in ties.groups for name in group.names}
    return [
        f"{printable(tensor)}: the base may tie its head to this embedding, but the name of its head is unknown"
        for tensor in edits
        if tensor not in known and tensor.rpartition(".")[0].rpartition(".")[2] in INPUT_EMBEDDINGS
    ]
