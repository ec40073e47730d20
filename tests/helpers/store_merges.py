"""Merges into a store on loopback, with uploads whose parts are small enough for tests."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import faults
from store_server import BUCKET, StoreServer, settled, tree

from loratool.files.safefile import Layout
from loratool.merging import parted_merge
from loratool.stores.limits import limits

if TYPE_CHECKING:
    import pytest

SMALLEST, PIECE = 16 << 10, 48 << 10  # bytes, in place of 5 MiB and 16 MiB
HIDDEN = 160


def make_models(home: Path, shards: int = 2, hidden: int = HIDDEN) -> None:
    faults.make_base(home / "base", shards=shards, hidden=hidden)
    faults.make_adapter(home / "adapter", layers=shards, hidden=hidden, rank=4)


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a thousandth, here and in the store."""
    own = limits

    def scaled() -> object:
        return dataclasses.replace(own(), smallest=SMALLEST, piece=PIECE)

    monkeypatch.setattr(parted_merge, "limits", scaled)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", SMALLEST)


def assert_same(store: StoreServer, prefix: str, folder: Path) -> None:
    """All files below a prefix have the bytes of those in a folder, and the record the same inputs and results.

    What a store copied has other entries in the record, and the report of that is a note.
    """
    there, here = store.objects(BUCKET, prefix), tree(folder)
    ours, theirs = (settled(files.pop("loratool.json")) for files in (there, here))
    unlike = {name for name in {*there, *here} if there.get(name) != here.get(name)}
    assert not unlike, sorted(unlike)
    for record in (ours, theirs):
        record.pop("files")
        record.pop("plan", None)
    assert ours == theirs


def write_large_headers(home: Path, layers: int = 80, hidden: int = 8192) -> None:
    """A model of the shape of Llama 70 B in files of 5 GB, and an adapter of its attention: headers and holes alone."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128_256, hidden)}
    factors: dict[str, tuple[int, ...]] = {}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.mlp.down_proj.weight": (hidden, 28_672),
            f"{layer}.mlp.gate_proj.weight": (28_672, hidden),
            f"{layer}.mlp.up_proj.weight": (28_672, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
        for name, rows in (("k_proj", 1024), ("o_proj", hidden), ("q_proj", hidden), ("v_proj", 1024)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, hidden)
            factors[f"base_model.model.{layer}.self_attn.{name}.lora_A.weight"] = (8, hidden)
            factors[f"base_model.model.{layer}.self_attn.{name}.lora_B.weight"] = (rows, 8)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (128_256, hidden)}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * math.prod(each) for each in files[-1].values()) + 2 * math.prod(shape) > 5_000_000_000:
            files.append({})
        files[-1][name] = shape
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        write_holes(home / "base" / name, "BF16", tensors)
    index = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    (home / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 64}
    settings |= {"hidden_size": hidden, "num_key_value_heads": 8, "num_hidden_layers": layers}
    (home / "base" / "config.json").write_text(json.dumps(settings))
    write_holes(home / "adapter" / "adapter_model.safetensors", "F32", factors)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"]}
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def write_holes(path: Path, dtype: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file with a header and no values; it takes no room on most file systems."""
    path.parent.mkdir(exist_ok=True)
    layout = Layout.of((name, dtype, shape) for name, shape in shapes.items())
    path.write_bytes(layout.header)
    os.truncate(path, layout.size)
