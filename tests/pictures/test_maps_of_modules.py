"""Where modules are on a heat map: layers and kinds of models of language, blocks of image models."""

from __future__ import annotations

import pytest

from loratool.layouts.diffusion.known import links
from loratool.pictures.modules import places_of


def test_layers_are_columns_in_the_order_of_their_numbers_and_attention_comes_first() -> None:
    names = ["mlp.up_proj", "self_attn.v_proj", "self_attn.q_proj"]
    places = places_of([f"model.layers.{at}.{name}.weight" for at in (10, 2) for name in names] + ["lm_head.weight"])
    assert places.columns == ("2", "10", "–")
    assert places.rows == ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "lm_head")
    assert places.of["model.layers.10.mlp.up_proj.weight"] == (2, 1)


def test_transformers_within_a_block_of_sdxl_have_columns_of_their_own() -> None:
    """The U-Net of SDXL has 70 of them: 4 and 20 on the way down, 10 in the middle, 30 and 6 on the way up."""
    places = places_of([f"unet.{row.parts[0]}.weight" for row in links("sdxl")])
    (row,) = (at for at, name in enumerate(places.rows) if name == "attn1.to_q")
    columns = [places.columns[column] for r, column in places.of.values() if r == row]
    assert len(columns) == 70
    assert columns[:5] == ["IN04.0", "IN04.1", "IN05.0", "IN05.1", "IN07.0"]
    assert columns[-1] == "OUT05.1"
    assert sum(column.startswith("MID.") for column in columns) == 10


@pytest.mark.parametrize("separator", [".", "_"])
@pytest.mark.parametrize("name", ["sdxl", "sd15", "flux", "sd3", "wan-1.3b", "qwen-image"])
def test_no_two_modules_of_an_image_model_share_a_cell(name: str, separator: str) -> None:
    targets = {f"unet.{row.original}".replace(".", separator) for row in links(name)}
    places = places_of(targets)
    assert len(set(places.of.values())) == len(places.of) == len(targets)
    assert len(places.rows) < 60
    assert len(places.columns) < 100


def test_what_follows_all_blocks_of_a_transformer_is_behind_them() -> None:
    targets = [
        "unet.double_blocks.3.img_attn.qkv",
        "unet.final_layer.linear",
        "unet.single_blocks.0.linear1",
        "unet.img_in",
    ]
    assert places_of(targets).columns == ("IN", "D03", "S00", "OUT")
