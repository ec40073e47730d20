"""Whatever is in the files of a quantised checkpoint, it is decoded or refused in a sentence."""

from __future__ import annotations

import json
import os
import random
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import header, mutation_of
from packed_bnb import FourBit, int8
from packed_hqq import Hqq
from packed_models import save_packed
from quantised_models import FAMILIES, MATRICES, Quantised
from torch import Tensor

from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded
from loratool.bases.opening import open_checkpoint
from loratool.bases.packed import Requantizable
from loratool.bases.weights import Room
from loratool.errors import LoratoolError

# of each kind; LORATOOL_MUTATIONS=20000 LORATOOL_SEED=7 pytest tests/files/test_fuzzing_packed.py tries 2000 of each
COUNT = int(os.environ.get("LORATOOL_MUTATIONS", "60")) // 10
SEED = int(os.environ.get("LORATOOL_SEED", "11"))
CPU = torch.device("cpu")
MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"
FIELDS = (
    *(
        "quantization_config",
        "quant_method",
        "modules_to_not_convert",
        "ignore",
        "llm_int8_skip_modules",
        "skip_modules",
    ),
    *("bits", "group_size", "weight_block_size", "config_groups", "dynamic", "format", "checkpoint_format", "version"),
    *("quant_algo", "desc_act", "sym", "modules_in_block_to_quantize", "kv_cache_scheme", "quantization"),
)
Files = tuple[Mapping[str, Any], Mapping[str, Any] | None, dict[str, str] | None, Mapping[str, Any]]


def made(maker: Callable[[Mapping[str, Tensor]], Quantised]) -> Files:
    one = maker({NAME: torch.randn(32, 64, generator=torch.Generator().manual_seed(0))})
    return one.tensors, one.config, None, one.files


def torchao() -> Files:
    data = {
        "block_size": [1, 4],
        "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        "target_dtype": {"_data": "int8"},
    }
    said = {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale", "zero_point"]}
    parts: dict[str, Any] = {"qdata": np.ones((8, 8), np.int8), "scale": np.ones((8, 2), np.float32)}
    tensors = {
        f"{MODULE}._weight_{part}": value for part, value in {**parts, "zero_point": np.ones((8, 2), np.int8)}.items()
    }
    config = {"quant_method": "torchao", "modules_to_not_convert": ["lm_head"]}
    return tensors, config, {NAME: json.dumps(said), "tensor_names": json.dumps([NAME])}, {}


def quanto() -> Files:
    tensors = {f"{NAME}._data": np.ones((8, 8), np.int8), f"{NAME}._scale": np.ones((8, 1), np.float32)}
    return tensors, None, None, {"quanto_qmap.json": {MODULE: {"weights": "qint8", "activations": "none"}}}


BNB = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}
HQQ = {"quant_method": "hqq", "skip_modules": ["lm_head"]}
KINDS: Mapping[str, Callable[[], Files]] = {
    "nf4": lambda: (FourBit((8, 8), "nf4", 32, 3).tensors(NAME), BNB, None, {}),
    "int8 of bitsandbytes": lambda: (int8((8, 8), MODULE)[0], BNB, None, {}),
    "HQQ, 4 bits": lambda: (Hqq((8, 8), "4bit_u8", 8, 1).tensors(MODULE), HQQ, None, {}),
    "HQQ, 3 bits": lambda: (Hqq((8, 8), "3bit_32", 8, 0).tensors(MODULE), HQQ, None, {}),
    "torchao": torchao,
    "quanto": quanto,
    **{kind: lambda maker=maker: made(maker) for kind, maker in {**FAMILIES, **MATRICES}.items()},  # type: ignore[misc]
}


def changed(values: bytes, chance: random.Random) -> bytes:
    """A safetensors file with odd bytes in its tensors."""
    raw, start = bytearray(values), 8 + int.from_bytes(values[:8], "little")
    for _ in range(chance.choice((1, 3, 30))):
        raw[chance.randrange(start, len(raw))] = chance.choice((0, 255, 127, 128, chance.randrange(256)))
    return bytes(raw)


def all_of(folder: Path) -> None:
    """What a merge asks of a base: all values, and what configs say where they are plain or packed anew."""
    base = decoded(open_checkpoint(folder))
    if not isinstance(base, Decoded):
        return
    (model,) = base.models
    for name, weight in base.weights.items():
        if weight.check(Room()):  # which a merge refuses
            continue
        weight.doubt(Room())
        lines = weight.rows(0, weight.shape[0], CPU, torch.float32, Room()).view(-1, weight.line)
        if isinstance(weight, Requantizable):
            packed = weight.encode(lines, 0, weight.parameters(Room()))
            assert weight.laid_out(packed).nbytes == weight.tensors[0].info.nbytes
        for place in model.settings.places:
            json.dumps(model.left_plain(place, [name]))
        base.metadata(base.shards[0].layout.metadata or {}, [name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_quantised_checkpoint_is_decoded_or_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    tensors, config, metadata, files = KINDS[kind]()
    folder = save_packed(tmp_path / "base", tensors, config, metadata)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    all_of(folder)
    chance = random.Random(f"{SEED} {kind}")
    failures: list[str] = []
    for _ in range(COUNT):
        name = chance.choice(["model.safetensors", "model.safetensors", *sound])
        spoil = chance.choice((header, changed))
        if name != "model.safetensors":
            content = mutation_of(sound[name], FIELDS, chance)
        else:
            content = spoil(sound[name], chance)
        (folder / name).write_bytes(content)
        try:
            all_of(folder)
        except LoratoolError:
            pass
        except Exception:
            failures.append(f"{name} = {content!r}"[:3000] + f"\n{traceback.format_exc(limit=-3)}")
        (folder / name).write_bytes(sound[name])
    assert not failures, f"{len(failures)} failures\n" + "\n\n".join(failures[:3])
