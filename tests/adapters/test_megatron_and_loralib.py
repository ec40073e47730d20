"""Adapters of Megatron-Core models and of loralib: each is merged to what its own forward pass adds, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer_layouts import (
    HEADS,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
    RANK,
    TOKENS,
    WIDE,
    WIDTH,
    check_merged,
    numbers,
    product,
    rows_of_groups,
    shapes,
    weights,
    write_base,
)

import loratool
from loratool.results.facts import AdapterFacts

ALPHA = 1
SCALE = ALPHA / RANK
FUSED = (HEADS + 2 * KEY_HEADS) * WIDTH

# The four modules of a layer: (rows, columns).
MODULES = {"qkv": (FUSED, HIDDEN), "proj": (HIDDEN, HEADS * WIDTH), "fc1": (2 * WIDE, HIDDEN), "fc2": (HIDDEN, WIDE)}
NEMO = "model.decoder.layers.{}"
BRIDGE = "decoder.layers.{}"
STYLES = {
    "nemo1": {
        "qkv": f"{NEMO}.self_attention.adapter_layer.lora_kqv_adapter",
        "proj": f"{NEMO}.self_attention.adapter_layer.lora_dense_attention_adapter",
        "fc1": f"{NEMO}.mlp.adapter_layer.lora_hto4h_adapter",
        "fc2": f"{NEMO}.mlp.adapter_layer.lora_4htoh_adapter",
    },
    "bridge": {
        "qkv": f"{BRIDGE}.self_attention.linear_qkv.adapter",
        "proj": f"{BRIDGE}.self_attention.linear_proj.adapter",
        "fc1": f"{BRIDGE}.mlp.linear_fc1.adapter",
        "fc2": f"{BRIDGE}.mlp.linear_fc2.adapter",
    },
}
SETTINGS = {
    "nemo1": (
        "model_config.yaml",
        f"num_attention_heads: {HEADS}\nnum_query_groups: {KEY_HEADS}\npeft:\n  peft_scheme: lora\n  lora_tuning:\n"
        f"    target_modules:\n    - all\n    adapter_dim: {RANK}\n    alpha: {ALPHA}\n",
    ),
    "bridge": (
        "run_config.yaml",
        f"model:\n  num_attention_heads: {HEADS}\n  num_query_groups: {KEY_HEADS}\npeft:\n"
        f"  _target_: megatron.bridge.peft.lora.LoRA\n  dim: {RANK}\n  alpha: {ALPHA}  # of all\n  dropout: 0.0\n",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("llama") / "base")


def factors(layer: int, module: str) -> tuple[Tensor, Tensor]:
    """(linear_in, linear_out) of a module."""
    rows, columns = MODULES[module]
    return numbers(RANK, columns, seed=layer * 10), numbers(rows, RANK, seed=layer * 10 + 1)


def megatron_tensors(style: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for module, name in STYLES[style].items():
            a, b = factors(layer, module)
            tensors |= {f"{name.format(layer)}.linear_in.weight": a, f"{name.format(layer)}.linear_out.weight": b}
    return tensors


def megatron_deltas() -> dict[str, Tensor]:
    deltas: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        a, b = factors(layer, "qkv")
        for part in "qkv":
            deltas[f"{start}.self_attn.{part}_proj"] = product(rows_of_groups(b, HEADS, KEY_HEADS, part), a, SCALE)
        a, b = factors(layer, "fc1")
        deltas |= {
            f"{start}.mlp.gate_proj": product(b[:WIDE], a, SCALE),
            f"{start}.mlp.up_proj": product(b[WIDE:], a, SCALE),
        }
        for module, name in (("proj", "self_attn.o_proj"), ("fc2", "mlp.down_proj")):
            a, b = factors(layer, module)
            deltas[f"{start}.{name}"] = product(b, a, SCALE)
    return deltas


def write(folder: Path, tensors: dict[str, Tensor], settings: tuple[str, str] | None = None, **header: str) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "weights.safetensors", header or None)
    if settings is None:
        return folder / "weights.safetensors"
    (folder / settings[0]).write_text(settings[1])
    return folder


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    loratool.merge(base, adapter, out, device="cpu", **options)
    return out


@pytest.mark.parametrize("style", STYLES)
def test_rows_of_grouped_queries_keys_and_values_are_told_apart(base: Path, tmp_path: Path, style: str) -> None:
    """And those of gate and up, with the alpha, rank and heads of the run's settings."""
    adapter = write(tmp_path / "a", megatron_tensors(style), SETTINGS[style])
    check_merged(merged(base, adapter, tmp_path / "out"), base, megatron_deltas())


def ranks(count: int) -> list[dict[str, Tensor]]:
    """What each of so many processes holds of NeMo's adapter: its groups of heads, its rows of gate and of up, and of
    the other two layers its columns; of A of the first two, and of B of the others, equal parts of the rows.
    """
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in megatron_tensors("nemo1").items():
        rows = tensor.chunk(count)
        if "hto4h_adapter.linear_out" in name:
            gate, up = (half.chunk(count) for half in tensor.chunk(2))
            rows = tuple(torch.cat(pair) for pair in zip(gate, up, strict=True))
        elif "linear_in" in name and ("dense" in name or "4htoh" in name):
            rows = tensor.chunk(count, dim=1)
        for rank, part in enumerate(rows):
            found[rank][name] = part.contiguous()
    return found


def write_ranks(folder: Path, parts: list[dict[str, Tensor]]) -> Path:
    for rank, tensors in enumerate(parts):
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
        save_file(tensors, folder / f"mp_rank_{rank:02d}" / "model_weights.safetensors")
    (folder / SETTINGS["nemo1"][0]).write_text(SETTINGS["nemo1"][1])
    return folder


def test_folders_of_tensor_parallel_ranks_are_one_adapter(base: Path, tmp_path: Path) -> None:
    """With the alpha of the whole rank; and what is written of it is in one file."""
    adapter = write_ranks(tmp_path / "a", ranks(2))
    check_merged(merged(base, adapter, tmp_path / "out"), base, megatron_deltas())
    loratool.resize(adapter, tmp_path / "same", rank=RANK)
    found = weights(merged(base, tmp_path / "same", tmp_path / "again"))
    for module, delta in megatron_deltas().items():
        torch.testing.assert_close(found[module], weights(base)[module] + delta, rtol=1e-5, atol=1e-5)


def write_stages(folder: Path, parts: list[dict[str, Tensor]], **settings: object) -> Path:
    """The same with a layer in each stage of a pipeline, which numbers it 0."""
    for rank, tensors in enumerate(parts):
        for stage in range(LAYERS):
            own = {n.replace(f"layers.{stage}.", "layers.0."): t for n, t in tensors.items() if f"layers.{stage}." in n}
            home = folder / f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
            home.mkdir(parents=True)
            save_file(own, home / "model_weights.safetensors")
    lines = "".join(f"{name}: {value}\n" for name, value in settings.items())
    (folder / SETTINGS["nemo1"][0]).write_text(SETTINGS["nemo1"][1] + lines)
    return folder


@pytest.mark.parametrize("count", [1, 2])
def test_stages_of_a_pipeline_are_one_adapter(base: Path, tmp_path: Path, count: int) -> None:
    """Each numbers its layers from 0, and has an equal share of `num_layers`."""
    adapter = write_stages(tmp_path / "a", ranks(count), num_layers=LAYERS)
    facts = loratool.inspect(adapter)
    assert isinstance(facts, AdapterFacts)
    assert (facts.format, facts.modules[0].scaling) == ("megatron", SCALE)
    check_merged(merged(base, adapter, tmp_path / "out"), base, megatron_deltas())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "expected the number of all as num_layers"),
        ({"num_layers": 3}, "3 layers .* among 2 pipeline stages"),
        ({"num_layers": LAYERS, "virtual_pipeline_model_parallel_size": 2}, "alternate"),
    ],
)
def test_stages_whose_layers_are_not_known_are_refused(tmp_path: Path, settings: dict[str, int], told: str) -> None:
    adapter = write_stages(tmp_path / "a", ranks(1), **settings)
    with pytest.raises(loratool.InputError, match=told):
        loratool.read_adapter(adapter)


def test_ranks_that_do_not_go_together_are_refused(base: Path, tmp_path: Path) -> None:
    name = f"{STYLES['nemo1']['fc2'].format(0)}.linear_in.weight"
    first, second = ranks(2)
    with pytest.raises(loratool.InputError, match=r"mp_rank_01/.*fc2|mp_rank_01/.*4htoh.*linear_in\.weight is missing"):
        merged(
            base, write_ranks(tmp_path / "a", [first, {n: t for n, t in second.items() if n != name}]), tmp_path / "out"
        )
    odd = {name: first[name][:, :-1].contiguous()}
    with pytest.raises(loratool.InputError, match="expected one rank that 2 processes share"):
        merged(base, write_ranks(tmp_path / "b", [first | odd, second]), tmp_path / "out")
    folder = write_ranks(tmp_path / "c", [first, second])
    (folder / "mp_rank_00").rename(folder / "mp_rank_02")
    with pytest.raises(loratool.InputError, match="numbered from 0"):
        merged(base, folder, tmp_path / "out")
    (folder / "mp_rank_02").rename(folder / "tp_rank_9999_pp_rank_9999")  # of a hundred million
    with pytest.raises(loratool.InputError, match="numbered from 0"):
        merged(base, folder, tmp_path / "out")


def test_all_layers_in_one_tensor_are_read_as_one_each(base: Path, tmp_path: Path) -> None:
    """As a distributed checkpoint holds them, which is gathered without the numbers of layers."""
    every = megatron_tensors("bridge")
    stacked = {
        f"{name.replace('.{}', '')}.{side}.weight": torch.stack(
            [every[f"{name.format(n)}.{side}.weight"] for n in range(LAYERS)]
        )
        for name in STYLES["bridge"].values()
        for side in ("linear_in", "linear_out")
    }
    adapter = write(tmp_path / "a", stacked, SETTINGS["bridge"])
    check_merged(merged(base, adapter, tmp_path / "out"), base, megatron_deltas())


def test_canonical_adapters_have_a_pair_for_each_projection(base: Path, tmp_path: Path) -> None:
    """With rows as they are; the heads are not needed, and alpha may be given by the caller."""
    deltas: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    parts = {f"self_attn.{p}_proj": f"self_attention.linear_qkv.adapter.adapter_{p}" for p in "qkv"}
    parts |= {f"mlp.{p}_proj": f"mlp.linear_fc1.adapter.adapter_{p}" for p in ("gate", "up")}
    for at, (ours, theirs) in enumerate(parts.items()):
        rows, columns = shapes()[f"model.layers.1.{ours}"]
        a, b = numbers(RANK, columns, seed=at), numbers(rows, RANK, seed=at + 9)
        tensors |= {f"decoder.layers.1.{theirs}.linear_in.weight": a, f"decoder.layers.1.{theirs}.linear_out.weight": b}
        deltas[f"model.layers.1.{ours}"] = product(b, a, SCALE)
    adapter = write(tmp_path / "a", tensors)
    check_merged(merged(base, adapter, tmp_path / "out", input_alpha=ALPHA), base, deltas)


def test_without_settings_the_heads_of_the_base_count_and_alpha_is_asked_for(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", megatron_tensors("bridge"))
    with pytest.raises(loratool.InputError, match="--input-alpha"):
        merged(base, adapter, tmp_path / "out")
    check_merged(merged(base, adapter, tmp_path / "out", input_alpha=ALPHA), base, megatron_deltas())
    with pytest.raises(loratool.InputError, match="number of heads"):
        loratool.resize(adapter, tmp_path / "smaller", rank=1, input_alpha=ALPHA)


def test_a_run_whose_settings_have_no_alpha_took_the_rank(base: Path, tmp_path: Path) -> None:
    """The scaling is 1 then, which is said."""
    name, text = SETTINGS["nemo1"]
    adapter = write(tmp_path / "a", megatron_tensors("nemo1"), (name, text.replace(f"    alpha: {ALPHA}\n", "")))
    report = loratool.merge(base, adapter, tmp_path / "out", device="cpu")
    assert "alpha-missing" in [note.code for note in report.notes]
    check_merged(tmp_path / "out", base, {module: delta / SCALE for module, delta in megatron_deltas().items()})


def test_dora_of_a_fused_projection_has_the_lengths_of_its_rows(base: Path, tmp_path: Path) -> None:
    name = STYLES["bridge"]["qkv"].format(0)
    lengths = numbers(FUSED, seed=5).abs() + 1
    tensors = {n: t for n, t in megatron_tensors("bridge").items() if n.startswith(name)} | {
        f"{name}.weight_magnitude": lengths
    }
    out = merged(base, write(tmp_path / "a", tensors, SETTINGS["bridge"]), tmp_path / "out")
    for part in "qkv":
        found = weights(out)[f"model.layers.0.self_attn.{part}_proj"].norm(dim=1)
        wanted = rows_of_groups(lengths, HEADS, KEY_HEADS, part).double()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_rewritten_adapter_names_the_modules_as_transformers_does(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", megatron_tensors("bridge"), SETTINGS["bridge"])
    loratool.rescale(adapter, tmp_path / "double", scale=2.0, bake=True)
    found = weights(merged(base, tmp_path / "double", tmp_path / "out"))
    for module, delta in megatron_deltas().items():
        torch.testing.assert_close(found[module], weights(base)[module] + 2 * delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_another_strength_changes_one_number_of_the_settings(base: Path, tmp_path: Path, style: str) -> None:
    """Heads are not needed; the comment on its line, all other lines and all tensors keep their bytes."""
    name, text = SETTINGS[style]
    text = text.replace("num_attention_heads", "heads_that_are_not_told")
    adapter = write(tmp_path / "a", megatron_tensors(style), (name, text))
    loratool.rescale(adapter, tmp_path / "triple", scale=3.0)
    assert (tmp_path / "triple" / name).read_text() == text.replace(f"  alpha: {ALPHA}", f"  alpha: {3 * ALPHA}")
    assert (tmp_path / "triple" / "adapter.safetensors").read_bytes() == (adapter / "weights.safetensors").read_bytes()
    out = merged(base, tmp_path / "triple", tmp_path / "out")
    check_merged(out, base, {module: 3 * delta for module, delta in megatron_deltas().items()})


QKV = STYLES["bridge"]["qkv"].format(0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({f"{QKV}.linear_out.weight": None}, r"linear_qkv\.adapter\.linear_out\.weight is missing"),
        ({f"{QKV}.linear_out.weight": numbers(FUSED, 3)}, "expected one rank"),
        ({f"{QKV}.linear_out.weight": numbers(FUSED - 1, RANK)}, "cannot be those of 4 .* heads"),
        (
            {f"{STYLES['bridge']['fc1'].format(0)}.linear_out.weight": numbers(2 * WIDE - 1, RANK)},
            "gate_proj and up_proj",
        ),
        (
            {"decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_in.weight": numbers(RANK, HIDDEN)}
            | {"decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_out.weight": numbers(WIDE, RANK)},
            "no known name",
        ),
        ({"decoder.layers.0.odd": numbers(2)}, r"decoder\.layers\.0\.odd"),
    ],
)
def test_megatron_adapters_that_are_broken_are_refused(
    base: Path, tmp_path: Path, change: dict[str, Tensor | None], told: str
) -> None:
    tensors = {n: t for n, t in (megatron_tensors("bridge") | change).items() if t is not None}
    with pytest.raises(loratool.LoratoolError, match=told):
        merged(base, write(tmp_path / "a", tensors, SETTINGS["bridge"]), tmp_path / "out")


# loralib

PLAIN, TABLE, WIDER = "enc.0.proj", "embed_tokens", "enc.0.fc"


def model(folder: Path, more: dict[str, Tensor] | None = None, config: dict[str, Any] | None = None) -> Path:
    tensors = {f"{PLAIN}.weight": numbers(6, 4, seed=1), f"{TABLE}.weight": numbers(TOKENS, 4, seed=2)}
    tensors |= {f"{WIDER}.weight": numbers(12, 4, seed=3), f"{PLAIN}.bias": numbers(6, seed=4)}
    return save_model(folder, tensors | (more or {}), config or {"model_type": "thing"})


def test_loralib_layers_embeddings_and_biases_take_an_alpha_of_the_caller(tmp_path: Path) -> None:
    """Of an embedding the product is transposed; a bias that was saved takes the place of the base's."""
    base = model(tmp_path / "base")
    tensors = {
        f"{PLAIN}.lora_A": numbers(RANK, 4, seed=5),
        f"{PLAIN}.lora_B": numbers(6, RANK, seed=6),
        f"{PLAIN}.bias": numbers(6, seed=7),
        f"{TABLE}.lora_A": numbers(RANK, TOKENS, seed=8),
        f"{TABLE}.lora_B": numbers(4, RANK, seed=9),
    }
    adapter = write(tmp_path / "a", tensors)
    with pytest.raises(loratool.InputError, match="--input-alpha"):
        merged(base, adapter, tmp_path / "out")
    found = load_file(merged(base, adapter, tmp_path / "out", input_alpha=ALPHA) / "model.safetensors")
    before = load_file(base / "model.safetensors")
    for name in (PLAIN, TABLE):
        delta = product(tensors[f"{name}.lora_B"], tensors[f"{name}.lora_A"], SCALE)
        wanted = before[f"{name}.weight"].double() + (delta.T if name == TABLE else delta)
        assert torch.equal(found[f"{name}.weight"], wanted.float())
    assert torch.equal(found[f"{PLAIN}.bias"], tensors[f"{PLAIN}.bias"])


def test_loralib_layers_that_are_stored_the_other_way_round_are_transposed(tmp_path: Path) -> None:
    """`fan_in_fan_out`, which the base's shape shows."""
    base = model(
        tmp_path / "base",
        {"h.0.mlp.c_fc.weight": numbers(4, 6)},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    )
    tensors = {"h.0.mlp.c_fc.lora_A": numbers(RANK, 4), "h.0.mlp.c_fc.lora_B": numbers(6, RANK)}
    out = merged(base, write(tmp_path / "a", tensors, lora_alpha=str(ALPHA)), tmp_path / "out")
    delta = product(tensors["h.0.mlp.c_fc.lora_B"], tensors["h.0.mlp.c_fc.lora_A"], SCALE).T
    assert torch.equal(
        load_file(out / "model.safetensors")["h.0.mlp.c_fc.weight"], (numbers(4, 6).double() + delta).float()
    )


def merged_linear(enabled: list[bool]) -> tuple[dict[str, Tensor], Tensor]:
    """Factors of a layer of three parts, and ΔW block by block."""
    count = sum(enabled)
    a, b = numbers(RANK * count, 4, seed=5), numbers(4 * count, RANK, seed=6)
    blocks = iter(range(count))
    rows = [
        product(b[4 * n : 4 * n + 4], a[RANK * n : RANK * n + RANK], SCALE)
        if on and (n := next(blocks)) >= 0
        else torch.zeros(4, 4)
        for on in enabled
    ]
    return {f"{WIDER}.lora_A": a, f"{WIDER}.lora_B": b}, torch.cat(rows)


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True, True]])
def test_loralib_parts_of_a_merged_linear_are_those_that_its_header_names(tmp_path: Path, enabled: list[bool]) -> None:
    base = model(tmp_path / "base")
    tensors, delta = merged_linear(enabled)
    adapter = write(tmp_path / "a", tensors, lora_alpha=str(ALPHA), enable_lora=str(enabled))
    found = load_file(merged(base, adapter, tmp_path / "out") / "model.safetensors")[f"{WIDER}.weight"]
    assert torch.equal(found, (numbers(12, 4, seed=3).double() + delta).float())


def test_loralib_parts_that_nothing_names_are_all_or_the_weight_does_not_fit(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    tensors, delta = merged_linear([True, True, True])
    report = loratool.merge(base, write(tmp_path / "all", tensors), tmp_path / "out", device="cpu", input_alpha=ALPHA)
    assert "parts-assumed" in [note.code for note in report.notes]
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{WIDER}.weight"]
    assert torch.equal(found, (numbers(12, 4, seed=3).double() + delta).float())
    some = write(tmp_path / "some", merged_linear([True, False, True])[0])
    with pytest.raises(loratool.FitError, match=r"\[8, 4\].*\[12, 4\]"):
        merged(base, some, tmp_path / "second", input_alpha=ALPHA)


def test_loralib_convolutions_are_read_in_the_order_of_the_weight(tmp_path: Path) -> None:
    """Its product has (out · k, in · k) elements, which are the weight's one after the other; alpha is divided by r."""
    weight = numbers(6, 4, 3, 3, seed=11)
    base = model(tmp_path / "base", {"conv.weight": weight})
    a, b = numbers(RANK * 3, 4 * 3, seed=12), numbers(6 * 3, RANK * 3, seed=13)
    adapter = write(tmp_path / "a", {"conv.lora_A": a, "conv.lora_B": b}, lora_alpha=str(ALPHA))
    found = load_file(merged(base, adapter, tmp_path / "out") / "model.safetensors")["conv.weight"]
    wanted = weight.double() + (product(b, a, SCALE)).view(6, 4, 3, 3)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("tensors", "header", "told"),
    [
        ({f"{PLAIN}.lora_A": numbers(2, 4)}, {}, r"lora_B is missing"),
        ({f"{PLAIN}.lora_A": numbers(3, 4), f"{PLAIN}.lora_B": numbers(6, 2)}, {}, "expected one rank"),
        (
            {f"{PLAIN}.lora_A": numbers(2, 4), f"{PLAIN}.lora_B": numbers(6, 2)},
            {"lora_alpha": "many"},
            "expected a finite number",
        ),
        ({f"{PLAIN}.lora_A": numbers(2, 4), f"{PLAIN}.lora_B": numbers(6, 2)}, {"enable_lora": "yes"}, "true or false"),
        (
            merged_linear([True, False, True])[0],
            {"enable_lora": "true,false,false"},
            "2 parts, but enable_lora names 1",
        ),
        ({f"{PLAIN}.lora_A": numbers(2, 4), f"{PLAIN}.lora_B": numbers(6, 2), "odd": numbers(2)}, {}, "odd"),
    ],
)
def test_loralib_files_that_are_broken_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], header: dict[str, str], told: str
) -> None:
    adapter = write(tmp_path / "a", tensors, None, **header)
    options = {} if "lora_alpha" in header else {"input_alpha": ALPHA}
    with pytest.raises(loratool.LoratoolError, match=told):
        merged(model(tmp_path / "base"), adapter, tmp_path / "out", **options)


def test_pefts_config_says_whose_a_file_of_such_names_is(tmp_path: Path) -> None:
    tensors = {f"{PLAIN}.lora_A": numbers(2, 4), f"{PLAIN}.lora_B": numbers(6, 2)}
    adapter = write(
        tmp_path / "a", tensors, ("adapter_config.json", json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    )
    assert loratool.read_adapter(adapter / "weights.safetensors").format == "peft"
