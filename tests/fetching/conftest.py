"""A base and an adapter in repositories of a loopback Hub, and the real client that asks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from hub_client import Client
from hub_models import HIDDEN, NEEDED, NOT_NEEDED, SHARDS
from hub_server import HubServer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with all that repositories have beside a model, and an adapter that names it."""
    home = tmp_path_factory.mktemp("models")
    faults.make_base(home / "base", shards=SHARDS, hidden=HIDDEN)
    faults.make_adapter(home / "adapter", layers=SHARDS, hidden=HIDDEN, rank=4)
    for name, text in {**NOT_NEEDED, **NEEDED}.items():
        (home / "base" / name).parent.mkdir(exist_ok=True)
        (home / "base" / name).write_text(text)
    config = json.loads((home / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/base"
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (home / "adapter" / "optimizer.pt").write_text("state")
    return home


@pytest.fixture
def hub(models: Path) -> Iterator[HubServer]:
    """A server that has each folder of `models` as a repository: a test file may have models of its own."""
    with HubServer() as server:
        for folder in models.iterdir():
            server.add(f"org/{folder.name}", folder)
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")
