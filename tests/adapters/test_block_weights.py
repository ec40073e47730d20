"""Weights of blocks: names in both layouts and all dialects lie in the same block, and lists and presets mean what they
mean in the tools that they come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from diffusion_models import WIDTH, clip, ldm_unet, under, values
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters.blocks import BlockWeights
from loratool.errors import UsageError
from loratool.layouts.diffusion.blocks import block_of
from loratool.layouts.diffusion.known import links

if TYPE_CHECKING:
    from pathlib import Path

H = WIDTH

# Names of SD1.5, SDXL and Flux with their blocks, from the extension's table and the models' code.
BLOCKS = {
    "unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.weight": "IN01",
    "unet.down_blocks.1.attentions.1.proj_in.weight": "IN05",
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": "IN04",
    "unet_down_blocks_0_downsamplers_0_conv.weight": "IN03",
    "unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2.weight": "MID",
    "unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.weight": "OUT03",
    "unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q.weight": "OUT03",
    "unet.up_blocks.3.attentions.2.proj_out.weight": "OUT11",
    "te_text_model_encoder_layers_3_self_attn_q_proj.weight": "CLIP",
    "text_encoder_2.text_model.encoder.layers.3.mlp.fc1.weight": "CLIP",
    "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight": "CLIP",
    "te3_encoder_block_0_layer_0_SelfAttention_q.weight": "T5",
    "text_encoder_2.encoder.block.23.layer.1.DenseReluDense.wo.weight": "T5",
    "te_model_layers_3_mlp_up_proj.weight": "BASE",
    "unet_img_in.weight": "IN",
    "transformer.time_text_embed.timestep_embedder.linear_1.weight": "IN",
    "model.diffusion_model.final_layer.linear.weight": "OUT",
    "transformer.proj_out.weight": "OUT",
    "transformer.single_transformer_blocks.3.proj_out.weight": "S03",
    "unet_double_blocks_7_img_attn_qkv.weight": "D07",
    "transformer.transformer_blocks.7.attn.to_q.weight": "D07",
    "transformer_single_transformer_blocks_37_proj_mlp.weight": "S37",
    "unet_single_blocks_37_linear1.weight": "S37",
    "unet_time_embed_0.weight": "BASE",
    "model.layers.11.mlp.up_proj.weight": "L11",
    "transformer.h.3.attn.c_attn.weight": "L03",
    "bert.encoder.layer.3.attention.self.query.weight": "L03",
    "distilbert.transformer.layer.3.attention.q_lin.weight": "L03",
    "decoder.block.3.layer.0.SelfAttention.q.weight": "L03",
    "vit_encoder_layer_3_attention_attention_query.weight": "L03",
}


def test_a_name_lies_in_its_block_in_whatever_dialect() -> None:
    assert {name: block_of(name) for name in BLOCKS} == BLOCKS


@pytest.mark.parametrize("model", ["sd15", "sdxl", "flux", "sd3", "wan-1.3b"])
def test_both_layouts_of_a_module_lie_in_one_block(model: str) -> None:
    for row in links(model):
        block = block_of(f"{row.original}.weight")
        assert all(block_of(f"{part}.weight") == block for part in row.parts), row


def test_words_for_blocks_mean_their_factors() -> None:
    outs = dict.fromkeys([f"OUT{n:02d}" for n in range(3, 12)], 1.0)
    ins = dict.fromkeys(("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"), 0.0)
    assert BlockWeights.of(["OUTALL"]).factors == {"BASE": 1.0, **ins, **outs}
    assert BlockWeights.of(["IN04-IN06=0.5", "S=0", "MID=2"]).factors == {
        **dict.fromkeys(("IN04", "IN05", "IN06"), 0.5),
        "S": 0.0,
        "MID": 2.0,
    }
    assert (
        BlockWeights.of(["1", "0", "0", "0", "0", "0.5", "0", "0", "0", "0", "0", "2"]).factors["MID"] == 0.5
    )  # SDXL's twelve
    assert BlockWeights.of(["S=0", "S03=1"]).factor("unet_single_blocks_3_linear1") == 1.0
    for words, told in (
        (["1", "2"], "a list has"),
        (["IN=x"], "IN=x"),
        (["Q03=1"], "is not a block"),
        (["HM"], "preset"),
    ):
        with pytest.raises(UsageError, match=told):
            BlockWeights.of(words)


def test_presets_are_those_of_the_extension() -> None:
    """Each as its 17 numbers, of which the extension's own file has INS with IN04."""
    ons = {block for block, factor in BlockWeights.of(["INS"]).factors.items() if factor}
    assert ons == {"BASE", "IN01", "IN02", "IN04"}


def test_a_block_that_a_list_leaves_out_is_asked_for() -> None:
    """The tools that lists come from multiply what has no number by 0, and OUT00 of SDXL is not in the list of SD1.5."""
    names = ["unet.up_blocks.0.attentions.0.proj_in.weight", "unet.down_blocks.1.attentions.0.proj_in.weight"]
    with pytest.raises(UsageError, match=r"no number for OUT00.*add OUT00=0"):
        BlockWeights.of(["ALL"]).check(names)
    with pytest.raises(UsageError, match=r"no number for L00-L02, L04, where.*add L00-L02=0,L04=0, or"):
        BlockWeights.of(["ALL"]).check([f"transformer.h.{n}.attn.c_attn" for n in (0, 1, 2, 4)])
    for more in ("OUT00=0.5", "OUT=0.5"):
        weights = BlockWeights.of(["INALL", more])
        weights.check(names)
        assert [weights.factor(name) for name in names] == [0.5, 1.0]
    BlockWeights.of(["1"] * 26).check(names)


def test_sixty_one_numbers_are_those_of_the_extension_for_flux() -> None:
    """Text encoders and what comes before and after the blocks have numbers of their own."""
    order = ["CLIP", "T5", "IN", *(f"D{n:02d}" for n in range(19)), *(f"S{n:02d}" for n in range(38)), "OUT"]
    weights = BlockWeights.of([str(number) for number in range(61)])
    names = {
        "te1_text_model_encoder_layers_0_mlp_fc1": "CLIP",
        "te2_encoder_block_0_layer_0_SelfAttention_q": "T5",
        "unet_guidance_in_in_layer": "IN",
        "unet_double_blocks_18_img_attn_qkv": "D18",
        "unet_single_blocks_0_linear1": "S00",
        "unet_final_layer_linear": "OUT",
    }
    weights.check(names)
    assert {name: weights.factor(name) for name in names} == {n: order.index(block) for n, block in names.items()}
    with pytest.raises(UsageError, match="no number for IN04"):
        weights.check(["unet_input_blocks_4_1_proj_in"])


def test_what_has_no_factor_of_its_own_has_that_of_the_rest() -> None:
    names = ("te1_text_model_x", "unet_img_in", "unet_final_layer_linear", "unet_double_blocks_0_img_attn_qkv")
    assert [BlockWeights.of(["BASE=0.5", "CLIP=2"]).factor(name) for name in names] == [2, 0.5, 0.5, 1]
    assert [BlockWeights.of(["CLIP=2", "BASE=0.5"]).factor(name) for name in names] == [0.5, 0.5, 0.5, 1]


@pytest.mark.parametrize("word", ["IN40=0.5", "S=0.5", "D30-D40=0", "T5=1"])
def test_a_block_that_no_weight_lies_in_is_refused_next_to_others_that_are_there(word: str) -> None:
    names = ["unet.up_blocks.1.attentions.0.proj_in.weight", "te_text_model_encoder_layers_3_self_attn_q_proj.weight"]
    with pytest.raises(UsageError, match=f"the adapter changes nothing in {word}; it changes CLIP, OUT03"):
        BlockWeights.of(["OUT03=0.5", word]).check(names)
    BlockWeights.of(["OUT00-OUT05=0.5", "BASE=2", "OUT=1"]).check(names)


def test_later_words_count_over_earlier_ones_and_over_a_list() -> None:
    name = "unet.up_blocks.1.attentions.0.proj_in.weight"
    assert BlockWeights.of(["OUT03=2", "OUT=0.5"]).factor(name) == 0.5
    assert BlockWeights.of(["OUT=0.5", "OUT03=2"]).factor(name) == 2
    assert BlockWeights.of(["OUTALL", "OUT=0.5"]).factor(name) == 0.5
    assert BlockWeights.of([*["1"] * 17, "OUT03=2"]).factor(name) == 2


def test_a_range_may_be_given_backwards_and_the_middle_by_its_other_name() -> None:
    assert BlockWeights.of(["OUT05-OUT04=0.5", "M00=2"]).factors == {"OUT04": 0.5, "OUT05": 0.5, "MID": 2.0}


MODULES = {
    "unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": 0.5,
    "unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": 1.0,
    "unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": 0.0,
    "te_text_model_encoder_layers_0_self_attn_q_proj": -2.0,
}
WORDS = ["IN=0.5", "OUT03=0", "BASE=-2"]
STORED = {
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": 0,
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight": 1,
    "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn1.to_q.weight": 2,
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": 3,
}


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """An SD1.5 file, and an adapter of kohya's of rank 2 whose ΔW is 2 everywhere."""
    shapes = under("model.diffusion_model.", ldm_unet((1, 1, 1, 0), matrix_ends=False, added=False))
    save_file(values(shapes | under("cond_stage_model.transformer.", clip())), tmp_path / "sd.safetensors")
    tensors = {}
    for module in MODULES:
        tensors[f"lora_{module}.lora_down.weight"] = torch.ones(2, H)
        tensors[f"lora_{module}.lora_up.weight"] = torch.ones(H, 2)
        tensors[f"lora_{module}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "sd.safetensors", tmp_path / "lora.safetensors"


def changes_in(before: Path, after: Path) -> dict[str, float]:
    """What was added to each tensor that changed, the same everywhere."""
    old, new = load_file(before), load_file(after)
    found = {}
    for name in old:
        if not torch.equal(old[name], new[name]):
            (found[name],) = set((new[name] - old[name]).flatten().tolist())
    return found


def test_a_merge_weighs_blocks(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    loratool.merge(base, adapter, tmp_path / "out.safetensors", weights=2, block_weights=WORDS, device="cpu")
    factors = list(MODULES.values())
    wanted = {name: 4 * factors[at] for name, at in STORED.items() if factors[at]}
    assert changes_in(base, tmp_path / "out.safetensors") == wanted
    with pytest.raises(UsageError, match="the adapter changes nothing in D"):
        loratool.merge(base, adapter, tmp_path / "o.safetensors", block_weights="D=0.5", device="cpu")


def test_an_adapter_rescaled_by_block_merges_to_the_same(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    report = loratool.rescale(adapter, tmp_path / "scaled.safetensors", block_weights=WORDS)
    assert "alpha-is-zero" not in [note.code for note in report.notes]  # it is what was asked for
    loratool.merge(base, tmp_path / "scaled.safetensors", tmp_path / "out.safetensors", device="cpu")
    factors = list(MODULES.values())
    assert changes_in(base, tmp_path / "out.safetensors") == {
        name: 2 * factors[at] for name, at in STORED.items() if factors[at]
    }


def test_a_combination_weighs_blocks(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where weights are divided by their sum, in which a factor of an adapter's weight would cancel."""
    base, adapter = inputs
    factors = list(MODULES.values())
    for name, keywords in (("sum", {"weights": [1, 0.5]}), ("mean", {"normalize": True})):
        out = tmp_path / f"{name}.safetensors"
        loratool.combine([adapter, adapter], out, block_weights=WORDS, device="cpu", **keywords)
        loratool.merge(base, out, tmp_path / f"{name}-merged.safetensors", device="cpu")
        whole = 3 if name == "sum" else 2
        found = changes_in(base, tmp_path / f"{name}-merged.safetensors")
        assert found == {tensor: whole * factors[at] for tensor, at in STORED.items() if factors[at]}
    with pytest.raises(UsageError, match="the adapter changes nothing in D"):
        loratool.combine([adapter, adapter], tmp_path / "o.safetensors", block_weights="D=0.5", device="cpu")
