"""An adapter of another kind of model ends in one sentence that names both kinds, whatever is in common."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from diffusion_models import WIDTH, bfl_flux, clip, ldm_unet, lumina, sd3, under, values, wan
from peft_files import save_peft
from safetensors.torch import save_file

import loratool
from loratool.cli import run

if TYPE_CHECKING:
    from pathlib import Path

H = WIDTH
SPATIAL = "down_blocks_1_attentions_0_transformer_blocks_0"


def unet(text: int) -> dict[str, tuple[int, ...]]:
    """A narrow U-Net of LDM whose text has the width of a release."""
    shapes = ldm_unet((1, 1, 1, 0), matrix_ends=False, added=False)
    wide = {name: (H, text) for name in shapes if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    return under("model.diffusion_model.", shapes | wide)


LANGUAGE: dict[str, tuple[int, ...]] = {
    f"model.layers.{n}.self_attn.{p}_proj.weight": (H, H) for n in range(2) for p in ("q", "k", "v", "o")
}
BASES: dict[str, dict[str, tuple[int, ...]]] = {
    "SD 1.5": unet(768) | under("cond_stage_model.transformer.", clip()),
    "SDXL": unet(2048),
    "Flux": under("model.diffusion_model.", bfl_flux()),
    "SD3": under("model.diffusion_model.", sd3()),
    "Wan": wan(),
    "Lumina or Z-Image": lumina(),
    "language": LANGUAGE,
}
NAMES = {"SD 1.5": "Stable Diffusion 1", "language": "a language model or another one of Transformers"}
MODELS = {"Flux": "Flux or HunyuanVideo"}  # what the names of an adapter fit
# (modules with columns) of adapters in several dialects
ADAPTERS = {
    "SD 1.5": {f"lora_unet_{SPATIAL}_attn2_to_k": 768, "lora_te_text_model_encoder_layers_0_mlp_fc1": H},
    "SDXL": {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": 2048, "lora_te2_text_model_x": H},
    "Flux": {f"transformer.single_transformer_blocks.{n}.proj_mlp": H for n in range(38)}
    | {f"transformer.transformer_blocks.{n}.ff.net.0.proj": H for n in range(19)},
    "SD3": {f"lora_unet_joint_blocks_{n}_x_block_attn_qkv": H for n in range(24)},
    "Wan": {f"diffusion_model.blocks.{n}.self_attn.q": H for n in range(30)},
    "Lumina or Z-Image": {f"diffusion_model.layers.{n}.attention.to_q": H for n in range(30)},
    "language": {f"base_model.model.model.layers.{n}.self_attn.q_proj": H for n in range(24)},
}
# Each kind once as the adapter and once as the base, and the two that differ in the width of their text alone.
PAIRS = [*zip(ADAPTERS, [*[*ADAPTERS][1:], "SD 1.5"], strict=True), ("SDXL", "SD 1.5")]


def adapter_of(kind: str, folder: Path) -> Path:
    return saved(ADAPTERS[kind], folder, in_peft=kind == "language")


def saved(modules: dict[str, int], folder: Path, in_peft: bool) -> Path:
    ends = ("lora_A.weight", "lora_B.weight") if in_peft else ("lora_down.weight", "lora_up.weight")
    tensors: dict[str, torch.Tensor] = {}
    for module, columns in modules.items():
        tensors |= {f"{module}.{ends[0]}": torch.ones(2, columns), f"{module}.{ends[1]}": torch.ones(H, 2)}
    if not in_peft:
        save_file(tensors, folder / "lora.safetensors")
        return folder / "lora.safetensors"
    return save_peft(folder / "lora", tensors, r=2, lora_alpha=2)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for number, shapes in enumerate(BASES.values()):
        save_file(values(shapes), root / f"{number}.safetensors")
    return {kind: root / f"{number}.safetensors" for number, kind in enumerate(BASES)}


@pytest.mark.parametrize(("kind", "other"), PAIRS)
def test_an_adapter_of_another_kind_of_model_ends_in_one_sentence(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, other: str
) -> None:
    adapter = adapter_of(kind, tmp_path)
    assert run(["merge", str(bases[other]), str(adapter), "-o", str(tmp_path / "out")]) == 4
    told, hint = capsys.readouterr().err.splitlines()
    own = MODELS.get(kind, NAMES.get(kind, kind))
    assert told.startswith(f"Error: lora: this is an adapter of {own}, but BASE is {NAMES.get(other, other)};")
    assert len(told) < 250
    assert hint == f"hint: loratool inspect {adapter}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "language"])
def test_inspect_says_which_model_an_adapter_or_a_checkpoint_is_of(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    facts, model = loratool.inspect(adapter_of(kind, tmp_path)), loratool.inspect(bases[kind])
    assert isinstance(facts, loratool.AdapterFacts)
    assert isinstance(model, loratool.CheckpointFacts)
    own = NAMES.get(kind, kind)
    assert model.models == (own,)
    assert f"\nmodel         {own}\n" in str(model)
    assert facts.models == ((own,) if kind not in MODELS else ("Flux", "HunyuanVideo"))
    line = f"model       {MODELS.get(kind, own)}"
    assert [each for each in str(facts).splitlines() if each.startswith("model ")] == [line]


def test_of_a_language_model_nothing_is_said(bases: dict[str, Path], tmp_path: Path) -> None:
    for path in (adapter_of("language", tmp_path), bases["language"]):
        facts = loratool.inspect(path)
        assert isinstance(facts, (loratool.AdapterFacts, loratool.CheckpointFacts))
        assert facts.models == ()


def test_a_table_is_grouped_and_filtered_by_the_models_that_adapters_fit(tmp_path: Path) -> None:
    for kind in ("SDXL", "Wan", "language"):
        (tmp_path / kind).mkdir()
        adapter_of(kind, tmp_path / kind)
    table = loratool.inspect(tmp_path)
    assert isinstance(table, loratool.FleetFacts)
    headings = [line for line in str(table).splitlines() if line.endswith(": 1 adapter")]
    assert headings == [f"base not named{end}: 1 adapter" for end in ("", " (SDXL)", " (Wan)")]
    found = loratool.inspect(tmp_path, where="model=SDXL", sort="name")
    assert isinstance(found, loratool.FleetFacts)
    assert [row.model for row in found.adapters] == [("SDXL",)]
    assert "(SDXL)" in str(found)


@pytest.mark.parametrize(("kind", "other"), [("Flux", "SD 1.5"), ("SDXL", "SD 1.5"), ("language", "Wan")])
def test_adapters_of_different_models_are_not_put_together(tmp_path: Path, kind: str, other: str) -> None:
    """Some of their modules have the same names, or none; a sum of them is an adapter of neither model."""
    for each in (kind, other):
        (tmp_path / each).mkdir()
    adapters = [adapter_of(each, tmp_path / each) for each in (kind, other)]
    for put_together in (loratool.combine, partial(loratool.compress, rank=1)):
        with pytest.raises(loratool.FitError, match="belong to different models") as caught:
            put_together(adapters, tmp_path / "out", device="cpu")
        assert all(NAMES.get(each, each) in str(caught.value) for each in (kind, other))
    assert not (tmp_path / "out").exists()


def test_nothing_is_extracted_from_a_model_of_another_kind(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(loratool.FitError, match=r"is Stable Diffusion 1, and .* is SDXL; pass the model that"):
        loratool.extract(bases["SD 1.5"], bases["SDXL"], tmp_path / "out", rank=2, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["attention.wq", "attention.query", "attention.attention.query", "feed_forward.w1"])
def test_names_that_models_of_language_have_too_are_no_sign_of_another_kind(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    """Those of Llama as Meta saved it and of encoders in Transformers begin like those of Lumina."""
    names = {f"base_model.model.layers.{n}.{module}": H for n in range(2)}
    names["base_model.model.model.layers.0.self_attn.q_proj"] = H
    adapter = saved(names, tmp_path, in_peft=True)
    assert run(["merge", str(bases["language"]), str(adapter), "-o", str(tmp_path / "out")]) == 4
    told = capsys.readouterr().err
    assert "this is an adapter of" not in told
    assert module in told


def test_an_adapter_of_the_same_kind_is_told_what_the_base_lacks(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of("Wan", tmp_path)
    assert run(["merge", str(bases["Wan"]), str(adapter), "-o", str(tmp_path / "out")]) == 4
    assert "diffusion_model.blocks." in capsys.readouterr().err


def test_inspecting_with_a_base_of_another_kind_says_so_too(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(loratool.FitError, match=r"^lora: this is an adapter of SD3, but BASE is Flux"):
        loratool.inspect(adapter_of("SD3", tmp_path), base=bases["Flux"])


def test_components_are_called_what_diffusers_calls_them(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words are those that --only takes."""
    modules = (f"lora_unet_{SPATIAL}_attn2_to_k", "lora_te2_text_model_encoder_layers_0_mlp_fc1")
    tensors = {f"{m}.{end}": torch.ones(2, 2) for m in modules for end in ("lora_down.weight", "lora_up.weight")}
    tensors[f"{modules[0]}.lora_down.weight"] = torch.ones(2, 768)
    tensors[f"{modules[0]}.lora_up.weight"] = torch.ones(H, 2)
    save_file(tensors, tmp_path / "lora.safetensors")
    words = ["merge", str(bases["SD 1.5"]), str(tmp_path / "lora.safetensors"), "-o", str(tmp_path / "out.safetensors")]
    assert run(words) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "the base has no component te2, only unet, text_encoder; pass --only unet" in told
    assert run([*words, "--only", "unet"]) == 0
    assert "outside of unet" in " ".join(capsys.readouterr().out.split())
