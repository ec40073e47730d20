"""A pipeline on the Hub: what its components need is downloaded, and no other variant."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from diffusion_models import WIDTH, clip, conv, values
from hub_models import downloaded
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

    from hub_client import Client
    from hub_server import HubServer

H = WIDTH
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def pipeline_at(root: Path) -> Path:
    """A U-Net of one shard with an index, a text encoder with another variant, and a VAE in another format."""
    for name in ("unet", "text_encoder", "vae", "tokenizer"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    save_file(values({TO_Q: (H, H), **conv("conv_in")}), root / "unet" / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys([TO_Q, "conv_in.weight", "conv_in.bias"], shard)}
    (root / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save_file(values(clip()), root / "text_encoder" / "model.safetensors")
    save_file(values(clip()), root / "text_encoder" / "model.fp16.safetensors")
    (root / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"never loaded")
    (root / "sd.safetensors").write_bytes(b"the same in one file")
    named = {name: ["diffusers", "X"] for name in ("unet", "text_encoder", "vae", "tokenizer")}
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **named}))
    return root


def test_a_pipeline_is_merged_and_inspected_from_the_hub(hub: HubServer, client: Client, tmp_path: Path) -> None:
    base = pipeline_at(tmp_path / "pipeline")
    hub.add("org/pipeline", base)
    target = f"unet.{TO_Q.removesuffix('.weight')}"
    factors = {f"{target}.lora_A.weight": torch.ones(2, H), f"{target}.lora_B.weight": torch.ones(H, 2)}
    save_file(factors, tmp_path / "lora.safetensors")
    told = json.loads(client.works("inspect", "org/pipeline", "--json").out)["results"][0]
    assert [part["name"] for part in told["components"]] == ["unet", "text_encoder"]
    client.works("merge", "org/pipeline", tmp_path / "lora.safetensors", "-o", tmp_path / "out")
    came = {name for name in downloaded(hub, "org/pipeline") if name.endswith(".safetensors")}
    assert came == {"unet/diffusion_pytorch_model-00001-of-00001.safetensors", "text_encoder/model.safetensors"}
    (shard,) = (tmp_path / "out" / "unet").glob("*.safetensors")
    before = load_file(base / "unet" / shard.name)[TO_Q]
    assert torch.equal(load_file(shard)[TO_Q], before + 2)
    assert (tmp_path / "out" / "tokenizer" / "config.json").is_file()
