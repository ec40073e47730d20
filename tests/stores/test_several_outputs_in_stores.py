"""Several merges at one reading of their base (`--also`), of which any may be in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from store_merges import assert_same, small_parts
from store_server import BUCKET, StoreServer, tree

import loratool
from loratool import cli

BASE, ADAPTER = f"s3://{BUCKET}/team/base", f"s3://{BUCKET}/team/adapter"
PLACE = "several"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)


@pytest.fixture(scope="module")
def merged(models: Path) -> Path:
    """The outputs of two merges into folders, of the weights 1 and 2."""
    loratool.merge(models / "base", models / "adapter", models / "merged-1")
    loratool.merge(models / "base", models / "adapter", models / "merged-2", weights=[2])
    return models


def read_of_base(store: StoreServer) -> int:
    """Bytes of the base's weights that came from the store, since the last call."""
    size = sum(each.sent for each in store.requests if each.kind == "get" and "team/base/model-" in each.key)
    store.requests.clear()
    return size


def test_outputs_in_stores_and_folders_are_what_their_own_merges_make(
    store: StoreServer, merged: Path, tmp_path: Path
) -> None:
    there = {weight: f"s3://{BUCKET}/{PLACE}/mixed-{weight}" for weight in (1, 2)}
    outputs: dict[str, Any] = {there[1]: ADAPTER, there[2]: (ADAPTER, 2), str(tmp_path / "here"): ADAPTER}
    found = loratool.merge_many(BASE, outputs)
    assert not found.errors
    assert str(found[there[2]].out) == str(Path(there[2]))
    for weight in (1, 2):
        assert_same(store, f"{PLACE}/mixed-{weight}", merged / f"merged-{weight}")
    here, alone = tree(tmp_path / "here"), tree(merged / "merged-1")
    assert {name: here[name] for name in here if name != "loratool.json"} == {
        name: alone[name] for name in alone if name != "loratool.json"
    }
    assert not [key for key in store.uploads(BUCKET) if key.startswith(PLACE)]


def test_rows_of_the_base_are_read_once_for_all_outputs(store: StoreServer, models: Path) -> None:
    """What each output reads for itself are edges: bytes that are copied, but too few for a part of their own."""
    loratool.merge(BASE, ADAPTER, f"s3://{BUCKET}/{PLACE}/alone")
    one = read_of_base(store)
    loratool.merge_many(BASE, {f"s3://{BUCKET}/{PLACE}/once-{number}": (ADAPTER, number) for number in (1, 2, 3)})
    assert 0 < read_of_base(store) < 2 * one


def test_one_that_may_not_be_written_fails_alone(
    store: StoreServer, merged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is there stays, the other output is complete, and a plan of both asks for no write."""
    mine, out = (f"s3://{BUCKET}/{PLACE}/{name}" for name in ("mine", "out"))
    store.client.put_object(Bucket=BUCKET, Key=f"{PLACE}/mine/notes.txt", Body=b"mine")
    line = ["merge", BASE, ADAPTER, "-o", out, "--also", f"{mine}={ADAPTER}", "-q"]
    store.requests.clear()
    assert cli.run([*line, "--dry-run"]) == 0
    assert {each.method for each in store.requests} == {"GET"}
    assert cli.run(line) == 2
    assert "already exists" in capfd.readouterr().err
    assert store.objects(BUCKET, f"{PLACE}/mine") == {"notes.txt": b"mine"}
    assert_same(store, f"{PLACE}/out", merged / "merged-1")
