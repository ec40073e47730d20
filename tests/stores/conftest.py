"""A base and an adapter in a bucket on loopback, and the environment by which loratool finds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from hub_fixtures import client, hub
from store_server import BUCKET, SHARDS, StoreServer

from loratool.files import stand_ins
from loratool.stores import client as of_stores

__all__ = ["client", "hub"]
HIDDEN = 96


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    faults.make_base(home / "base", shards=SHARDS, hidden=HIDDEN)
    faults.make_adapter(home / "adapter", layers=SHARDS, hidden=HIDDEN, rank=4)
    return home


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[StoreServer]:
    """A store that holds the base and the adapter."""
    with StoreServer() as store:
        for name in ("base", "adapter"):
            store.put(BUCKET, models / name, f"team/{name}")
        store.forget_uploads(BUCKET)
        yield store


@pytest.fixture
def store(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    """The store as loratool finds it, with nothing counted yet, and without its patience."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(of_stores, "WAITS", (0.01,) * len(of_stores.WAITS))
    server.requests.clear()
    yield server
    server.fault = lambda _asked: None
    stand_ins.forget()
