"""What a record says of an adapter that something was made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.provenance.inputs import told_input
from loratool.provenance.recorded import made_of


def as_input(adapter: Adapter, name: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """An adapter, as provenance names it, with SHA-256 of its files."""
    where, metadata = (adapter.file.path, adapter.file.metadata) if adapter.alone else (adapter.folder, {})
    return {
        "name": name,
        **told_input(where, adapter.alone),
        "format": adapter.format,
        "sha256": dict(digests),
        **made_of(where, digests, metadata),
    }
