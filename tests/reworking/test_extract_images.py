"""Adapters extracted from image models have the names of the dialect, and merge to the model that they are from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from diffusion_models import WIDTH, bfl_flux, clip, ldm_unet, under, values
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import FitError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

H = WIDTH
LDM = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"


def changed(path: Path, out: Path, *names: str) -> None:
    """A copy of a file in which some weights have a difference of rank 1 more."""
    tensors = load_file(path)
    for number, name in enumerate(names):
        torch.manual_seed(number)
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name] + torch.randn(rows, 1) @ torch.randn(1, columns)
    save_file(tensors, out)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An SD1.5 file and a fine-tune of it."""
    home = tmp_path_factory.mktemp("files")
    shapes = under("model.diffusion_model.", ldm_unet((1, 1, 1, 0), matrix_ends=False, added=False))
    save_file(values(shapes | under("cond_stage_model.transformer.", clip())), home / "sd.safetensors")
    changed(home / "sd.safetensors", home / "tuned.safetensors", LDM, TEXT)
    return home / "sd.safetensors", home / "tuned.safetensors"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same two weights in a pipeline of diffusers."""
    home = tmp_path_factory.mktemp("pipelines")
    found = []
    for name in ("sd", "tuned"):
        root = home / name
        for part, config in {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}.items():
            (root / part).mkdir(parents=True)
            key = "_class_name" if part == "unet" else "architectures"
            (root / part / "config.json").write_text(json.dumps({key: config if part == "unet" else [config]}))
        (root / "model_index.json").write_text(
            json.dumps({"_class_name": "X", "unet": ["diffusers", "X"], "text_encoder": ["transformers", "X"]})
        )
        found.append(root)
    shapes = {UNET: (H, H), UNET.replace("to_q", "to_k"): (H, H)}
    save_file(values(shapes), found[0] / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(values(clip()), found[0] / "text_encoder" / "model.safetensors")
    for file, name in (("unet/diffusion_pytorch_model.safetensors", UNET), ("text_encoder/model.safetensors", CLIP)):
        changed(found[0] / file, found[1] / file, name)
    return found[0], found[1]


NAMES = {
    "diffusers": (f"unet.{UNET}", f"text_encoder.{CLIP}", "lora_A.weight"),
    "kohya": (f"lora_unet.{UNET}", f"lora_te.{CLIP}", "lora_down.weight"),
    "comfy": (
        LDM.replace("model.diffusion_model.", "diffusion_model."),
        f"text_encoders.clip_l.transformer.{CLIP}",
        "lora_down.weight",
    ),
}


def names_in(dialect: str) -> set[str]:
    """What the first factors of the two weights are called."""
    *modules, role = NAMES[dialect]
    modules = [module.removesuffix(".weight") for module in modules]
    return {f"{module.replace('.', '_') if dialect == 'kohya' else module}.{role}" for module in modules}


@pytest.mark.parametrize("dialect", [None, "diffusers", "kohya", "comfy"])
def test_an_adapter_of_a_pipeline_is_in_a_dialect_of_its_tools(
    pipelines: tuple[Path, Path], tmp_path: Path, dialect: str | None
) -> None:
    base, tuned = pipelines
    report = loratool.extract(base, tuned, tmp_path / "out.safetensors", rank=1, to=dialect, device="cpu")
    role = NAMES[dialect or "diffusers"][-1]
    stored = load_file(tmp_path / "out.safetensors")
    assert {name for name in stored if name.endswith(role)} == names_in(dialect or "diffusers")
    assert len(report.modules) == 2
    loratool.merge(base, tmp_path / "out.safetensors", tmp_path / "merged", device="cpu")
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        wanted, found = load_file(tuned / file), load_file(tmp_path / "merged" / file)
        assert all(torch.allclose(wanted[name], found[name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "comfy", "peft"])
def test_an_adapter_of_a_single_file_is_in_the_dialect_that_is_asked_for(
    files: tuple[Path, Path], tmp_path: Path, dialect: str
) -> None:
    base, tuned = files
    out = tmp_path / "out"
    loratool.extract(base, tuned, out, rank=1, to=dialect, device="cpu")
    (weights,) = out.glob("*.safetensors")
    if dialect != "peft":
        stored = load_file(weights)
        assert {name for name in stored if name.endswith(NAMES[dialect][-1])} == names_in(dialect)
    loratool.merge(base, out, tmp_path / "merged.safetensors", device="cpu")
    wanted, found = load_file(tuned), load_file(tmp_path / "merged.safetensors")
    assert all(torch.allclose(wanted[name], found[name], atol=1e-5) for name in wanted)


def test_what_a_dialect_cannot_hold_is_told_with_the_way_out(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = files
    tensors = load_file(tuned)
    norm = LDM.replace("attn1.to_q", "norm1")
    save_file(tensors | {norm: tensors[norm] + 1}, tmp_path / "more.safetensors")
    with pytest.raises(FitError, match="norm1"):
        loratool.extract(base, tmp_path / "more.safetensors", tmp_path / "out", to="kohya", device="cpu")
    loratool.extract(
        base, tmp_path / "more.safetensors", tmp_path / "out", to="kohya", rank=1, exclude="norm", device="cpu"
    )
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, tmp_path / "llm.safetensors")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}, tmp_path / "llm2.safetensors")
    with pytest.raises(UsageError, match="kohya"):
        loratool.extract(
            tmp_path / "llm.safetensors", tmp_path / "llm2.safetensors", tmp_path / "o", to="kohya", device="cpu"
        )


QKV, LINEAR1 = "double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_layers_that_the_dialect_divides_otherwise_are_extracted_as_it_has_them(tmp_path: Path, dialect: str) -> None:
    """Of a Flux file the fused projections, of which diffusers has the parts; the adapter merges to the fine-tune."""
    base, tuned = tmp_path / "flux.safetensors", tmp_path / "tuned.safetensors"
    save_file(values(bfl_flux()), base)
    changed(base, tuned, QKV, LINEAR1)
    report = loratool.extract(base, tuned, tmp_path / "out", rank=1, to=dialect, device="cpu")
    if dialect == "diffusers":
        names = {target.rpartition(".attn.")[2] for target in report.modules}
        assert names == {
            "to_q.weight",
            "to_k.weight",
            "to_v.weight",
            "transformer.single_transformer_blocks.0.proj_mlp.weight",
        }
    loratool.merge(base, tmp_path / "out", tmp_path / "merged.safetensors", device="cpu")
    wanted, found = load_file(tuned), load_file(tmp_path / "merged.safetensors")
    assert all(torch.allclose(wanted[name], found[name], atol=1e-4) for name in wanted)


def test_parts_of_a_pipeline_are_extracted_as_one_layer_where_the_dialect_has_one(tmp_path: Path) -> None:
    """Of three projections two differ: the third has zero rows in kohya's one layer."""
    attention = "transformer_blocks.0.attn"
    shapes = {f"{attention}.{name}.weight": (H, H) for name in ("to_q", "to_k", "to_v")}
    found = []
    for name in ("base", "tuned"):
        root = tmp_path / name
        (root / "transformer").mkdir(parents=True)
        (root / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
        (root / "model_index.json").write_text(json.dumps({"_class_name": "X", "transformer": ["diffusers", "X"]}))
        found.append(root / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(values(shapes), found[0])
    changed(found[0], found[1], f"{attention}.to_q.weight", f"{attention}.to_v.weight")
    out = tmp_path / "out.safetensors"
    loratool.extract(tmp_path / "base", tmp_path / "tuned", out, rank=2, to="kohya", device="cpu")
    stored = load_file(out)
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    up, down, alpha = (stored[f"{module}.{name}"] for name in ("lora_up.weight", "lora_down.weight", "alpha"))
    before, after = load_file(found[0]), load_file(found[1])
    differences = [after[name] - before[name] for name in shapes]
    assert torch.allclose(alpha / 2 * up @ down, torch.cat(differences), atol=1e-4)
