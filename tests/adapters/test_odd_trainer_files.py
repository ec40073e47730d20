"""Files of LLM trainers with anything odd in them are read, or refused in one error; nothing else ever comes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from trainer_layouts import HEADS, KEY_HEADS, write_base

import loratool

TIMES = 25  # mutations of each layout; thousands were tried
MEGATRON, LIT = "decoder.layers.0.self_attention.linear_qkv.adapter", "transformer.h.0.attn.qkv"
Shapes = dict[str, tuple[int, ...]]
LAYOUTS: dict[str, tuple[Shapes, dict[str, str]]] = {
    "torchtune": (
        {
            "layers.0.attn.q_proj.lora_a.weight": (2, 8),
            "layers.0.attn.q_proj.lora_b.weight": (16, 2),
            "layers.0.attn.q_proj.magnitude": (16,),
            "layers.0.mlp.w1.lora_a.weight": (2, 8),
            "layers.0.mlp.w1.lora_b.weight": (12, 2),
        },
        {
            "adapter_config.json": '{"r": 2, "lora_alpha": 1, "peft_type": "LORA"}',
            "config.json": '{"model_type": "llama"}',
        },
    ),
    "litgpt": (
        {
            f"{LIT}.lora_A": (4, 8),
            f"{LIT}.lora_B": (24, 2),
            "transformer.h.0.mlp.fc_1.lora_A": (2, 8),
            "transformer.h.0.mlp.fc_1.lora_B": (12, 2),
        },
        {
            "hyperparameters.yaml": "lora_r: 2\nlora_alpha: 1\nlora_query: true\nlora_key: false\nlora_value: true\n",
            "model_config.yaml": f"n_head: {HEADS}\nn_query_groups: {KEY_HEADS}\n",
        },
    ),
    "megatron": (
        {
            f"{MEGATRON}.linear_in.weight": (2, 8),
            f"{MEGATRON}.linear_out.weight": (32, 2),
            f"{MEGATRON}.weight_magnitude": (32,),
        }
        | {"decoder.layers.mlp.linear_fc2.adapter.linear_in.weight": (2, 2, 12)}
        | {"decoder.layers.mlp.linear_fc2.adapter.linear_out.weight": (2, 8, 2)},
        {"run_config.yaml": f"model:\n  num_attention_heads: {HEADS}\npeft:\n  dim: 2\n  alpha: 1\n"},
    ),
    "loralib": (
        {"enc.0.fc.lora_A": (4, 4), "enc.0.fc.lora_B": (8, 2), "enc.0.fc.bias": (12,)}
        | {"embed_tokens.lora_A": (2, 9), "embed_tokens.lora_B": (4, 2)},
        {},
    ),
    "mlx": (
        {"model.layers.0.self_attn.q_proj.lora_a": (8, 2), "model.layers.0.self_attn.q_proj.lora_b": (2, 16)}
        | {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": (3, 2, 8)}
        | {"model.layers.0.mlp.switch_mlp.up_proj.lora_b": (3, 12, 2), "model.layers.0.self_attn.q_proj.m": (16,)},
        {"adapter_config.json": '{"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 20.0}}'},
    ),
}
FILES = {"torchtune": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
SHAPES = (
    (),
    (0,),
    (1,),
    (2,),
    (2, 0),
    (1, 1),
    (3, 3),
    (2, 8),
    (16, 2),
    (2, 2, 2),
    (1, 2, 8),
    (0, 2, 8),
    (1, 1, 1, 1, 1),
)
DTYPES = (torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64)
WORDS = (
    b"",
    b"\xff\xfe",
    b": ",
    b"\t",
    b"null",
    b"nan",
    b"-1",
    b"1e999",
    b"[]",
    b"{",
    b"&x *x",
    b"- a: b",
    b"\n" * 50,
    b"  " * 99,
)
ODD_NAMES = (
    "",
    ".",
    "lora_A",
    ".lora_a",
    "x" * 10_000,
    "a\x00b",
    "layers.0.attn.q_proj.lora_a.weight.lora_b.weight",
    "é.lora_B",
)


def odd_tensors(shapes: Shapes, chance: random.Random) -> dict[str, Tensor]:
    """The tensors of a layout, one or two of them gone, called otherwise, or of another shape or dtype."""
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    for _ in range(chance.randint(1, 2)):
        name = chance.choice(sorted(tensors))
        match chance.randrange(5):
            case 0:
                del tensors[name]
            case 1:
                tensors[name] = torch.ones(chance.choice(SHAPES))
            case 2:
                tensors[name] = tensors[name].to(chance.choice(DTYPES))
            case 3:
                tensors[chance.choice(ODD_NAMES)] = torch.ones(2, 2)
            case 4:
                tensors[name.replace(chance.choice([".", "0", "lora", "in"]), chance.choice(["", "..", "9"]), 1)] = (
                    tensors.pop(name)
                )
    return tensors or {"a": torch.ones(1)}


def odd_text(text: str, chance: random.Random) -> bytes:
    """A file of settings, spoilt at one place in half of the cases."""
    raw = text.encode()
    if chance.random() < 0.5:
        return raw
    at, end = sorted(chance.randrange(len(raw) + 1) for _ in range(2))
    return raw[:at] + chance.choice(WORDS) + raw[end:]


def failure(command: Any, *words: Any, **options: Any) -> int:
    """0 for a command that works, else the exit code of the one error of the library's that it raises."""
    try:
        command(*words, **options)
    except loratool.LoratoolError as error:
        return error.exit_code
    return 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_is_in_the_files_of_a_trainer_is_read_or_refused(tmp_path: Path, layout: str) -> None:
    """With a base, whose config may be odd too, and without one."""
    shapes, settings = LAYOUTS[layout]
    chance = random.Random(layout)
    base = write_base(tmp_path / "base")
    text = (base / "config.json").read_text()
    for number in range(TIMES):
        folder = tmp_path / str(number)
        folder.mkdir()
        header = {
            "lora_alpha": chance.choice(["1", "x", "inf"]),
            "enable_lora": chance.choice(["true,false,true", "", "1"]),
        }
        path = folder / FILES.get(layout, "weights.safetensors")
        save_file(odd_tensors(shapes, chance), path, header)
        for name, content in settings.items():
            if chance.random() < 0.9:
                (folder / name).write_bytes(odd_text(content, chance))
        place = folder if settings else path
        assert failure(loratool.inspect, place, check=True) in (0, 3)
        alpha = {"input_alpha": chance.choice([1.0, 0.0, -3.0])} if chance.random() < 0.5 else {}
        (base / "config.json").write_text(
            json.dumps(json.loads(text) | {"num_key_value_heads": chance.choice([2, 3, 0, "x"])})
        )
        assert failure(loratool.plan, base, place, tmp_path / "out", **alpha) in (0, 3, 4)
