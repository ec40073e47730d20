"""What of an adapter PEFT has no way to store."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import uneven_dora
from loratool.adapters.formats.roles.names import of_factors
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.notes import Note
from loratool.templates import some


def losses(adapter: Adapter) -> tuple[Note, ...]:
    """What would be lost, with the way out where there is one."""
    columns = [target for target, update in adapter.updates.items() if is_by_column(update)]
    full = [t for t, u in adapter.updates.items() if isinstance(u, Add) and not of_factors(t, adapter.sources)]
    lost = {"DoRA of input columns": columns, "changes stored in full": full}
    ways_out = {"changes stored in full": " (--base writes the new values)"}
    notes = (
        Note("not-in-peft", f"PEFT cannot store {what}{ways_out.get(what, '')}: {some(t)}")
        for what, t in lost.items()
        if t
    )
    return (*notes, *uneven_dora(adapter, "PEFT"))


def is_by_column(update: Update) -> bool:
    """Whether DoRA has the lengths of columns, as PEFT has them of an embedding alone."""
    if not (isinstance(update, Magnitude) and update.by_column):
        return False
    return not (isinstance(update.inner, LowRank) and update.inner.table)
