"""Models in single files on the Hub, GGUF and safetensors: planned from headers, merged as from this disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_client import Client
from hub_models import downloaded
from hub_server import WRITER, HubServer
from merged_models import write_adapter
from safetensors.torch import save_file

import loratool

pytest.importorskip("gguf")
from gguf_models import Kind, llama_weights, split, write_llama

HIDDEN = 256  # so that the weights are more than is read of a header at first


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two GGUF files of different types, the same in parts, and in one file of safetensors; an adapter."""
    home: Path = tmp_path_factory.mktemp("models")
    weights = llama_weights(hidden=HIDDEN, mlp=4 * HIDDEN)
    for name in ("gguf", "file"):
        (home / name).mkdir()
    write_llama(home / "gguf" / "model-Q8_0.gguf", weights, Kind.Q8_0)
    write_llama(home / "gguf" / "model-F16.gguf", weights, Kind.F16)
    split(home / "gguf" / "model-F16.gguf", home / "split")
    (home / "split" / "config.json").write_text("{}")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, home / "file" / "model-bf16.safetensors")
    save_file({"other.weight": torch.ones(1)}, home / "file" / "other.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    factors = {name: (torch.ones(2, HIDDEN) * 0.1, torch.ones(HIDDEN, 2) * 0.1)}
    write_adapter(home / "adapter", factors, torch.float32, r=2, lora_alpha=2, target_modules=["q_proj"])
    return home


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home", WRITER)


def sent(hub: HubServer, repo: str) -> int:
    """Bytes of content that were sent of a repository."""
    blobs = {blob.sha256 for commit in hub.repos[repo].commits.values() for blob in commit.values()}
    asked = [*hub.asked("GET", f"^/{repo}/resolve/"), *hub.asked("GET", "^/cdn/")]
    return sum(each.sent for each in asked if f"/{repo}/" in each.path or each.path.split("/")[2] in blobs)


@pytest.mark.parametrize(("repo", "inside"), [("org/gguf", ":model-Q8_0.gguf"), ("org/split", "")])
def test_a_gguf_model_is_inspected_by_its_header(
    hub: HubServer, client: Client, models: Path, repo: str, inside: str
) -> None:
    told = json.loads(client.works("inspect", repo + inside, "--json").out)["results"][0]
    base = models / repo.removeprefix("org/") / inside.removeprefix(":")
    here = loratool.inspect(base).to_dict()
    assert {**told, "path": "", "cost": ""} == {**{key: here[key] for key in told}, "path": "", "cost": ""}
    size = sum(path.stat().st_size for path in ([base] if inside else base.glob("*.gguf")))
    assert sent(hub, repo) < size / 2


@pytest.mark.parametrize("place", ["org/gguf:model-Q8_0.gguf", "org/file:model-bf16.safetensors"])
def test_a_file_of_a_repository_is_merged_into_a_file(
    hub: HubServer, client: Client, models: Path, tmp_path: Path, place: str
) -> None:
    """No other file of the repository is downloaded."""
    repo, _, name = place.partition(":")
    out, here = (tmp_path / (which + Path(name).suffix) for which in ("out", "here"))
    client.works("merge", place, models / "adapter", "-o", out)
    assert {each for each in downloaded(hub, repo) if each.endswith((".gguf", ".safetensors"))} == {name}
    loratool.merge(models / repo.removeprefix("org/") / name, models / "adapter", here, device="cpu")
    assert out.read_bytes() == here.read_bytes()


def test_a_gguf_model_is_streamed(hub: HubServer, client: Client, models: Path, tmp_path: Path) -> None:
    words = ["merge", "org/split", str(models / "adapter"), "--stream", "--push-to-hub", "alice/split"]
    client.works(*words)
    loratool.merge(models / "split", models / "adapter", tmp_path / "out", device="cpu")
    found = hub.files("alice/split")
    for path in (tmp_path / "out").glob("*.gguf"):
        assert found[path.name] == path.read_bytes()
