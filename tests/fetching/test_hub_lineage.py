"""What was made of repositories is made again from their recorded commits, whatever their branches are by then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hub_client import Client
    from hub_server import HubServer


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_merge_of_repositories_is_repeated_from_their_commits(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """Their files are known by the SHA-256 that the Hub has of them; the second machine has an empty cache."""
    client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "made")
    table = json.loads((tmp_path / "made" / "loratool.json").read_bytes())
    weights = {name: facts for name, facts in table["base"]["files"].items() if name.endswith(".safetensors")}
    assert {*map(frozenset, weights.values())} == {frozenset({"size", "sha256"})}
    moved = shutil.copytree(models / "adapter", tmp_path / "moved")
    (moved / "adapter_config.json").write_text("{}")
    hub.add("org/adapter", moved)  # main is another commit now
    client.home.rename(tmp_path / "old home")
    client.home.mkdir()
    ran = client.works("reproduce", tmp_path / "made", "-o", tmp_path / "again")
    assert "have the same bytes" in ran.out
    assert content(tmp_path / "again") == content(tmp_path / "made")
