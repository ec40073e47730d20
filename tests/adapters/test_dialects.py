"""Adapters whose tensors' names say everything: how each dialect names modules, and what its updates come to.

Every file is made here with safetensors. A merged base is held to the formula of the dialect's tool, in float64; values
are eighths, so that each sum and product is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.adapter import Flattened
from loratool.adapters.formats import read_adapter
from loratool.adapters.reading import Reading
from loratool.results.facts import AdapterFacts

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FLAT = ATTENTION.replace(".", "_")
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn"
QWEN = "transformer_blocks.0.attn.to_q"
KOHYA = f"lora_unet_{FLAT}_to_q"


def eighths(*shape: int, seed: int = 0) -> Tensor:
    """Values in eighths, none of them zero."""
    generator = torch.Generator().manual_seed(seed + 31 * math.prod(shape) + len(shape))
    numbers = torch.randint(1, 16, shape, generator=generator) * torch.sign(
        torch.rand(shape, generator=generator) - 0.5
    )
    return numbers / 8


def alpha(value: float = 1.0) -> Tensor:
    return torch.tensor(value)


def pair(down: str, up: str, rows: int = 6, columns: int = 4, rank: int = 2) -> dict[str, Tensor]:
    """The two factors of a layer under their names."""
    return {down: eighths(rank, columns), up: eighths(rows, rank, seed=1)}


def of_kohya(module: str, rows: int = 6, columns: int = 4) -> dict[str, Tensor]:
    tensors = pair(f"{module}.lora_down.weight", f"{module}.lora_up.weight", rows, columns)
    return {**tensors, f"{module}.alpha": alpha()}


def of_peft(module: str, rows: int = 6, columns: int = 4, rank: int = 2) -> dict[str, Tensor]:
    return pair(f"{module}.lora_A.weight", f"{module}.lora_B.weight", rows, columns, rank)


@dataclass(frozen=True)
class Toy:
    """A file of one dialect, and what it does."""

    dialect: str | tuple[str, ...]
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, float]  # target → what multiplies up @ down
    flat: bool = False  # whether targets are written without dots
    metadata: Mapping[str, str] = field(default_factory=dict)
    codes: tuple[str, ...] = ()  # of notes that are told


ALPHAS = {"unet.r": 2, "unet.lora_alpha": 1}
TOYS = {
    "kohya-lin": Toy("kohya", of_kohya(KOHYA), {f"unet.{ATTENTION}.to_q.weight": 0.5}, flat=True),
    "kohya-noalpha": Toy(
        "kohya",
        pair(f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
        {f"unet.{ATTENTION}.to_q.weight": 1.0},
        flat=True,
        codes=("alpha-missing",),
    ),
    "kohya-te": Toy(
        "kohya",
        of_kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        {"te2.text_model.encoder.layers.0.mlp.fc1.weight": 0.5},
        flat=True,
    ),
    "wan-fun": Toy(
        "wan-fun",
        of_kohya("lora_unet__blocks_0_cross_attn_k"),
        {"unet.blocks.0.cross_attn.k.weight": 0.5},
        flat=True,
    ),
    "onetrainer-legacy": Toy(
        "onetrainer",
        of_kohya("lora_transformer_single_transformer_blocks_0_proj_mlp"),
        {"transformer.single_transformer_blocks.0.proj_mlp.weight": 0.5},
        flat=True,
        metadata={"ot_revision": "abc"},
    ),
    "simpletuner-lycoris": Toy(
        "lycoris",
        of_kohya("lycoris_transformer_blocks_0_attn_to_q"),
        {"transformer_blocks.0.attn.to_q.weight": 0.5},
        flat=True,
    ),
    "diff-v1": Toy(
        "diffusers",
        {
            **pair(
                f"unet.{ATTENTION}.processor.to_q_lora.down.weight", f"unet.{ATTENTION}.processor.to_q_lora.up.weight"
            ),
            **pair(
                f"unet.{ATTENTION}.processor.to_out_lora.down.weight",
                f"unet.{ATTENTION}.processor.to_out_lora.up.weight",
            ),
        },
        {f"unet.{ATTENTION}.to_q.weight": 1.0, f"unet.{ATTENTION}.to_out.0.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "diff-v0": Toy(
        "diffusers",
        pair(f"{ATTENTION}.processor.to_q_lora.down.weight", f"{ATTENTION}.processor.to_q_lora.up.weight"),
        {f"unet.{ATTENTION}.to_q.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "diff-v2": Toy(
        "diffusers",
        pair(f"{ENCODER}.q_proj.lora_linear_layer.down.weight", f"{ENCODER}.q_proj.lora_linear_layer.up.weight"),
        {f"{ENCODER}.q_proj.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "diff-peft": Toy(
        "diffusers",
        of_peft(f"unet.{ATTENTION}.to_q"),
        {f"unet.{ATTENTION}.to_q.weight": 0.5},
        metadata={"lora_adapter_metadata": json.dumps(ALPHAS)},
        codes=("alpha-in-header",),
    ),
    "diff-mixedrank": Toy(
        "diffusers",
        {**of_peft(f"unet.{ATTENTION}.to_q"), **of_peft(f"unet.{ATTENTION}.to_k", rank=4)},
        {f"unet.{ATTENTION}.to_q.weight": 1.0, f"unet.{ATTENTION}.to_k.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "comfy": Toy(
        "comfy",
        {
            **of_kohya("diffusion_model.double_blocks.0.img_attn.proj"),
            **of_kohya("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"),
        },
        {
            "diffusion_model.double_blocks.0.img_attn.proj.weight": 0.5,
            "clip_l.text_model.encoder.layers.0.mlp.fc1.weight": 0.5,
        },
    ),
    "aitk": Toy(
        "ai-toolkit",
        of_peft("transformer.transformer_blocks.0.attn.to_q"),
        {"transformer.transformer_blocks.0.attn.to_q.weight": 1.0},
        metadata={"software": json.dumps({"name": "ai-toolkit"})},
        codes=("alpha-missing",),
    ),
    "qwen-default": Toy(
        "diffusers",
        pair(f"{QWEN}.lora_A.default.weight", f"{QWEN}.lora_B.default.weight"),
        {"transformer.transformer_blocks.0.attn.to_q.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "mochi": Toy(
        "original",
        pair("blocks.0.attn.qkv_x.lora_A", "blocks.0.attn.qkv_x.lora_B"),
        {"diffusion_model.blocks.0.attn.qkv_x.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "fal": Toy(
        "peft",
        of_peft("base_model.model.transformer_blocks.0.attn.to_q"),
        {"transformer.transformer_blocks.0.attn.to_q.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "musubi-wan": Toy(
        "musubi",
        of_kohya("lora_unet_blocks_0_self_attn_q"),
        {"unet.blocks.0.self_attn.q.weight": 0.5},
        flat=True,
        metadata={"ss_network_module": "networks.lora_wan"},
    ),
    "two dialects": Toy(
        ("kohya", "diffusers"),
        {**of_kohya(KOHYA), **of_peft(f"unet.{ATTENTION}.to_k")},
        {f"unet.{ATTENTION}.to_q.weight": 0.5, f"unet.{ATTENTION}.to_k.weight": 1.0},
        codes=("alpha-missing",),
    ),
}


def written(toy: Toy, folder: Path) -> Path:
    path = folder / "toy.safetensors"
    save_file(dict(toy.tensors), path, dict(toy.metadata) or None)
    return path


def factors(toy: Toy) -> list[tuple[Tensor, Tensor]]:
    """Every (down, up) in the order of the file's making."""
    matrices = [tensor for tensor in toy.tensors.values() if tensor.dim() > 1]
    return list(zip(matrices[::2], matrices[1::2], strict=True))


@pytest.mark.parametrize("name", TOYS)
def test_a_dialect_is_read_as_the_formula_has_it(name: str, tmp_path: Path) -> None:
    """The file is recognised, every target is named, and merging gives W + scale · up @ down, rounded once."""
    toy = TOYS[name]
    path = written(toy, tmp_path)
    adapter = read_adapter(path)
    flattened = {target for target in adapter.updates if isinstance(target, Flattened)}
    dotted = set(adapter.updates) - flattened
    expected = {Flattened.of(target) for target in toy.scales} if toy.flat else set(toy.scales)
    assert {str(t) for t in dotted} | {t for t in flattened if toy.flat} == expected or name == "two dialects"
    assert adapter.unused == ()
    facts = loratool.inspect(path)
    assert isinstance(facts, AdapterFacts)
    assert facts.format == toy.dialect
    assert tuple(note.code for note in adapter.notes) == toy.codes
    base = {
        target: eighths(up.shape[0], down.shape[1], seed=9)
        for target, (down, up) in zip(toy.scales, factors(toy), strict=True)
    }
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", path, tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "base.safetensors")
    for (target, scale), (down, up) in zip(toy.scales.items(), factors(toy), strict=True):
        assert torch.equal(merged[target].double(), base[target].double() + scale * up.double() @ down.double())


def test_an_alpha_that_is_said_serves_for_modules_without_one(tmp_path: Path) -> None:
    path = written(TOYS["kohya-noalpha"], tmp_path)
    adapter = read_adapter(path, Reading(input_alpha=8.0))
    (update,) = adapter.updates.values()
    assert update.scale == 4.0  # type: ignore[attr-defined]
    assert adapter.notes == ()
