"""The options about names on the command line, and how a plan shows what was decided."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from malformed import f32, write_adapter, write_base
from workbench import Workbench, tensors_of
from working_plans import working_plan

from loratool.merging.fingerprints import content_fingerprint

HIDDEN, ROWS = 4, 8


def factors(modules: list[str], rows: int, columns: int) -> dict[str, object]:
    generator = np.random.default_rng(3)
    found: dict[str, object] = {}
    for module in modules:
        found[f"base_model.model.{module}.lora_A.weight"] = f32(generator.normal(size=(2, columns)))
        found[f"base_model.model.{module}.lora_B.weight"] = f32(generator.normal(size=(rows, 2)))
    return found


def fused_model(bench: Workbench) -> None:
    """Two layers whose gate and up are one tensor, and an adapter that names them apart."""
    tensors = {f"model.layers.{n}.mlp.gate_up_proj.weight": f32(np.ones((2 * ROWS, HIDDEN))) for n in range(2)}
    write_base(bench.base, tensors)
    write_adapter(bench.adapter, factors([f"net.{n}.att.up" for n in range(2)], ROWS, HIDDEN))  # type: ignore[arg-type]


MAP = r"^net\.(\d+)\.att\.up=model.layers.\1.mlp.up_proj"


def test_a_map_on_the_command_line_gives_names_and_the_plan_shows_rule_and_rows(bench: Workbench) -> None:
    fused_model(bench)
    bench.refuses_to_merge("net.{0-1}.att.up.weight", code=4)
    words: list[str | Path] = ["merge", bench.base, bench.adapter, "-o", bench.out, "--map", MAP, "--dry-run"]
    outcome = bench.run(*words)
    assert outcome.code == 0, outcome.err
    line = "net.{0-1}.att.up → map, up_proj of gate_up_proj → model.layers.{0-1}.mlp.gate_up_proj.weight[8:16]  16×4 F32  ×2"
    assert f"  {line}" in outcome.out.splitlines()
    edits = json.loads(bench.run(*words, "--json").out)["edits"]
    assert [(edit["target"], edit["part"]) for edit in edits] == [
        (f"net.{n}.att.up.weight", f"{ROWS}:{2 * ROWS}") for n in range(2)
    ]
    assert edits[1]["tensor"] == "model.layers.1.mlp.gate_up_proj.weight"


def test_a_map_merges_into_the_rows_that_it_names(bench: Workbench) -> None:
    fused_model(bench)
    before = tensors_of(bench.base)
    after, _ = bench.merges("--map", MAP)
    for name, tensor in before.items():
        assert np.array_equal(after[name][:ROWS], tensor[:ROWS])
        assert not np.allclose(after[name][ROWS:], tensor[ROWS:])


@pytest.mark.parametrize("text", ["x", "(=y", r"a=\7"])
def test_a_map_that_is_none_is_wrong_usage(bench: Workbench, text: str) -> None:
    bench.refuses_to_merge("--map", code=2, options=["--map", text])


def square_conv1d(bench: Workbench) -> None:
    write_base(bench.base, {"h.0.attn.c_proj.weight": f32(np.ones((4, 4)))})
    (bench.base / "config.json").write_text("{}")
    write_adapter(bench.adapter, factors(["h.0.attn.c_proj"], 4, 4), fan_in_fan_out=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "turned"), [("--fan-in-fan-out", True), ("--no-fan-in-fan-out", False)])
def test_a_square_weight_that_nothing_decides_is_stored_as_the_option_says(
    bench: Workbench, option: str, turned: bool
) -> None:
    square_conv1d(bench)
    bench.refuses_to_merge("--fan-in-fan-out or --no-fan-in-fan-out", code=4)
    after, _ = bench.merges(option)
    saved = tensors_of(bench.adapter)
    a, b = (saved[f"base_model.model.h.0.attn.c_proj.lora_{side}.weight"] for side in "AB")
    scale = json.loads((bench.adapter / "adapter_config.json").read_text())
    change = scale["lora_alpha"] / scale["r"] * (b @ a)
    wanted = 1 + (change.T if turned else change)
    assert np.allclose(after["h.0.attn.c_proj.weight"], wanted, rtol=0, atol=1e-6)


def test_another_map_is_another_merge_and_continues_none(bench: Workbench) -> None:
    fused_model(bench)
    up = working_plan(bench.base, bench.adapter, maps=[MAP])
    gate = working_plan(bench.base, bench.adapter, maps=[MAP.replace("up_proj", "gate_proj")])
    assert content_fingerprint(up, []) != content_fingerprint(gate, [])
