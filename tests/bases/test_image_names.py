"""Adapters of image models find their weights in either layout, under every component's name, dotted or flattened.

What is expected is written down from the converters of diffusers and from the code of the models' authors; the whole
tables are compared with those converters in tests/acceptance/test_layouts_of_diffusers.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from diffusion_models import WIDTH, Shapes, bfl_flux, clip, sd15_file, sdxl_file, t5, under, values
from named_updates import Targets, save_targets
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters import formats
from loratool.errors import FitError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

H = WIDTH


@pytest.fixture(autouse=True)
def targets_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Targets()))


def merged(
    base: Shapes, modules: dict[str, tuple[int, int]], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """ΔW of every tensor that a merge of these modules changes, in float64, and that of the modules."""
    before = values(base)
    save_file(before, folder / "base.safetensors")
    changes = save_targets(folder / "adapter", modules)
    loratool.merge(folder / "base.safetensors", folder / "adapter", folder / "out", device="cpu")
    after = load_file(folder / "out" / "base.safetensors")
    assert list(after) == sorted(before)
    changed = {name: after[name].double() - before[name].double() for name in before}
    return {name: change for name, change in changed.items() if change.any()}, changes


UNET = "model.diffusion_model."
# In SD1.5 and SDXL, with the tensor of the single file that is meant, without its prefix and its end.
SD15 = {
    "unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "unet_down_blocks_1_resnets_1_time_emb_proj": "input_blocks.5.0.emb_layers.1",
    "unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": "middle_block.1.transformer_blocks.0.ff.net.0.proj",
    "unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0": "output_blocks.5.1.transformer_blocks.0.attn2.to_out.0",
    "unet.up_blocks.3.attentions.1.transformer_blocks.0.attn2.to_k": "output_blocks.10.1.transformer_blocks.0.attn2.to_k",
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_v": "input_blocks.4.1.transformer_blocks.0.attn2.to_v",
    "mid_block_resnets_1_time_emb_proj": "middle_block.2.emb_layers.1",
    "model.diffusion_model.time_embed.2": "time_embed.2",
    "transformer.time_embedding.linear_1": "time_embed.0",
}
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.{}"


def rows_of(module: str) -> int:
    return 8 * H if module.endswith(("ff_net_0_proj", "ff.net.0.proj")) else 4 * H if module.endswith("fc1") else H


def test_sd15_is_found_in_a_single_file_by_the_names_of_kohya_diffusers_and_ldm(tmp_path: Path) -> None:
    text = {
        "te_text_model_encoder_layers_0_self_attn_q_proj": TEXT.format("0.self_attn.q_proj"),
        "text_encoder.text_model.encoder.layers.1.mlp.fc1": TEXT.format("1.mlp.fc1"),
        "clip_l.text_model.encoder.layers.1.self_attn.out_proj": TEXT.format("1.self_attn.out_proj"),
    }
    wanted = {**{target: UNET + name for target, name in SD15.items()}, **text}
    found, changes = merged(sd15_file(), {target: (rows_of(target), H) for target in wanted}, tmp_path)
    assert found.keys() == {f"{name}.weight" for name in wanted.values()}
    for target, name in wanted.items():
        assert torch.equal(found[f"{name}.weight"], changes[target]), target


def test_sdxl_is_found_in_a_single_file_with_clip_g_in_the_layout_of_open_clip(tmp_path: Path) -> None:
    """Its q, k and v are row blocks of one tensor, and its projection is stored transposed."""
    plain = {
        "unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": f"{UNET}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
        "unet_down_blocks_2_attentions_1_proj_in": f"{UNET}input_blocks.8.1.proj_in.weight",
        "unet.add_embedding.linear_2": f"{UNET}label_emb.0.2.weight",
        "te1_text_model_encoder_layers_0_self_attn_k_proj": "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight",
        "te2_text_model_encoder_layers_0_mlp_fc1": "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight",
        "text_encoder_2.text_model.encoder.layers.1.self_attn.out_proj": "conditioner.embedders.1.model.transformer.resblocks.1.attn.out_proj.weight",
    }
    slices = {
        "te2_text_model_encoder_layers_0_self_attn_q_proj": slice(0, H),
        "clip_g.text_model.encoder.layers.0.self_attn.k_proj": slice(H, 2 * H),
        "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj": slice(2 * H, 3 * H),
    }
    projection = "te2_text_projection"
    modules = {target: (rows_of(target), H) for target in (*plain, *slices, projection)}
    found, changes = merged(sdxl_file(), modules, tmp_path)
    open_clip = "conditioner.embedders.1.model."
    fused = f"{open_clip}transformer.resblocks.0.attn.in_proj_weight"
    assert found.keys() == {*plain.values(), fused, f"{open_clip}text_projection"}
    assert all(torch.equal(found[name], changes[target]) for target, name in plain.items())
    assert all(torch.equal(found[fused][rows], changes[target]) for target, rows in slices.items())
    assert torch.equal(found[f"{open_clip}text_projection"], changes[projection].T)


def flux_file() -> Shapes:
    found = under("model.diffusion_model.", bfl_flux()) | under("text_encoders.clip_l.transformer.", clip())
    return found | under("text_encoders.t5xxl.transformer.", t5())


def test_flux_is_found_in_a_single_file_by_the_names_of_kohya_and_diffusers(tmp_path: Path) -> None:
    """Split projections go to their rows of the fused tensors, and the halves of (scale, shift) to (shift, scale)."""
    q = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    modules = {
        "transformer.transformer_blocks.0.attn.to_k": (H, H),
        "transformer_blocks_0_attn_to_v": (H, H),
        "unet_double_blocks_1_img_attn_qkv": (3 * H, H),
        "transformer_single_transformer_blocks_0_proj_mlp": (4 * H, H),
        "transformer.single_transformer_blocks.0.attn.to_q": (H, H),
        "transformer.norm_out.linear": (2 * H, H),
        "te3_encoder_block_0_layer_0_SelfAttention_q": (H, H),
        "te1_text_model_encoder_layers_0_self_attn_q_proj": (H, H),
    }
    found, changes = merged(flux_file(), modules, tmp_path)
    k, v, qkv, mlp, single_q, norm, t5_q, clip_q = changes.values()
    zero = torch.zeros(H, H, dtype=torch.float64)
    wanted = {
        f"{UNET}double_blocks.0.img_attn.qkv.weight": torch.cat([zero, k, v]),
        f"{UNET}double_blocks.1.img_attn.qkv.weight": qkv,
        f"{UNET}single_blocks.0.linear1.weight": torch.cat([single_q, zero, zero, mlp]),
        f"{UNET}final_layer.adaLN_modulation.1.weight": torch.cat([norm[H:], norm[:H]]),
        q: t5_q,
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": clip_q,
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], change) for name, change in wanted.items())


DIFFUSERS_FLUX: Shapes = {
    **{f"transformer_blocks.0.attn.{name}.weight": (H, H) for name in ("to_q", "to_k", "to_v", "add_q_proj")},
    **{f"transformer_blocks.0.attn.{name}.weight": (H, H) for name in ("add_k_proj", "add_v_proj", "to_out.0")},
    **{f"single_transformer_blocks.0.attn.{name}.weight": (H, H) for name in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.0.proj_mlp.weight": (4 * H, H),
    "single_transformer_blocks.0.proj_out.weight": (H, 5 * H),
    "norm_out.linear.weight": (2 * H, H),
    "x_embedder.weight": (H, H),
}


def test_a_fused_update_is_spread_over_the_split_tensors_of_diffusers(tmp_path: Path) -> None:
    modules = {
        "unet_double_blocks_0_img_attn_qkv": (3 * H, H),
        "diffusion_model.single_blocks.0.linear1": (7 * H, H),
        "unet_single_blocks_0_linear2": (H, 5 * H),
        "unet_final_layer_adaLN_modulation_1": (2 * H, H),
        "diffusion_model.img_in": (H, H),
    }
    found, changes = merged(DIFFUSERS_FLUX, modules, tmp_path)
    qkv, linear1, linear2, modulation, img_in = changes.values()
    block, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
    wanted = {
        **{f"{block}.to_{name}.weight": rows for name, rows in zip("qkv", torch.split(qkv, H), strict=True)},
        **{
            f"{single}.attn.to_{name}.weight": rows
            for name, rows in zip("qkv", torch.split(linear1, H)[:3], strict=True)
        },
        f"{single}.proj_mlp.weight": linear1[3 * H :],
        f"{single}.proj_out.weight": linear2,
        "norm_out.linear.weight": torch.cat([modulation[H:], modulation[:H]]),
        "x_embedder.weight": img_in,
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], change) for name, change in wanted.items())


def test_two_updates_of_the_same_rows_are_refused_whatever_they_are_called(tmp_path: Path) -> None:
    with pytest.raises(FitError) as refused:
        merged(
            flux_file(),
            {
                "unet_double_blocks_0_img_attn_qkv": (3 * H, H),
                "transformer.transformer_blocks.0.attn.to_k": (H, H),
                "unet_double_blocks_0_img_mlp_2": (H, 4 * H),
                "diffusion_model.double_blocks.0.img_mlp.2": (H, 4 * H),
            },
            tmp_path,
        )
    told = str(refused.value)
    assert "double_blocks.0.img_attn.qkv.weight is already edited by" in told
    assert (
        "double_blocks.0.img_mlp.2.weight is edited by diffusion_model.double_blocks.0.img_mlp.2.weight already" in told
    )
    assert not (tmp_path / "out").exists()


def test_names_that_the_base_has_not_are_refused_together_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FitError) as refused:
        merged(
            under("model.diffusion_model.", bfl_flux()),
            {
                "unet_double_blocks_7_img_attn_qkv": (3 * H, H),
                "transformer.transformer_blocks.0.attn.to_x": (H, H),
                "te1_text_model_encoder_layers_0_mlp_fc1": (4 * H, H),
                "unet_img_in": (H, 2 * H),
            },
            tmp_path,
        )
    told = str(refused.value)
    assert "unet_double_blocks_7_img_attn_qkv.weight: no weight of the base has this name" in told
    assert "nearest: double_blocks." in told
    assert "transformer.transformer_blocks.0.attn.to_x.weight: the base has no such weight" in told
    assert "te1_text_model_encoder_layers_0_mlp_fc1.weight: the base has no component te1" in told
    assert "unet_img_in.weight: the update is [4, 8], but img_in.weight is [4, 4]" in told
    assert len(refused.value.problems) == 4
