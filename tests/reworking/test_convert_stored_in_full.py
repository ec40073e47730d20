"""Norms, biases and weights that an adapter stores in full, in dialects that have a place for them, and in none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import FitError, InputError

Tensors = dict[str, Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape)))


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def written(folder: Path) -> Tensors:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def factors(module: str, rows: int, columns: int, seed: int = 0, names: str = "kohya") -> Tensors:
    down, up = numbers(2, columns, seed=seed), numbers(rows, 2, seed=seed)
    if names == "peft":
        return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    return {
        f"{module}.lora_down.weight": down,
        f"{module}.lora_up.weight": up,
        f"{module}.alpha": torch.tensor(1.0),
    }


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# Of SDXL, as LyCORIS and as ComfyUI call them: a norm, and a convolution with its bias.
BLOCK = "input_blocks.4.1.transformer_blocks.1"
NORM = (numbers(4), numbers(4, seed=1))
CONVOLUTION = (numbers(6, 4, 3, 3), numbers(6))


def in_lycoris() -> Tensors:
    start = f"lora_unet_{BLOCK.replace('.', '_')}"
    return {
        **factors(f"{start}_attn1_to_q", 4, 4),
        f"{start}_norm1.w_norm": NORM[0],
        f"{start}_norm1.b_norm": NORM[1],
        "lora_unet_input_blocks_4_0_in_layers_2.diff": CONVOLUTION[0],
        "lora_unet_input_blocks_4_0_in_layers_2.diff_b": CONVOLUTION[1],
    }


def in_comfy() -> Tensors:
    return {
        **factors(f"diffusion_model.{BLOCK}.attn1.to_q", 4, 4),
        f"diffusion_model.{BLOCK}.norm1.diff": NORM[0],
        f"diffusion_model.{BLOCK}.norm1.diff_b": NORM[1],
        "diffusion_model.input_blocks.4.0.in_layers.2.diff": CONVOLUTION[0],
        "diffusion_model.input_blocks.4.0.in_layers.2.diff_b": CONVOLUTION[1],
    }


def test_norms_and_changes_in_full_are_carried_under_the_roles_that_each_tool_reads(tmp_path: Path) -> None:
    """LyCORIS has roles of their own for norms, ComfyUI's are those of any weight; values keep their bytes."""
    source = saved(tmp_path / "lycoris.safetensors", in_lycoris())
    report = loratool.convert(source, tmp_path / "comfy", to="comfy")
    same(written(tmp_path / "comfy"), in_comfy())
    assert len(report.beside) == 4
    assert set(report.beside.values()) == {0.0}
    loratool.convert(tmp_path / "comfy", tmp_path / "back", to="lycoris", architecture="sdxl")
    same(written(tmp_path / "back"), in_lycoris())


def test_an_adapter_of_nothing_but_changes_in_full_is_converted(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in in_lycoris().items() if "attn1" not in name}
    loratool.convert(saved(tmp_path / "full.safetensors", tensors), tmp_path / "comfy", to="comfy", architecture="sdxl")
    same(written(tmp_path / "comfy"), {name: tensor for name, tensor in in_comfy().items() if "attn1" not in name})


def test_rows_of_changes_go_where_those_of_layers_go(tmp_path: Path) -> None:
    """Flux has q, k and v in one weight: what the adapter leaves as it is gets zeros; halves change places, also in biases."""
    attention = "transformer.transformer_blocks.0.attn"
    q, v, bias, end = numbers(4, 4), numbers(4, 4, seed=1), numbers(4), numbers(8, 4)
    tensors = {
        f"{attention}.to_q.diff": q,
        f"{attention}.to_v.diff": v,
        f"{attention}.to_q.diff_b": bias,
        "transformer.norm_out.linear.diff": end,
        "transformer.norm_out.linear.diff_b": end[:, 0],
    }
    loratool.convert(saved(tmp_path / "flux.safetensors", tensors), tmp_path / "comfy", to="comfy", architecture="flux")
    qkv, last = "diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.final_layer.adaLN_modulation.1"
    wanted = {
        f"{qkv}.diff": torch.cat([q, torch.zeros(4, 4), v]),
        f"{qkv}.diff_b": torch.cat([bias, torch.zeros(8)]),
        f"{last}.diff": torch.cat([end[4:], end[:4]]),
        f"{last}.diff_b": torch.cat([end[4:, 0], end[:4, 0]]),
    }
    same(written(tmp_path / "comfy"), wanted)


def test_one_weight_is_not_changed_by_factors_and_in_full(tmp_path: Path) -> None:
    """ComfyUI would apply one of the two."""
    attention = "transformer.transformer_blocks.0.attn"
    tensors = {**factors(f"{attention}.to_q", 4, 4, names="peft"), f"{attention}.to_v.diff": numbers(4, 4)}
    source = saved(tmp_path / "flux.safetensors", tensors)
    with pytest.raises(FitError, match=r"by factors and others in full[^:]*:\s+diffusion_model\.double_blocks\.0\.img"):
        loratool.convert(source, tmp_path / "out", to="comfy", architecture="flux")


def test_a_bias_of_which_no_weight_tells_the_rows_is_refused_where_rows_move(tmp_path: Path) -> None:
    tensors = factors("transformer.transformer_blocks.0.attn.to_q", 4, 4, names="peft")
    tensors |= {"transformer.norm_out.linear.diff_b": numbers(8)}
    with pytest.raises(InputError, match=r"norm_out\.linear\.bias: which of its rows go where"):
        loratool.convert(
            saved(tmp_path / "flux.safetensors", tensors), tmp_path / "out", to="comfy", architecture="flux"
        )


@pytest.mark.parametrize(("dialect", "reader"), [("kohya", "kohya"), ("diffusers", "diffusers"), ("peft", "PEFT")])
def test_where_no_tool_reads_changes_in_full_they_are_a_loss_that_is_named(
    tmp_path: Path, dialect: str, reader: str
) -> None:
    source = saved(tmp_path / "lycoris.safetensors", in_lycoris())
    with pytest.raises(
        FitError, match=rf"{reader} cannot store changes stored in full.*: unet_input_blocks_4_0_in_lay"
    ):
        loratool.convert(source, tmp_path / "out", to=dialect)
    report = loratool.convert(source, tmp_path / "out", to=dialect, accept_loss=True)
    assert [note.code for note in report.lost] == [f"not-in-{'peft' if dialect == 'peft' else 'dialect'}"]
    assert len(written(tmp_path / "out")) == (3 if dialect == "kohya" else 2)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_with_the_base_peft_gets_new_values_of_what_is_changed_in_full(tmp_path: Path, layout: str) -> None:
    """W + ΔW in float32, saved whole: also of a norm whose base is in bfloat16, and of a base in the authors' layout."""
    own = {f"{BLOCK}.norm1.weight": NORM[0], f"{BLOCK}.norm1.bias": NORM[1]}
    own |= {"input_blocks.4.0.in_layers.2.weight": CONVOLUTION[0], "input_blocks.4.0.in_layers.2.bias": CONVOLUTION[1]}
    inside = "down_blocks.1.attentions.0.transformer_blocks.1"
    names = (f"{inside}.norm1.weight", f"{inside}.norm1.bias", "down_blocks.1.resnets.0.conv1.weight")
    called = dict(zip(own, (*names, "down_blocks.1.resnets.0.conv1.bias"), strict=True))
    before = {name: numbers(*change.shape, seed=9) for name, change in own.items()}
    before[f"{BLOCK}.norm1.weight"] = before[f"{BLOCK}.norm1.weight"].bfloat16()
    base = {called[name] if layout == "diffusers" else name: tensor for name, tensor in before.items()}
    module = f"{inside if layout == 'diffusers' else BLOCK}.attn1.to_q.weight"
    saved(tmp_path / "base.safetensors", {**base, module: torch.ones(4, 4)})
    source = saved(tmp_path / "lycoris.safetensors", in_lycoris())
    report = loratool.convert(source, tmp_path / "peft", to="peft", base=tmp_path / "base.safetensors")
    assert max(report.beside.values()) < 1e-6
    found = written(tmp_path / "peft")
    for name, change in own.items():
        wanted = before[name].double() + change.double()
        assert torch.equal(found[f"base_model.model.{called[name]}"], wanted.float())
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {"down_blocks.1.resnets.0.conv1", f"{inside}.norm1"}
    merged = {}
    for name, adapter in (("one", source), ("other", tmp_path / "peft")):
        loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / f"{name}.safetensors", device="cpu")
        merged[name] = load_file(tmp_path / f"{name}.safetensors")
    for name, tensor in merged["one"].items():
        torch.testing.assert_close(merged["other"][name], tensor, rtol=1e-6, atol=1e-6)


# Flux's control adapters widen the input layer, and put norms in the place of the base's.
CONTROL = {"img_in": (4, 8), "double_blocks.0.img_attn.qkv": (12, 4), "single_blocks.0.linear1": (28, 4)}
QUERY, KEY = numbers(2), numbers(2, seed=1)


def control_adapter(path: Path) -> Path:
    tensors: Tensors = {}
    for module, (rows, columns) in CONTROL.items():
        tensors |= {**factors(module, rows, columns, names="peft"), f"{module}.lora_B.bias": numbers(rows)}
    norms = {
        "double_blocks.0.img_attn.norm.query_norm.scale": QUERY,
        "single_blocks.0.norm.key_norm.scale": KEY,
    }
    return saved(path, tensors | norms)


def test_control_adapters_keep_their_norms_in_comfy_in_diffusers_and_in_peft(tmp_path: Path) -> None:
    """And ComfyUI is told how wide the input layer becomes; PEFT is told which modules are saved whole."""
    source = control_adapter(tmp_path / "control.safetensors")
    for dialect in ("comfy", "diffusers", "peft"):
        report = loratool.convert(source, tmp_path / dialect, to=dialect)
        assert set(report.beside.values()) == {0.0}
    comfy, diffusers, peft = (written(tmp_path / dialect) for dialect in ("comfy", "diffusers", "peft"))
    assert torch.equal(comfy["diffusion_model.double_blocks.0.img_attn.norm.query_norm.set_weight"], QUERY)
    assert torch.equal(comfy["diffusion_model.single_blocks.0.norm.key_norm.set_weight"], KEY)
    assert comfy["diffusion_model.img_in.reshape_weight"].tolist() == [4, 8]
    names = ("transformer_blocks.0.attn.norm_q.weight", "single_transformer_blocks.0.attn.norm_k.weight")
    for name, value in zip(names, (QUERY, KEY), strict=True):
        assert torch.equal(diffusers[f"transformer.{name}"], value)
        assert torch.equal(peft[f"base_model.model.{name}"], value)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == sorted(name.removesuffix(".weight") for name in names)
    for server, dialect in (("comfyui", "comfy"), ("diffusers", "diffusers")):
        loratool.convert(source, tmp_path / f"for-{server}", server=server)
        same(written(tmp_path / f"for-{server}"), {"comfy": comfy, "diffusers": diffusers}[dialect])
    for here, there in (("comfy", "diffusers"), ("diffusers", "comfy"), ("peft", "diffusers")):
        loratool.convert(tmp_path / here, tmp_path / f"{here}-{there}", to=there)
        same(written(tmp_path / f"{here}-{there}"), {"comfy": comfy, "diffusers": diffusers}[there])


def test_norms_that_diffusers_does_not_load_are_refused_for_it(tmp_path: Path) -> None:
    """It looks for norms in adapters of Flux alone."""
    start = "diffusion_model.blocks.0.self_attn"
    tensors = {**factors(f"{start}.q", 4, 4), f"{start}.norm_q.set_weight": numbers(4)}
    source = saved(tmp_path / "wan.safetensors", tensors)
    with pytest.raises(FitError, match=r"diffusers cannot store tensors saved whole: .*norm_q"):
        loratool.convert(source, tmp_path / "out", to="diffusers")
    block = "transformer.transformer_blocks.0"
    qwen = {**factors(f"{block}.img_mod.1", 24, 4, names="peft"), f"{block}.attn.norm_q.weight": numbers(2)}
    with pytest.raises(FitError, match="norms of Flux alone, and these are of qwen-image"):
        loratool.convert(saved(tmp_path / "qwen.safetensors", qwen), tmp_path / "out", to="diffusers")


@pytest.mark.parametrize("role", ["query_norm.set_weight", "query_norm.scale.set_weight"])
def test_both_spellings_of_a_replaced_norm_are_merged(tmp_path: Path, role: str) -> None:
    """ComfyUI's releases name the parameter, or the layer."""
    norm = "double_blocks.0.img_attn.norm"
    source = saved(tmp_path / "norm.safetensors", {f"diffusion_model.{norm}.{role}": QUERY})
    base = {f"{norm}.query_norm.scale": torch.ones(2), "double_blocks.0.img_attn.qkv.weight": torch.ones(12, 4)}
    base |= {"single_blocks.0.linear1.weight": torch.ones(28, 4)}
    loratool.merge(saved(tmp_path / "base.safetensors", base), source, tmp_path / "merged.safetensors", device="cpu")
    assert torch.equal(load_file(tmp_path / "merged.safetensors")[f"{norm}.query_norm.scale"], QUERY)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_parameter_that_is_no_weight_is_changed_under_its_own_name(tmp_path: Path, layout: str) -> None:
    """As ComfyUI names it; diffusers calls this one of Wan `scale_shift_table`."""
    start, change = "diffusion_model.blocks.0", numbers(1, 6, 4)
    tensors = factors(f"{start}.self_attn.q", 4, 4, names="peft") | {f"{start}.modulation.diff": change}
    source = saved(tmp_path / "wan.safetensors", tensors)
    names = {
        "original": ("modulation", "self_attn.q.weight", "cross_attn.q.weight"),
        "diffusers": ("scale_shift_table", "attn1.to_q.weight", "ffn.net.0.proj.weight"),
    }[layout]
    base = {f"blocks.0.{name}": torch.ones(*(change.shape if not n else (4, 4))) for n, name in enumerate(names)}
    loratool.merge(saved(tmp_path / "base.safetensors", base), source, tmp_path / "merged.safetensors", device="cpu")
    assert torch.equal(load_file(tmp_path / "merged.safetensors")[f"blocks.0.{names[0]}"], 1 + change)


def test_a_bias_beside_loha_goes_with_it(tmp_path: Path) -> None:
    module, shapes = f"lora_unet_{BLOCK.replace('.', '_')}_ff_net_2", ((6, 2), (2, 8), (6, 2), (2, 8))
    roles = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"{module}.{r}": numbers(*s, seed=n) for n, (r, s) in enumerate(zip(roles, shapes, strict=True))}
    tensors |= {f"{module}.diff_b": numbers(6)}
    source = saved(tmp_path / "loha.safetensors", tensors)
    report = loratool.convert(source, tmp_path / "comfy", to="comfy", architecture="sdxl")
    here = f"diffusion_model.{BLOCK}.ff.net.2"
    same(written(tmp_path / "comfy"), {name.replace(module, here): tensor for name, tensor in tensors.items()})
    assert list(report.beside.values()) == [0.0]


def test_rescaled_changes_get_the_names_of_the_dialect_that_is_asked_for(tmp_path: Path) -> None:
    source = saved(tmp_path / "lycoris.safetensors", in_lycoris())
    loratool.rescale(source, tmp_path / "twice", scale=2.0, to="comfy")
    found, wanted = written(tmp_path / "twice"), in_comfy()
    assert found.keys() == wanted.keys()
    for name in (name for name in wanted if ".diff" in name):
        assert torch.equal(found[name], 2 * wanted[name])


def test_a_value_that_is_lost_on_the_way_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool.adapters.formats.named import writing

    def wrong(self: Any, target: str, norm: bool = False) -> str:
        return f"{self.module(target)}.{'diff' if target.endswith('.bias') else 'diff_b'}"

    monkeypatch.setattr(writing.NamedNames, "change", wrong)
    source = saved(tmp_path / "lycoris.safetensors", in_lycoris())
    with pytest.raises(loratool.LoratoolError) as refusal:
        loratool.convert(source, tmp_path / "out", to="comfy")
    assert refusal.value.exit_code == 1
    assert not (tmp_path / "out").exists()


# ---- other methods of LyCORIS ----

METHODS: dict[str, dict[str, Tensor]] = {
    "(IA)³": {"weight": numbers(6), "on_input": torch.tensor(0)},
    "GLoRA": {
        "a1.weight": numbers(4, 2),
        "a2.weight": numbers(2, 4),
        "b1.weight": numbers(6, 2),
        "b2.weight": numbers(2, 4, seed=1),
        "alpha": torch.tensor(1.0),
    },
    "OFT": {"oft_blocks": numbers(3, 2, 2), "rescale": numbers(6, 1), "alpha": torch.tensor(0.01)},
    "BOFT": {"oft_blocks": numbers(1, 3, 2, 2), "alpha": torch.tensor(0.0)},
    "LoRA with single elements": {
        "lora_down.weight": numbers(2, 4),
        "lora_up.weight": numbers(6, 2),
        "alpha": torch.tensor(1.0),
        "bias_indices": torch.tensor([[5], [3]], dtype=torch.int16),
        "bias_values": torch.ones(1),
        "bias_size": torch.tensor([6, 4], dtype=torch.int16),
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_lycoris_keep_their_tensors_where_the_dialect_has_them(method: str, tmp_path: Path) -> None:
    """So that names and headers can be changed; where no tool reads them, they are refused by name."""
    here, there = f"lora_unet_{BLOCK.replace('.', '_')}_ff_net_2", f"diffusion_model.{BLOCK}.ff.net.2"
    others = factors(f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q", 4, 4)
    tensors = others | {f"{here}.{role}": tensor for role, tensor in METHODS[method].items()}
    source = saved(tmp_path / "lycoris.safetensors", tensors)
    report = loratool.convert(source, tmp_path / "lycoris", to="lycoris", architecture="sdxl")
    same(written(tmp_path / "lycoris"), tensors)
    assert {layer.error for layer in report.modules.values()} == {0.0}
    if method == "GLoRA":
        loratool.convert(source, tmp_path / "comfy", to="comfy", architecture="sdxl")
        found = written(tmp_path / "comfy")
        assert {name for name in found if name.startswith(there)} == {f"{there}.{role}" for role in METHODS[method]}
    for dialect in ("kohya", "diffusers", *(["comfy"] if method != "GLoRA" else [])):
        with pytest.raises(
            FitError, match=rf"{dialect} cannot store updates other than a product of two factors: .*net_2"
        ):
            loratool.convert(source, tmp_path / dialect, to=dialect, architecture="sdxl")


def test_a_method_whose_layer_another_dialect_divides_is_refused(tmp_path: Path) -> None:
    module = "lycoris_transformer_blocks_0_attn_to_q"
    tensors = {f"{module}.{role}": tensor for role, tensor in METHODS["GLoRA"].items()}
    with pytest.raises(FitError, match=r"attn_to_q\.weight: its update \(Both\) cannot be split"):
        loratool.convert(
            saved(tmp_path / "flux.safetensors", tensors), tmp_path / "out", to="comfy", architecture="flux"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("dialect", "module"), [("lycoris", "lora_unet_{}"), ("comfy", "diffusion_model.{}")])
def test_a_weight_that_is_changed_by_factors_and_in_full_becomes_one_change(
    tmp_path: Path, dialect: str, module: str, dtype: torch.dtype
) -> None:
    """LyCORIS makes one module of a name, and ComfyUI keeps the last of both: their sum in float64, rounded once, is what
    each can read.
    """
    path = f"{BLOCK}.attn1.to_q"
    name = f"lora_unet_{path.replace('.', '_')}"
    diff, given = numbers(4, 4, seed=9).to(dtype), {n: t.to(dtype) for n, t in factors(name, 4, 4).items()}
    given[f"{name}.lora_up.weight"][0] = torch.tensor([2, 2.0**-19])
    given[f"{name}.lora_down.weight"][:, 0] = torch.tensor([1, 2.0**-19])
    diff[0, 0] = 2.0**-11  # so that the sum is 1 + 2⁻¹¹ + 2⁻³⁹, which float32 takes for half-way between two of float16
    style = saved(tmp_path / "style.safetensors", {**given, f"{name}.diff": diff})
    report = loratool.convert(style, tmp_path / "out.safetensors", to=dialect)
    found = load_file(tmp_path / "out.safetensors")
    whole = module.format(path if dialect == "comfy" else path.replace(".", "_"))
    up, down = (given[f"{name}.lora_{side}.weight"].double() for side in ("up", "down"))
    total = 0.5 * up @ down + diff.double()
    wanted = total.to(dtype)
    wanted[0, 0] = 1 + (2.0**-10 if dtype == torch.float16 else 2.0**-11)
    same(found, {f"{whole}.diff": wanted})
    assert "written-in-full" in [note.code for note in report.notes]
