"""Adapters whose tensors' names say everything: how each dialect names modules, and what its updates come to.

Every file is made here with safetensors. A merged base is held to the formula of the dialect's tool, in float64; values
are eighths, so that each sum and product is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import role_formulas
import torch
from paths import REAL, ROOT
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.adapter import Flattened, load_update
from loratool.adapters.formats import read_adapter
from loratool.adapters.formats.named.dialects import SPELLINGS
from loratool.adapters.formats.named.format import spelling_in
from loratool.adapters.reading import Reading
from loratool.cli import run
from loratool.results.facts import AdapterFacts

real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the published adapters are not here: {REAL} is missing")
SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "schemas" / "inspect.schema.json").read_text("utf-8"))
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FLAT = ATTENTION.replace(".", "_")
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn"
QWEN = "transformer_blocks.0.attn.to_q"
XLABS, SINGLE = "double_blocks.0.processor", "single_blocks.0.processor"
KOHYA = f"lora_unet_{FLAT}_to_q"


def eighths(*shape: int, seed: int = 0) -> Tensor:
    """Values in eighths, none of them zero."""
    generator = torch.Generator().manual_seed(seed + 31 * math.prod(shape) + len(shape))
    numbers = torch.randint(1, 16, shape, generator=generator) * torch.sign(
        torch.rand(shape, generator=generator) - 0.5
    )
    return numbers / 8


def alpha(value: float = 1.0) -> Tensor:
    return torch.tensor(value)


def pair(down: str, up: str, rows: int = 6, columns: int = 4, rank: int = 2) -> dict[str, Tensor]:
    """The two factors of a layer under their names."""
    return {down: eighths(rank, columns), up: eighths(rows, rank, seed=1)}


def of_kohya(module: str, rows: int = 6, columns: int = 4) -> dict[str, Tensor]:
    tensors = pair(f"{module}.lora_down.weight", f"{module}.lora_up.weight", rows, columns)
    return {**tensors, f"{module}.alpha": alpha()}


def of_peft(module: str, rows: int = 6, columns: int = 4, rank: int = 2) -> dict[str, Tensor]:
    return pair(f"{module}.lora_A.weight", f"{module}.lora_B.weight", rows, columns, rank)


@dataclass(frozen=True)
class Toy:
    """A file of one dialect, and what it does."""

    dialect: str | tuple[str, ...]
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, float]  # target → what multiplies up @ down
    flat: bool = False  # whether targets are written without dots
    metadata: Mapping[str, str] = field(default_factory=dict)
    codes: tuple[str, ...] = ()  # of notes that are told


ALPHAS = {"unet.r": 2, "unet.lora_alpha": 1}
TOYS = {
    "kohya-lin": Toy("kohya", of_kohya(KOHYA), {f"unet.{ATTENTION}.to_q.weight": 0.5}, flat=True),
    "kohya-noalpha": Toy(
        "kohya",
        pair(f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
        {f"unet.{ATTENTION}.to_q.weight": 1.0},
        flat=True,
        codes=("alpha-missing",),
    ),
    "kohya-te": Toy(
        "kohya",
        of_kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        {"te2.text_model.encoder.layers.0.mlp.fc1.weight": 0.5},
        flat=True,
    ),
    "wan-fun": Toy(
        "wan-fun",
        of_kohya("lora_unet__blocks_0_cross_attn_k"),
        {"unet.blocks.0.cross_attn.k.weight": 0.5},
        flat=True,
    ),
    "onetrainer-legacy": Toy(
        "onetrainer",
        of_kohya("lora_transformer_single_transformer_blocks_0_proj_mlp"),
        {"transformer.single_transformer_blocks.0.proj_mlp.weight": 0.5},
        flat=True,
        metadata={"ot_revision": "abc"},
    ),
    "lycoris wrapper": Toy(
        "lycoris",
        of_kohya("lycoris_transformer_blocks_0_attn_to_q"),
        {"transformer_blocks.0.attn.to_q.weight": 0.5},
        flat=True,
    ),
    "simpletuner-lycoris": Toy(
        "simpletuner",
        of_kohya("lycoris_transformer_blocks_0_attn_to_q"),
        {"transformer_blocks.0.attn.to_q.weight": 0.5},
        flat=True,
        metadata={"lycoris_config": "{}"},
    ),
    "diff-v1": Toy(
        "diffusers",
        {
            **pair(
                f"unet.{ATTENTION}.processor.to_q_lora.down.weight", f"unet.{ATTENTION}.processor.to_q_lora.up.weight"
            ),
            **pair(
                f"unet.{ATTENTION}.processor.to_out_lora.down.weight",
                f"unet.{ATTENTION}.processor.to_out_lora.up.weight",
            ),
        },
        {f"unet.{ATTENTION}.to_q.weight": 1.0, f"unet.{ATTENTION}.to_out.0.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "diff-v0": Toy(
        "diffusers",
        pair(f"{ATTENTION}.processor.to_q_lora.down.weight", f"{ATTENTION}.processor.to_q_lora.up.weight"),
        {f"unet.{ATTENTION}.to_q.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "diff-v2": Toy(
        "diffusers",
        pair(f"{ENCODER}.q_proj.lora_linear_layer.down.weight", f"{ENCODER}.q_proj.lora_linear_layer.up.weight"),
        {f"{ENCODER}.q_proj.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "diff-peft": Toy(
        "diffusers",
        of_peft(f"unet.{ATTENTION}.to_q"),
        {f"unet.{ATTENTION}.to_q.weight": 0.5},
        metadata={"lora_adapter_metadata": json.dumps(ALPHAS)},
        codes=("alpha-in-header",),
    ),
    "diff-mixedrank": Toy(
        "diffusers",
        {**of_peft(f"unet.{ATTENTION}.to_q"), **of_peft(f"unet.{ATTENTION}.to_k", rank=4)},
        {f"unet.{ATTENTION}.to_q.weight": 1.0, f"unet.{ATTENTION}.to_k.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "comfy": Toy(
        "comfy",
        {
            **of_kohya("diffusion_model.double_blocks.0.img_attn.proj"),
            **of_kohya("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"),
        },
        {
            "diffusion_model.double_blocks.0.img_attn.proj.weight": 0.5,
            "clip_l.text_model.encoder.layers.0.mlp.fc1.weight": 0.5,
        },
    ),
    "aitk": Toy(
        "ai-toolkit",
        of_peft("transformer.transformer_blocks.0.attn.to_q"),
        {"transformer.transformer_blocks.0.attn.to_q.weight": 1.0},
        metadata={"software": json.dumps({"name": "ai-toolkit"})},
        codes=("alpha-missing",),
    ),
    "qwen-default": Toy(
        "diffusers",
        pair(f"{QWEN}.lora_A.default.weight", f"{QWEN}.lora_B.default.weight"),
        {"transformer.transformer_blocks.0.attn.to_q.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "mochi": Toy(
        "original",
        pair("blocks.0.attn.qkv_x.lora_A", "blocks.0.attn.qkv_x.lora_B"),
        {"diffusion_model.blocks.0.attn.qkv_x.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "stable cascade, text encoder": Toy(
        "kohya",
        of_kohya("lora_prior_te_text_model_encoder_layers_0_mlp_fc1"),
        {"te.text_model.encoder.layers.0.mlp.fc1.weight": 0.5},
        flat=True,
    ),
    "a U-Net of PEFT without its config": Toy(
        "peft",
        of_peft(f"base_model.model.{ATTENTION}.to_q"),
        {f"unet.{ATTENTION}.to_q.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "hunyuan": Toy(
        "peft",
        of_peft("base_model.model.double_blocks.0.img_attn_qkv"),
        {"diffusion_model.double_blocks.0.img_attn_qkv.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "fal": Toy(
        "peft",
        of_peft("base_model.model.transformer_blocks.0.attn.to_q"),
        {"transformer.transformer_blocks.0.attn.to_q.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "musubi-wan": Toy(
        "musubi",
        of_kohya("lora_unet_blocks_0_self_attn_q"),
        {"unet.blocks.0.self_attn.q.weight": 0.5},
        flat=True,
        metadata={"ss_network_module": "networks.lora_wan"},
    ),
    "kohya-sd3": Toy(
        "kohya",
        {
            **of_kohya("lora_unet_joint_blocks_0_x_block_attn_qkv"),
            **of_kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
        },
        {
            "unet.joint_blocks.0.x_block.attn.qkv.weight": 0.5,
            "te3.encoder.block.0.layer.0.SelfAttention.q.weight": 0.5,
        },
        flat=True,
        metadata={"ss_network_module": "networks.lora_sd3"},
    ),
    "kohya-lumina": Toy(
        "kohya",
        of_kohya("lora_unet_layers_0_attention_qkv"),
        {"unet.layers.0.attention.qkv.weight": 0.5},
        flat=True,
        metadata={"ss_network_module": "networks.lora_lumina"},
    ),
    "stable cascade": Toy(
        "kohya",
        of_kohya("lora_prior_unet_down_blocks_0_0_channelwise_0"),
        {"prior.down_blocks.0.0.channelwise.0.weight": 0.5},
        flat=True,
    ),
    "diff-te-v1": Toy(
        "diffusers",
        pair(f"{ENCODER}.to_out_lora.down.weight", f"{ENCODER}.to_out_lora.up.weight"),
        {f"{ENCODER}.out_proj.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "diff-alpha-tensors": Toy(
        "diffusers",
        {**of_peft(f"unet.{ATTENTION}.to_q"), f"unet.{ATTENTION}.to_q.alpha": alpha()},
        {f"unet.{ATTENTION}.to_q.weight": 0.5},
    ),
    "simpletuner-header": Toy(
        "diffusers",
        {**of_peft(f"transformer.{QWEN}"), **of_peft("transformer.transformer_blocks.0.attn.to_k", rank=4)},
        {f"transformer.{QWEN}.weight": 4.0, "transformer.transformer_blocks.0.attn.to_k.weight": 0.75},
        metadata={
            "lora_adapter_metadata": json.dumps(
                {
                    "transformer.r": 2,
                    "transformer.lora_alpha": 8,
                    "transformer.rank_pattern": {"to_k": 4},
                    "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_k": 3},
                    "transformer.use_rslora": False,
                    "transformer.use_dora": None,
                }
            )
        },
        codes=("alpha-in-header",),
    ),
    "rslora in the header": Toy(
        "diffusers",
        of_peft(f"unet.{ATTENTION}.to_q", rank=4),
        {f"unet.{ATTENTION}.to_q.weight": 1.5},
        metadata={"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": True})},
        codes=("alpha-in-header",),
    ),
    "onetrainer-comfy": Toy(
        "onetrainer",
        of_kohya("diffusion_model.double_blocks.0.img_attn.proj"),
        {"diffusion_model.double_blocks.0.img_attn.proj.weight": 0.5},
        metadata={"ot_branch": "master"},
    ),
    "alpha only in an entry that nobody reads": Toy(
        "comfy",
        of_peft("diffusion_model.blocks.0.self_attn.q"),
        {"diffusion_model.blocks.0.self_attn.q.weight": 1.0},
        metadata={"network_alpha": "16", "ss_network_dim": "2"},
        codes=("alpha-missing", "alpha-in-header-not-used"),
    ),
    "split qkv": Toy(
        "kohya",
        of_kohya("lora_unet_double_blocks_0_img_attn_qkv"),
        {"unet.double_blocks.0.img_attn.qkv.weight": 0.5},
        flat=True,
        metadata={"ss_network_args": json.dumps({"split_qkv": "True"})},
        codes=("split-qkv",),
    ),
    "uso double blocks": Toy(
        "xlabs",
        {
            **pair(f"{XLABS}.qkv_lora1.down.weight", f"{XLABS}.qkv_lora1.up.weight", 12),
            **pair(f"{XLABS}.proj_lora2.down.weight", f"{XLABS}.proj_lora2.up.weight"),
            **pair(f"{SINGLE}.proj_lora.down.weight", f"{SINGLE}.proj_lora.up.weight"),
        },
        {
            "diffusion_model.double_blocks.0.img_attn.qkv.weight": 1.0,
            "diffusion_model.double_blocks.0.txt_attn.proj.weight": 1.0,
            "diffusion_model.single_blocks.0.linear2.weight": 1.0,
        },
        codes=("default-strength", "alpha-missing"),
    ),
    "bfl": Toy(
        "bfl",
        of_peft("final_layer.adaLN_modulation.1"),
        {"diffusion_model.final_layer.adaLN_modulation.1.weight": 1.0},
        codes=("alpha-missing",),
    ),
    "two dialects": Toy(
        ("kohya", "diffusers"),
        {**of_kohya(KOHYA), **of_peft(f"unet.{ATTENTION}.to_k")},
        {f"unet.{ATTENTION}.to_q.weight": 0.5, f"unet.{ATTENTION}.to_k.weight": 1.0},
        codes=("alpha-missing",),
    ),
}


def written(toy: Toy, folder: Path) -> Path:
    path = folder / "toy.safetensors"
    save_file(dict(toy.tensors), path, dict(toy.metadata) or None)
    return path


def factors(toy: Toy) -> list[tuple[Tensor, Tensor]]:
    """Every (down, up) in the order of the file's making."""
    matrices = [tensor for tensor in toy.tensors.values() if tensor.dim() > 1]
    return list(zip(matrices[::2], matrices[1::2], strict=True))


def hold_json(table: Any, toy: Toy) -> None:
    """Hold what `inspect --json` prints of a toy to its schema, and to the toy."""
    if find_spec("jsonschema") is not None:
        import jsonschema

        jsonschema.Draft202012Validator(SCHEMA).validate(table)
    (found,) = table["results"]
    assert found["format"] == (toy.dialect if isinstance(toy.dialect, str) else list(toy.dialect))
    assert found["metadata"] == dict(toy.metadata)
    assert found["shown_metadata"].keys() == toy.metadata.keys()
    assert sorted(module["scaling"] for module in found["modules"]) == sorted(toy.scales.values())
    power = 0.5 if found["rslora"] else 1
    assert all(module["alpha"] == module["scaling"] * module["rank"] ** power for module in found["modules"])
    assert all(f"{module['name']}.weight" == module["target"] for module in found["modules"])


@pytest.mark.parametrize("name", TOYS)
def test_a_dialect_is_read_as_the_formula_has_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is recognised, every target is named, and merging gives W + scale · up @ down, rounded once.

    `inspect --json` tells the dialect, several as a list, and of each module all that its schema names.
    """
    toy = TOYS[name]
    path = written(toy, tmp_path)
    adapter = read_adapter(path)
    flattened = {target for target in adapter.updates if isinstance(target, Flattened)}
    dotted = set(adapter.updates) - flattened
    expected = {Flattened.of(target) for target in toy.scales} if toy.flat else set(toy.scales)
    assert flattened | dotted == expected or name == "two dialects"
    assert adapter.unused == ()
    assert run(["inspect", str(path), "--json", "--metadata"]) == 0
    hold_json(json.loads(capsys.readouterr().out), toy)
    assert tuple(note.code for note in adapter.notes) == toy.codes
    base = {
        target: eighths(up.shape[0], down.shape[1], seed=9)
        for target, (down, up) in zip(toy.scales, factors(toy), strict=True)
    }
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", path, tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "base.safetensors")
    for (target, scale), (down, up) in zip(toy.scales.items(), factors(toy), strict=True):
        assert torch.equal(merged[target].double(), base[target].double() + scale * up.double() @ down.double())


# Methods of LyCORIS and other roles, spelled as kohya's tools spell modules


def unflattened(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{role}": tensor for role, tensor in tensors.items()}


def conv(w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return w + role_formulas.lora(t["lora_up.weight"], t["lora_down.weight"], 0.5)


def tucker(w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return w + role_formulas.lora(t["lora_up.weight"], t["lora_down.weight"], 0.5, t["lora_mid.weight"])


def loha(w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    one, other = (role_formulas.product_of(t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in "12")
    return w + 0.5 * one * other


def lokr(w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return w + role_formulas.kronecker(t["lokr_w1"], role_formulas.product_of(t["lokr_w2_a"], t["lokr_w2_b"]), 0.5)


def lokr_whole(w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return w + role_formulas.kronecker(t["lokr_w1"], t["lokr_w2"], 1.0)


def dora(w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    change = role_formulas.lora(t["lora_up.weight"], t["lora_down.weight"], 0.5)
    return role_formulas.dora(w, change, t["dora_scale"], by_column=t["dora_scale"].shape[0] == 1)


def ia3(w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return w * (1 + t["weight"].double()[:, None])


def oft(w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return role_formulas.oft(w, t["oft_blocks"], float(t["alpha"]) * w.shape[0])


def full(w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return w + t["diff"].double()


PAIR = {"lora_down.weight": eighths(2, 4), "lora_up.weight": eighths(6, 2, seed=1), "alpha": alpha()}
KERNELS = {"lora_down.weight": eighths(2, 4, 3, 3), "lora_up.weight": eighths(6, 2, 1, 1, seed=1), "alpha": alpha()}
METHODS: dict[str, tuple[dict[str, Tensor], tuple[int, ...], Callable[[Tensor, Mapping[str, Tensor]], Tensor]]] = {
    "kohya-conv": (KERNELS, (6, 4, 3, 3), conv),
    "locon-mid": (
        {
            "lora_down.weight": eighths(2, 4, 1, 1),
            "lora_up.weight": eighths(6, 2, 1, 1),
            "lora_mid.weight": eighths(2, 2, 3, 3),
            "alpha": alpha(),
        },
        (6, 4, 3, 3),
        tucker,
    ),
    "loha": (
        {
            **{f"hada_w{n}_a": eighths(6, 2, seed=int(n)) for n in "12"},
            **{f"hada_w{n}_b": eighths(2, 4, seed=int(n)) for n in "12"},
            "alpha": alpha(),
        },
        (6, 4),
        loha,
    ),
    "lokr-lr": (
        {"lokr_w1": eighths(2, 2), "lokr_w2_a": eighths(3, 2), "lokr_w2_b": eighths(2, 2, seed=1), "alpha": alpha()},
        (6, 4),
        lokr,
    ),
    "lokr-full": ({"lokr_w1": eighths(2, 2), "lokr_w2": eighths(3, 2), "alpha": alpha(99)}, (6, 4), lokr_whole),
    "dora-out": ({**PAIR, "dora_scale": eighths(6, 1).abs()}, (6, 4), dora),
    "dora-in": ({**PAIR, "dora_scale": eighths(1, 4).abs()}, (6, 4), dora),
    "ia3-out": ({"weight": eighths(6), "on_input": torch.tensor(0)}, (6, 4), ia3),
    "full": ({"diff": eighths(6, 4)}, (6, 4), full),
    "oft": ({"oft_blocks": eighths(3, 2, 2), "alpha": alpha(1e-3)}, (6, 4), oft),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_lycoris_is_read_from_names_without_dots(name: str, tmp_path: Path) -> None:
    """The merged weight is that of the method's formula, and the dialect is told by the tensors where no header does."""
    tensors, shape, formula = METHODS[name]
    module = f"{'oft' if name == 'oft' else 'lora'}_unet_{FLAT}_to_q"
    save_file(unflattened(module, tensors), tmp_path / "toy.safetensors")
    facts = loratool.inspect(tmp_path / "toy.safetensors")
    assert isinstance(facts, AdapterFacts)
    assert facts.format == ("kohya" if name in ("kohya-conv", "dora-out", "dora-in", "oft") else "lycoris")
    base = {f"unet.{ATTENTION}.to_q.weight": eighths(*shape, seed=9)}
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "toy.safetensors", tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "base.safetensors")
    for target, weight in base.items():
        assert torch.equal(merged[target], formula(weight.double(), tensors).float())


def test_biases_and_norms_that_are_stored_as_differences_are_added(tmp_path: Path) -> None:
    """Wan's `diff` and `diff_b`, and LyCORIS's `w_norm` and `b_norm`."""
    at, flat = "diffusion_model.blocks.0", "lora_unet_blocks_0_norm1"
    changes = {
        f"{at}.self_attn.q.diff_b": eighths(6),
        f"{at}.norm3.diff": eighths(4),
        f"{flat}.w_norm": eighths(4, seed=1),
        f"{flat}.b_norm": eighths(4, seed=2),
    }
    save_file({**of_peft(f"{at}.self_attn.q"), **changes}, tmp_path / "toy.safetensors")
    names = {
        f"{at}.self_attn.q.bias": f"{at}.self_attn.q.diff_b",
        f"{at}.norm3.weight": f"{at}.norm3.diff",
        f"{at}.norm1.weight": f"{flat}.w_norm",
        f"{at}.norm1.bias": f"{flat}.b_norm",
    }
    base = {name: eighths(*changes[change].shape, seed=7) for name, change in names.items()}
    save_file({**base, f"{at}.self_attn.q.weight": eighths(6, 4)}, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "toy.safetensors", tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "base.safetensors")
    for name, change in names.items():
        assert torch.equal(merged[name], base[name] + changes[change])


# Flux as XLabs and Black Forest Labs write it


def test_xlabs_changes_queries_keys_and_values_of_single_blocks_and_leaves_the_mlp(tmp_path: Path) -> None:
    """The rows 0 to 3h of linear1, of 7h."""
    module = f"{SINGLE}.qkv_lora"
    save_file(pair(f"{module}.down.weight", f"{module}.up.weight", 12), tmp_path / "toy.safetensors")
    base = {
        "single_blocks.0.linear1.weight": eighths(28, 4, seed=5),
        "double_blocks.0.img_attn.qkv.weight": eighths(12, 4),
    }
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "toy.safetensors", tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "base.safetensors")
    change = torch.zeros(28, 4)
    change[:12] = eighths(12, 2, seed=1) @ eighths(2, 4)
    assert torch.equal(merged["single_blocks.0.linear1.weight"], base["single_blocks.0.linear1.weight"] + change)


def test_control_adapters_of_flux_replace_the_scales_of_norms_and_add_biases(tmp_path: Path) -> None:
    """With a strength that halves the rest, a norm's scale is replaced whole."""
    attention = "double_blocks.0.img_attn"
    tensors = {
        **of_peft(f"{attention}.qkv", 12),
        f"{attention}.qkv.lora_B.bias": eighths(12),
        f"{attention}.norm.query_norm.scale": eighths(2),
    }
    save_file(tensors, tmp_path / "toy.safetensors")
    base = {
        f"{attention}.qkv.weight": eighths(12, 4, seed=3),
        f"{attention}.qkv.bias": eighths(12, seed=3),
        f"{attention}.norm.query_norm.scale": eighths(2, seed=3),
    }
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(
        tmp_path / "base.safetensors", tmp_path / "toy.safetensors", tmp_path / "out", weights=[0.5], device="cpu"
    )
    merged = load_file(tmp_path / "out" / "base.safetensors")
    change = 0.5 * eighths(12, 2, seed=1) @ eighths(2, 4)
    assert torch.equal(merged[f"{attention}.qkv.weight"], base[f"{attention}.qkv.weight"] + change)
    assert torch.equal(merged[f"{attention}.qkv.bias"], base[f"{attention}.qkv.bias"] + 0.5 * eighths(12))
    assert torch.equal(merged[f"{attention}.norm.query_norm.scale"], eighths(2))


# PEFT's adapters of image models, which training scripts save in a folder for each component


@pytest.mark.parametrize(("folder", "component"), [("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")])
def test_an_adapter_of_peft_in_the_folder_of_a_component_changes_that_component(
    folder: str, component: str, tmp_path: Path
) -> None:
    """Both text encoders have a weight of this name, which the config does not tell apart."""
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    save_peft(tmp_path / folder, of_peft(f"base_model.model.{module}"), r=2, lora_alpha=1)
    base = {f"text_encoders.{name}.transformer.{module}.weight": eighths(6, 4, seed=4) for name in ("clip_l", "clip_g")}
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / folder, tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "base.safetensors")
    change = 0.5 * eighths(6, 2, seed=1) @ eighths(2, 4)
    for name, weight in base.items():
        assert torch.equal(merged[name], weight + change if f".{component}." in name else weight), name


# The scale


def test_every_spelling_of_the_table_is_held_by_a_toy() -> None:
    """A row that no file of these tests is read by would be a row that nobody has seen to work."""
    seen = {spelling_in(name) for toy in TOYS.values() for name in toy.tensors}
    seen |= {spelling_in(f"oft_unet_{FLAT}_to_q.oft_blocks")}  # of the methods below
    seen |= {spelling_in("first_stage_model.decoder.conv_in.diff")}  # of tests/bases/test_vae_names.py
    seen |= {spelling_in("unet:0:up")}  # of tests/adapters/test_numbered_layers.py
    rows = {found[0] for found in seen if found}
    assert [row.begins for row in SPELLINGS if row not in rows] == []


def test_long_values_of_the_header_are_shortened_for_people_and_whole_for_programs(tmp_path: Path) -> None:
    tags = {f"tag {number}": {"word": number} for number in range(50)}
    metadata = {"ss_tag_frequency": json.dumps(tags), "ss_training_comment": "x" * 1000, "short": "as it is"}
    save_file(of_kohya(KOHYA), tmp_path / "toy.safetensors", metadata)
    facts = loratool.inspect(tmp_path / "toy.safetensors", metadata=True)
    assert isinstance(facts, AdapterFacts)
    assert facts.metadata == metadata
    assert facts.shown_metadata is not None
    assert facts.shown_metadata["short"] == "as it is"
    assert facts.shown_metadata["ss_tag_frequency"].startswith("tag 0: {1 entry}, tag 1: ")
    assert facts.shown_metadata["ss_tag_frequency"].endswith("… and 44 more")
    assert facts.shown_metadata["ss_training_comment"].endswith("… (1,000 characters)")
    assert all(len(text) < 400 for text in facts.shown_metadata.values())


def test_an_alpha_that_is_said_serves_for_modules_without_one(tmp_path: Path) -> None:
    path = written(TOYS["kohya-noalpha"], tmp_path)
    adapter = read_adapter(path, Reading(input_alpha=8.0))
    (update,) = adapter.updates.values()
    assert update.scale == 4.0  # type: ignore[attr-defined]
    assert adapter.notes == ()


def test_an_alpha_that_no_module_takes_is_told(tmp_path: Path) -> None:
    adapter = read_adapter(written(TOYS["kohya-lin"], tmp_path), Reading(input_alpha=8.0))
    (update,) = adapter.updates.values()
    assert update.scale == 0.5  # type: ignore[attr-defined]
    assert [note.code for note in adapter.notes] == ["input-alpha-not-used"]


# What people published


def factors_of(path: Path, down: str, up: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → its (down, up), by the ends of their names."""
    tensors = load_file(path)
    modules = [name.removesuffix(down) for name in tensors if name.endswith(down)]
    return {module: (tensors[module + down], tensors[module + up]) for module in modules}


@real
def test_attention_processors_of_2023_merge_to_the_formula(tmp_path: Path) -> None:
    """Modules of a U-Net without prefix and without alpha; some of the 128 are merged into zeros in float16."""
    path = REAL / "sd-diffusers-old-processor-pokemon"
    every = factors_of(path / "pytorch_lora_weights.safetensors", "_lora.down.weight", "_lora.up.weight")
    assert len(every) == len(read_adapter(path).updates) == 128
    pairs = dict(list(every.items())[::16])
    stored = {
        f"{module}_lora.{half}.weight": tensor
        for module, pair in pairs.items()
        for half, tensor in zip(("down", "up"), pair, strict=True)
    }
    save_file(stored, tmp_path / "some.safetensors")
    names = {
        module: module.replace(".processor.", ".") + (".0.weight" if module.endswith("to_out") else ".weight")
        for module in pairs
    }
    base = {
        names[module]: torch.zeros(up.shape[0], down.shape[1], dtype=torch.float16)
        for module, (down, up) in pairs.items()
    }
    save_file(base, tmp_path / "base.safetensors")
    report = loratool.merge(
        tmp_path / "base.safetensors", tmp_path / "some.safetensors", tmp_path / "out", device="cpu"
    )
    assert report.edited == len(pairs) == 8
    merged = load_file(tmp_path / "out" / "base.safetensors")
    for module, (down, up) in pairs.items():
        exact = up.double() @ down.double()
        error = (merged[names[module]].double() - exact).abs()
        assert bool((error <= exact.abs() * 2**-11 + 2**-25).all()), module


@real
def test_a_config_in_the_header_gives_what_the_config_file_of_the_same_factors_gives() -> None:
    """One training run, saved once by PEFT and once by diffusers: alpha 16 at rank 4, which is lost with the header."""
    by_peft = read_adapter(REAL / "sd-peft-unet-anime")
    by_header = read_adapter(REAL / "sd-peft-unet-anime" / "pytorch_lora_weights.safetensors")
    assert {target.removeprefix("unet.") for target in by_header.updates} == set(by_peft.updates)
    assert {update.scale for update in by_header.updates.values()} == {4.0}  # type: ignore[attr-defined]
    assert by_header.dialects == ("diffusers",)
    assert by_header.unused == by_header.unsupported == ()


@real
def test_lokr_of_kohya_names_is_the_kronecker_product_that_its_factors_make() -> None:
    """Both halves factored, alpha 4 at rank 4 in float16: 350 modules, of which some are compared in full."""
    path = REAL / "sd-lycoris-lokr-4" / "smart_falcon_4_lokr.safetensors"
    adapter, stored = read_adapter(path), load_file(path)
    assert (len(adapter.updates), adapter.dialects, adapter.unused) == (350, ("lycoris",), ())
    assert adapter.training.method == "LOKR"
    for module in ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_down_blocks_0_resnets_0_conv1"):
        target = Flattened(f"{module.removeprefix('lora_')}.weight")
        update = load_update(adapter.updates[target], torch.device("cpu"), torch.float64)
        t = {role: stored[f"{module}.{role}"].double() for role in ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")}
        left, right = t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"]
        scale = float(stored[f"{module}.alpha"]) / 4
        columns = left.shape[1] * right.shape[1]
        found = update.delta(torch.zeros(left.shape[0] * right.shape[0], columns, dtype=torch.float64))
        torch.testing.assert_close(found, scale * torch.kron(left, right))


@real
def test_flux_of_ai_toolkit_is_read_with_scale_one() -> None:
    adapter = read_adapter(REAL / "flux-aitoolkit-transformer")
    assert adapter.dialects == ("ai-toolkit",)
    assert all(target.startswith("transformer.single_transformer_blocks.") for target in adapter.updates)
    assert {update.scale for update in adapter.updates.values()} == {1.0}  # type: ignore[attr-defined]
    assert [note.code for note in adapter.notes] == ["alpha-missing"]


@pytest.mark.parametrize(
    ("roles", "method"),
    [
        ({"diff": (4, 4)}, "FULL"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "diff_b": (4,)}, "LORA"),
        ({"hada_w1_a": (4, 1), "hada_w1_b": (1, 4), "hada_w2_a": (4, 1), "hada_w2_b": (1, 4)}, "LOHA"),
    ],
)
def test_the_method_is_that_of_the_tensors(roles: dict[str, tuple[int, ...]], method: str, tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{module}.{role}": torch.ones(shape) for role, shape in roles.items()}, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").training.method == method
