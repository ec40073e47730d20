"""Models and adapters in a store go to the Hub as those in a folder do; weights of a model do not touch the disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import faults
import pytest
from hub_server import Fault, HubServer
from safetensors import safe_open
from store_server import BUCKET, StoreServer, tree

import loratool
from loratool.errors import VerificationError
from loratool.files.stand_ins import stream_of
from loratool.stores.names import StorePath
from loratool.stores.objects import listed

if TYPE_CHECKING:
    from hub_client import Client

OF_STORE = f"s3://{BUCKET}/pushed"


def test_a_model_in_a_store_is_pushed_as_one_in_a_folder_is(
    store: StoreServer, hub: HubServer, client: Client, models: Path
) -> None:
    """Also what `--include` asks for, and if the line drops on the way."""
    merged = models / "merged"
    loratool.merge(models / "base", models / "adapter", merged)
    (merged / "notes.csv").write_text("1,2")
    (merged / "optimizer.pt").write_text("x")
    store.put(BUCKET, merged, "pushed/merged")
    hub.faults.append(Fault("PUT", "^/lfs/", cut=10_000))
    client.works("push", f"{OF_STORE}/merged", "alice/it", "--include", "*.csv", cwd=None, **store.environment)
    there, here = hub.files("alice/it"), tree(merged)
    assert here.keys() - there.keys() == {"optimizer.pt"}
    made = {".gitattributes", "README.md", "loratool.json"}  # with the name of the repository
    assert {name for name, content in there.items() if content != here.get(name)} <= made


@pytest.mark.parametrize("recorded", [True, False], ids=["record", "no-record"])
def test_weights_are_read_twice_of_a_store(
    store: StoreServer, hub: HubServer, client: Client, tmp_path: Path, recorded: bool
) -> None:
    """For the SHA-256 that the Hub asks for first, with the comparison with `loratool.json`, and to send them.

    Besides that come the header and the 512 bytes by which the Hub decides how a file is uploaded.
    """
    faults.make_base(tmp_path / "base", shards=1, hidden=384)
    faults.make_adapter(tmp_path / "adapter", layers=1, hidden=384, rank=2)
    merged = tmp_path / "merged"
    loratool.merge(tmp_path / "base", tmp_path / "adapter", merged)
    if not recorded:
        (merged / "loratool.json").unlink()
    place = f"pushed/{'told' if recorded else 'untold'}"
    store.put(BUCKET, merged, place)
    (weights,) = merged.glob("*.safetensors")
    store.requests.clear()
    client.works("push", f"s3://{BUCKET}/{place}", "alice/twice", cwd=None, **store.environment)
    assert hub.files("alice/twice")[weights.name] == weights.read_bytes()
    size = weights.stat().st_size
    came = [each.sent for each in store.requests if each.kind == "get" and each.key.endswith(weights.name)]
    assert sorted(came) == [512, 64 << 10, size, size]


def test_an_object_that_is_not_what_its_record_says_is_not_pushed(
    store: StoreServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor is named, and the Hub is not asked for anything."""
    monkeypatch.setattr("loratool.publishing.pushing.open_repo", lambda *_: pytest.fail("the Hub was asked"))
    loratool.merge(models / "base", models / "adapter", tmp_path / "merged")
    path = max((tmp_path / "merged").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store.put(BUCKET, tmp_path / "merged", "pushed/damaged")
    with safe_open(path, "pt") as file:
        names = [re.escape(name) for name in file.keys()]  # noqa: SIM118 (no mapping)
    with pytest.raises(VerificationError, match=rf"{path.name}: differs .* \(tensor ({'|'.join(names)})\)"):
        loratool.push(f"{OF_STORE}/damaged", "alice/none")


def test_an_output_in_a_store_is_pushed_from_there(
    store: StoreServer, hub: HubServer, client: Client, models: Path
) -> None:
    out = f"{OF_STORE}/small"
    words = ("resize", models / "adapter", "--rank", "2", "-o", out, "--push-to-hub", "alice/small")
    client.works(*words, cwd=None, **store.environment)
    there = hub.files("alice/small")
    weights = "adapter_model.safetensors"
    assert there[weights] == store.objects(BUCKET, "pushed/small")[weights]
    told = client.refused("push", f"{out}/{weights}", "alice/x", code=3, cwd=None, **store.environment)
    assert "push the prefix that the object is in" in told


def test_bytes_of_an_object_are_a_file(store: StoreServer, models: Path) -> None:
    """From any place on, in any pieces."""
    path = models / "adapter" / "adapter_model.safetensors"
    there, own = listed(StorePath(BUCKET, "team/adapter"))[path.name], path.read_bytes()
    stream = stream_of(there)
    assert stream.read() == own
    assert stream.seek(-100, os.SEEK_END) == stream.tell() == len(own) - 100
    assert (stream.read(60), stream.read(), stream.read()) == (own[-100:-40], own[-40:], b"")
    assert (stream.seek(7), stream.seek(3, os.SEEK_CUR), stream.read(5)) == (7, 10, own[10:15])
