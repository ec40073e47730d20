"""A rank above what a layer can have is cut for that layer and told; PEFT loads the result, whichever command made it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_zoo import save_base
from safetensors.torch import save_file
from torch import nn
from trained_adapters import changes, loaded, lora, make_model, trained

import loratool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LAYERS = ["linear", "c_attn", "embed", "conv1", "conv2", "conv3", "square", "experts"]
MOST = {  # the smaller side of each layer, a kernel seen as a matrix
    "linear.weight": 8,
    "c_attn.weight": 16,
    "embed.weight": 8,
    "conv1.weight": 6,
    "conv2.weight": 4,
    "conv3.weight": 4,
    "square.weight": 24,
    "experts.gate_up_proj": 6,
    "experts.down_proj": 5,
}
COMMANDS: dict[str, Callable[[Path, Path, int], Any]] = {
    "resize": lambda given, out, rank: loratool.resize(given / "one", out, rank=rank),
    "combine": lambda given, out, rank: loratool.combine([given / "one", given / "two"], out, rank=rank),
    "combine, svd": lambda given, out, rank: loratool.combine(
        [given / "one", given / "two"], out, method="svd", rank=rank
    ),
    "combine, ties": lambda given, out, rank: loratool.combine(
        [given / "one", given / "two"], out, method="ties", density=1.0, sign="frequency", rank=rank
    ),
    "combine, ctm": lambda given, out, rank: loratool.combine(
        [given / "one", given / "two"], out, rank=rank, rank_policy="ctm"
    ),
    "extract": lambda given, out, rank: loratool.extract(given / "base", given / "tuned", out, rank=rank, exact=True),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, the base, and the base with the first of them."""
    folder, model = tmp_path_factory.mktemp("given"), make_model()
    for adapter, seed in (("one", 3), ("two", 4)):
        trained(folder / adapter, model, lora(LAYERS), seed)
    for checkpoint in ("base", "tuned"):
        save_base(folder / checkpoint, model)
    merged = loaded(model, folder / "one").merge_and_unload().state_dict()
    save_file({n: t.contiguous().clone() for n, t in merged.items()}, folder / "tuned" / "model.safetensors")
    return folder


@pytest.mark.parametrize("rank", [7, 99])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_rank_above_a_layer_s_shape_is_cut_for_that_layer_and_told(
    given: Path, tmp_path: Path, command: str, rank: int
) -> None:
    """Each layer gets the rank, or the most that its shape allows, in its tensors and in `rank_pattern`; a note counts
    the cut layers; PEFT loads the output key for key, and where the ranks are enough it adds the same ΔW as before.
    """
    model, out = make_model(), tmp_path / "out"
    report = COMMANDS[command](given, out, rank)
    wanted = {target: min(rank, most) for target, most in MOST.items()}
    config = json.loads((out / "adapter_config.json").read_text())
    wrapped = loaded(model, out)
    if command in ("resize", "extract"):  # methods of combine may need less
        assert {target: layer.rank for target, layer in report.modules.items()} == wanted
    assert all(layer.rank <= wanted[target] for target, layer in report.modules.items())
    assert config["rank_pattern"] == config["alpha_pattern"]
    (note,) = [note for note in report.notes if note.code == "rank-cut"]
    cut = sum(most < rank for most in MOST.values())
    assert f"rank {rank} is too large for {cut} of {len(MOST)} layers" in note.text
    assert any(f"such as {most} for {target}" in note.text for target, most in MOST.items())
    if command in ("resize", "extract", "combine") and rank == 99:
        one, two = (changes(model, loaded(model, given / name)) for name in ("one", "two"))
        found = changes(model, wrapped)
        for target in MOST:
            change = one[target] + two[target] if command == "combine" else one[target]
            torch.testing.assert_close(found[target], change, rtol=0, atol=3e-6)


@pytest.mark.parametrize("command", ["resize", "combine", "extract"])
def test_a_rank_that_every_layer_can_have_is_no_note(given: Path, tmp_path: Path, command: str) -> None:
    """At the largest rank that all layers can have nothing is cut and nothing told."""
    report = COMMANDS[command](given, tmp_path / "out", min(MOST.values()))
    assert not [note for note in report.notes if note.code == "rank-cut"]


def test_both_matrices_of_an_attention_keep_one_rank(tmp_path: Path) -> None:
    """PEFT gives the two matrices of an nn.MultiheadAttention one rank: the larger that either can have."""
    model = make_model()
    trained(tmp_path / "one", model, lora(["attention"]))
    loratool.resize(tmp_path / "one", tmp_path / "out", rank=99)
    loaded(model, tmp_path / "out")
    assert isinstance(model, nn.Module)


def test_uniform_fills_up_instead(given: Path, tmp_path: Path) -> None:
    """With --uniform every layer has the rank that was asked for, padded with zeros, and PEFT loads it."""
    report = loratool.resize(given / "one", tmp_path / "out", rank=9, uniform=True)
    assert {layer.rank for layer in report.modules.values()} == {9}
    assert not [note for note in report.notes if note.code == "rank-cut"]
    loaded(make_model(), tmp_path / "out")
