"""Merges into a store on loopback, with uploads whose parts are small enough for tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import faults
from store_server import BUCKET, StoreServer, settled, tree

from loratool.merging import in_store
from loratool.stores.limits import limits

if TYPE_CHECKING:
    import pytest

SMALLEST, PIECE = 16 << 10, 48 << 10  # bytes, in place of 5 MiB and 32 MiB
HIDDEN = 160


def make_models(home: Path, shards: int = 2, hidden: int = HIDDEN) -> None:
    faults.make_base(home / "base", shards=shards, hidden=hidden)
    faults.make_adapter(home / "adapter", layers=shards, hidden=hidden, rank=4)


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a thousandth, here and in the store."""
    own = limits

    def scaled() -> object:
        return dataclasses.replace(own(), smallest=SMALLEST, piece=PIECE)

    monkeypatch.setattr(in_store, "limits", scaled)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", SMALLEST)


def assert_same(store: StoreServer, prefix: str, folder: Path) -> None:
    """All files below a prefix have the bytes of those in a folder, and the record the same inputs and results.

    What a store copied has other entries in the record, and the report of that is a note.
    """
    there, here = store.objects(BUCKET, prefix), tree(folder)
    ours, theirs = (settled(files.pop("loratool.json")) for files in (there, here))
    assert there == here
    for record in (ours, theirs):
        record.pop("files")
        record.pop("plan", None)
    assert ours == theirs
