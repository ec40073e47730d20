"""Image models in one file of FP8, as they circulate: casts without scales, and ComfyUI's scaled form of both ages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusion_models import bfl_flux
from oracle import header, nearest, raw_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded
from loratool.bases.opening import open_checkpoint
from loratool.bases.weights import Room

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH = 16
PREFIX = "model.diffusion_model."
EDITED = "double_blocks.0.img_attn.qkv"
KINDS = {"e4m3": (torch.float8_e4m3fn, 4, 3, 448.0), "e5m2": (torch.float8_e5m2, 5, 2, 57344.0)}
FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
CPU = torch.device("cpu")


def defined(codes: Tensor, kind: str) -> Tensor:
    """What bytes stand for, in float64, by the bits: sign, exponent, fraction (OCP 8-bit Floating Point)."""
    _, exponents, fractions, _ = KINDS[kind]
    bits: NDArray[Any] = codes.view(torch.uint8).numpy().astype(np.int64)
    sign, exponent = bits >> 7, bits >> fractions & (1 << exponents) - 1
    fraction = (bits & (1 << fractions) - 1) / (1 << fractions)
    bias = (1 << exponents - 1) - 1
    values = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    return torch.from_numpy(np.where(sign > 0, -values, values))


def grid(kind: str) -> Tensor:
    """All finite numbers of a kind, in order."""
    found: NDArray[Any] = defined(torch.arange(256, dtype=torch.uint8), kind).numpy()
    return torch.from_numpy(np.unique(found[np.abs(found) <= KINDS[kind][3]]))


def distances(values: Tensor, kind: str) -> Tensor:
    """Of each value, how far the nearest number of a kind is."""
    return (values.double().flatten()[:, None] - grid(kind)).abs().amin(1).view(values.shape)


def random(*shape: int, seed: int = 0, size: float = 0.1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def cast_model(kind: str) -> dict[str, Tensor]:
    """Flux, all of it cast, biases and norms too."""
    shapes = bfl_flux(WIDTH)
    return {name: random(*shape, seed=n).to(KINDS[kind][0]) for n, (name, shape) in enumerate(shapes.items())}


def scaled_model(form: str, kind: str = "e4m3", shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Flux with matrices in F8, each with its scale, and everything else in BF16, behind ComfyUI's prefix."""
    dtype, _, _, greatest = KINDS[kind]
    tensors: dict[str, Tensor] = {}
    for number, (name, size) in enumerate(bfl_flux(WIDTH).items()):
        value, stem = random(*size, seed=number), f"{PREFIX}{name.removesuffix('weight')}"
        if len(size) != 2:
            tensors[PREFIX + name] = value.bfloat16()
            continue
        scale = value.abs().amax() / greatest
        tensors[PREFIX + name] = (value / scale).to(dtype)
        tensors[stem + ("scale_weight" if form == "old" else "weight_scale")] = scale.view(shape)
        tensors[stem + ("scale_input" if form == "old" else "input_scale")] = torch.tensor(0.5)
        if form == "layers":
            text = json.dumps({"format": FORMATS[kind]}).encode()
            tensors[f"{stem}comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if form == "old":
        tensors[f"{PREFIX}scaled_fp8"] = torch.zeros(2).to(dtype)
    return tensors


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    layers = {n.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for n in tensors if n.endswith("_scale")}
    layers = {name: value for name, value in layers.items() if not name.endswith(".input_scale")}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(dict(tensors), path, metadata)
    return path


def adapter(path: Path, size: float = 0.1) -> tuple[Path, Tensor]:
    """ComfyUI's spelling, without α: a scale of 1."""
    up, down = random(3 * WIDTH, 2, seed=90, size=size), random(2, WIDTH, seed=91, size=1)
    at = f"diffusion_model.{EDITED}"
    return save(path, {f"{at}.lora_A.weight": down, f"{at}.lora_B.weight": up}), up.double() @ down.double()


def opened(path: Path) -> Decoded:
    base = decoded(open_checkpoint(path))
    assert isinstance(base, Decoded)
    return base


def as_comfyui(path: Path) -> dict[str, Tensor]:
    """The weights as ComfyUI loads them, in float64: F8 with a scale is multiplied, everything else is taken as it is."""
    tensors = load_file(path)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("weight")
        scale = tensors.get(f"{stem}scale_weight", tensors.get(f"{stem}weight_scale"))
        if name.endswith(".weight"):
            assert (scale is not None) == (tensor.dtype in {dtype for dtype, *_ in KINDS.values()}), name
            found[name] = tensor.double() * (1.0 if scale is None else scale.double())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(33,), (33, 7), (6, 5, 3, 3)], ids=str)
def test_a_cast_weight_is_what_its_bits_say(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    finite = defined(codes, kind).abs() <= KINDS[kind][3]
    codes = torch.where(finite, codes, 0x81)
    path = save(tmp_path / "model.safetensors", {"conv.weight": codes.view(KINDS[kind][0])})
    weight = opened(path).weights["conv.weight"]
    assert (weight.shape, weight.dtype) == (shape, "BF16")
    wanted = defined(codes, kind).view(shape[0], -1)
    for first, count in ((0, shape[0]), (2, 3), (shape[0] - 1, 1)):
        assert torch.equal(
            weight.rows(first, count, CPU, torch.float32, Room()).double(), wanted[first : first + count]
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_scaled_weight_is_its_bits_times_its_scale(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = scaled_model("old", kind, shape)
    base = opened(save(tmp_path / "model.safetensors", tensors))
    name = f"{PREFIX}{EDITED}.weight"
    values = defined(tensors[name], kind) * tensors[f"{PREFIX}{EDITED}.scale_weight"].double()
    assert torch.equal(base.weights[name].rows(5, 9, CPU, torch.float32, Room()), values[5:14].float())
    assert not [each for each in base.tensors if "scale" in each.rpartition(".")[2] and "norm" not in each]


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_weight_of_a_cast_becomes_plain_and_a_note_says_what_may_be_lost(kind: str, tmp_path: Path) -> None:
    tensors = cast_model(kind)
    base, (file, change) = save(tmp_path / "base.safetensors", tensors), adapter(tmp_path / "a.safetensors")
    report = loratool.merge(base, [file], tmp_path / "out.safetensors", device="cpu")
    name, after = f"{EDITED}.weight", load_file(tmp_path / "out.safetensors")
    assert after[name].dtype == torch.bfloat16
    assert torch.equal(after[name], nearest(defined(tensors[name], kind) + change, torch.bfloat16))
    before, raw = raw_tensors(base), raw_tensors(tmp_path / "out.safetensors")
    assert {each for each in before if before[each] != raw[each]} == {name}
    (note,) = (note for note in report.notes if note.code == "fp8-cast")
    assert EDITED in note.text
    loratool.merge(base, [file], tmp_path / "whole.safetensors", device="cpu", dequantize=True)
    whole = load_file(tmp_path / "whole.safetensors")
    assert {each.dtype for each in whole.values()} == {torch.bfloat16}
    assert torch.equal(whole[name], after[name])


@pytest.mark.parametrize("form", ["old", "layers", "header"])
def test_the_scales_go_with_an_edited_weight_and_all_else_stays(form: str, tmp_path: Path) -> None:
    tensors = scaled_model(form)
    metadata = header_of(tensors) if form == "header" else None
    base, (file, change) = save(tmp_path / "b.safetensors", tensors, metadata), adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    report = loratool.merge(base, [file], out, device="cpu")
    name = f"{PREFIX}{EDITED}.weight"
    old, new = as_comfyui(base), as_comfyui(out)
    exact = old[name].float().double() + change
    assert torch.equal(new[name], nearest(exact, torch.bfloat16).double())
    assert all(torch.equal(new[each], old[each]) for each in old if each != name)
    gone = {each for each in tensors if each.startswith(f"{PREFIX}{EDITED}.") and each.rpartition(".")[2] != "weight"}
    gone -= {f"{PREFIX}{EDITED}.bias"}
    assert raw_tensors(base).keys() - raw_tensors(out).keys() == gone
    assert len(gone) == {"old": 2, "layers": 3, "header": 2}[form]
    assert not [note for note in report.notes if note.code == "fp8-cast"]
    if form == "header":
        layers = json.loads(header(base)["__metadata__"]["_quantization_metadata"])["layers"]
        left = json.loads(header(out)["__metadata__"]["_quantization_metadata"])["layers"]
        assert layers.keys() - left.keys() == {f"{PREFIX}{EDITED}"}
    assert loratool.verify(out, base, [file], device="cpu").verdict == "proven"


def test_a_model_without_any_f8_has_no_mark_of_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", scaled_model("old"))
    loratool.merge(base, [], tmp_path / "out.safetensors", device="cpu", dequantize=True)
    after = load_file(tmp_path / "out.safetensors")
    assert {each.dtype for each in after.values()} == {torch.bfloat16}
    assert after.keys() == {PREFIX + name for name in bfl_flux(WIDTH)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_goes_back_to_the_nearest_f8_on_request(kind: str, tmp_path: Path) -> None:
    tensors = cast_model(kind)
    base, (file, change) = save(tmp_path / "base.safetensors", tensors), adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    loratool.merge(base, [file], out, device="cpu", requantize=True, accept_loss=True)
    name, after = f"{EDITED}.weight", load_file(out)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    exact = defined(tensors[name], kind) + change
    lost = (defined(after[name], kind) - exact).abs()
    assert (lost <= distances(exact, kind) + exact.abs() * 2.0**-22).all()
    assert {each for each in tensors if not torch.equal(after[each].float(), tensors[each].float())} == {name}


def test_an_update_below_the_steps_of_f8_is_refused_with_its_gain(tmp_path: Path) -> None:
    base, (file, _) = save(tmp_path / "b.safetensors", cast_model("e4m3")), adapter(tmp_path / "a.safetensors", 3e-4)
    with pytest.raises(loratool.LoratoolError, match="keep 12 % of the update") as error:
        loratool.merge(base, [file], tmp_path / "out.safetensors", device="cpu", requantize=True)
    assert error.value.exit_code == 4
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.02, 4.0], ids=["own-scale", "new-scale"])
def test_a_scaled_weight_gets_the_scale_that_loses_less(kind: str, size: float, tmp_path: Path) -> None:
    """ComfyUI's rule for a new one: the largest magnitude over the largest number."""
    tensors = scaled_model("old", kind)
    base, (file, change) = save(tmp_path / "b.safetensors", tensors), adapter(tmp_path / "a.safetensors", size)
    out = tmp_path / "out.safetensors"
    loratool.merge(base, [file], out, device="cpu", requantize=True, accept_loss=True)
    name, scale = f"{PREFIX}{EDITED}.weight", f"{PREFIX}{EDITED}.scale_weight"
    after = load_file(out)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    exact = (defined(tensors[name], kind) * tensors[scale].double()).float().double() + change
    fresh = exact.abs().amax() / KINDS[kind][3]
    losses = {each: float((distances(exact / each, kind) * each).norm()) for each in (tensors[scale].double(), fresh)}
    found = defined(after[name], kind) * after[scale].double()
    assert float((found - exact).norm()) == pytest.approx(min(losses.values()), rel=1e-3)
    chosen = float(min(losses, key=lambda each: losses[each]))
    assert float(after[scale]) == pytest.approx(chosen, rel=1e-6)


def spoilt(change: str) -> tuple[dict[str, Tensor], str]:
    """A scaled model in which one thing is wrong, and what must be told."""
    form = "layers" if change in ("no scale", "no json", "no format", "int8") else "old"
    tensors, stem = scaled_model(form), f"{PREFIX}{EDITED}."
    match change:
        case "nan":
            tensors[f"{stem}scale_weight"] = torch.tensor(float("nan"))
            return tensors, "scale_weight: 1 of 1 values are NaN"
        case "zero":
            tensors[f"{stem}scale_weight"] = torch.tensor(0.0)
            return tensors, "scale_weight: 1 of 1 values are zero"
        case "rows":
            tensors[f"{stem}scale_weight"] = torch.ones(3 * WIDTH, 1)
            return tensors, r"must be F32 \[\] or \[1\], the scale of all values, but it is F32 \[48, 1\]"
        case "integer":
            tensors[f"{stem}scale_weight"] = torch.tensor(1)
            return tensors, r"but it is I64 \[\]"
        case "plain":
            tensors[f"{stem}weight"] = tensors[f"{stem}weight"].bfloat16()
            return tensors, "scale_weight exists too"
        case "no scale":
            del tensors[f"{stem}weight_scale"]
            return tensors, "is float8_e4m3fn, but it is missing"
        case "no json":
            tensors[f"{stem}comfy_quant"] = torch.tensor(list(b"{"), dtype=torch.uint8)
            return tensors, "comfy_quant: cannot be read"
        case "no format":
            tensors[f"{stem}comfy_quant"] = torch.tensor(list(b"{}"), dtype=torch.uint8)
            return tensors, "must name the format"
        case "int8":
            text = json.dumps({"format": "int8_tensorwise"}).encode()
            tensors[f"{stem}comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
            tensors[f"{stem}weight"] = tensors[f"{stem}weight"].view(torch.int8)
            return tensors, "packed with ComfyUI's int8_tensorwise"
    del tensors[f"{stem}scale_weight"]
    tensors[f"{stem}weight_scale_inv"] = torch.ones(1, 1)
    return tensors, "packed with FP8 whose scales no config describes"


@pytest.mark.parametrize(
    "change", ["nan", "zero", "rows", "integer", "plain", "no scale", "no json", "no format", "int8", "other"]
)
def test_what_is_wrong_with_a_scale_is_refused_by_name(change: str, tmp_path: Path) -> None:
    tensors, told = spoilt(change)
    base, (file, _) = save(tmp_path / "base.safetensors", tensors), adapter(tmp_path / "a.safetensors")
    with pytest.raises(loratool.InputError, match=told) as error:
        loratool.merge(base, [file], tmp_path / "out.safetensors", device="cpu")
    assert EDITED in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()
