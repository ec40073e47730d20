"""What of an adapter PEFT has no way to store."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import told_losses, uneven_dora
from loratool.adapters.formats.roles.names import of_factors
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.notes import Note


def losses(adapter: Adapter) -> tuple[Note, ...]:
    """What would be lost, with the way out where there is one."""

    def said(target: str, update: Update) -> str:
        match update:
            case Magnitude(by_column=True) if not (isinstance(update.inner, LowRank) and update.inner.table):
                return "DoRA of input columns"  # which PEFT has of an embedding alone
            case Add() if not of_factors(target, adapter.sources):
                return "changes stored in full (--base writes the new values)"
        return ""

    return (*told_losses(adapter, "not-in-peft", "PEFT cannot store", said), *uneven_dora(adapter, "PEFT"))
