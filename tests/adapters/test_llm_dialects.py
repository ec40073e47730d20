"""Adapters in the layouts of LLM trainers: each is merged to what its trainer's own formula says, or refused by name."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from hub_client import Client
from hub_server import HubServer
from paths import REAL
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer_layouts import (
    HEADS,
    HIDDEN,
    KEY_HEADS,
    RANK,
    WIDE,
    WIDTH,
    check_merged,
    halves_from_pairs,
    numbers,
    product,
    shapes,
    weights,
    write_base,
)

import loratool

ALPHA = 1  # at rank 2, so that a scaling that is forgotten or applied twice shows
SCALE = ALPHA / RANK
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("llama") / "base")


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    loratool.merge(base, adapter, out, device="cpu", **options)
    return out


# torchtune

TUNE = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
TUNE_CONFIG = {"r": RANK, "lora_alpha": ALPHA, "target_modules": [*TUNE], "peft_type": "LORA"}


def torchtune_tensors() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for at, (theirs, ours) in enumerate({f"layers.0.{t}": f"{LAYER}.{o}" for t, o in TUNE.items()}.items()):
        rows, columns = shapes()[ours]
        tensors[f"{theirs}.lora_a.weight"] = numbers(RANK, columns, seed=at)
        tensors[f"{theirs}.lora_b.weight"] = numbers(rows, RANK, seed=at + 50)
    tensors |= {"output.lora_a.weight": numbers(RANK, HIDDEN, seed=90)}
    return tensors | {"output.lora_b.weight": numbers(shapes()["lm_head"][0], RANK, seed=91)}


def torchtune(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    return save_peft(
        folder,
        torchtune_tensors() if tensors is None else tensors,
        **({name: value for name, value in (TUNE_CONFIG | config).items() if value is not None}),
    )


def torchtune_deltas(permuted: bool = True, scale: float = SCALE) -> dict[str, Tensor]:
    tensors = torchtune_tensors()
    names = {f"layers.0.{t}": f"{LAYER}.{o}" for t, o in TUNE.items()} | {"output": "lm_head"}
    deltas = {}
    for theirs, ours in names.items():
        b = tensors[f"{theirs}.lora_b.weight"]
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(ours.rpartition(".")[2])
        b = halves_from_pairs(b, heads) if heads and permuted else b
        deltas[ours] = product(b, tensors[f"{theirs}.lora_a.weight"], scale)
    return deltas


def test_torchtune_rows_of_queries_and_keys_are_put_in_the_order_of_the_base(base: Path, tmp_path: Path) -> None:
    """Under the head counts of the base; every other module, the head among them, is as it is stored."""
    check_merged(merged(base, torchtune(tmp_path / "a"), tmp_path / "out"), base, torchtune_deltas())


def test_torchtune_does_not_permute_the_rows_of_models_with_halves(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    check_merged(merged(base, torchtune(tmp_path / "a"), tmp_path / "out"), base, torchtune_deltas(permuted=False))


def test_torchtune_lengths_of_dora_move_with_their_rows(base: Path, tmp_path: Path) -> None:
    """W' has in each row the length that was trained for that row."""
    tensors = torchtune_tensors() | {"layers.0.attn.q_proj.magnitude": numbers(HEADS * WIDTH, seed=7).abs() + 1}
    out = merged(base, torchtune(tmp_path / "a", tensors), tmp_path / "out")
    query = f"{LAYER}.self_attn.q_proj"
    lengths = halves_from_pairs(tensors["layers.0.attn.q_proj.magnitude"], HEADS).double()
    torch.testing.assert_close(weights(out)[query].norm(dim=1), lengths, rtol=1e-6, atol=1e-6)
    moved = weights(base)[query] + torchtune_deltas()[query]
    wanted = moved * lengths[:, None] / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weights(out)[query], wanted, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("change", [{"model_type": "falcon"}, {"num_attention_heads": None}], ids=["model", "heads"])
def test_torchtune_on_a_base_that_does_not_tell_the_order_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", **change)
    with pytest.raises(loratool.FitError, match=r"q_proj.*model_type llama") as told:
        loratool.merge(base, torchtune(tmp_path / "a"), tmp_path / "out", device="cpu")
    assert "v_proj" not in str(told.value)


def test_commands_without_a_base_take_the_heads_from_the_model_config_in_the_folder(base: Path, tmp_path: Path) -> None:
    """Without it they are refused, and the refusal names that way out; inspect needs no heads."""
    adapter = torchtune(tmp_path / "a")
    facts = loratool.inspect(adapter)
    assert isinstance(facts, loratool.AdapterFacts)
    assert (facts.format, facts.ranks, facts.scalings) == ("torchtune", {"2": 8}, {"0.5": 8})
    measured = loratool.inspect(adapter, values=True)
    assert isinstance(measured, loratool.AdapterFacts)
    assert measured.values is not None
    skipped = {target for target, why in measured.values.skipped.items() if "number of heads" in why}
    assert skipped == {f"{LAYER}.self_attn.{part}_proj.weight" for part in "qk"}
    with pytest.raises(loratool.InputError, match=r"copy its config\.json"):
        loratool.resize(adapter, tmp_path / "smaller", rank=1)
    shutil.copy(base / "config.json", adapter)
    loratool.rescale(adapter, tmp_path / "double", scale=2.0, bake=True)
    loratool.resize(adapter, tmp_path / "same", rank=RANK)
    loratool.combine([adapter, adapter], tmp_path / "twice", weights=[0.5, 0.5])
    loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    (totals,) = loratool.compare([adapter, tmp_path / "mlx"]).totals.values()
    assert totals.cosine == pytest.approx(1.0)
    for name, times in (("double", 2.0), ("same", 1.0), ("twice", 1.0), ("mlx", 1.0)):
        found = weights(merged(base, tmp_path / name, tmp_path / f"{name}-out"))
        for module, delta in torchtune_deltas(scale=SCALE * times).items():
            torch.testing.assert_close(found[module], weights(base)[module] + delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        ({"layers.0.attn.q_proj.lora_b.weight": None}, {}, r"layers\.0\.attn\.q_proj: .*lora_b\.weight is missing"),
        ({"layers.0.mlp.w1.lora_b.weight": numbers(WIDE, 3)}, {}, r"layers\.0\.mlp\.w1: .*expected one rank"),
        ({"layers.0.mlp.w1.lora_a.weight": numbers(4, HIDDEN)}, {}, r"lora_a has 4 rows and lora_b 2 columns"),
        ({"layers.0.attn.q_proj.magnitude": numbers(3)}, {}, r"expected 16 floats"),
        ({"layers.0.mlp.w1.lora_a.weight": torch.ones(RANK, HIDDEN, dtype=torch.int32)}, {}, "expected floats"),
        ({}, {"lora_alpha": "one"}, "expected a finite number"),
        ({}, {"lora_alpha": None}, "pass --input-alpha"),
        ({}, {"r": 3}, "r is 3, but the factors have rank 2"),
        (
            {"layers.0.odd.lora_a.weight": numbers(2, 8), "layers.0.odd.lora_b.weight": numbers(8, 2)},
            {},
            "no known name",
        ),
        ({"layers.0.odd": numbers(2)}, {}, r"layers\.0\.odd"),
    ],
)
def test_torchtune_adapters_that_are_broken_are_refused_by_the_name_of_the_tensor(
    base: Path, tmp_path: Path, change: dict[str, Tensor | None], config: dict[str, Any], told: str
) -> None:
    tensors = {name: tensor for name, tensor in (torchtune_tensors() | change).items() if tensor is not None}
    with pytest.raises(loratool.LoratoolError, match=told) as error:
        loratool.merge(base, torchtune(tmp_path / "a", tensors, **config), tmp_path / "out", device="cpu")
    assert error.value.exit_code in (3, 4)
    assert not (tmp_path / "out").exists()


def test_an_alpha_that_is_not_recorded_is_asked_for_and_one_that_is_counts(base: Path, tmp_path: Path) -> None:
    without = torchtune(tmp_path / "without", lora_alpha=None)
    check_merged(merged(base, without, tmp_path / "out", input_alpha=ALPHA), base, torchtune_deltas())
    report = loratool.merge(base, torchtune(tmp_path / "with"), tmp_path / "second", device="cpu", input_alpha=99.0)
    check_merged(tmp_path / "second", base, torchtune_deltas())
    assert "input-alpha-not-used" in [note.code for note in report.notes]


# litgpt

PARTS = {"q": "lora_query", "k": "lora_key", "v": "lora_value"}
PART_ROWS = {"q": HEADS * WIDTH, "k": KEY_HEADS * WIDTH, "v": KEY_HEADS * WIDTH}
LIT = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}


def litgpt(folder: Path, parts: str = "qkv", settings: str | None = None, **more: Tensor | None) -> Path:
    """An adapter of the parts of attention named in `parts`, and of the other layers of one block."""
    tensors = litgpt_tensors(parts) | more
    folder.mkdir()
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "lit_model.lora.safetensors")
    lines = ["checkpoint_dir: checkpoints/org/base", "devices: 1", f"lora_r: {RANK}", f"lora_alpha: {ALPHA}"]
    lines += [
        "data:",
        "  class_path: litgpt.data.Alpaca",
        "  init_args:",
        "    lora_alpha: 99",
        "train:",
        "  lr: 0.0003",
    ]
    lines += [f"{name}: {str(part in parts).lower()}" for part, name in PARTS.items()]
    text = "\n".join(lines) if settings is None else settings
    if text:
        (folder / "hyperparameters.yaml").write_text(text)
    return folder


def litgpt_tensors(parts: str) -> dict[str, Tensor]:
    qkv = "transformer.h.0.attn.qkv"
    tensors = {
        f"{qkv}.lora_A": numbers(RANK * len(parts), HIDDEN, seed=1),
        f"{qkv}.lora_B": numbers(sum(PART_ROWS[part] for part in parts), RANK, seed=2),
    }
    for at, (theirs, ours) in enumerate(LIT.items()):
        rows, columns = shapes()[f"{LAYER}.{ours}"]
        tensors[f"transformer.h.0.{theirs}.lora_A"] = numbers(RANK, columns, seed=at)
        tensors[f"transformer.h.0.{theirs}.lora_B"] = numbers(rows, RANK, seed=at + 50)
    return tensors


def litgpt_deltas(parts: str) -> dict[str, Tensor]:
    tensors = litgpt_tensors(parts)
    a, b = (tensors[f"transformer.h.0.attn.qkv.lora_{side}"] for side in "AB")
    deltas, at = {}, 0
    for number, part in enumerate(parts):
        rows = b[at : at + PART_ROWS[part]]
        deltas[f"{LAYER}.self_attn.{part}_proj"] = product(rows, a[RANK * number : RANK * (number + 1)], SCALE)
        at += PART_ROWS[part]
    for theirs, ours in LIT.items():
        up, down = (tensors[f"transformer.h.0.{theirs}.lora_{side}"] for side in "BA")
        deltas[f"{LAYER}.{ours}"] = product(up, down, SCALE)
    return deltas


@pytest.mark.parametrize("parts", ["qkv", "qv", "kv", "k"])
def test_litgpt_parts_of_attention_get_their_own_rows(base: Path, tmp_path: Path, parts: str) -> None:
    """Those that were not enabled keep the base's bytes, with fewer key heads than query heads too."""
    check_merged(merged(base, litgpt(tmp_path / "a", parts), tmp_path / "out"), base, litgpt_deltas(parts))


def test_litgpt_heads_stand_in_the_model_config_that_it_writes(base: Path, tmp_path: Path) -> None:
    """With it, an adapter is rewritten without a base; without it, that is refused."""
    adapter = litgpt(tmp_path / "a", "qv")
    with pytest.raises(loratool.InputError, match="number of heads"):
        loratool.resize(adapter, tmp_path / "same", rank=RANK)
    (adapter / "model_config.yaml").write_text(f"name: x\nn_head: {HEADS}\nn_query_groups: {KEY_HEADS}\n")
    loratool.resize(adapter, tmp_path / "same", rank=RANK)
    found = weights(merged(base, tmp_path / "same", tmp_path / "out"))
    for module, delta in litgpt_deltas("qv").items():
        torch.testing.assert_close(found[module], weights(base)[module] + delta, rtol=1e-5, atol=1e-5)


FUSED_MODELS = {
    "gpt_neox": ("gpt_neox.layers.0", "attention.query_key_value", "attention.dense", {}),
    "falcon": ("transformer.h.0", "self_attention.query_key_value", "self_attention.dense", {"multi_query": False}),
}


@pytest.mark.parametrize("model", FUSED_MODELS)
def test_litgpt_rows_go_to_bases_that_take_turns_by_head(tmp_path: Path, model: str) -> None:
    """Its own parts lie one below the other; the base has queries, keys and values of one head, then of the next."""
    start, fused, dense, settings = FUSED_MODELS[model]
    sides = {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.fc": (32, 8), "mlp.proj": (8, 32)}
    called = dict(zip(sides, (fused, dense, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), strict=True))
    base_weights = {f"{start}.{called[name]}": numbers(*shape, seed=3) for name, shape in sides.items()}
    config = {"model_type": model, "num_attention_heads": 2, **settings}
    base = save_model(tmp_path / "base", {f"{name}.weight": tensor for name, tensor in base_weights.items()}, config)
    tensors = {}
    for name, (rows, columns) in sides.items():
        ranks = 3 * RANK if name == "attn.qkv" else RANK
        tensors[f"transformer.h.0.{name}.lora_A"] = numbers(ranks, columns, seed=5)
        tensors[f"transformer.h.0.{name}.lora_B"] = numbers(rows, RANK, seed=6)
    adapter = tmp_path / "a"
    adapter.mkdir()
    save_file(tensors, adapter / "w.safetensors")
    (adapter / "hyperparameters.yaml").write_text(
        "".join(f"{name}: true\n" for name in PARTS.values()) + "lora_alpha: 1\n"
    )
    deltas = {}
    for name in sides:
        a, b = (tensors[f"transformer.h.0.{name}.lora_{side}"] for side in "AB")
        parts = [
            product(rows, down, SCALE)
            for rows, down in zip(b.chunk(len(a) // RANK), a.reshape(-1, RANK, a.shape[1]), strict=True)
        ]
        by_head = [part[head * 4 : head * 4 + 4] for head in range(2) for part in parts]
        deltas[f"{start}.{called[name]}"] = torch.cat(by_head if name == "attn.qkv" else parts)
    check_merged(merged(base, adapter, tmp_path / "out"), base, deltas)


def test_a_conversion_takes_the_heads_of_its_base(base: Path, tmp_path: Path) -> None:
    """Which the refusal without them names as a way out; what is written merges to the same weights."""
    adapter = litgpt(tmp_path / "a", "qv")
    with pytest.raises(loratool.InputError, match="pass the model that was trained with --base"):
        loratool.convert(adapter, tmp_path / "peft", to="peft")
    loratool.convert(adapter, tmp_path / "peft", to="peft", base=base)
    found = weights(merged(base, tmp_path / "peft", tmp_path / "out"))
    for module, delta in litgpt_deltas("qv").items():
        torch.testing.assert_close(found[module], weights(base)[module] + delta, rtol=1e-5, atol=1e-5)


def test_another_strength_changes_the_alpha_in_the_settings_alone(base: Path, tmp_path: Path) -> None:
    """No heads are needed for it. Tensors, and all other settings, keep their bytes; the new adapter is read as before."""
    lit, tune = litgpt(tmp_path / "lit", "qv"), torchtune(tmp_path / "tune")
    shutil.copy(base / "config.json", tune)
    for adapter, deltas in ((lit, litgpt_deltas("qv")), (tune, torchtune_deltas())):
        out = tmp_path / f"{adapter.name}-half"
        report = loratool.rescale(adapter, out, scale=0.5)
        assert not report.baked
        (before,), (after,) = (list(folder.glob("*.safetensors")) for folder in (adapter, out))
        assert after.read_bytes() == before.read_bytes()
        assert (out / "config.json").exists() == (adapter / "config.json").exists()
        check_merged(
            merged(base, out, tmp_path / f"{adapter.name}-merged"), base, {m: d / 2 for m, d in deltas.items()}
        )
    old, new = ((folder / "hyperparameters.yaml").read_text().splitlines() for folder in (lit, tmp_path / "lit-half"))
    assert [line for line in new if line not in old] == [f"lora_alpha: {ALPHA / 2}"]
    assert len(new) == len(old)
    assert json.loads((tmp_path / "tune-half" / "adapter_config.json").read_text()) == {
        **TUNE_CONFIG,
        "lora_alpha": 0.5,
    }


def test_strengths_that_one_alpha_cannot_say_are_baked(tmp_path: Path) -> None:
    adapter = litgpt(tmp_path / "a", "k")
    with pytest.raises(loratool.InputError, match="--bake"):
        loratool.rescale(adapter, tmp_path / "half", match=["k_proj=0.5"])
    loratool.rescale(adapter, tmp_path / "half", scale=0.5, bake=True)
    assert loratool.read_adapter(tmp_path / "half").format == "peft"


def test_litgpt_adapters_on_the_hub_bring_the_files_that_tell_how_to_read_them(base: Path, tmp_path: Path) -> None:
    """Their settings and the model's config, without which the parts of attention are not known."""
    adapter = litgpt(tmp_path / "a", "qv")
    (adapter / "model_config.yaml").write_text(f"n_head: {HEADS}\nn_query_groups: {KEY_HEADS}\n")
    with HubServer() as server:
        server.add("org/lit", adapter)
        client = Client(server, tmp_path / "home")
        assert "litgpt, LORA" in client.works("inspect", "org/lit").out
        client.works("resize", "org/lit", "--rank", RANK, "-o", tmp_path / "same")
        client.works("merge", base, "org/lit", "-o", tmp_path / "out", "--device", "cpu")
    check_merged(tmp_path / "out", base, litgpt_deltas("qv"))
    assert loratool.read_adapter(tmp_path / "same").updates.keys() == {f"{m}.weight" for m in litgpt_deltas("qv")}


@pytest.mark.parametrize(
    ("parts", "settings", "change", "told"),
    [
        ("qv", f"lora_r: 2\nlora_alpha: {ALPHA}", {}, r"adapts 2 of query, key and value; hyperparameters\.yaml"),
        ("qv", "lora_alpha: 1\nlora_query: true\nlora_key: true\nlora_value: true", {}, "enables lora_query, lora_key"),
        ("qkv", "lora_query: 1\nlora_alpha: 1", {}, "must be true or false"),
        ("qkv", "lora_r: 2", {}, "pass --input-alpha"),
        ("qkv", "lora_alpha: 1\nlora_alpha: 2", {}, "appears twice"),
        ("qkv", None, {"transformer.h.0.attn.proj.lora_B": None}, r"attn\.proj: .*lora_B is missing"),
        ("qkv", None, {"transformer.h.0.attn.qkv.lora_B": numbers(33, RANK)}, "33 rows cannot be those of"),
        (
            "qkv",
            None,
            {"transformer.h.0.mlp.odd.lora_A": numbers(2, 8), "transformer.h.0.mlp.odd.lora_B": numbers(8, 2)},
            "no known name",
        ),
        (
            "qkv",
            None,
            {"transformer.h.0.attn.attn.lora_A": numbers(2, 8), "transformer.h.0.attn.attn.lora_B": numbers(8, 2)},
            r"before 0\.5\.4",
        ),
    ],
)
def test_litgpt_adapters_that_are_broken_are_refused(
    base: Path, tmp_path: Path, parts: str, settings: str | None, change: dict[str, Tensor | None], told: str
) -> None:
    adapter = litgpt(tmp_path / "a", parts, settings, **change)
    with pytest.raises(loratool.LoratoolError, match=told):
        loratool.merge(base, adapter, tmp_path / "out", device="cpu")


# published adapters

LAYERS_OF_QWEN = {"q_proj": (896, 896), "v_proj": (128, 896)}  # of the last 4 layers


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the published adapters are not here: {REAL} is missing")
@pytest.mark.parametrize("file", ["adapters.safetensors", "0000100_adapters.safetensors"])
def test_a_published_adapter_of_mlx_merges_to_the_formula(tmp_path: Path, file: str) -> None:
    """The last weights, and a checkpoint by its own name; its config has an alpha that mlx-lm does not use."""
    shapes = {f"model.layers.{n}.self_attn.{p}": shape for n in range(20, 24) for p, shape in LAYERS_OF_QWEN.items()}
    base = save_model(
        tmp_path / "base", {f"{m}.weight": numbers(*s, seed=n) for n, (m, s) in enumerate(shapes.items())}
    )
    adapter = REAL / "mlx-qwen0.5b" / file
    tensors = load_file(adapter)
    scale = json.loads((adapter.parent / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    deltas = {m: product(tensors[f"{m}.lora_b"].T, tensors[f"{m}.lora_a"].T, scale) for m in shapes}
    check_merged(merged(base, adapter, tmp_path / "out"), base, deltas)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the published adapters are not here: {REAL} is missing")
def test_published_arrays_of_numpy_are_read_once_the_line_has_converted_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(REAL / "mlx-npz" / "adapters.npz", tmp_path)
    with pytest.raises(loratool.InputError, match="numpy arrays") as told:
        loratool.read_adapter(tmp_path)
    code = shlex.split(str(told.value).partition("python -c ")[2])[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "the line", "exec"), {})
    facts = loratool.inspect(tmp_path, input_alpha=[80.0])
    assert isinstance(facts, loratool.AdapterFacts)
    assert (facts.format, facts.ranks, facts.scalings) == ("mlx", {"4": 32}, {"20": 32})


def test_factors_that_are_numbered_in_the_order_of_a_model_are_refused_by_the_name_of_their_tool(
    tmp_path: Path,
) -> None:
    """cloneofsimo/lora: nothing in its files says which layers they belong to."""
    tensors = {
        "unet:0:up": numbers(6, 2),
        "unet:0:down": numbers(2, 4),
        "unet:1:up": numbers(6, 2),
        "unet:1:down": numbers(2, 4),
    }
    (tmp_path / "a").mkdir()
    save_file(
        tensors,
        tmp_path / "a" / "lora.safetensors",
        {"unet": '["CrossAttention"]', "unet:0:rank": "2", "unet:1:rank": "2"},
    )
    for place in (tmp_path / "a", tmp_path / "a" / "lora.safetensors"):
        with pytest.raises(loratool.InputError, match="cloneofsimo"):
            loratool.resize(place, tmp_path / "out", rank=1)
