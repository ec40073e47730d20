"""Adapters of several dialects on the Hub: what is told of them from their headers is what is told of their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dialect_samples import DIALECTS, PARTS, write_image_base
from safetensors.torch import load_file, save_file

import loratool

if TYPE_CHECKING:
    from hub_client import Client
    from hub_server import HubServer

# Three of them have their alpha in a tensor, which no header tells.
SAMPLES = {**DIALECTS, **PARTS}
NAMES = ("kohya", "comfy", "kohya, DoRA", "diffusers", "mlx", "gguf")


def without_place(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("schema", "path", "cost", "name")}


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_inspected_on_the_hub_as_on_this_disk(
    name: str, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    """With every alpha and scaling, also where these are the values of small tensors."""
    here = SAMPLES[name].write(tmp_path / "adapter")
    hub.add("org/adapter", tmp_path / "adapter")
    there = json.loads(client.works("inspect", "org/adapter", "--json").out)["results"][0]
    assert without_place(there) == without_place(json.loads(json.dumps(loratool.inspect(here).to_dict())))


def test_alphas_between_factors_come_by_few_requests(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """Of forty layers with 160 KB of factors each, as attention of SDXL has them at rank 32, whose alphas lie between."""
    module = "lora_unet_middle_block_1_transformer_blocks_{}_attn1_to_q"
    tensors: dict[str, torch.Tensor] = {}
    for number in range(40):
        start = module.format(number)
        tensors[f"{start}.alpha"] = torch.tensor(number + 1, dtype=torch.float16)
        tensors[f"{start}.lora_down.weight"] = torch.zeros(32, 1280, dtype=torch.float16)
        tensors[f"{start}.lora_up.weight"] = torch.zeros(1280, 32, dtype=torch.float16)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "style.safetensors")
    hub.add("org/adapter", tmp_path / "adapter")
    found = json.loads(client.works("inspect", "org/adapter", "--json").out)["results"][0]
    assert len({module["alpha"] for module in found["modules"]}) == 40
    assert len(hub.asked("GET", r"^/cdn/.*\.safetensors$")) <= 5


IN_REPOSITORIES = {
    "kohya": DIALECTS["kohya"],
    "kohya, as diffusers calls files": replace(DIALECTS["kohya"], name="pytorch_lora_weights.safetensors"),
    "mlx": DIALECTS["mlx"],
    "gguf": DIALECTS["gguf"],
}


@pytest.mark.parametrize("name", IN_REPOSITORIES)
def test_a_repository_of_an_adapter_is_merged_as_its_files_are(
    name: str, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    """Beside pictures and a page, as repositories of adapters have them."""
    sample, base = IN_REPOSITORIES[name], tmp_path / "base.safetensors"
    here = sample.write(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("# A style")
    (tmp_path / "adapter" / "images").mkdir()
    (tmp_path / "adapter" / "images" / "one.png").write_bytes(bytes(5000))
    hub.add("org/adapter", tmp_path / "adapter")
    write_image_base(base, sample.weight)
    client.works("merge", base, "org/adapter", "-o", tmp_path / "there.safetensors")
    loratool.merge(base, here, tmp_path / "here.safetensors", device="cpu")
    there, wanted = (load_file(tmp_path / f"{name}.safetensors") for name in ("there", "here"))
    assert there.keys() == wanted.keys()
    assert all(torch.equal(there[name], value) for name, value in wanted.items())
