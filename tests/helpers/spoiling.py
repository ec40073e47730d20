"""Small quantised models with one thing spoilt: what is wrong must be told with the module's name, and nothing written.

A model has one packed matrix of each family that can be written here. A spoiling loses, cuts, lengthens or mistypes one
of its tensors, puts a value there that no quantiser writes, lays the plain weight beside it, or breaks what the config
or the packed JSON says. Seeded: the same every time.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from packed_affine import quanto, torchao
from packed_bnb import FourBit, int8
from packed_hqq import Hqq
from packed_models import save_packed
from quantised_models import FAMILIES, MATRICES, Quantised
from safetensors.torch import save_file
from torch import Tensor

MODULE = "model.layers.0.self_attn.q_proj"
ROWS, COLUMNS, RANK = 32, 96, 2
VALUES = ("weight", "weight_packed", "qweight", "W_q", "_weight_qdata", "_data")  # tensors that any bytes are values of
SIZES = ("group_size", "weight_block_size", "block_structure", "bits")  # in a config, however deep


def bitsandbytes(nested: int) -> Quantised:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return taken(config, FourBit((ROWS, COLUMNS), "nf4", 64, nested).tensors(f"{MODULE}.weight"))


def taken(config: dict[str, Any], arrays: Any) -> Quantised:
    return Quantised(config, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


def every() -> dict[str, Quantised]:
    """One model of each family."""
    drawn = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(1))
    by_libraries: dict[str, Callable[..., Quantised]] = {
        "torchao": partial(torchao, kind="Int8Tensor", columns=32),
        "quanto": partial(quanto, axis=0),
    }
    made = {name: make({f"{MODULE}.weight": drawn}) for name, make in {**FAMILIES, **MATRICES, **by_libraries}.items()}
    load_in_8bit = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return made | {
        "nf4": bitsandbytes(0),
        "nf4, nested": bitsandbytes(3),
        "LLM.int8()": taken(load_in_8bit, int8((ROWS, COLUMNS), MODULE)[0]),
        "HQQ": taken({"quant_method": "hqq"}, Hqq((ROWS, COLUMNS), "4bit_u8", 32, 1).tensors(MODULE)),
    }


@dataclass(frozen=True)
class Spoiling:
    """What is done to a model, in words."""

    told: str
    do: Callable[[dict[str, Tensor], dict[str, Any]], object]


def put(name: str, told: str, value: Callable[[Tensor], Tensor]) -> Spoiling:
    return Spoiling(f"{name} {told}", lambda tensors, _: tensors.update({name: value(tensors[name]).contiguous()}))


def first_is(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        spoilt = tensor.float() if tensor.is_floating_point() else tensor.clone()
        spoilt.view(-1)[0] = value
        return spoilt.to(tensor.dtype)

    return change


def of_tensor(name: str, tensor: Tensor) -> Iterator[Spoiling]:
    """Ways to spoil one of the tensors of a packed weight."""
    if not name.endswith(("weight_g_idx", "pre_quant_scale")):  # without which a weight means something else
        yield Spoiling(f"{name} is lost", lambda tensors, _: tensors.pop(name))
    if "quant_state" in name:
        yield put(name, "is broken JSON", lambda t: t[: len(t) // 2].clone())
    if tensor.dim():
        yield put(name, "is cut", lambda t: t[:-1].clone())
        yield put(name, "is longer", lambda t: torch.cat([t, t[-1:]]))
    yield put(name, "is of another dtype", lambda t: t.float().double())
    if name.rsplit(".", 1)[-1] in VALUES:
        return
    if tensor.is_floating_point():
        if "scale" in name and not name.endswith("._scale"):  # in quanto a row of zeros has the scale 0
            yield put(name, "has a zero", first_is(0))
        yield put(name, "has a NaN", first_is(float("nan")))
        if tensor.dtype != torch.float8_e4m3fn:
            yield put(name, "has an infinity", first_is(float("inf")))
    if name.endswith("g_idx"):
        yield put(name, "is out of range", first_is(COLUMNS))
        yield put(name, "is negative", first_is(-1))


def of_config(config: dict[str, Any]) -> Iterator[Spoiling]:
    """Ways to spoil the sizes that a config states."""
    for path in places(config):
        odds: tuple[object, ...] = (0, -3, 7, "many", None, [16], {})
        for odd in odds:
            yield Spoiling(f"{path[-1]} of the config is {odd!r}", partial(said, path, odd))


def places(table: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items() if isinstance(table, dict) else ():
        yield from [(*path, key)] if key in SIZES and value else places(value, (*path, key))


def said(path: tuple[str, ...], value: Any, _: dict[str, Tensor], config: dict[str, Any]) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


def spoilings(model: Quantised, count: int, seed: str) -> list[Spoiling]:
    """Some of the ways to spoil a model; that the plain weight lies beside it is always one of them."""
    plain = f"{MODULE}.weight"
    found = [spoiling for name, tensor in model.tensors.items() for spoiling in of_tensor(name, tensor)]
    found += of_config(model.config)
    beside = Spoiling("is there as a plain weight too", lambda t, _: t.update({plain: torch.ones(ROWS, COLUMNS)}))
    chance = random.Random(seed)
    return [beside, *chance.sample(found, min(count, len(found)))]


def write_adapter(folder: Path) -> Path:
    folder.mkdir()
    names = (("lora_A", (RANK, COLUMNS)), ("lora_B", (ROWS, RANK)))
    factors = {f"base_model.model.{MODULE}.{name}.weight": torch.full(shape, 0.125) for name, shape in names}
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_spoilt(folder: Path, model: Quantised, spoiling: Spoiling | None) -> Path:
    """A model folder, spoilt or not."""
    tensors, config = dict(model.tensors), copy.deepcopy(model.config)
    if spoiling:
        spoiling.do(tensors, config)
    save_packed(folder, tensors, config, model.metadata)
    for name, content in model.files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def flip(path: Path, at: float) -> None:
    """Turn over a bit of a file, at a part of its length."""
    raw = bytearray(path.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 1
    path.write_bytes(raw)
