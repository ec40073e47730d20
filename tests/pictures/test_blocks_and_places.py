"""Where modules are on a map, and how tables are written: what large models and odd names make of them."""

from __future__ import annotations

import pytest
from pictured import table_of

from loratool.pictures.blocks import MOST_ROWS, Column, Message, Messages, Shown, Table, Tiles
from loratool.pictures.modules import MOST_CELLS, places_of


def test_layers_are_in_the_order_of_their_numbers_and_attention_comes_before_the_rest() -> None:
    layers = [f"model.layers.{n}.{name}.weight" for n in (10, 2, 0) for name in ("mlp.up_proj", "self_attn.v_proj")]
    places = places_of([*layers, "lm_head.weight", "model.layers.2.post_attention_layernorm.weight"])
    assert places.columns == ("0", "2", "10", "–")
    assert places.rows == ("self_attn.v_proj", "mlp.up_proj", "post_attention_layernorm", "lm_head")
    assert places.of["model.layers.10.mlp.up_proj.weight"] == (1, 2)
    assert places.by_layer[0] == "model.layers.0.self_attn.v_proj.weight"
    assert places.by_layer[-1] == "lm_head.weight"


def test_names_without_layers_and_no_names_at_all_have_places() -> None:
    assert places_of(["a", "b"]).columns == ("–",)
    assert places_of([]).cells({}) == ()


def test_experts_of_a_large_model_share_a_cell_with_their_mean() -> None:
    """Of few modules each has a cell, and its row in the table; of more than a map can show, numbers are folded."""
    few = [f"layers.0.experts.{n}.up_proj.weight" for n in range(3)]
    assert [
        cell.entry for cell in places_of(few).cells(dict.fromkeys(few, 1.0), {n: at for at, n in enumerate(few)})
    ] == [0, 1, 2]
    many = [
        f"layers.{layer}.experts.{n}.{kind}.weight"
        for layer in range(2)
        for n in range(MOST_CELLS // 2)
        for kind in ("up", "down")
    ]
    places = places_of(many)
    assert places.rows == ("down", "up")  # what all names have in common is left out
    values = {name: float(int(name.split(".")[3]) % 2) for name in many}
    cells = places.cells(values, {name: at for at, name in enumerate(many)})
    assert [(cell.value, cell.entry) for cell in cells] == [(0.5, None)] * 4
    assert cells[0].label == f"down of layer 0, {MOST_CELLS // 2} together"


def test_what_the_table_leaves_out_is_said_and_no_cell_refers_to_it() -> None:
    count = MOST_ROWS + 3
    markup = Table("t", [Column("name"), Column("n")], [(f"r{at}", at) for at in range(count)]).markup("p")
    assert markup.count("<tr>") == 1 + MOST_ROWS
    assert "The last 3 rows are left out; --json has all." in markup
    names = [f"layers.{n}.a" for n in range(count)]
    entries = [
        cell.entry for cell in places_of(names).cells(dict.fromkeys(names, 1.0), {n: at for at, n in enumerate(names)})
    ]
    assert max(entry for entry in entries if entry is not None) < MOST_ROWS


def test_cells_are_written_as_people_read_them() -> None:
    rows = [("a<b", 1234567, 0.123456, Shown("1.20 GB", 1.2e9), None), ("c", 0, 2e-7, Shown("3 B", 3), None)]
    columns = [Column(name) for name in ("name", "count", "part", "size", "nothing")]
    table = table_of(Table("t", columns, rows).markup("p"), "name")
    assert table["a<b"] == {"name": "a<b", "count": "1,234,567", "part": "0.1235", "size": "1.20 GB", "nothing": "–"}
    assert table["c"]["part"] == "2e-07"


@pytest.mark.parametrize("text", ["<script>x</script>", '" onload="x', "&lt;"])
def test_text_from_anywhere_is_escaped_in_every_block(text: str) -> None:
    blocks = (
        Tiles([(text, text)]),
        Messages(text, [Message(True, text, text, text)]),
        Table(text, [Column(text, text), Column("n")], [(text, 1)], text),
    )
    for block in blocks:
        markup = block.markup("p")
        assert text not in markup
        assert "<script" not in markup
        assert 'onload="' not in markup
