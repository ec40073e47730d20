"""An adapter alone is merged into the base that it names, taken from the Hub's cache on this disk without the Hub.

The cache is built by hand as huggingface_hub documents it: blobs, refs, and snapshots of links.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_client import Client
    from hub_server import HubServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_cache(home: Path, repo: str, folder: Path) -> None:
    """A repository as `hf download` leaves it in the cache."""
    place = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    (place / "blobs").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    for path in (each for each in folder.rglob("*") if each.is_file()):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        raw = path.read_bytes()
        heavy = path.suffix == ".safetensors"
        name = hashlib.sha256(raw).hexdigest() if heavy else hashlib.sha1(raw).hexdigest()
        (place / "blobs" / name).write_bytes(raw)
        link.symlink_to(os.path.relpath(place / "blobs" / name, link.parent))


@pytest.fixture
def offline(client: Client, models: Path) -> Client:
    put_into_cache(client.home, "org/base", models / "base")
    shutil.copytree(models / "adapter", client.home / "style")
    return client


def test_an_adapter_alone_finds_its_base_in_the_cache(
    hub: HubServer, offline: Client, models: Path, tmp_path: Path
) -> None:
    offline.works("merge", "style", "-o", "alone", cwd=offline.home, HF_HUB_OFFLINE="1")
    offline.works("merge", models / "base", models / "adapter", "-o", tmp_path / "wanted")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "wanted").glob("*.safetensors")}
    assert wanted == {path.name: path.read_bytes() for path in (offline.home / "alone").glob("*.safetensors")}
    base = json.loads((offline.home / "alone" / "loratool.json").read_text())["base"]
    assert base["hub"] == f"org/base@{COMMIT}"
    for name, facts in base["files"].items():  # known by the names of the blobs, and not read for it
        if name.endswith(".safetensors"):
            assert facts["sha256"] == hashlib.sha256((models / "base" / name).read_bytes()).hexdigest()
    assert hub.log == []


def test_without_a_network_it_is_said_how_to_use_the_cache(offline: Client) -> None:
    """What the cache has may be older than what the name stands for, so nobody takes it unasked."""
    told = offline.refused("merge", "style", "-o", "alone", cwd=offline.home, HF_ENDPOINT="http://127.0.0.1:9")
    assert "set HF_HUB_OFFLINE=1 to use only the cache" in told


def test_an_adapter_whose_base_is_nowhere_says_which_and_how_to_get_it(client: Client, models: Path) -> None:
    told = client.refused("merge", models / "adapter", "-o", "alone", HF_HUB_OFFLINE="1")
    assert "org/base" in told
    assert "hf download org/base" in told
    assert not (client.home / "alone").exists()
