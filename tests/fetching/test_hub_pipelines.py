"""A pipeline on the Hub: what its components need is downloaded, and no other variant."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from diffusion_models import WIDTH, clip, conv, values
from hub_client import Client
from hub_models import downloaded
from hub_server import WRITER
from packed_bnb import FourBit
from safetensors.torch import load, load_file, save_file

import loratool

if TYPE_CHECKING:
    from pathlib import Path

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


def save_lora(path: Path) -> Path:
    """An adapter that changes the quantised weight of the U-Net, whose factors are all ones."""
    factors = {f"unet.{TO_Q.removesuffix('.weight')}.lora_{side}.weight": torch.ones(2, H) for side in "AB"}
    save_file({name: value.T.contiguous() if "lora_B" in name else value for name, value in factors.items()}, path)
    return path


def quantised_pipeline_at(root: Path) -> Path:
    """The same with a weight in nf4, of which an index names the file, and a file that a component has no more."""
    pipeline_at(root)
    (shard,) = (root / "unet").glob("*.safetensors")
    packed = FourBit((H, H), "nf4", 16, 0)
    tensors = {n: torch.from_numpy(v.copy()) for n, v in packed.tensors(TO_Q).items()}
    save_file({**tensors, **values(conv("conv_in"))}, shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(shard), shard.name)}
    (root / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    config = {"_class_name": "UNet2DConditionModel", "quantization_config": {"quant_method": "bitsandbytes"}}
    (root / "unet" / "config.json").write_text(json.dumps(config))
    return root


def test_a_pipeline_is_streamed_as_it_is_merged(hub: HubServer, tmp_path: Path) -> None:
    """A model that the repository had before is replaced, with the weights in folders of components."""
    base, lora = quantised_pipeline_at(tmp_path / "pipeline"), save_lora(tmp_path / "lora.safetensors")
    hub.add("org/pipeline", base)
    (tmp_path / "old" / "unet").mkdir(parents=True)
    (tmp_path / "old" / "unet" / "old.safetensors").write_bytes(b"stale")
    (tmp_path / "old" / "model_index.json").write_text("{}")
    hub.add("alice/merged", tmp_path / "old")
    client = Client(hub, tmp_path / "home", WRITER)
    client.works("merge", "org/pipeline", lora, "--stream", "--push-to-hub", "alice/merged", "--overwrite")
    loratool.merge(base, lora, tmp_path / "out", device="cpu")
    found = {name: content for name, content in hub.files("alice/merged").items() if name != ".gitattributes"}
    wanted = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {*found, "vae/diffusion_pytorch_model.bin"} == wanted.keys()  # a pickle is never sent
    told = {"README.md", "loratool.json"}  # which name places
    assert {name for name in found if found[name] != wanted[name].read_bytes()} == told
    (shard,) = (name for name in found if name.startswith("unet/") and name.endswith(".safetensors"))
    assert TO_Q in load(found[shard])


def test_a_pushed_pipeline_has_the_indexes_of_its_components(hub: HubServer, tmp_path: Path) -> None:
    base = quantised_pipeline_at(tmp_path / "pipeline")
    (tmp_path / "old" / "text_encoder").mkdir(parents=True)
    for name in ("text_encoder/model-00001-of-00002.safetensors", "text_encoder/model.safetensors.index.fp16.json"):
        (tmp_path / "old" / name).write_bytes(b"stale")
    hub.add("alice/merged", tmp_path / "old")
    Client(hub, tmp_path / "home", WRITER).works("push", base, "alice/merged")
    found = {name for name in hub.files("alice/merged") if name.partition("/")[0] in ("unet", "text_encoder")}
    assert found == {
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00001.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
    }
