"""Outputs of folders in a store, with files that are sent in parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import faults
import pytest
from store_server import BUCKET

import loratool
from loratool.publishing import storing

if TYPE_CHECKING:
    from store_server import StoreServer

PIECE = 1 << 10


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "PIECE", PIECE)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", PIECE)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "loratool.json"}


@pytest.mark.usefixtures("in_parts")
def test_a_folder_with_a_large_file_is_the_one_on_this_disk(store: StoreServer, models: Path, tmp_path: Path) -> None:
    loratool.rescale(models / "adapter", f"s3://{BUCKET}/large/folder", scale=2)
    loratool.rescale(models / "adapter", tmp_path / "folder", scale=2)
    there, here = store.objects(BUCKET, "large/folder"), content(tmp_path / "folder")
    assert there.pop("loratool.json")
    assert there == here
    sizes = [len(each) for each in here.values()]
    assert sum(each.kind == "part" for each in store.requests) == sum(
        -(-size // PIECE) for size in sizes if size > PIECE
    )
    assert not store.uploads(BUCKET)


@pytest.mark.usefixtures("in_parts")
def test_what_a_killed_run_has_sent_of_another_output_goes(
    store: StoreServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = faults.make_adapter(tmp_path / "other", layers=2, hidden=96, rank=2)
    out = f"s3://{BUCKET}/large/killed"
    with monkeypatch.context() as patch:
        for name in ("complete", "abort"):  # as if it were killed there
            patch.setattr(f"loratool.stores.uploads.{name}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loratool.rescale(models / "adapter", out, scale=2)
    assert store.objects(BUCKET, "large/killed").keys() == {".loratool/begin.json", ".loratool/finish.json"}
    assert len(store.uploads(BUCKET)) == 1
    loratool.rescale(other, out, scale=3)
    loratool.rescale(other, tmp_path / "out", scale=3)
    there = store.objects(BUCKET, "large/killed")
    assert there.pop("loratool.json")
    assert there == content(tmp_path / "out")
    assert not store.uploads(BUCKET)
