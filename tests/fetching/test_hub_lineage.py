"""What was made of repositories is made again from their recorded commits, whatever their branches are by then."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub_server import Blob
from oracle import files_of

import loratool

if TYPE_CHECKING:
    from hub_client import Client
    from hub_server import HubServer


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
    assert files_of(tmp_path / "again") == files_of(tmp_path / "made")


def new_machine(client: Client) -> None:
    """Whose cache is empty."""
    client.home.rename(client.home.with_name(f"{client.home.name} of before"))
    client.home.mkdir()


COMMANDS = {
    "convert": ("org/adapter", "--to", "mlx", "--base", "org/base"),
    "rebase": ("org/adapter", "--from", "org/base", "--onto", "org/base@v2", "--force"),
    "rescale": ("hf://org/adapter", "--scale", "0.5"),
    "merge": ("auto", "org/adapter", "-w", "0.5"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_input_from_the_hub_is_taken_from_the_commit_that_it_was(
    name: str, hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """Models that options name as well; the branches have moved on, and the second machine has an empty cache."""
    hub.repos["org/base"].branches["v2"] = hub.repos["org/base"].branches["main"]
    client.works(name, *COMMANDS[name], "-o", tmp_path / "made", "-q")
    commits = {repo: hub.repos[repo].branches["main"] for repo in ("org/base", "org/adapter")}
    command = json.loads((tmp_path / "made" / "loratool.json").read_bytes())["command"]
    used = {repo for repo in commits if f"{repo}@{commits[repo]}" in command}
    assert used == ({"org/adapter"} if name == "rescale" else set(commits))
    for repo in ("adapter", "base"):
        hub.add(f"org/{repo}", shutil.copytree(models / "adapter", tmp_path / repo))
    new_machine(client)
    client.works("reproduce", tmp_path / "made", "-o", tmp_path / "again", "-q")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "made")


@pytest.mark.parametrize("name", ["convert", "rebase", "rescale"])
def test_a_hub_that_has_other_bytes_under_a_commit_is_refused(
    name: str, hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """A mirror that lies, or a repository that was rewritten: the digests of the record decide."""
    hub.repos["org/base"].branches["v2"] = hub.repos["org/base"].branches["main"]
    client.works(name, *COMMANDS[name], "-o", tmp_path / "made", "-q")
    changed = "adapter" if name == "rescale" else "base"
    config = "adapter_config.json" if name == "rescale" else "config.json"
    table = json.loads((models / changed / config).read_bytes())
    files = hub.repos[f"org/{changed}"].commits[hub.repos[f"org/{changed}"].branches["main"]]
    files[config] = Blob(json.dumps({**table, "made_up": 1}).encode(), files[config].lfs)
    new_machine(client)
    told = client.refused("reproduce", tmp_path / "made", "-o", tmp_path / "again", code=3)
    assert re.search(rf"{config} (differs from the bytes|has \d+ bytes, not \d+)", told), told
    assert not (tmp_path / "again").exists()


def test_what_made_a_model_or_an_adapter_is_told_from_its_repository(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """Their records are small files, which are read beside the headers."""
    loratool.merge(models / "base", models / "adapter", tmp_path / "model", device="cpu")
    loratool.rescale(models / "adapter", tmp_path / "half", scale=0.5)
    for name in ("model", "half"):
        hub.add(f"org/{name}", tmp_path / name)
        told = json.loads(client.works("inspect", f"org/{name}", "--json").out)["results"][0]
        here = json.loads(json.dumps(loratool.inspect(tmp_path / name).to_dict()))
        assert here["history"]["made_by"] == ("merge" if name == "model" else "rescale")
        assert told["history"] == {**here["history"], "name": f"org/{name}"}
