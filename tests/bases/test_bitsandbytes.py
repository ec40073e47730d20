"""bitsandbytes: decoded rows are the documented formula, and what does not fit together is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_bnb import FourBit, as_bytes, int8
from packed_models import check_rows, open_packed, save_packed
from peft_files import save_peft

import loratool
from loratool.bases.weights import Room

Array = NDArray[Any]

LAYER = "model.layers.0."
NAME = f"{LAYER}self_attn.q_proj.weight"
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": None}
PLAIN = {"model.norm.weight": np.ones(8, np.float32), "lm_head.weight": np.ones((4, 8), np.float32)}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [0, 3])
@pytest.mark.parametrize("shape", [(6, 64), (5, 37), (3, 4, 18), (7, 1)])
def test_four_bits_are_looked_up_and_scaled_by_block(
    tmp_path: Path, kind: str, nested: int, shape: tuple[int, ...]
) -> None:
    """Rows may begin within a byte and within a block, and a weight may be a stack of experts."""
    packed = FourBit(shape, kind, 32, nested)
    folder = save_packed(tmp_path / "base", {**packed.tensors(NAME), **PLAIN}, NF4)
    check_rows(folder, NAME, packed.values())
    nested_too = ", nested statistics" if nested else ""
    assert open_packed(folder).weights[NAME].scheme == f"{kind}, blocks of 32{nested_too}"


def test_bytes_may_be_stored_as_another_dtype(tmp_path: Path) -> None:
    packed = FourBit((6, 64), "nf4", 64, 0)
    tensors = {name: torch.from_numpy(value.copy()) for name, value in packed.tensors(NAME).items()}
    tensors[NAME] = tensors[NAME].view(96, 2).view(torch.bfloat16)
    folder = save_packed(tmp_path / "base", tensors, {**NF4, "bnb_4bit_quant_storage": "bfloat16"})
    check_rows(folder, NAME, packed.values())


def test_int8_is_scaled_by_row(tmp_path: Path) -> None:
    tensors, wanted = int8((6, 33), NAME.removesuffix(".weight"))
    check_rows(save_packed(tmp_path / "base", {**tensors, **PLAIN}, INT8), NAME, wanted)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_conv1d_is_seen_in_out_as_its_plain_weight_is(tmp_path: Path, kind: str) -> None:
    """bitsandbytes turns the weights of Conv1D layers when it packs them."""
    name = "h.0.attn.c_attn.weight"
    if kind == "nf4":
        packed = FourBit((6, 10), "nf4", 32, 0)
        tensors, wanted = packed.tensors(name), packed.values()
    else:
        tensors, wanted = int8((6, 10), name.removesuffix(".weight"))
    config = NF4 if kind == "nf4" else INT8
    check_rows(save_packed(tmp_path / "base", tensors, config, model_type="gpt2"), name, wanted.T.copy())


@pytest.mark.parametrize("config", [None, {}, {"load_in_4bit": True}])
def test_packed_weights_are_found_without_a_method(tmp_path: Path, config: Mapping[str, Any] | None) -> None:
    folder = save_packed(tmp_path / "base", FourBit((6, 64), "nf4", 64, 0).tensors(NAME), config)
    assert open_packed(folder).weights.keys() == {NAME}


def projections(*names: str) -> dict[str, Any]:
    return {k: v for name in names for k, v in FourBit((4, 32), "nf4", 32, 0).tensors(f"{LAYER}{name}.weight").items()}


def listed(folder: Path, *plain: str) -> list[str]:
    (model,) = open_packed(folder).models
    names = [f"{LAYER}{name}.weight" for name in plain]
    said = model.left_plain(model.settings.places[0], names)
    assert {k: v for k, v in said.items() if k != "llm_int8_skip_modules"} == {
        k: v for k, v in model.settings.values.items() if k != "llm_int8_skip_modules"
    }
    found: list[str] = said["llm_int8_skip_modules"]
    return found


def test_a_new_list_of_plain_modules_also_holds_what_transformers_leaves_plain_by_itself(tmp_path: Path) -> None:
    """Its default (the head, and whatever else is plain in the file) does not apply once there is a list."""
    gate: dict[str, Array] = {
        f"{LAYER}mlp.router.weight": np.ones((2, 8), np.float32),
        "model.embed_tokens.weight": np.ones((4, 8)),
    }
    folder = save_packed(tmp_path / "base", {**projections("self_attn.o_proj", "mlp.down_proj"), **PLAIN, **gate}, NF4)
    wanted = {"lm_head", f"{LAYER}mlp.router", f"{LAYER}self_attn.o_proj"}
    assert set(listed(folder, "self_attn.o_proj")) == wanted


def test_a_packed_head_is_not_listed_as_plain(tmp_path: Path) -> None:
    tensors = {**projections("self_attn.o_proj"), **FourBit((4, 32), "nf4", 32, 0).tensors("lm_head.weight")}
    folder = save_packed(tmp_path / "base", tensors, NF4)
    assert listed(folder, "self_attn.o_proj") == [f"{LAYER}self_attn.o_proj"]


def test_a_list_of_plain_modules_grows(tmp_path: Path) -> None:
    given = {**NF4, "llm_int8_skip_modules": ["lm_head", "multi_modal_projector"]}
    folder = save_packed(tmp_path / "base", {**projections("self_attn.o_proj"), **PLAIN}, given)
    assert listed(folder, "self_attn.o_proj") == ["lm_head", "multi_modal_projector", f"{LAYER}self_attn.o_proj"]


def test_layers_that_vllm_fuses_are_listed_by_its_names_where_all_their_parts_are_plain(tmp_path: Path) -> None:
    names = [f"self_attn.{name}_proj" for name in "qkv"]
    folder = save_packed(tmp_path / "base", {**projections(*names, "mlp.gate_proj", "mlp.up_proj"), **PLAIN}, NF4)
    assert f"{LAYER}self_attn.qkv_proj" in listed(folder, *names, "mlp.gate_proj")
    assert f"{LAYER}mlp.gate_up_proj" not in listed(folder, *names, "mlp.gate_proj")
    assert f"{LAYER}mlp.gate_up_proj" in listed(folder, "mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize("listed", [None, ["lm_head"]])
def test_a_plain_weight_that_no_list_names_is_refused_where_others_of_its_name_are_packed(
    tmp_path: Path, listed: list[str] | None
) -> None:
    """transformers makes a packed layer of it, which then finds no statistics."""
    other = "model.layers.1.self_attn.q_proj"
    tensors = {**projections("self_attn.q_proj"), f"{other}.weight": np.ones((4, 32), np.float32), **PLAIN}
    with pytest.raises(loratool.InputError) as caught:
        open_packed(save_packed(tmp_path / "base", tensors, {**NF4, "llm_int8_skip_modules": listed}))
    assert f"{other}.weight: is F32 [4, 32], but the config says that it is packed (nf4" in str(caught.value)
    assert "it is missing from llm_int8_skip_modules" in str(caught.value)
    named = save_packed(tmp_path / "named", tensors, {**NF4, "llm_int8_skip_modules": ["lm_head", other]})
    assert [*open_packed(named).weights] == [NAME]


STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def stated(**changes: object) -> Callable[[dict[str, Array]], object]:
    """Change entries of the JSON; None takes one away."""

    def change(tensors: dict[str, Array]) -> object:
        said = {**json.loads(tensors[STATE].tobytes()), **changes}
        return tensors.update({STATE: as_bytes({key: value for key, value in said.items() if value is not None})})

    return change


MALFORMED: dict[str, tuple[Callable[[dict[str, Array]], object], str]] = {
    "absmax of another length": (
        lambda t: t.update({f"{NAME}.absmax": np.zeros(7, np.uint8)}),
        f"{NAME}.absmax: must be U8 [6] for blocks of 64 of [6, 64], but it is U8 [7]",
    ),
    "wrong group size": (stated(blocksize=128), f"{NAME}.absmax: must be U8 [3] for blocks of 128 of [6, 64]"),
    "absmax missing": (lambda t: t.pop(f"{NAME}.absmax"), f"{NAME}.absmax: must be U8 [6] for blocks of 64"),
    "map of another length": (
        lambda t: t.update({f"{NAME}.quant_map": np.zeros(8, np.float32)}),
        f"{NAME}.quant_map: must be F32 [16], but it is F32 [8]",
    ),
    "nested statistics missing": (
        lambda t: t.pop(f"{NAME}.nested_absmax"),
        f"{NAME}.nested_absmax: must be F32 [2] for blocks of 3 of 6 statistics, but it is missing",
    ),
    "both plain and packed": (
        lambda t: t.update({NAME: np.zeros((6, 64), np.float32)}),
        f"{NAME}: must be 192 bytes for [6, 64] at 4 bits a value, but it is F32 [6, 64], 1536 bytes",
    ),
    "shape that does not fit": (stated(shape=[6, 65]), f"{NAME}: must be 195 bytes for [6, 65]"),
    "values missing": (lambda t: t.pop(NAME), f"{NAME}: must be 192 bytes for [6, 64] at 4 bits a value, but it is mi"),
    "JSON broken": (lambda t: t.update({STATE: np.frombuffer(b'{"quant', np.uint8)}), f"{STATE}: not valid JSON"),
    "JSON is no object": (lambda t: t.update({STATE: as_bytes([1])}), f"{STATE}: expected a JSON object, found list"),
    "JSON too long": (lambda t: t.update({STATE: np.zeros(70000, np.uint8)}), f"{STATE}: is 70000 bytes of JSON"),
    "another kind": (stated(quant_type="fp4"), f"{STATE}: quant_type must be 'nf4', as in its name, but it is 'fp4'"),
    "no block": (stated(blocksize=0), f"{STATE}: blocksize must be an even number of values, but it is 0"),
    "no shape": (stated(shape=None), f"{STATE}: shape must be a list of two or more sizes, but it is missing"),
    "offset is text": (stated(nested_offset="x"), f"{STATE}: nested_offset must be a number, but it is 'x'"),
    "no nested block": (stated(nested_blocksize=None), f"{STATE}: nested_blocksize must be a number of values"),
    "unknown kind": (
        lambda t: t.update({f"{NAME}.quant_state.bitsandbytes__af4": t.pop(STATE)}),
        f"{NAME}: is of the unknown kind 'af4'; known are nf4 and fp4",
    ),
    "quant_state missing": (
        lambda t: t.pop(STATE),
        f"{NAME}: is U8 [192, 1], but {STATE} is missing",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, problem = MALFORMED[case]
    tensors = FourBit((6, 64), "nf4", 64, 3).tensors(NAME)
    change(tensors)
    other = FourBit((4, 32), "nf4", 32, 0).tensors(f"{LAYER}mlp.up_proj.weight")
    other.pop(f"{LAYER}mlp.up_proj.weight.quant_map")
    folder = save_packed(tmp_path / "base", {**tensors, **other}, NF4)
    with pytest.raises(loratool.InputError) as caught:
        open_packed(folder)
    assert problem in str(caught.value)
    assert f"{LAYER}mlp.up_proj.weight.quant_map: must be F32 [16], but it is missing" in str(caught.value)
    assert "bitsandbytes weights that cannot be read; save the model with bitsandbytes again" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SCB", np.ones(7, np.float32), ".SCB: must be F32 [6] for [6, 33], but it is F32 [7]"),
        ("weight", np.ones((6, 33), np.float32), ".weight: must be I8, but it is F32 [6, 33]"),
        ("weight", np.ones(6, np.int8), ".weight: must be a matrix, but it is I8 [6]"),
        ("weight_format", np.array(1, np.uint8), ".weight_format: must be 0, values row by row, but it is 1"),
        ("SCB", None, f".weight: is I8 [6, 33], but {LAYER}self_attn.q_proj.SCB is missing"),
    ],
)
def test_int8_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, name: str, value: Array | None, problem: str
) -> None:
    module = NAME.removesuffix(".weight")
    tensors, _ = int8((6, 33), module)
    tensors.pop(f"{module}.{name}")
    if value is not None:
        tensors[f"{module}.{name}"] = value
    folder = save_packed(tmp_path / "base", tensors, INT8)
    with pytest.raises(loratool.InputError) as caught:
        open_packed(folder)
    assert module + problem in str(caught.value)


@pytest.mark.parametrize(
    ("part", "wrong", "problem"),
    [
        ("absmax", np.nan, "1 of 6 values are NaN or infinite"),
        ("absmax", np.inf, "1 of 6 values are NaN or infinite"),
        ("absmax", -1.0, "1 of 6 values are negative"),
        ("quant_map", np.nan, "1 of 16 values are NaN or infinite"),
        ("nested_absmax", np.nan, "1 of 2 values are NaN or infinite"),
        ("nested_quant_map", np.nan, "1 of 256 values are NaN or infinite"),
    ],
)
def test_scales_that_no_quantiser_writes_are_told(tmp_path: Path, part: str, wrong: float, problem: str) -> None:
    tensors = FourBit((6, 64), "nf4", 64, 3 if part.startswith("nested") else 0).tensors(NAME)
    tensors[f"{NAME}.{part}"][1] = wrong
    weight = open_packed(save_packed(tmp_path / "base", tensors, NF4)).weights[NAME]
    assert weight.check(Room()) == f"{NAME}.{part}: {problem}"


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_itself_decodes_to_the_same_bits(tmp_path: Path, kind: str, nested: bool) -> None:
    library: Any = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    if kind == "int8":
        values, largest, _ = library.int8_vectorwise_quant(weight.half())
        module = NAME.removesuffix(".weight")
        tensors, wanted = {NAME: values, f"{module}.SCB": largest}, library.int8_vectorwise_dequant(values, largest)
    else:
        values, state = library.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        tensors = {NAME: values, **{f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}}
        wanted = library.dequantize_4bit(values, state)
    folder = save_packed(tmp_path / "base", tensors, INT8 if kind == "int8" else NF4)
    check_rows(folder, NAME, wanted.numpy())


def test_models_of_text_and_images_are_listed_as_they_are_in_memory_too(tmp_path: Path) -> None:
    """transformers renames their modules when it loads them, and compares the list with the new names."""
    names = ("language_model.model.layers.0.mlp.down_proj", "vision_tower.vision_model.layers.1.fc1")
    tensors: dict[str, Any] = {"language_model.lm_head.weight": np.ones((4, 8), np.float32)}
    for name in (*names, "language_model.model.layers.1.mlp.down_proj"):  # which is not edited
        tensors |= FourBit((4, 32), "nf4", 32, 0).tensors(f"{name}.weight")
    adapter = tmp_path / "adapter"
    factors = {f"base_model.model.{name}.lora_{ab}.weight": size for name in names for ab, size in FACTORS.items()}
    save_peft(adapter, {name: torch.ones(size) for name, size in factors.items()}, r=2, lora_alpha=2)
    base = save_packed(tmp_path / "base", tensors, {**NF4, "llm_int8_skip_modules": ["lm_head"]}, text_config={})
    loratool.merge(base, [adapter], tmp_path / "out", device="cpu")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    here = ["model.language_model.layers.0.mlp.down_proj", "model.vision_tower.layers.1.fc1"]
    assert said[0] == "lm_head"
    assert {*said} >= {"lm_head", *names, *here}


FACTORS = {"A": (2, 32), "B": (4, 2)}
