"""A small adapter of every dialect, and of what a reader does not meet in all of them, as files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf_bytes
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from trainer_layouts import HEADS, HIDDEN, KEY_HEADS, RANK, TOKENS, WIDE, WIDTH, numbers

O_PROJ = "model.layers.0.self_attn.o_proj"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
COLUMNS = HEADS * WIDTH  # of o_proj, whose rows are HIDDEN


def pair(down: str, up: str, rows: int = HIDDEN, columns: int = COLUMNS) -> dict[str, Tensor]:
    """A and B of one layer."""
    return {down: numbers(RANK, columns, seed=1), up: numbers(rows, RANK, seed=2)}


@dataclass(frozen=True)
class Sample:
    """An adapter of a dialect, and the dialect of what is made of it."""

    tensors: Mapping[str, Tensor]
    becomes: str
    texts: Mapping[str, str] = field(default_factory=dict)  # files beside it
    header: Mapping[str, str] = field(default_factory=dict)
    name: str = "lora.safetensors"
    alpha: float | None = None  # that the file does not tell
    others: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # files with more of its tensors
    weight: str = f"{O_PROJ}.weight"  # that it changes, where it changes one that is (HIDDEN, COLUMNS)

    def write(self, folder: Path) -> Path:
        """Its files, in a new folder; the path that a command takes."""
        folder.mkdir()
        (folder / self.name).parent.mkdir(exist_ok=True)
        if self.name.endswith(".gguf"):
            (folder / self.name).write_bytes(gguf_of(self.tensors))
        else:
            save_file(dict(self.tensors), folder / self.name, dict(self.header) or None)
        for file, tensors in self.others.items():
            (folder / file).parent.mkdir(exist_ok=True)
            save_file(dict(tensors), folder / file)
        for file, text in self.texts.items():
            (folder / file).write_text(text)
        return folder if self.texts else folder / self.name


def gguf_of(tensors: Mapping[str, Tensor]) -> bytes:
    """An adapter of llama.cpp's with α = 1."""
    entries = (
        gguf_bytes.words("general.architecture", "llama"),
        gguf_bytes.words("general.type", "adapter"),
        gguf_bytes.words("adapter.type", "lora"),
        gguf_bytes.entry("adapter.lora.alpha", gguf_bytes.F32, struct.pack("<f", 1.0)),
    )
    return gguf_bytes.whole_file(entries, {name: tensor.numpy() for name, tensor in tensors.items()})


def of_kohya(module: str) -> dict[str, Tensor]:
    return {**pair(f"{module}.lora_down.weight", f"{module}.lora_up.weight"), f"{module}.alpha": torch.tensor(1.0)}


def of_peft(module: str) -> dict[str, Tensor]:
    return pair(f"{module}.lora_A.weight", f"{module}.lora_B.weight")


LOKR = {"lokr_w1": numbers(2, 2, seed=1), "lokr_w2": numbers(4, 8, seed=2), "alpha": torch.tensor(9.0)}
LYCORIS = "lycoris_transformer_blocks_0_attn_to_q"
MLX = json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": RANK, "scale": 3.0}, "num_layers": -1})
PEFT = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "target_modules": ["o_proj"]})
MEGATRON_PROJ = "decoder.layers.0.self_attention.linear_proj.adapter"
LITGPT = f"checkpoint_dir: org/base\nlora_r: {RANK}\nlora_alpha: 1\nlora_projection: true\n"
MEGATRON = (
    f"model:\n  num_attention_heads: 4\npeft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  dim: {RANK}\n  alpha: 1\n"
)
CLONEOFSIMO = {
    f"text_encoder:{at}:{side}": numbers(*shape, seed=at)
    for at in range(8)  # of two layers, which number their projections as a walk meets them
    for side, shape in (("up", (3, RANK)), ("down", (RANK, 3)))
}
DIALECTS: Mapping[str, Sample] = {
    "peft": Sample(of_peft(f"base_model.model.{O_PROJ}"), "peft", {"adapter_config.json": PEFT}, name="adapter_model.safetensors"),
    "mlx": Sample(
        {f"{O_PROJ}.lora_a": numbers(COLUMNS, RANK, seed=1), f"{O_PROJ}.lora_b": numbers(RANK, HIDDEN, seed=2)},
        "mlx",
        {"adapter_config.json": MLX},
        name="adapters.safetensors",
    ),
    "litgpt": Sample(
        pair("transformer.h.0.attn.proj.lora_A", "transformer.h.0.attn.proj.lora_B"),
        "peft",
        {"hyperparameters.yaml": LITGPT},
        name="lit_model.lora.safetensors",
    ),
    "loralib": Sample(pair(f"{O_PROJ}.lora_A", f"{O_PROJ}.lora_B"), "peft", alpha=1.0),
    "megatron": Sample(
        pair(f"{MEGATRON_PROJ}.linear_in.weight", f"{MEGATRON_PROJ}.linear_out.weight"),
        "peft",
        {"run_config.yaml": MEGATRON},
    ),
    "torchtune": Sample(pair("layers.0.attn.output_proj.lora_a.weight", "layers.0.attn.output_proj.lora_b.weight"), "torchtune", alpha=1.0),
    "gguf": Sample(pair("blk.0.attn_output.weight.lora_a", "blk.0.attn_output.weight.lora_b"), "gguf", name="adapter.gguf"),
    "kohya": Sample(of_kohya(f"lora_unet_{UNET.replace('.', '_')}"), "kohya", weight=f"unet.{UNET}.weight"),
    "wan-fun": Sample(of_kohya("lora_unet__blocks_0_cross_attn_k"), "kohya", weight="diffusion_model.blocks.0.cross_attn.k.weight"),
    "onetrainer": Sample(
        of_kohya("lora_transformer_transformer_blocks_0_attn_to_out_0"), "kohya", weight="transformer.transformer_blocks.0.attn.to_out.0.weight"
    ),
    "lycoris": Sample({f"{LYCORIS}.{role}": tensor for role, tensor in LOKR.items()}, "lycoris", weight="transformer_blocks.0.attn.to_q.weight"),
    "simpletuner": Sample(
        {f"{LYCORIS}.{role}": tensor for role, tensor in LOKR.items()},
        "diffusers",
        header={"lycoris_config": "{}"},
        weight="transformer_blocks.0.attn.to_q.weight",
    ),
    "musubi": Sample(
        of_kohya("lora_unet_blocks_0_self_attn_q"),
        "kohya",
        header={"ss_network_module": "networks.lora_wan"},
        weight="diffusion_model.blocks.0.self_attn.q.weight",
    ),
    "diffusers": Sample(of_peft(f"unet.{UNET}"), "diffusers", weight=f"unet.{UNET}.weight"),
    "ai-toolkit": Sample(
        of_peft("transformer.transformer_blocks.0.attn.to_q"),
        "diffusers",
        header={"software": '{"name": "ai-toolkit"}'},
        weight="transformer.transformer_blocks.0.attn.to_q.weight",
    ),
    "cloneofsimo": Sample(CLONEOFSIMO, "diffusers", header={"text_encoder": '["CLIPAttention"]'}, weight=""),
    "comfy": Sample(
        of_kohya("diffusion_model.double_blocks.0.img_attn.proj"), "comfy", weight="diffusion_model.double_blocks.0.img_attn.proj.weight"
    ),
    "bfl": Sample(
        of_peft("final_layer.adaLN_modulation.1"), "comfy", weight="diffusion_model.final_layer.adaLN_modulation.1.weight"
    ),
    "xlabs": Sample(
        pair("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight", 48), "comfy", weight=""
    ),
    "original": Sample(
        pair("blocks.0.self_attn.q.lora_A", "blocks.0.self_attn.q.lora_B"), "comfy", weight="diffusion_model.blocks.0.self_attn.q.weight"
    ),
}  # fmt: skip


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same factors for both layers of the model, in one tensor."""
    return {name: torch.stack([tensor, tensor * 2]) for name, tensor in tensors.items()}


NEMO_PROJ = "model.decoder.layers.0.self_attention.adapter_layer.lora_dense_attention_adapter"
NEMO = f"num_layers: 2\npeft:\n  peft_scheme: lora\n  lora_tuning:\n    adapter_dim: {RANK}\n    alpha: 1\n"
GROUPED = (HEADS + 2 * KEY_HEADS) * WIDTH  # rows of queries, keys and values of one layer
QUERIES_AND_VALUES = (HEADS + KEY_HEADS) * WIDTH
# What the readers of LLM trainers do besides: several parts in one matrix, lengths of rows, experts, ranks.
PARTS: Mapping[str, Sample] = {
    "mlx, DoRA": Sample(
        {**DIALECTS["mlx"].tensors, f"{O_PROJ}.m": numbers(HIDDEN, seed=3).abs()},
        "mlx",
        {"adapter_config.json": MLX.replace('"lora"', '"dora"')},
        name="adapters.safetensors",
    ),
    "mlx, experts": Sample(
        {
            "model.layers.0.mlp.switch_mlp.up_proj.lora_a": numbers(3, RANK, HIDDEN, seed=1),
            "model.layers.0.mlp.switch_mlp.up_proj.lora_b": numbers(3, WIDE, RANK, seed=2),
        },
        "mlx",
        {"adapter_config.json": MLX},
        name="adapters.safetensors",
        weight="",
    ),
    "litgpt, parts": Sample(
        {
            "transformer.h.0.attn.qkv.lora_A": numbers(2 * RANK, HIDDEN, seed=1),
            "transformer.h.0.attn.qkv.lora_B": numbers(QUERIES_AND_VALUES, RANK, seed=2),
        },
        "peft",
        {"hyperparameters.yaml": f"{LITGPT}lora_query: true\nlora_key: false\nlora_value: true\n"},
        name="lit_model.lora.safetensors",
    ),
    "torchtune, DoRA": Sample(
        {
            **pair("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight", HEADS * WIDTH, HIDDEN),
            "layers.0.attn.q_proj.magnitude": numbers(HEADS * WIDTH, seed=3).abs(),
        },
        "torchtune",
        {"adapter_config.json": json.dumps({"r": RANK, "lora_alpha": 1})},
        name="adapter_model.safetensors",
    ),
    "megatron, parts": Sample(
        {
            **pair(
                "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
                "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight",
                GROUPED,
                HIDDEN,
            ),
            **stacked(
                pair(
                    "decoder.layers.mlp.linear_fc1.adapter.linear_in.weight",
                    "decoder.layers.mlp.linear_fc1.adapter.linear_out.weight",
                    2 * WIDE,
                    HIDDEN,
                )
            ),
        },
        "peft",
        {"run_config.yaml": MEGATRON},
    ),
    "megatron, stages": Sample(
        pair(f"{NEMO_PROJ}.linear_in.weight", f"{NEMO_PROJ}.linear_out.weight"),
        "peft",
        {"model_config.yaml": NEMO},
        name="tp_rank_00_pp_rank_000/model_weights.safetensors",
        others={
            "tp_rank_00_pp_rank_001/model_weights.safetensors": pair(
                f"{NEMO_PROJ}.linear_in.weight", f"{NEMO_PROJ}.linear_out.weight"
            )
        },
    ),
    "gguf, rows": Sample(
        {
            **pair("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b", HEADS * WIDTH, HIDDEN),
            "token_embd.weight.lora_a": numbers(TOKENS, RANK, seed=1),
            "token_embd.weight.lora_b": numbers(HIDDEN, RANK, seed=2),
        },
        "gguf",
        name="adapter.gguf",
    ),
    "kohya, DoRA": Sample(
        of_kohya("lora_unet_mid_block_attn1_to_q")
        | {"lora_unet_mid_block_attn1_to_q.dora_scale": numbers(HIDDEN, 1, seed=3).abs()},
        "kohya",
        weight="unet.mid_block.attn1.to_q.weight",
    ),
}


def write_image_base(path: Path, weight: str) -> Path:
    """One file with the weight that a sample of an image model changes."""
    path.write_bytes(save({weight: numbers(HIDDEN, COLUMNS, seed=9)}))
    return path


def header(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata())
