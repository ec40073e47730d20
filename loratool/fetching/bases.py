"""The base that an adapter says it was trained on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from loratool.adapters.formats import format_at
from loratool.arguments import PathLike
from loratool.errors import InputError, UsageError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.hub_names import parse, with_owner
from loratool.notes import BASE_NAMED, Note

Model = TypeVar("Model", bound=Checkpoint)

AUTO = "auto"
# What tells models of one family apart, by the fields of configs that hold it. Vocabularies are not among them: they grow.


def named_base(path: Path) -> str:
    """The base of the adapter at `path`, as its config names it with its revision; empty where it does not."""
    if not os.path.lexists(path):
        raise InputError(f"{printable(path)}: no such file or folder")
    training = format_at(path).training_at(path)
    name, revision = training.base, training.revision
    if not name.strip():
        return ""
    named_revision = revision and "@" not in name and not os.path.lexists(name)
    return f"{name}@{revision}" if named_revision else name


def chosen_base(base: PathLike, adapters: Sequence[Path]) -> PathLike:
    """The base itself, or the one that the adapters name where it is called "auto"."""
    return base_of(adapters) if os.fspath(base) == AUTO and not os.path.lexists(AUTO) else base


def told_choice(model: Model, given: PathLike, chosen: PathLike) -> Model:
    """The model, with a note where it is not the one that was given, but the one that the adapters name."""
    if os.fspath(given) == os.fspath(chosen):
        return model
    text = f"{printable(chosen)} is read as the base, because the adapter names it"
    return dataclasses.replace(model, notes=(*model.notes, Note(BASE_NAMED, text)))


def base_of(adapters: Sequence[Path]) -> str:
    """The one base that all these adapters name; raises `UsageError` where there is none, several, or it is not here."""
    names = list(dict.fromkeys(map(named_base, adapters)))
    if "" in names or not names:
        raise UsageError(
            "the adapter's config does not name its base (base_model_name_or_path); name the base, by its path or Hub "
            "id, with --base"
        )
    if len(names) > 1:
        raise UsageError(
            f"the adapters name several bases ({', '.join(map(printable, names))}); name one of them with --base"
        )
    if os.path.lexists(names[0]):
        return names[0]
    owned = with_owner(names[0])
    if parse(owned) is None:
        raise UsageError(
            f"the adapter names its base {printable(names[0])}, which was not found; name it, by its path or Hub id, with --base"
        )
    return owned
