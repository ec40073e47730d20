"""Trained weights beside an adapter, and adapters in several files, where they lie on the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hub_models import downloaded
from hub_server import WRITER
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from hub_client import Client
    from hub_server import HubServer


def with_head(models: Path, folder: Path) -> Path:
    """The adapter with a value head and a pickle beside it, and a state of training."""
    shutil.copytree(models / "adapter", folder)
    save_file({"v_head.weight": torch.ones(1, 7)}, folder / "value_head.safetensors")
    torch.save({"w": torch.ones(3)}, folder / "non_lora_trainables.bin")
    return folder


def test_weights_beside_an_adapter_on_the_hub_stop_a_merge(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """They are downloaded with it, told with what they hold, and left out where that is allowed."""
    hub.add("org/trained", with_head(models, tmp_path / "trained"))
    told = client.refused("merge", "org/base", "org/trained", "-o", tmp_path / "out", code=4)
    assert "value_head.safetensors (1 tensor of 7 parameters" in told
    assert "non_lora_trainables.bin (a pickle of 1 tensor" in told
    assert "optimizer.pt" not in downloaded(hub, "org/trained")
    ignored = ["--ignore-files", "value_head.safetensors", "--ignore-files", "*.bin"]
    client.works("merge", "org/base", "org/trained", "-o", tmp_path / "out", *ignored)


def test_a_streaming_merge_stops_for_them_too(hub: HubServer, client: Client, models: Path, tmp_path: Path) -> None:
    """Nothing is sent, and no repository is made."""
    hub.add("org/trained", with_head(models, tmp_path / "trained"))
    words = ["merge", "org/base", "org/trained", "--stream", "--push-to-hub", "org/merged"]
    assert "value_head.safetensors" in client.refused(*words, code=4, cwd=tmp_path, HF_TOKEN=WRITER)
    assert "org/merged" not in hub.repos


def test_inspect_names_them_by_their_headers_alone(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """What a value head holds is told without a download of its tensors."""
    hub.add("org/trained", with_head(models, tmp_path / "trained"))
    report = json.loads(client.works("inspect", "org/trained", "--json").out)["results"][0]
    assert any("value_head.safetensors (1 tensor of 7 parameters" in note["text"] for note in report["notes"])
    assert any("non_lora_trainables.bin" in note["text"] for note in report["notes"])


def test_an_adapter_in_several_files_is_downloaded_whole(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """Every part and the index come, and merge to the same bytes as the one file."""
    folder = tmp_path / "parts"
    shutil.copytree(models / "adapter", folder)
    stored = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    files = {name: f"adapter_model-{n % 2 + 1:05d}-of-00002.safetensors" for n, name in enumerate(stored)}
    for file in set(files.values()):
        save_file({name: stored[name] for name in stored if files[name] == file}, folder / file)
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    hub.add("org/parts", folder)
    for adapter in ("org/parts", "org/adapter"):
        client.works("merge", "org/base", adapter, "-o", tmp_path / adapter.replace("/", "-"))
    one, other = (
        {k: v for path in (tmp_path / name).glob("*.safetensors") for k, v in load_file(path).items()}
        for name in ("org-parts", "org-adapter")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
