"""Models in single files on the Hub, GGUF and safetensors: planned from headers, merged as from this disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def hub(models: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        for name in ("gguf", "split", "file"):
            server.add(f"org/{name}", models / name)
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home", WRITER)


def sent(hub: HubServer, repo: str) -> int:
    """Bytes of content that were sent of a repository."""
    blobs = {blob.sha256 for commit in hub.repos[repo].commits.values() for blob in commit.values()}
    asked = [*hub.asked("GET", f"^/{repo}/resolve/"), *hub.asked("GET", "^/cdn/")]
    return sum(each.sent for each in asked if f"/{repo}/" in each.path or each.path.split("/")[2] in blobs)


@pytest.mark.parametrize(
    ("repo", "inside", "files"),
    [
        ("org/gguf", ":model-Q8_0.gguf", ["model-Q8_0.gguf"]),
        ("org/split", "", [f"model-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]),
        ("org/file", ":model-bf16.safetensors", ["model-bf16.safetensors"]),
    ],
)
def test_a_model_on_the_hub_is_inspected_by_its_header_and_merged(
    hub: HubServer, client: Client, models: Path, tmp_path: Path, repo: str, inside: str, files: list[str]
) -> None:
    folder = models / repo.removeprefix("org/")
    base = folder / inside.removeprefix(":")
    told = json.loads(client.works("inspect", repo + inside, "--json").out)["results"][0]
    here = loratool.inspect(base).to_dict()
    assert {k: v for k, v in told.items() if k not in ("path", "cost")} == {
        k: here[k] for k in told if k not in ("path", "cost")
    }
    size = sum((folder / name).stat().st_size for name in files)
    assert sent(hub, repo) < size / 2
    out = f"out{Path(files[0]).suffix}" if inside else "out"
    client.works("merge", repo + inside, models / "adapter", "-o", tmp_path / out)
    assert {name for name in downloaded(hub, repo) if name.endswith((".gguf", ".safetensors"))} == {*files}
    loratool.merge(base, models / "adapter", tmp_path / f"here{out.removeprefix('out')}", device="cpu")
    for found in (tmp_path / out).glob("*.gguf") if not inside else [tmp_path / out]:
        other = tmp_path / f"here{out.removeprefix('out')}" / (found.name if not inside else "")
        assert found.read_bytes() == other.read_bytes()


def test_a_repository_of_several_gguf_models_is_refused_with_the_files(client: Client, models: Path) -> None:
    told = client.refused("merge", "org/gguf", models / "adapter", "-o", "out", code=3)
    assert "several GGUF models (model-F16.gguf, model-Q8_0.gguf)" in told


def test_a_gguf_model_is_streamed(hub: HubServer, client: Client, models: Path, tmp_path: Path) -> None:
    words = ["merge", "org/split", str(models / "adapter"), "--stream", "--push-to-hub", "alice/split"]
    client.works(*words)
    loratool.merge(models / "split", models / "adapter", tmp_path / "out", device="cpu")
    found = hub.files("alice/split")
    for path in (tmp_path / "out").glob("*.gguf"):
        assert found[path.name] == path.read_bytes()
