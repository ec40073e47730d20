"""Adapters of dialects, as diffusers' own converters read them: the same ΔW for every weight of its layout.

A converter gives A and B under diffusers' names; the strength is in the factors, in an alpha next to them, or in
`network_alphas`. Where diffusers is known to be wrong, the test says so and holds what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

conversions: Any = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

BFL_SHAPES = {
    "double_blocks.0.img_attn.qkv": (12, 4),
    "double_blocks.0.img_attn.proj": (4, 4),
    "double_blocks.0.img_mlp.0": (16, 4),
    "double_blocks.0.img_mlp.2": (4, 16),
    "double_blocks.0.img_mod.lin": (24, 4),
    "double_blocks.0.txt_attn.qkv": (12, 4),
    "double_blocks.0.txt_attn.proj": (4, 4),
    "double_blocks.0.txt_mlp.0": (16, 4),
    "double_blocks.0.txt_mlp.2": (4, 16),
    "double_blocks.0.txt_mod.lin": (24, 4),
    "single_blocks.0.linear1": (28, 4),
    "single_blocks.0.linear2": (4, 20),
    "single_blocks.0.modulation.lin": (12, 4),
}
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
FLUX = {  # of diffusers
    **{f"{BLOCK}.attn.{name}": (4, 4) for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"{BLOCK}.attn.add_{part}_proj": (4, 4) for part in "qkv"},
    **{f"{BLOCK}.{ff}.net.0.proj": (16, 4) for ff in ("ff", "ff_context")},
    **{f"{BLOCK}.{ff}.net.2": (4, 16) for ff in ("ff", "ff_context")},
    **{f"{BLOCK}.{norm}.linear": (24, 4) for norm in ("norm1", "norm1_context")},
    **{f"{SINGLE}.attn.to_{part}": (4, 4) for part in "qkv"},
    f"{SINGLE}.proj_mlp": (16, 4),
    f"{SINGLE}.proj_out": (4, 20),
    f"{SINGLE}.norm.linear": (12, 4),
    "x_embedder": (4, 4),
    "context_embedder": (4, 4),
    "proj_out": (4, 4),
    "norm_out.linear": (8, 4),
}
# Some converters know the rows of linear1 at the width of Flux alone.
WIDE = {"single_blocks.0.linear1": (21504, 4)}
WIDE_PARTS = {**{f"{SINGLE}.attn.to_{part}": (3072, 4) for part in "qkv"}, f"{SINGLE}.proj_mlp": (12288, 4)}
WAN = {
    **{f"blocks.0.attn{n}.{name}": (4, 4) for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    "blocks.0.ffn.net.0.proj": (16, 4),
    "blocks.0.ffn.net.2": (4, 16),
    "condition_embedder.time_proj": (24, 4),
    "patch_embedding": (4, 4),
}


def all_blocks(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The same modules in all blocks of Flux, which diffusers' converter asks for."""
    return {
        module.replace(".0.", f".{number}.", 1): shape
        for module, shape in shapes.items()
        for number in range(38 if module.startswith("single") else 19 if "blocks.0." in module else 1)
    }


def factors(shapes: Mapping[str, tuple[int, int]], down: str, up: str, alpha: str = "") -> dict[str, Tensor]:
    """Factors of every module at rank 2, with α = 1 where there is a name for it."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"{module}{down}"] = torch.randn(2, columns, generator=generator)
        tensors[f"{module}{up}"] = torch.randn(rows, 2, generator=generator)
        if alpha:
            tensors[f"{module}{alpha}"] = torch.tensor(1.0)
    return tensors


def flattened(shapes: Mapping[str, tuple[int, int]], prefix: str) -> dict[str, Tensor]:
    flat = {prefix + module.replace(".", "_"): shape for module, shape in shapes.items()}
    return factors(flat, ".lora_down.weight", ".lora_up.weight", ".alpha")


def of_xlabs() -> dict[str, Tensor]:
    double = {f"double_blocks.0.processor.qkv_lora{n}": (12, 4) for n in (1, 2)}
    double |= {f"double_blocks.0.processor.proj_lora{n}": (4, 4) for n in (1, 2)}
    single = {"single_blocks.0.processor.qkv_lora": (12, 4), "single_blocks.0.processor.proj_lora": (4, 20)}
    return factors({**double, **single}, ".down.weight", ".up.weight")


def deltas(converted: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """ΔW by the names of weights, of what a converter gives."""
    found: dict[str, Tensor] = {}
    for name, down in converted.items():
        if ".lora_A" not in name:
            continue
        module = name.partition(".lora_A")[0]
        up = converted[name.replace("lora_A", "lora_B")]
        scale = alphas.get(f"{module}.alpha", float(down.shape[0])) / down.shape[0]
        found[f"{module.removeprefix('transformer.')}.weight"] = scale * up.double() @ down.double()
    return found


def convert_with(name: str) -> Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, float]]]:
    def convert(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        found = getattr(conversions, name)({key: tensor.clone() for key, tensor in tensors.items()})
        state, alphas = found if isinstance(found, tuple) else (found, {})
        return state, {key: float(value) for key, value in (alphas or {}).items()}

    return convert


WAN_ORIGINAL = {
    **{f"blocks.0.{kind}_attn.{part}": (4, 4) for kind in ("self", "cross") for part in "qkvo"},
    "blocks.0.ffn.0": (16, 4),
    "blocks.0.ffn.2": (4, 16),
}
CASES: dict[str, tuple[dict[str, Tensor], str, Mapping[str, tuple[int, int]]]] = {
    "kohya": (
        flattened({**BFL_SHAPES, **WIDE}, "lora_unet_"),
        "_convert_kohya_flux_lora_to_diffusers",
        {**FLUX, **WIDE_PARTS},
    ),
    "xlabs": (of_xlabs(), "_convert_xlabs_flux_lora_to_diffusers", FLUX),
    "musubi": (flattened(WAN_ORIGINAL, "lora_unet_"), "_convert_musubi_wan_lora_to_diffusers", WAN),
    "wan": (
        factors({f"diffusion_model.{m}": s for m, s in WAN_ORIGINAL.items()}, ".lora_A.weight", ".lora_B.weight"),
        "_convert_non_diffusers_wan_lora_to_diffusers",
        WAN,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merge_into_the_layout_of_diffusers_adds_what_its_converter_gives(case: str, tmp_path: Path) -> None:
    tensors, converter, shapes = CASES[case]
    save_file(tensors, tmp_path / "lora.safetensors")
    base = {f"{module}.weight": torch.zeros(shape) for module, shape in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "base.safetensors")
    expected = deltas(*convert_with(converter)(tensors))
    assert len(expected) >= 8
    assert expected.keys() <= merged.keys()
    for name, tensor in merged.items():
        wanted = expected.get(name, torch.zeros_like(tensor, dtype=torch.float64))
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_control_adapters_swap_halves_of_one_factor_alone(tmp_path: Path) -> None:
    """diffusers' converter swaps those of lora_A too, along the rank, which changes the product; all else is the same."""
    shapes = {
        **all_blocks({**BFL_SHAPES, **WIDE}),
        "final_layer.adaLN_modulation.1": (8, 4),
        "final_layer.linear": (4, 4),
        "txt_in": (4, 4),
    }
    shapes |= {
        f"{name}_in.{layer}": (4, 4) for name in ("time", "vector", "guidance") for layer in ("in_layer", "out_layer")
    }
    shapes["img_in"] = (4, 4)
    tensors = factors(shapes, ".lora_A.weight", ".lora_B.weight")
    norms = {
        f"double_blocks.{number}.{stream}_attn.norm.{which}_norm.scale": torch.rand(2)
        for number in range(19)
        for stream in ("img", "txt")
        for which in ("query", "key")
    }
    norms |= {
        f"single_blocks.{n}.norm.{which}_norm.scale": torch.rand(2) for n in range(38) for which in ("query", "key")
    }
    biases = {f"{module}.lora_B.bias": torch.randn(shape[0]) for module, shape in shapes.items()}
    save_file({**tensors, **norms, **biases}, tmp_path / "lora.safetensors")
    embedders = {
        f"time_text_embed.{name}_embedder.linear_{n}": (4, 4)
        for name in ("timestep", "text", "guidance")
        for n in (1, 2)
    }
    modules = {**all_blocks({**FLUX, **WIDE_PARTS}), **embedders}
    base = {f"{module}.weight": torch.zeros(shape) for module, shape in modules.items()}
    base |= {f"{module}.bias": torch.zeros(shape[0]) for module, shape in modules.items()}
    base |= {
        f"transformer_blocks.{number}.attn.norm_{name}.weight": torch.ones(2)
        for number in range(19)
        for name in ("q", "k", "added_q", "added_k")
    }
    base |= {
        f"single_transformer_blocks.{n}.attn.norm_{name}.weight": torch.ones(2) for n in range(38) for name in "qk"
    }
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "base.safetensors")
    converted, _ = convert_with("_convert_bfl_flux_control_lora_to_diffusers")({**tensors, **norms, **biases})
    expected = deltas(converted, {})
    odd = "norm_out.linear.weight"
    down, up = (tensors[f"final_layer.adaLN_modulation.1.lora_{half}.weight"].double() for half in "AB")
    wrong, expected[odd] = expected[odd], torch.cat([up[4:], up[:4]]) @ down
    assert not torch.allclose(wrong, expected[odd]), "diffusers has mended its converter"
    replaced = {n.removeprefix("transformer."): t for n, t in converted.items() if ".attn.norm_" in n}
    added = {
        n.removeprefix("transformer.").replace(".lora_B.bias", ".bias"): t
        for n, t in converted.items()
        if n.endswith("B.bias")
    }
    assert len(replaced) == 19 * 4 + 38 * 2
    for name, tensor in merged.items():
        wanted = {**expected, **replaced, **added}[name].double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def met(model: torch.nn.Module, classes: set[str], kinds: tuple[type, ...]) -> dict[str, Any]:
    """The layers of a model as lora_diffusion's `_find_modules` meets them."""
    return {
        f"{at}.{name}": layer
        for at, ancestor in model.named_modules()
        if type(ancestor).__name__ in classes
        for name, layer in ancestor.named_modules()
        if isinstance(layer, kinds)
    }


def test_layers_that_cloneofsimo_numbers_are_those_of_diffusers(tmp_path: Path) -> None:
    """In a U-Net and a text encoder that diffusers and transformers make, narrow ones of Stable Diffusion's depth."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8, 12, 12), norm_num_groups=2, cross_attention_dim=6, attention_head_dim=2
    )
    config = transformers.CLIPTextConfig(
        hidden_size=6, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
    )
    found = {
        "unet": met(unet, {"ResnetBlock2D", "Attention", "GEGLU"}, (torch.nn.Linear, torch.nn.Conv2d)),
        "text_encoder": met(transformers.CLIPTextModel(config), {"CLIPAttention"}, (torch.nn.Linear,)),
    }
    tensors: dict[str, Tensor] = {}
    for component, layers in found.items():
        for number, layer in enumerate(layers.values()):
            shape = layer.weight.shape
            tensors[f"{component}:{number}:down"] = torch.ones(1, *shape[1:])
            tensors[f"{component}:{number}:up"] = torch.ones(shape[0], *(1 for _ in shape[1:]))
    header = {"unet": '["ResnetBlock2D", "Attention", "GEGLU"]', "text_encoder": '["CLIPAttention"]'}
    save_file(tensors, tmp_path / "lora.safetensors", header)
    targets = list(loratool.read_adapter(tmp_path / "lora.safetensors").updates)
    prefixes = ("text_model.", "")  # transformers 5 has none
    wanted = [
        f"{component}.{'text_model.' if component != 'unet' else ''}{name.removeprefix(prefixes[0])}.weight"
        for component, layers in found.items()
        for name in layers
    ]
    assert sorted(targets) == sorted(wanted)
    by_source = {loratool.read_adapter(tmp_path / "lora.safetensors").sources[t][0]: t for t in targets}
    for component, layers in found.items():
        for number, name in enumerate(layers):
            assert by_source[f"{component}:{number}:down"].endswith(f"{name}.weight")
