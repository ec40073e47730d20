"""diffusers and mlx-lm apply converted adapters as PEFT's formula has it, to models with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import numbers
from peft_files import save_peft
from safetensors.torch import load_file
from torch import Tensor

import loratool

RANK, ALPHA = 2, 1.0


def trained(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter of PEFT's on some weights, by module, and ΔW of each: α/r · B @ A."""
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for n, (module, weight) in enumerate(weights.items()):
        kernel = weight.shape[2:]
        a = numbers(RANK, weight.shape[1], *kernel, seed=n)
        b = numbers(weight.shape[0], RANK, *(1 for _ in kernel), seed=n + 100)
        start = f"base_model.model.{module}.lora_"
        tensors |= {f"{start}A.weight": a, f"{start}B.weight": b}
        deltas[module] = (ALPHA / RANK * b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    save_peft(folder, tensors, r=RANK, lora_alpha=ALPHA, base_model_name_or_path="org/base")
    return deltas


def check(model: Any, before: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> None:
    """Every weight of a model is what it was, with its ΔW."""
    after = {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    for name, weight in before.items():
        wanted = weight + deltas[name.removesuffix(".weight")] if name.removesuffix(".weight") in deltas else weight
        torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-5)


SDXL = (
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
    "down_blocks.1.attentions.1.proj_in",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_out.0",
    "down_blocks.0.resnets.1.conv1",
    "up_blocks.1.upsamplers.0.conv",
)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_diffusers_applies_a_converted_adapter_of_a_unet(tmp_path: Path, dialect: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=8,
        cross_attention_dim=2048,
        use_linear_projection=True,
    )
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    deltas = trained(tmp_path / "adapter", {module: before[f"{module}.weight"] for module in SDXL})
    report = loratool.convert(tmp_path / "adapter", tmp_path / "out.safetensors", to=dialect, architecture="sdxl")
    assert report.dialect == dialect
    loader = diffusers.loaders.StableDiffusionXLLoraLoaderMixin
    state, alphas, *_ = loader.lora_state_dict(tmp_path / "out.safetensors", unet_config=unet.config)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    unet.fuse_lora()
    check(unet, before, deltas)


FLUX = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.1.ff_context.net.2",
    "single_transformer_blocks.0.proj_out",
)


@pytest.mark.parametrize("way", [("diffusers",), ("kohya",), ("comfy", "diffusers")])
def test_diffusers_applies_a_converted_adapter_of_flux(tmp_path: Path, way: tuple[str, ...]) -> None:
    """Its reader of kohya's names cuts qkv into three, as they were joined."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deltas = trained(tmp_path / "adapter", {module: before[f"{module}.weight"] for module in FLUX})
    here = tmp_path / "adapter"
    for n, dialect in enumerate(way):
        loratool.convert(here, tmp_path / f"{n}.safetensors", to=dialect)
        here = tmp_path / f"{n}.safetensors"
    loader = diffusers.loaders.FluxLoraLoaderMixin
    state, alphas, *_ = loader.lora_state_dict(here, return_alphas=True)
    state = {name: tensor for name, tensor in state.items() if "transformer." in name}
    loader.load_lora_into_transformer(state, network_alphas=alphas, transformer=model)
    model.fuse_lora()
    check(model, before, deltas)


def test_mlx_applies_converted_factors_of_experts(tmp_path: Path) -> None:
    """Its layer of all experts, fused: W_e + scale · b_e @ a_e."""
    mx = pytest.importorskip("mlx.core")
    lora = pytest.importorskip("mlx_lm.tuner.lora")
    switch = pytest.importorskip("mlx_lm.models.switch_layers")
    modules = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(3)]
    weights = {module: numbers(6, 4, seed=n) for n, module in enumerate(modules)}
    deltas = trained(tmp_path / "adapter", weights)
    loratool.convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    linear = switch.SwitchLinear(4, 6, 3, bias=False)
    linear.weight = mx.array(torch.stack(list(weights.values())).numpy())
    layer = lora.LoRASwitchLinear.from_base(linear, r=config["rank"], scale=config["scale"])
    own = {f"model.layers.0.mlp.switch_mlp.up_proj.{name}": name for name in ("lora_a", "lora_b")}
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert tensors.keys() == own.keys()
    assert {name: tuple(layer[own[name]].shape) for name in own} == {n: tuple(t.shape) for n, t in tensors.items()}
    layer.update({own[name]: mx.array(tensor.numpy()) for name, tensor in tensors.items()})
    found = torch.tensor(layer.fuse().weight.tolist())
    wanted = torch.stack([weights[module] + deltas[module] for module in modules])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_mlx_applies_a_converted_adapter(tmp_path: Path) -> None:
    """As its own layers multiply, scale · (x @ a) @ b."""
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    lora = pytest.importorskip("mlx_lm.tuner.lora")
    module = "model.layers.0.self_attn.q_proj"
    weight = numbers(6, 4, seed=7)
    deltas = trained(tmp_path / "adapter", {module: weight})
    loratool.convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    linear = nn.Linear(4, 6, bias=False)
    linear.weight = mx.array(weight.numpy())
    layer = lora.LoRALinear.from_base(linear, r=config["rank"], scale=config["scale"])
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    layer.lora_a, layer.lora_b = (mx.array(tensors[f"{module}.lora_{side}"].numpy()) for side in "ab")
    x = numbers(3, 4, seed=8)
    found = torch.tensor(layer(mx.array(x.numpy())).tolist())
    torch.testing.assert_close(found, x @ (weight + deltas[module]).T, rtol=1e-5, atol=1e-5)
