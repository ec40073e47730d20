"""A merge of a base on the Hub into a store, both on loopback, with the real clients of both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import Client
from hub_server import HubServer
from store_merges import assert_same
from store_server import BUCKET, StoreServer


@pytest.fixture
def client(models: Path, tmp_path: Path) -> Iterator[Client]:
    with HubServer() as hub:
        for name in ("base", "adapter"):
            hub.add(f"org/{name}", models / name)
        yield Client(hub, tmp_path / "home")


def test_a_base_on_the_hub_is_merged_into_a_store(store: StoreServer, client: Client, tmp_path: Path) -> None:
    """The files of the same merge into a folder; nothing of the Hub's can be copied inside the store."""
    client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "from-hub")
    client.works("merge", "org/base", "org/adapter", "-o", f"s3://{BUCKET}/from-hub", cwd=None, **store.environment)
    parts = {each.kind for each in store.requests}
    assert "part" in parts
    assert "copy part" not in parts
    assert store.uploads(BUCKET) == []
    assert_same(store, "from-hub", tmp_path / "from-hub")
