"""What a record says of an adapter that something was made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.provenance.inputs import told_adapter


def as_input(adapter: Adapter, name: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """An adapter, as provenance names it, with the digests of its files."""
    alone = adapter.file if adapter.alone else None
    return told_adapter(name, adapter.folder, adapter.format, digests, alone)
