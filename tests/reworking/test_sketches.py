"""Sketches of updates, held to their definition on dense matrices, and to dense norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sketch_definition
import torch
from peft_files import named_by_peft, save_peft
from safetensors.torch import load_file, save_file

import loratool
from loratool.algebra import sketching
from loratool.algebra.sketching import Sketcher, folded, tolerance
from loratool.errors import FitError, InputError
from loratool.inspecting.neighbours import Sketched, is_same, twins
from loratool.results.sketch import SketchFacts
from loratool.reworking.sketches import Sketch, sketch_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYERS = {
    "model.layers.0.self_attn.q_proj": (24, 16, 3),
    "model.layers.0.self_attn.k_proj": (8, 16, 3),
    "model.layers.0.self_attn.v_proj": (8, 16, 3),
    "model.layers.1.mlp.down_proj": (16, 40, 2),
}
SCALE = 1.75
GOLDEN = [-38.0, 17.0, 52.0, 0.0, -27.0, 0.0, 32.0, -24.0]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def factors(seed: int = 0) -> Factors:
    """(B, A) of each module, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {name: (normal(out, rank), normal(rank, into)) for name, (out, into, rank) in LAYERS.items()}


def write(folder: Path, given: Factors, dtype: torch.dtype = torch.float32, scale: float = SCALE, **more: Any) -> Path:
    """An adapter of PEFT's; `more` are tensors besides the factors."""
    rank = {name: pair[1].shape[0] for name, pair in given.items()}
    alpha = {name: scale * r for name, r in rank.items()}
    tensors = {**more, **named_by_peft(given, dtype)}
    return save_peft(folder, tensors, r=3, lora_alpha=3 * scale, rank_pattern=rank, alpha_pattern=alpha)


def dense(given: Factors, scale: float = SCALE) -> dict[str, NDArray[np.float64]]:
    return {f"{name}.weight": scale * (up @ down).numpy() for name, (up, down) in given.items()}


def of(path: Path, base: Path | None = None) -> Sketch:
    return sketch_of(loratool.read_adapter(path), loratool.open_checkpoint(base) if base else None)


def distance(one: Sketch, other: Sketch) -> float:
    return float(np.linalg.norm(one.values - other.values))


def same(one: Sketch, other: Sketch) -> bool:
    return is_same(one.facts, other.facts, distance(one, other))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sketch") / "plain", factors())


def test_a_sketch_is_its_definition_on_dense_matrices(tmp_path: Path) -> None:
    given = factors(1)
    found = of(write(tmp_path / "a", given, torch.float64))
    weights = dense(given)
    assert np.abs(found.values - sketch_definition.sketch(weights, 1024)).max() < 1e-12
    shown = loratool.inspect(tmp_path / "a", values=True, device="cpu")
    assert shown.kind == "adapter"
    assert shown.sketch is not None
    assert np.abs(np.array(shown.sketch) - sketch_definition.sketch(weights, 256)).max() < 1e-7
    norm = np.sqrt(sum((delta**2).sum() for delta in weights.values()))
    assert found.norm == pytest.approx(norm, rel=1e-12)
    assert (found.names, found.saved, found.rounding) == ("base", "", 1e-6)


def test_the_hash_never_changes() -> None:
    """A golden vector: an index of today is read by every later release."""
    sketcher = Sketcher(8)
    sketcher.add("model.layers.0.mlp.up_proj.weight", np.arange(6.0).reshape(3, 2), np.arange(8.0).reshape(2, 4))
    assert np.round(sketcher.sketch(), 9).tolist() == GOLDEN
    assert sketching.hashes("out", "w", 3).tolist() == sketch_definition.hashed("out", "w", 3)


@pytest.mark.parametrize("size", [512, 64, 2])
def test_folding_gives_the_sketch_of_fewer_numbers(size: int) -> None:
    weights = dense(factors(2))
    sketcher = Sketcher()
    for name, (up, down) in factors(2).items():
        sketcher.add(f"{name}.weight", SCALE * up.numpy(), down.numpy())
    expected = sketch_definition.sketch(weights, size)
    assert np.abs(folded(sketcher.sketch(), size) - expected).max() < 1e-10


def test_gauge_alpha_order_and_rank_make_no_difference(plain: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    turned: Factors = {}
    for name, (up, down) in reversed(factors().items()):
        turn = torch.randn(up.shape[1], up.shape[1], generator=generator, dtype=torch.float64)
        wider = torch.cat([up @ turn, torch.zeros(up.shape[0], 2, dtype=torch.float64)], 1)
        more = torch.randn(2, down.shape[1], generator=generator, dtype=torch.float64)
        turned[name] = (wider * SCALE / 0.25, torch.cat([torch.linalg.solve(turn, down), more]))
    other = of(write(tmp_path / "turned", turned, scale=0.25))
    assert distance(of(plain), other) < 1e-6 * other.norm
    assert same(of(plain), other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounding_to_another_dtype_stays_within_tolerance(dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    other = of(write(tmp_path / "rounded", factors(), dtype))
    assert same(of(plain), other)
    assert (distance(of(plain), other) > 1e-5 * other.norm) == (dtype in (torch.bfloat16, torch.float16))


def test_a_change_above_rounding_is_another_update(plain: Path, tmp_path: Path) -> None:
    changed = factors()
    up, down = changed["model.layers.1.mlp.down_proj"]
    changed["model.layers.1.mlp.down_proj"] = (1.01 * up, down)
    found = of(write(tmp_path / "changed", changed))
    truth = 0.01 * SCALE * float(torch.linalg.norm(up @ down))
    assert not same(of(plain), found)
    assert distance(of(plain), found) == pytest.approx(truth, rel=0.2)


@pytest.mark.parametrize("dialect", ["mlx", "peft-split", "peft-fused", "torchtune", "gguf"])
def test_dialects_of_language_models_agree(dialect: str, tmp_path: Path, llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    out = tmp_path / ("out.gguf" if dialect == "gguf" else "out")
    loratool.convert(adapter, out, to=dialect, base=base)
    one, other = of(adapter), of(out, base)
    assert (one.names, other.names) == ("base", "base")
    assert distance(one, other) < 2e-6 * one.norm
    # llama.cpp and torchtune have rows in another order, which depends on the heads; a config tells what was fused
    assert other.needs_base == (dialect in ("torchtune", "gguf", "peft-fused"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with fewer heads of keys than of queries, and an adapter on it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (8, 16),
        "self_attn.v_proj": (8, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
    }
    given = {
        f"model.layers.0.{name}": (
            torch.randn(out, 2, generator=generator).double(),
            torch.randn(2, into, generator=generator).double(),
        )
        for name, (out, into) in shapes.items()
    }
    adapter = write(folder / "adapter", given, scale=2.0)
    table = json.loads((adapter / "adapter_config.json").read_text())
    plain_table = {key: value for key, value in table.items() if not key.endswith("_pattern")}
    plain_table |= {"r": 2, "lora_alpha": 4, "target_modules": [name.partition(".")[2] for name in shapes]}
    (adapter / "adapter_config.json").write_text(json.dumps(plain_table))
    return folder / "base", adapter


SDXL = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (640, 2048),
    "mid_block.attentions.0.proj_in": (1280, 1280),
}


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "peft"])
def test_dialects_of_image_models_agree(dialect: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, (rows, columns) in SDXL.items():
        tensors[f"unet.{name}.lora.down.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"unet.{name}.lora.up.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    out = tmp_path / ("out" if dialect == "peft" else "out.safetensors")
    loratool.convert(tmp_path / "pytorch_lora_weights.safetensors", out, to=dialect)
    one, other = of(tmp_path / "pytorch_lora_weights.safetensors"), of(out)
    assert (one.names, other.names) == ("base", "base")
    assert distance(one, other) < 2e-6 * one.norm


def test_rows_of_a_fused_weight_are_those_of_its_parts(tmp_path: Path) -> None:
    """Three equal parts, which need no base: rows are counted in each part, by the definition."""
    generator = torch.Generator().manual_seed(8)
    up, down = torch.randn(48, 3, generator=generator).double(), torch.randn(3, 16, generator=generator).double()
    found = of(write(tmp_path / "fused", {"model.layers.0.self_attn.qkv_proj": (up, down)}, torch.float64))
    delta = SCALE * (up @ down).numpy()
    start = "model.layers.0.self_attn."
    parts = {f"{start}{part}_proj.weight": delta[16 * at : 16 * at + 16] for at, part in enumerate("qkv")}
    assert np.abs(found.values - sketch_definition.sketch(parts, 1024)).max() < 1e-12


def test_names_of_an_unknown_architecture_are_as_stored(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_some_block_7_fc.lora_down.weight": torch.ones(2, 8),
        "lora_unet_some_block_7_fc.lora_up.weight": torch.ones(8, 2),
        "lora_unet_some_block_7_fc.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "odd.safetensors")
    assert of(tmp_path / "odd.safetensors").names == "as stored"


def test_what_stands_besides_the_factors_is_compared_by_its_digest(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "adapter_model.safetensors")
    for name, value in (("one", 1.0), ("again", 1.0), ("other", 2.0)):
        folder = tmp_path / name
        head = {"base_model.model.lm_head.weight": torch.full((4, 16), value)}
        table = json.loads((plain / "adapter_config.json").read_text())
        save_peft(folder, {**tensors, **head}, **{**table, "modules_to_save": ["lm_head"]})
    one, again, other = (of(tmp_path / name) for name in ("one", "again", "other"))
    assert one.saved == again.saved != ""
    assert len({of(plain).saved, one.saved, other.saved}) == 3
    assert same(one, other)


def test_values_that_are_not_numbers_and_other_updates_have_no_sketch(tmp_path: Path) -> None:
    given = factors()
    given["model.layers.0.self_attn.q_proj"][0][0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        of(write(tmp_path / "nan", given))
    folder = tmp_path / "ia3"
    save_peft(
        folder,
        {"base_model.model.model.layers.0.mlp.down_proj.ia3_l": torch.ones(1, 8)},
        peft_type="IA3",
        target_modules=["down_proj"],
        feedforward_modules=["down_proj"],
    )
    with pytest.raises((InputError, FitError)):
        of(folder)


def test_distances_estimate_dense_ones_and_planted_twins_are_found_among_strangers() -> None:
    """A thousand pairs against dense norms, relative error by the stated spread; and twins among 300."""
    generator = np.random.default_rng(0)
    count, shape, rank = 300, (60, 50), 2
    ups, downs = generator.standard_normal((count, shape[0], rank)), generator.standard_normal((count, rank, shape[1]))
    for copy, original in ((50, 7), (51, 7), (200, 199)):
        ups[copy], downs[copy] = 3.0 * ups[original] * (1 + 1e-8), downs[original] / 3.0
    kept, deltas = [], ups @ downs
    for up, down, delta in zip(ups, downs, deltas, strict=True):
        sketcher = Sketcher()
        sketcher.add("w", up, down)
        facts = SketchFacts("base", float(np.linalg.norm(delta)), 1e-6, 0.0, "")
        kept.append(Sketched(sketcher.sketch().astype(np.float32), facts))
    assert sorted(twins(kept)) == [(7, 50), (7, 51), (50, 51), (199, 200)]
    pairs = generator.integers(0, count, (1000, 2))
    pairs = pairs[np.linalg.norm(deltas[pairs[:, 0]] - deltas[pairs[:, 1]], axis=(1, 2)) > 1e-6]
    truth = np.linalg.norm(deltas[pairs[:, 0]] - deltas[pairs[:, 1]], axis=(1, 2))
    found = np.array([np.linalg.norm(kept[i].values - kept[j].values) for i, j in pairs])
    error = np.sqrt(np.mean((found / truth - 1) ** 2))
    assert sketching.spread(1024) / 8 < error < sketching.spread(1024) * 1.1


def test_the_tolerance_is_that_of_the_two_dtypes() -> None:
    assert tolerance([2.0, 1.0], [2.4e-3, 3e-4]) == pytest.approx(1.5 * 2.0 * (2.4e-3**2 + 3e-4**2) ** 0.5)
