"""Merged models, bases and adapters on the Hub are verified like local ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hub_client import Client
    from hub_server import HubServer


def test_operands_of_verify_may_be_repositories(hub: HubServer, client: Client, models: Path, tmp_path: Path) -> None:
    """The adapter names its base; the record of a repository is enough as well."""
    client.works("merge", models / "base", models / "adapter", "-o", tmp_path / "merged")
    hub.add("org/merged", tmp_path / "merged")
    ran = client.works("verify", "org/merged", "--adapter", "org/adapter", "--device", "cpu")
    assert "proven: every tensor is what the formula gives" in ran.out
    assert "every file is what loratool.json says" in client.works("verify", "org/merged").out
