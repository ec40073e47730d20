"""Adapters of every method are merged as their formulas have it, with weights that take several blocks of rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import role_formulas
import torch
from role_formulas import random
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

ALPHA = torch.tensor(1.0)
ROWS, COLUMNS = 520, 600  # of a weight that takes two blocks
UP, DOWN = random(6, 2), random(2, 4)
LENGTHS, TALL_UP, TALL_DOWN = random(1, COLUMNS).abs() + 1, random(ROWS, 1), random(1, COLUMNS)
BLOCKS, GENERATORS = random(ROWS // 4, 4, 4), random(3, 8, 2, 2)
GLORA = (random(4, 2), random(2, 4), random(6, 2, seed=1), random(2, 4, seed=2))
# what a file has of a module
MODULES: dict[str, dict[str, Tensor]] = {
    "plain": {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": ALPHA, "diff_b": random(6)},
    "core": {
        "lora_down.weight": random(2, 4, 1, 1),
        "lora_up.weight": random(6, 2, 1, 1),
        "lora_mid.weight": random(2, 2, 3, 3),
        "alpha": ALPHA,
    },
    "hadamard": {
        "hada_w1_a": UP,
        "hada_w1_b": random(2, 36, seed=1),
        "hada_w2_a": random(6, 2, seed=2),
        "hada_w2_b": random(2, 36, seed=3),
        "alpha": ALPHA,
    },
    "kronecker": {"lokr_w1": random(2, 2), "lokr_w2_a": random(3, 1), "lokr_w2_b": random(1, 18), "alpha": ALPHA},
    "columns": {"lora_down.weight": TALL_DOWN, "lora_up.weight": TALL_UP, "dora_scale": LENGTHS, "alpha": ALPHA},
    "rotated": {"oft_blocks": BLOCKS, "alpha": torch.tensor(0.01)},
    "butterfly": {"oft_blocks": GENERATORS, "alpha": torch.tensor(0.0)},
    "gated": {"weight": random(4), "on_input": torch.tensor(1)},
    "general": {**dict(zip(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), GLORA, strict=True)), "alpha": ALPHA},
    "norm": {"w_norm": random(6), "b_norm": random(6, seed=1)},
    "sparse": {
        "lora_down.weight": DOWN,
        "lora_up.weight": UP,
        "alpha": ALPHA,
        "bias_indices": torch.tensor([[5], [3]], dtype=torch.int16),
        "bias_values": torch.ones(1),
        "bias_size": torch.tensor([6, 4], dtype=torch.int16),
    },
}
SHAPES = {
    "core": (6, 4, 3, 3),
    "hadamard": (6, 4, 3, 3),
    "kronecker": (6, 4, 3, 3),
    "columns": (ROWS, COLUMNS),
    "rotated": (ROWS, COLUMNS),
    "butterfly": (16, 5),
    "norm": (6,),
}
BASE = {
    **{f"diffusion_model.{name}.weight": random(*SHAPES.get(name, (6, 4)), seed=9) for name in MODULES},
    "diffusion_model.plain.bias": random(6, seed=9),
    "diffusion_model.norm.bias": random(6, seed=9),
    "diffusion_model.untouched.weight": random(6, 4),
}


def weight(name: str) -> Tensor:
    return BASE[f"diffusion_model.{name}.weight"].double()


@cache
def wanted() -> Mapping[str, Tensor]:
    """W' of every weight, by the formulas."""
    core, halves, kron = (MODULES[name] for name in ("core", "hadamard", "kronecker"))
    mid = core["lora_mid.weight"]
    one = role_formulas.product_of(halves["hada_w1_a"], halves["hada_w1_b"])
    other = role_formulas.product_of(halves["hada_w2_a"], halves["hada_w2_b"])
    right = role_formulas.product_of(kron["lokr_w2_a"], kron["lokr_w2_b"]).reshape(3, 2, 3, 3)
    single = torch.zeros(6, 4, dtype=torch.float64)
    single[5, 3] = 1
    change, tall = role_formulas.lora(UP, DOWN, 0.5), TALL_UP.double() @ TALL_DOWN.double()
    return {
        "plain": weight("plain") + change,
        "core": weight("core") + role_formulas.lora(core["lora_up.weight"], core["lora_down.weight"], 0.5, mid),
        "hadamard": weight("hadamard") + (0.5 * one * other).reshape(6, 4, 3, 3),
        "kronecker": weight("kronecker") + role_formulas.kronecker(kron["lokr_w1"], right, 1.0),
        "columns": role_formulas.dora(weight("columns"), tall, LENGTHS, by_column=True),
        "rotated": role_formulas.oft(weight("rotated"), BLOCKS, 0.01 * ROWS),
        "butterfly": role_formulas.boft(weight("butterfly"), GENERATORS),
        "gated": weight("gated") * (1 + MODULES["gated"]["weight"].double()),
        "general": role_formulas.glora(weight("general"), GLORA, 0.5),
        "norm": weight("norm") + MODULES["norm"]["w_norm"].double(),
        "sparse": weight("sparse") + change + single,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roles")
    tensors = {f"diffusion_model.{name}.{role}": t for name, roles in MODULES.items() for role, t in roles.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter.safetensors")
    save_file(BASE, folder / "base.safetensors")
    return folder


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_every_method_is_merged_as_its_formula_has_it(files: Path, tmp_path: Path, strength: float) -> None:
    """At another weight the result lies on the line from W through W'."""
    out = tmp_path / "out"
    report = loratool.merge(
        files / "base.safetensors", files / "adapter.safetensors", out, weights=[strength], device="cpu"
    )
    merged = load_file(out / "base.safetensors")
    for name, after in wanted().items():
        line = weight(name).lerp(after, strength).float()
        torch.testing.assert_close(merged[f"diffusion_model.{name}.weight"], line, rtol=3e-7, atol=3e-7, msg=name)
    bias = BASE["diffusion_model.plain.bias"].double() + strength * MODULES["plain"]["diff_b"].double()
    torch.testing.assert_close(merged["diffusion_model.plain.bias"].double(), bias)
    bias = BASE["diffusion_model.norm.bias"].double() + strength * MODULES["norm"]["b_norm"].double()
    torch.testing.assert_close(merged["diffusion_model.norm.bias"].double(), bias)
    assert torch.equal(merged["diffusion_model.untouched.weight"], BASE["diffusion_model.untouched.weight"])
    assert not [note for note in report.notes if note.code == "alpha-missing"]
    assert loratool.verify(out, files / "base.safetensors", files / "adapter.safetensors", weights=[strength]).passes


def test_oft_of_kohya_is_known_by_its_prefix(tmp_path: Path) -> None:
    """Its α limits the rotation even where it is 0, unlike that of LyCORIS."""
    blocks, base = random(3, 2, 2), random(6, 4, seed=9)
    for alpha, limit in ((1e-3, 6e-3), (0.0, 0.0)):
        folder = tmp_path / str(alpha)
        folder.mkdir()
        save_file({"unet.mid.proj.weight": base}, folder / "base.safetensors")
        other = {"oft_unet_mid_other.oft_blocks": blocks.clone(), "oft_unet_mid_other.alpha": torch.tensor(1.0)}
        save_file({"unet.mid.proj.weight": base, "unet.mid.other.weight": base.clone()}, folder / "base.safetensors")
        tensors = {"oft_unet_mid_proj.oft_blocks": blocks, "oft_unet_mid_proj.alpha": torch.tensor(alpha), **other}
        save_file(tensors, folder / "adapter.safetensors")
        loratool.merge(folder / "base.safetensors", folder / "adapter.safetensors", folder / "out", device="cpu")
        merged = load_file(folder / "out" / "base.safetensors")["unet.mid.proj.weight"]
        torch.testing.assert_close(merged.double(), role_formulas.oft(base, blocks, limit), rtol=1e-6, atol=1e-6)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A base whose input layers have fewer columns, or channels, than an adapter was trained on."""
    base = {
        "diffusion_model.img_in.weight": random(4, 3, seed=9),
        "diffusion_model.conv.weight": random(4, 3, 2, 2, seed=9),
        "diffusion_model.other.weight": random(4, 3),
    }
    adapter = {
        "diffusion_model.img_in.lora_A.weight": random(2, 6),
        "diffusion_model.img_in.lora_B.weight": random(4, 2),
        "diffusion_model.conv.lora_down.weight": random(2, 5, 2, 2),
        "diffusion_model.conv.lora_up.weight": random(6, 2, 1, 1),
        "diffusion_model.conv.reshape_weight": torch.tensor([6, 5, 2, 2]),
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "adapter.safetensors")
    return tmp_path


def test_a_weight_is_filled_up_with_zeros_to_the_shape_that_was_trained(wide: Path) -> None:
    """Input layers of ControlNets of Flux, and what `reshape_weight` says of any other weight."""
    report = loratool.merge(wide / "base.safetensors", wide / "adapter.safetensors", wide / "out", device="cpu")
    base, merged = load_file(wide / "base.safetensors"), load_file(wide / "out" / "base.safetensors")
    for name, shape in (("img_in", (4, 6)), ("conv", (6, 5, 2, 2))):
        filled = torch.zeros(*shape, dtype=torch.float64)
        before = base[f"diffusion_model.{name}.weight"].double()
        filled[tuple(map(slice, before.shape))] = before
        up, down = (random(shape[0], 2), random(2, 6)) if name == "img_in" else (random(6, 2, 1, 1), random(2, 5, 2, 2))
        wanted = (filled + role_formulas.lora(up, down, 1.0)).float()
        torch.testing.assert_close(merged[f"diffusion_model.{name}.weight"], wanted, rtol=0, atol=0)
    assert torch.equal(merged["diffusion_model.other.weight"], base["diffusion_model.other.weight"])
    assert [note.code for note in report.notes].count("tensor-widened") == 2
    assert loratool.verify(wide / "out", wide / "base.safetensors", wide / "adapter.safetensors").passes


def test_adapters_that_see_a_weight_in_two_shapes_are_refused_together(wide: Path) -> None:
    plain = {
        "diffusion_model.img_in.lora_A.weight": random(2, 3),
        "diffusion_model.img_in.lora_B.weight": random(4, 2),
    }
    save_file(plain, wide / "plain.safetensors")
    adapters = [wide / "adapter.safetensors", wide / "plain.safetensors"]
    with pytest.raises(loratool.FitError, match=r"img_in\.weight: one adapter fills it up to \[4, 6\], others do not"):
        loratool.merge(wide / "base.safetensors", adapters, wide / "out", device="cpu")


def test_a_smaller_update_is_not_filled_up(wide: Path) -> None:
    """Zeros are added to the weight, never to factors."""
    narrow = {
        "diffusion_model.img_in.lora_A.weight": random(2, 2),
        "diffusion_model.img_in.lora_B.weight": random(4, 2),
    }
    save_file(narrow, wide / "narrow.safetensors")
    with pytest.raises(loratool.FitError, match=r"img_in\.weight.*\[4, 2\]|\(4, 2\)"):
        loratool.merge(wide / "base.safetensors", wide / "narrow.safetensors", wide / "out", device="cpu")


# ---- updates that depend on all of a weight, which the base has in parts ----

HEAD = "transformer_blocks.0.attn"
PARTS = ("to_q", "to_k", "to_v")
QKV = {"lora_down.weight": random(1, 8), "lora_up.weight": random(24, 1), "alpha": ALPHA}
OF_ALL_ROWS = {
    "DoRA of columns": {**QKV, "dora_scale": random(1, 8, seed=5).abs() + 1},
    "OFT": {"oft_blocks": random(2, 12, 12) / 4},  # blocks of rows that two parts share
    "BOFT": {"oft_blocks": random(2, 6, 4, 4) / 4, "alpha": torch.tensor(0.0)},
}


@pytest.fixture
def in_parts(tmp_path: Path) -> dict[str, Tensor]:
    """Flux in diffusers' layout; of q, k and v one is stored in another dtype."""
    base = {f"{HEAD}.{name}.weight": random(8, 8, seed=n) for n, name in enumerate(PARTS)}
    base |= {f"{HEAD}.add_q_proj.weight": random(8, 8), "x_embedder.weight": random(8, 4)}
    base |= {"context_embedder.weight": random(8, 8), f"{HEAD}.to_k.weight": base[f"{HEAD}.to_k.weight"].bfloat16()}
    save_file(base, tmp_path / "base.safetensors")
    return base


def save_fused(tmp_path: Path, roles: Mapping[str, Tensor], module: str = "double_blocks_0_img_attn_qkv") -> Path:
    tensors = {f"lora_unet_{module}.{role}": tensor.clone() for role, tensor in roles.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("method", OF_ALL_ROWS)
def test_parts_of_a_fused_weight_see_each_other(method: str, in_parts: dict[str, Tensor], tmp_path: Path) -> None:
    """Norms of columns, and rotations of rows, are those of q, k and v together, as they are one weight to the adapter."""
    adapter, base, out = save_fused(tmp_path, OF_ALL_ROWS[method]), tmp_path / "base.safetensors", tmp_path / "out"
    loratool.merge(base, adapter, out, device="cpu", weights=[0.5])
    whole, roles = torch.cat([in_parts[f"{HEAD}.{name}.weight"].float() for name in PARTS]), OF_ALL_ROWS[method]
    if method == "DoRA of columns":
        change = role_formulas.lora(roles["lora_up.weight"], roles["lora_down.weight"], 1.0)
        after = role_formulas.dora(whole, change, roles["dora_scale"], by_column=True)
    elif method == "OFT":
        after = role_formulas.oft(whole, roles["oft_blocks"])
    else:
        after = role_formulas.boft(whole, roles["oft_blocks"])
    merged, wanted = load_file(out / "base.safetensors"), whole.double().lerp(after, 0.5)
    for name, rows in zip(PARTS, wanted.view(3, 8, 8), strict=True):
        found = merged[f"{HEAD}.{name}.weight"]
        eps = 2**-8 if found.dtype == torch.bfloat16 else 3e-7
        torch.testing.assert_close(found.double(), rows, rtol=eps, atol=eps)
    assert loratool.verify(out, base, adapter, weights=[0.5]).passes


def test_parts_that_another_adapter_replaces_are_told(in_parts: dict[str, Tensor], tmp_path: Path) -> None:
    adapter = save_fused(tmp_path, OF_ALL_ROWS["DoRA of columns"])
    save_file({f"transformer.{HEAD}.to_v.set_weight": random(8, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(loratool.FitError, match=r"img_attn_qkv\.weight: depends on .*to_v\.weight, which is replaced"):
        loratool.merge(
            tmp_path / "base.safetensors", [adapter, tmp_path / "other.safetensors"], tmp_path / "out", device="cpu"
        )
    assert len(in_parts) == 6


def test_dora_of_columns_of_a_fused_weight_becomes_lora_of_its_parts(
    in_parts: dict[str, Tensor], tmp_path: Path
) -> None:
    """At full rank W' − W of q, k and v is that of the weight in which they are one."""
    adapter, roles = save_fused(tmp_path, OF_ALL_ROWS["DoRA of columns"]), OF_ALL_ROWS["DoRA of columns"]
    loratool.convert(
        adapter, tmp_path / "lora", to="diffusers", base=tmp_path / "base.safetensors", rank=8, architecture="flux"
    )
    whole = torch.cat([in_parts[f"{HEAD}.{name}.weight"].float() for name in PARTS])
    change = role_formulas.lora(roles["lora_up.weight"], roles["lora_down.weight"], 1.0)
    wanted = role_formulas.dora(whole, change, roles["dora_scale"], by_column=True) - whole.double()
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    found = load_file(file)
    for name, rows in zip(PARTS, wanted.view(3, 8, 8), strict=True):
        a, b = (found[f"transformer.{HEAD}.{name}.lora_{side}.weight"].double() for side in "AB")
        torch.testing.assert_close(b @ a, rows, rtol=1e-5, atol=1e-5)
