"""Without `--to`, outputs are in the dialect of the first input, or in one that a note names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer_layouts import HIDDEN, RANK, numbers, write_base

import loratool
from loratool.results.facts import AdapterFacts

O_PROJ = "model.layers.0.self_attn.o_proj"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
EXPERTS, INNER = 3, 4


def pair(down: str, up: str, rows: int = 8) -> dict[str, Tensor]:
    return {down: numbers(RANK, 16, seed=1), up: numbers(rows, RANK, seed=2)}


@dataclass(frozen=True)
class Input:
    """An adapter of a dialect, and the dialect of what is made of it."""

    tensors: Mapping[str, Tensor]
    becomes: str
    texts: Mapping[str, str] = field(default_factory=dict)  # files beside it
    header: Mapping[str, str] = field(default_factory=dict)
    name: str = "lora.safetensors"
    alpha: float | None = None  # that the file does not tell


def of_kohya(module: str) -> dict[str, Tensor]:
    return {**pair(f"{module}.lora_down.weight", f"{module}.lora_up.weight"), f"{module}.alpha": torch.tensor(1.0)}


def of_peft(module: str) -> dict[str, Tensor]:
    return pair(f"{module}.lora_A.weight", f"{module}.lora_B.weight")


LOKR = {"lokr_w1": numbers(2, 2, seed=1), "lokr_w2": numbers(4, 3, seed=2), "alpha": torch.tensor(9.0)}
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
INPUTS = {
    "peft": Input(of_peft(f"base_model.model.{O_PROJ}"), "peft", {"adapter_config.json": PEFT}, name="adapter_model.safetensors"),
    "mlx": Input(
        {f"{O_PROJ}.lora_a": numbers(16, RANK, seed=1), f"{O_PROJ}.lora_b": numbers(RANK, 8, seed=2)},
        "mlx",
        {"adapter_config.json": MLX},
        name="adapters.safetensors",
    ),
    "litgpt": Input(
        pair("transformer.h.0.attn.proj.lora_A", "transformer.h.0.attn.proj.lora_B"),
        "peft",
        {"hyperparameters.yaml": LITGPT},
        name="lit_model.lora.safetensors",
    ),
    "loralib": Input(pair(f"{O_PROJ}.lora_A", f"{O_PROJ}.lora_B"), "peft", alpha=1.0),
    "megatron": Input(
        pair(f"{MEGATRON_PROJ}.linear_in.weight", f"{MEGATRON_PROJ}.linear_out.weight"),
        "peft",
        {"run_config.yaml": MEGATRON},
    ),
    "torchtune": Input(pair("layers.0.attn.output_proj.lora_a.weight", "layers.0.attn.output_proj.lora_b.weight"), "torchtune", alpha=1.0),
    "gguf": Input({}, "gguf"),
    "kohya": Input(of_kohya(f"lora_unet_{UNET.replace('.', '_')}"), "kohya"),
    "wan-fun": Input(of_kohya("lora_unet__blocks_0_cross_attn_k"), "kohya"),
    "onetrainer": Input(of_kohya("lora_transformer_transformer_blocks_0_attn_to_out_0"), "kohya"),
    "lycoris": Input({f"{LYCORIS}.{role}": tensor for role, tensor in LOKR.items()}, "lycoris"),
    "simpletuner": Input(
        {f"{LYCORIS}.{role}": tensor for role, tensor in LOKR.items()}, "diffusers", header={"lycoris_config": "{}"}
    ),
    "musubi": Input(of_kohya("lora_unet_blocks_0_self_attn_q"), "kohya", header={"ss_network_module": "networks.lora_wan"}),
    "diffusers": Input(of_peft(f"unet.{UNET}"), "diffusers"),
    "ai-toolkit": Input(of_peft("transformer.transformer_blocks.0.attn.to_q"), "diffusers", header={"software": '{"name": "ai-toolkit"}'}),
    "cloneofsimo": Input(CLONEOFSIMO, "diffusers", header={"text_encoder": '["CLIPAttention"]'}),
    "comfy": Input(of_kohya("diffusion_model.double_blocks.0.img_attn.proj"), "comfy"),
    "bfl": Input(of_peft("final_layer.adaLN_modulation.1"), "comfy"),
    "xlabs": Input(pair("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight", 48), "comfy"),
    "original": Input(pair("blocks.0.self_attn.q.lora_A", "blocks.0.self_attn.q.lora_B"), "comfy"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("llama") / "base")


def written(name: str, home: Path, base: Path) -> Path:
    """The adapter of a dialect, on a disk."""
    made = INPUTS[name]
    folder = home / "adapter"
    if name == "gguf":
        plain = written("peft", home, base)
        loratool.convert(plain, home / "adapter.gguf", to="gguf", base=base)
        return home / "adapter.gguf"
    folder.mkdir()
    save_file(dict(made.tensors), folder / made.name, dict(made.header) or None)
    for file, text in made.texts.items():
        (folder / file).write_text(text)
    return folder if made.texts else folder / made.name


def format_of(path: Path, alpha: float | None = None) -> str:
    facts = loratool.inspect(path, input_alpha=alpha)
    assert isinstance(facts, AdapterFacts)
    assert isinstance(facts.format, str)
    return facts.format


def test_the_table_has_every_dialect_that_is_read() -> None:
    page = (ROOT / "docs" / "dialects.md").read_text(encoding="utf-8")
    table = page.partition("| dialect | a tensor |")[2].partition("\n\n")[0]
    assert sorted(INPUTS) == sorted(re.findall(r"^\| ([\w-]+) \|", table, re.MULTILINE))


@pytest.mark.parametrize("name", INPUTS)
def test_an_output_is_in_the_dialect_of_the_input_or_a_note_says_which(name: str, base: Path, tmp_path: Path) -> None:
    made = INPUTS[name]
    adapter, out = written(name, tmp_path, base), tmp_path / "out"
    model = base if name in ("torchtune", "gguf") else None
    report = loratool.resize(adapter, out, rank=1, device="cpu", input_alpha=made.alpha, base=model)
    # the header still says which tool made the adapter, whose dialect has the same names
    assert format_of(out, made.alpha) == (name if name in ("ai-toolkit", "simpletuner") else made.becomes)
    changed = [note.text for note in report.notes if note.code == "layout-changed"]
    assert bool(changed) == (made.becomes != name)
    assert all(name in text for text in changed)


def test_what_takes_a_model_to_write_is_pefts_without_one_and_a_note_says_it(base: Path, tmp_path: Path) -> None:
    for name in ("torchtune", "gguf"):
        (tmp_path / name).mkdir()
        adapter = written(name, tmp_path / name, base)
        report = loratool.resize(
            adapter, tmp_path / f"{name}-out", rank=1, device="cpu", input_alpha=INPUTS[name].alpha
        )
        assert format_of(tmp_path / f"{name}-out") == "peft"
        assert ["--base" in note.text for note in report.notes if note.code == "layout-changed"] == [True]


def test_adapters_of_two_dialects_are_combined_in_that_of_the_first(base: Path, tmp_path: Path) -> None:
    """PEFT's scale is 1/2, mlx-lm's 3: ΔW of the sum is that of the formulas."""
    for name in ("peft", "mlx"):
        (tmp_path / name).mkdir()
        written(name, tmp_path / name, base)
    folders = [tmp_path / name / "adapter" for name in ("mlx", "peft")]
    loratool.combine(folders, tmp_path / "sum", normalize=False, device="cpu")
    found = load_file(tmp_path / "sum" / "adapters.safetensors")
    scale = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
    a, b = (one[f"{O_PROJ}.lora_{side}"].double() for side in "ab")
    low, high = (other[f"base_model.model.{O_PROJ}.lora_{side}.weight"].double() for side in "AB")
    wanted = 3 * (a @ b).T + 0.5 * high @ low
    a, b = (found[f"{O_PROJ}.lora_{side}"].double() for side in "ab")
    torch.testing.assert_close(scale * (a @ b).T, wanted, rtol=1e-5, atol=1e-6)


# ---- experts in mlx-lm's one tensor for all ----


def experts(folder: Path, which: tuple[int, ...] = (0, 1, 2), container: str = "mlp", **config: object) -> Path:
    """PEFT's LoRA on layers of experts, each of which has factors of its own."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for expert in which:
        for leaf, (rows, columns) in {"up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
            start = f"base_model.model.model.layers.0.{container}.experts.{expert}.{leaf}.lora_"
            tensors[f"{start}A.weight"] = numbers(RANK, columns, seed=expert)
            tensors[f"{start}B.weight"] = numbers(rows, RANK, seed=expert + 9)
    save_file(tensors, folder / "adapter_model.safetensors")
    table = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "target_modules": ["up_proj", "down_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    return folder


def change(adapter: Path, expert: int, leaf: str, scale: float = 0.5) -> Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    start = f"base_model.model.model.layers.0.mlp.experts.{expert}.{leaf}.lora_"
    a, b = (tensors[f"{start}{side}.weight"].double() for side in "AB")
    return scale * (b @ a)


def stacked(out: Path, leaf: str, container: str = "switch_mlp") -> Tensor:
    """ΔW of every expert by mlx-lm's formula, scale · b @ a."""
    tensors = load_file(out / "adapters.safetensors")
    scale = json.loads((out / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    a, b = (tensors[f"model.layers.0.mlp.{container}.{leaf}.lora_{side}"].double() for side in "ab")
    found: Tensor = scale * (b @ a)
    return found


def test_experts_are_stacked_for_mlx_and_come_apart_again(tmp_path: Path) -> None:
    adapter = experts(tmp_path / "adapter")
    report = loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    assert {layer.error for layer in report.modules.values()} == {0.0}
    for leaf in ("up_proj", "down_proj"):
        wanted = torch.stack([change(adapter, expert, leaf) for expert in range(EXPERTS)])
        torch.testing.assert_close(stacked(tmp_path / "mlx", leaf), wanted, rtol=0, atol=0)
    loratool.convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_that_the_adapter_does_not_change_get_zeros(base: Path, tmp_path: Path) -> None:
    """As many as the base has; without one a note says how many were assumed. Some models have another container."""
    adapter = experts(tmp_path / "adapter", (0, 2))
    report = loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    assert "experts-counted" in [note.code for note in report.notes]
    found = stacked(tmp_path / "mlx", "up_proj")
    assert found.shape[0] == 3
    assert not bool(found[1].any())
    model = tmp_path / "model"
    model.mkdir()
    save_file({"model.norm.weight": torch.ones(4)}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"model_type": "dots1", "n_routed_experts": 5}))
    loratool.convert(adapter, tmp_path / "dots", to="mlx", base=model)
    found = stacked(tmp_path / "dots", "up_proj", "experts")
    assert found.shape[0] == 5
    torch.testing.assert_close(found[2], change(adapter, 2, "up_proj"), rtol=0, atol=0)


def test_parameters_of_all_experts_are_cut_into_mlx_lms_layers(tmp_path: Path) -> None:
    """PEFT's one parameter for gate and up: ΔW of each part and expert is that of its rows."""
    adapter = experts(tmp_path / "adapter")
    loratool.convert(adapter, tmp_path / "fused", to="peft-fused")
    loratool.convert(tmp_path / "fused", tmp_path / "mlx", to="mlx")
    for leaf in ("up_proj", "down_proj"):
        wanted = torch.stack([change(adapter, expert, leaf) for expert in range(EXPERTS)])
        torch.testing.assert_close(stacked(tmp_path / "mlx", leaf), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("verb", ["resize", "rescale", "combine"])
def test_experts_of_mlx_stay_in_one_tensor(verb: str, tmp_path: Path) -> None:
    adapter = experts(tmp_path / "adapter")
    loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    out, factor = tmp_path / "out", 1.0
    if verb == "resize":
        loratool.resize(tmp_path / "mlx", out, rank=3, device="cpu")
    elif verb == "rescale":
        loratool.rescale(tmp_path / "mlx", out, scale=2.0, bake=True)
        factor = 2.0
    else:
        loratool.combine([tmp_path / "mlx", adapter], out, normalize=False, device="cpu")
        factor = 2.0
    for leaf in ("up_proj", "down_proj"):
        wanted = torch.stack([change(adapter, expert, leaf) for expert in range(EXPERTS)])
        torch.testing.assert_close(stacked(out, leaf), factor * wanted, rtol=1e-5, atol=1e-6)
