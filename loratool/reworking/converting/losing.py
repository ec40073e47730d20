"""What a dialect cannot say: refused by name, or left out where that is accepted."""

from __future__ import annotations

from dataclasses import replace

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Format
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.errors import FitError, printable
from loratool.notes import Note


def without_losses(adapter: Adapter, form: Format, dialect: str, accepted: bool) -> tuple[Adapter, tuple[Note, ...]]:
    """The adapter without what a dialect cannot say, and what that was; raises `FitError` where it is not accepted."""
    lost = form.losses(adapter, dialect)
    if not lost:
        return adapter, ()
    if not accepted:
        raise FitError(
            f"{printable(adapter.file.path)}: {dialect} cannot express all of this adapter; pass --accept-loss to "
            "leave it out, or merge it into its base with `loratool merge`:",
            [note.text for note in lost],
        )
    kept: dict[str, Update] = {}
    for target, update in adapter.updates.items():
        plain = update.inner if isinstance(update, Magnitude) else update
        for each in (update, plain):
            if not form.losses(replace(adapter, updates={target: each}, bases={}), dialect):
                kept[target] = each
                break
    return replace(adapter, updates=kept, bases={}), lost
