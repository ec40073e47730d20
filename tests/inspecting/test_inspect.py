"""What `inspect` tells, held to PEFT, to dense decompositions in float64, and to the files read by the safetensors package."""

from __future__ import annotations

import json
import math
import runpy
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import save_model
from malformed import write_adapter, write_base
from paths import REAL, ROOT
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft_files import named_by_peft, save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import loratool
from loratool import cli
from loratool.results.facts import AdapterFacts, CheckpointFacts
from loratool.results.values import Measured, Values

if TYPE_CHECKING:
    from loratool.results.values import MeasuredOnBase

DESCRIBED: dict[str, Any] = json.loads((ROOT / "docs" / "schemas" / "inspect.schema.json").read_text("utf-8"))
PREFIX = "base_model.model."


def validate(found: Any) -> None:
    """Hold what `inspect --json` printed to its published schema, where a validator is installed."""
    if find_spec("jsonschema") is not None:
        import jsonschema

        jsonschema.Draft202012Validator(DESCRIBED).validate(found)


def llama(**settings: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaConfig(**{**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, **settings})


def write_factors(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """An adapter with (B, A) of some modules."""
    rank = next(iter(factors.values()))[1].shape[0]
    return save_peft(folder, named_by_peft(factors), **{"r": rank, "lora_alpha": 2 * rank, **config})


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapter_facts(path: Path, **options: Any) -> AdapterFacts:
    facts = loratool.inspect(path, **options)
    assert isinstance(facts, AdapterFacts)
    return facts


def values_of(path: Path, **options: Any) -> Values:
    values = adapter_facts(path, values=True, device="cpu", **options).values
    assert values is not None
    return values


# Parameters, as PEFT prints them


OTHERS: dict[str, Any] = {
    "AdaLoRA": AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "(IA)³": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "LoHa": LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "VB-LoRA": VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "DeLoRA": DeloraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "LN tuning": LNTuningConfig(task_type="CAUSAL_LM"),
    "tokens": TrainableTokensConfig(token_indices=[1, 2], task_type="CAUSAL_LM"),
}


def counted_as_printed(tuned: Any, home: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line of parameters that PEFT prints, which `inspect` tells of the adapter that it saves, too."""
    capsys.readouterr()
    tuned.print_trainable_parameters()
    printed = capsys.readouterr().out.strip()
    tuned.save_pretrained(home / "adapter")
    against = adapter_facts(home / "adapter", base=home / "base").against
    assert against is not None
    assert against.line == printed
    return printed


@pytest.mark.parametrize("kind", OTHERS)
def test_parameters_of_other_types_are_counted_as_peft_prints_them(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_config(llama())
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, OTHERS[kind])
    counted_as_printed(tuned, tmp_path, capsys)


def sequence_model(config: LlamaConfig) -> Any:
    config.num_labels, config.pad_token_id = 3, 0
    return AutoModelForSequenceClassification.from_config(config)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"target_modules": ["q_proj", "v_proj"]}),
    "all linear, tied": ({"tie_word_embeddings": True}, {"target_modules": "all-linear"}),
    "DoRA": ({}, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "modules to save": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ({}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "trained biases": ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of B": ({"attention_bias": True}, {"target_modules": ["q_proj"], "lora_bias": True}),
    "tokens": ({}, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 7]}),
    "ranks by pattern": ({}, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_parameters_are_counted_as_peft_prints_them(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_settings, settings = SETTINGS[case]
    model = AutoModelForCausalLM.from_config(llama(**model_settings))
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    printed = counted_as_printed(tuned, tmp_path, capsys)
    if "tie" not in case:
        by_config = adapter_facts(tmp_path / "adapter", base_config=tmp_path / "base" / "config.json").against
        assert by_config is not None
        assert (by_config.line, by_config.source) == (printed, "config")


def test_a_head_that_the_base_has_not_is_counted_twice_as_peft_holds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = llama(tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tuned = get_peft_model(sequence_model(config), LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj"]))
    counted_as_printed(tuned, tmp_path, capsys)


def sparse_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Path:
    """An adapter of some shapes whose values, all zero, take no room on the disk."""
    folder.mkdir()
    table, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(table).encode()
    with open(folder / "adapter_model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + at)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_line_of_llama_2_7b_is_the_one_that_everybody_knows(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(32):
        for name in ("q_proj", "v_proj"):
            module = f"{PREFIX}model.layers.{layer}.self_attn.{name}"
            shapes[f"{module}.lora_A.weight"], shapes[f"{module}.lora_B.weight"] = (8, 4096), (4096, 8)
    adapter = sparse_adapter(tmp_path / "adapter", shapes, {"peft_type": "LORA", "r": 8, "lora_alpha": 16})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    against = adapter_facts(adapter, base_config=tmp_path / "config.json").against
    assert against is not None
    assert against.line == "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622"


# Facts from headers


def test_facts_of_headers_are_those_of_the_file(tmp_path: Path) -> None:
    factors = {"model.layers.0.self_attn.q_proj": (normal(12, 3), normal(3, 8))}
    factors["model.layers.1.self_attn.q_proj"] = (normal(12, 5), normal(5, 8))
    pattern = {"model.layers.1.self_attn.q_proj": 5}
    path = write_factors(tmp_path / "a", factors, rank_pattern=pattern, use_rslora=True, task_type="CAUSAL_LM")
    facts = adapter_facts(path, tensors=True)
    assert facts.ranks == {"3": 1, "5": 1}
    assert facts.rslora
    assert facts.alphas == {"6": 2}
    assert [module.scaling for module in facts.modules] == pytest.approx([6 / math.sqrt(3), 6 / math.sqrt(5)])
    assert facts.rank_pattern == {"model.layers.1.self_attn.q_proj": 5}
    assert [(t.name, t.shape, t.count, t.parameters) for t in facts.targets] == [
        ("q_proj", (12, 8), 2, 3 * 20 + 5 * 20)
    ]
    stored = load_file(path / "adapter_model.safetensors")
    assert facts.tensors is not None
    assert {t.name: (t.shape, t.bytes) for t in facts.tensors} == {
        name: (tuple(tensor.shape), 4 * tensor.numel()) for name, tensor in stored.items()
    }
    assert facts.parameters == sum(tensor.numel() for tensor in stored.values())
    assert facts.values is None
    assert facts.findings is None


def test_with_a_base_every_module_names_the_tensor_it_lands_on(tmp_path: Path) -> None:
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    save_model(
        tmp_path / "base",
        {fused: normal(32, 16)},
        {"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    )
    factors = {"model.layers.0.self_attn.qkv_proj": (normal(32, 2), normal(2, 16))}
    facts = adapter_facts(write_factors(tmp_path / "a", factors), base=tmp_path / "base")
    (module,) = facts.modules
    assert module.places is not None
    assert [(place.tensor, place.rows) for place in module.places] == [(fused, (0, 32))]


def test_a_base_that_does_not_fit_is_an_error_unless_it_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base")
    path = write_factors(tmp_path / "a", {"model.layers.7.self_attn.q_proj": (normal(8, 2), normal(2, 8))})
    assert cli.run(["inspect", str(path), "--base", str(tmp_path / "base")]) == 4
    assert "does not fit" in capsys.readouterr().err
    assert cli.run(["inspect", str(path), "--base", str(tmp_path / "base"), "--check", "--json"]) == 3
    (facts,) = json.loads(capsys.readouterr().out)["results"]
    assert {finding["code"] for finding in facts["findings"]} >= {"does-not-fit"}
    assert facts["modules"][0]["places"] == []


def test_a_model_that_loratool_merged_says_of_what(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", weights=[0.5], device="cpu")
    facts = loratool.inspect(tmp_path / "out")
    assert isinstance(facts, CheckpointFacts)
    assert facts.made_by == "loratool merge: base + adapter × 0.5"
    assert ("q_proj", (8, 8), 1) in [(w.name, w.shape, w.count) for w in facts.weights]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("lllite_unet_down_blocks_0.conditioning1.0.weight", "controlnet-lllite"),
        ("emb_params", "textual-inversion"),
        ("w_a_000", "numbered"),
    ],
)
def test_a_file_of_a_kind_that_is_not_read_is_named_and_counted(name: str, form: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(4, 8)}, tmp_path / "weights.safetensors")
    facts = adapter_facts(tmp_path / "weights.safetensors", tensors=True, check=True)
    assert (facts.format, facts.parameters, facts.dtypes) == (form, 32, {"F32": 1})
    assert len(facts.unsupported) == 1
    assert facts.tensors is not None
    assert [tensor.name for tensor in facts.tensors] == [name]


def test_a_model_whose_names_begin_as_those_of_an_adapter_is_a_checkpoint(tmp_path: Path) -> None:
    save_file({"transformer.h.0.attn.c_attn.weight": torch.ones(4, 8)}, tmp_path / "gpt2.safetensors")
    assert isinstance(loratool.inspect(tmp_path / "gpt2.safetensors"), CheckpointFacts)


def test_a_base_and_its_config_are_not_both_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    words = ["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--base-config", "config.json"]
    assert cli.run(words) == 2
    assert "mutually exclusive" in capsys.readouterr().err


# Facts from values


def decaying(
    rows: int, columns: int, rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(B, A) whose product has singular values over four decades."""
    fall = torch.logspace(0, -4, rank, dtype=torch.float64)
    return (
        (normal(rows, rank, seed=seed, dtype=torch.float64) * fall).to(dtype),
        normal(rank, columns, seed=seed + 1, dtype=torch.float64).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 24, 8), (16, 48, 16), (6, 9, 12), (20, 20, 1)])
def test_singular_values_and_ranks_are_those_of_the_dense_matrix(
    rows: int, columns: int, rank: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    up, down = decaying(rows, columns, rank, 3, dtype)
    path = write_factors(tmp_path / "a", {"layer": (up, down)}, lora_alpha=3 * rank)
    (found,) = values_of(path).modules
    dense = torch.linalg.svdvals(3.0 * up.double() @ down.double())
    exact = dense[: min(rank, rows, columns)]
    assert len(found.singular_values) == len(exact)
    assert float((torch.tensor(found.singular_values) - exact).abs().max()) <= 1e-6 * float(exact[0])
    energies = exact.square()
    shares = exact / exact.sum()
    assert found.norm == pytest.approx(float(energies.sum().sqrt()))
    assert found.spectral == pytest.approx(float(exact[0]))
    assert found.stable_rank == pytest.approx(float(energies.sum() / energies[0]))
    assert found.entropy_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))
    kept = (energies.cumsum(0) / energies.sum()).tolist()
    assert found.energy_ranks == tuple(
        next(at for at, part in enumerate(kept, 1) if part >= wanted - 1e-12) for wanted in (0.90, 0.95, 0.99)
    )
    assert found.balance == pytest.approx(float(up.double().norm() / down.double().norm()))
    assert found.dead == rank - sum(float(value) > 1e-6 * float(exact[0]) for value in exact)


def test_dead_components_odd_values_and_zero_updates_are_counted(tmp_path: Path) -> None:
    up, down = normal(12, 4), normal(4, 10)
    down[1], up[:, 2] = 0, 0
    broken = normal(12, 4)
    broken[0, 0], broken[3, 1], broken[4, 1] = math.nan, math.inf, 1e-41
    factors = {
        "m.0.dead": (up, down),
        "m.0.broken": (broken, normal(4, 10)),
        "m.0.zero": (torch.zeros(12, 4), normal(4, 10)),
        "m.0.sound": (normal(12, 4), normal(4, 10)),
    }
    values = values_of(write_factors(tmp_path / "a", factors))
    found = {module.target: module for module in values.modules}
    dead = found["m.0.dead.weight"]
    assert (dead.dead, dead.zero_rows, dead.zero_columns) == (2, 1, 1)
    assert dead.condition is None
    bad = found["m.0.broken.weight"]
    assert (bad.nonfinite, bad.subnormal, bad.norm, bad.singular_values) == (2, 1, None, ())
    zero = found["m.0.zero.weight"]
    assert (zero.norm, zero.stable_rank, zero.energy_ranks, zero.dead) == (0.0, None, None, 4)
    sound = found["m.0.sound.weight"]
    assert dead.norm is not None
    assert sound.norm is not None
    assert values.norm == pytest.approx(math.hypot(dead.norm, sound.norm))
    validate(as_json(tmp_path / "a", "--values"))


def test_suggested_ranks_keep_their_energy_and_resize_writes_the_bytes_that_are_told(tmp_path: Path) -> None:
    factors = {f"model.layers.{n}.{name}": decaying(24, 16, 8, 10 * n + at) for n in range(3) for at, name in
               enumerate(("q_proj", "v_proj"))}  # fmt: skip
    path = write_factors(tmp_path / "a", factors)
    values = values_of(path)
    spectra = [torch.linalg.svdvals(2.0 * up.double() @ down.double())[:8].square() for up, down in factors.values()]
    together = torch.stack(spectra).sum(0)
    for kept in values.suggestions:
        parts = (together.cumsum(0) / together.sum()).tolist()
        assert kept.rank == next(at for at, part in enumerate(parts, 1) if part >= kept.energy)
        uniform = loratool.resize(path, tmp_path / "out", rank=kept.rank, device="cpu", dry_run=True)
        assert (uniform.totals.bytes, uniform.totals.bytes_before) == (kept.bytes, kept.bytes_now)
        by_layer = loratool.resize(path, tmp_path / "out", energy=kept.energy, device="cpu", dry_run=True)
        assert by_layer.totals.bytes == kept.bytes_by_layer


BASE_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", BASE_DTYPES, ids=str)
def test_against_a_base_norms_rounding_and_amplification_are_those_of_the_formula(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = (normal(48, 32, seed=9) * 0.02).to(dtype)
    up, down = normal(48, 4, seed=1) * 1e-4, normal(4, 32, seed=2)
    weighed = weigh_one(tmp_path, weight, up, down)
    wide, delta = weight.double(), 2.0 * up.double() @ down.double()
    u, _, vt = torch.linalg.svd(delta, full_matrices=False)
    applied = (weight.float() + (2.0 * up @ down)).to(dtype).double() - wide
    assert weighed.sampled_rows == 48
    assert weighed.norm == pytest.approx(float(wide.norm()))
    assert weighed.ratio == pytest.approx(float(delta.norm() / wide.norm()))
    assert weighed.amplification == pytest.approx(float(delta.norm() / (u[:, :4].T @ wide @ vt[:4].T).norm()), rel=1e-5)
    assert weighed.unchanged == pytest.approx(float((applied == 0).double().mean()), abs=2e-3)
    assert weighed.gain == pytest.approx(float((applied * delta).sum() / delta.square().sum()), rel=2e-3)


def weigh_one(folder: Path, weight: Tensor, up: Tensor, down: Tensor, **config: Any) -> MeasuredOnBase:
    save_model(folder / "base", {"model.layers.0.self_attn.q_proj.weight": weight}, {"model_type": "llama"})
    path = write_factors(folder / "a", {"model.layers.0.self_attn.q_proj": (up, down)}, **config)
    (found,) = values_of(path, base=folder / "base").modules
    assert found.weight is not None
    return found.weight


def test_a_large_weight_is_rounded_on_a_sample_of_rows_and_that_is_said(tmp_path: Path) -> None:
    weight = (normal(1500, 1024, seed=9) * 0.02).to(torch.bfloat16)
    up, down = normal(1500, 2, seed=1) * 2e-5, normal(2, 1024, seed=2)
    weighed = weigh_one(tmp_path, weight, up, down)
    assert weighed.sampled_rows == 1024
    applied = (weight.float() + (2.0 * up @ down)).to(torch.bfloat16).double() - weight.double()
    assert weighed.unchanged == pytest.approx(float((applied == 0).double().mean()), abs=0.02)
    assert weighed.norm == pytest.approx(float(weight.double().norm()))
    assert any(
        "up to 1024 evenly spaced rows" in note
        for note in map(str, values_of(tmp_path / "a", base=tmp_path / "base").notes)
    )


def test_a_conv1d_and_an_embedding_are_weighed_the_way_round_they_are_stored(tmp_path: Path) -> None:
    base = {"h.0.attn.c_attn.weight": normal(16, 48, seed=1), "wte.weight": normal(30, 16, seed=2)}
    save_model(tmp_path / "base", base, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    path = write_factors(tmp_path / "a", {"transformer.h.0.attn.c_attn": (normal(48, 2), normal(2, 16))})
    tensors = load_file(path / "adapter_model.safetensors")
    tensors[f"{PREFIX}transformer.wte.lora_embedding_A"] = normal(2, 30, seed=4)
    tensors[f"{PREFIX}transformer.wte.lora_embedding_B"] = normal(16, 2, seed=5)
    save_file(tensors, path / "adapter_model.safetensors")
    found = {m.target: m for m in values_of(path, base=tmp_path / "base").modules}
    for target, delta, tensor in (
        ("transformer.h.0.attn.c_attn.weight", 2.0 * normal(48, 2) @ normal(2, 16), "h.0.attn.c_attn.weight"),
        ("transformer.wte.weight", 2.0 * (normal(16, 2, seed=5) @ normal(2, 30, seed=4)).T, "wte.weight"),
    ):
        weighed, stored = found[target].weight, base[tensor].double()
        assert weighed is not None
        turned = delta.double().T if delta.shape != stored.shape else delta.double()
        u, _, vt = torch.linalg.svd(turned, full_matrices=False)
        core = (u[:, :2].T @ stored @ vt[:2].T).norm()
        assert weighed.amplification == pytest.approx(float(turned.norm() / core), rel=1e-5)
        assert weighed.gain == pytest.approx(1.0, abs=1e-5)


def test_what_is_no_low_rank_product_is_told_as_not_measured(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(llama())
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "a")
    values = values_of(tmp_path / "a")
    assert values.modules == ()
    assert len(values.skipped) == 2
    validate(as_json(tmp_path / "a", "--values", "--check"))


def test_a_tied_head_is_weighed_against_the_embedding_that_holds_it(tmp_path: Path) -> None:
    embedding = normal(30, 16, seed=2)
    save_model(
        tmp_path / "base",
        {"model.embed_tokens.weight": embedding},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    )
    path = write_factors(tmp_path / "a", {"lm_head": (normal(30, 2), normal(2, 16))})
    (found,) = values_of(path, base=tmp_path / "base").modules
    assert found.weight is not None
    assert found.weight.tensor == "model.embed_tokens.weight"
    assert found.weight.norm == pytest.approx(float(embedding.norm()))


def test_a_convolution_and_dora_are_measured_as_their_product(tmp_path: Path) -> None:
    up, down = normal(6, 3, 1, 1, seed=1), normal(3, 4, 3, 3, seed=2)
    linear = normal(8, 3, seed=3), normal(3, 5, seed=4)
    path = write_factors(tmp_path / "a", {"conv": (up, down), "linear": linear}, use_dora=True)
    tensors = load_file(path / "adapter_model.safetensors")
    tensors[f"{PREFIX}conv.lora_magnitude_vector"] = torch.ones(1, 6, 1, 1)
    tensors[f"{PREFIX}linear.lora_magnitude_vector"] = torch.ones(8)
    save_file(tensors, path / "adapter_model.safetensors")
    values = values_of(path)
    found = {m.target: m.singular_values for m in values.modules}
    dense = 2.0 * up.double().flatten(1) @ down.double().flatten(1)
    assert found["conv.weight"] == pytest.approx(torch.linalg.svdvals(dense)[:3].tolist())
    dense = 2.0 * linear[0].double() @ linear[1].double()
    assert found["linear.weight"] == pytest.approx(torch.linalg.svdvals(dense)[:3].tolist())
    assert any(note.startswith("DoRA") for note in map(str, values.notes))
    facts = adapter_facts(path)
    assert facts.dora
    assert [(t.name, t.shape) for t in facts.targets] == [("conv", (6, 4, 3, 3)), ("linear", (8, 5))]


# Output


def as_json(path: Path, *options: str) -> Any:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.run(["inspect", str(path), "--json", "--device", "cpu", *options])
    assert code in (0, 3)
    return json.loads(out.getvalue(), parse_constant=refuse_constant)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the published adapters are not here: {REAL} is missing")
def test_json_of_every_published_adapter_is_as_the_schema_says() -> None:
    folders = sorted(path for path in REAL.iterdir() if path.is_dir())
    assert len(folders) > 20
    kinds = set()
    for folder in folders:
        found = as_json(folder, "--values", "--check", "--tensors")
        validate(found)
        kinds.add(found["results"][0]["kind"])
    assert kinds == {"adapter", "unreadable"}


def test_json_of_the_fixture_and_of_the_demo_is_as_the_schema_says(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "fixtures" / "make_tiny.py"))["make_tiny"](tmp_path / "tiny")
    loratool_demo(tmp_path / "demo")
    for home, merged in ((tmp_path / "tiny", ()), (tmp_path / "demo", ("merged",))):
        base = ("--base", str(home / "base"))
        for name, options in (("adapter", base), ("base", ()), *((m, ()) for m in merged)):
            validate(as_json(home / name, *options))
            validate(as_json(home / name, "--values", "--check", "--tensors", *options))


def loratool_demo(folder: Path) -> None:
    from loratool.demo import demo

    demo(folder)


def test_the_schema_forbids_fields_that_it_does_not_describe() -> None:
    def check(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node:
                assert node["additionalProperties"] is False
                assert set(node["required"]) == {*node["properties"]} - {"operands"}
            for value in node.values():
                check(value)

    if find_spec("jsonschema") is not None:
        import jsonschema

        jsonschema.Draft202012Validator.check_schema(DESCRIBED)
    check(DESCRIBED)
    described = DESCRIBED["$defs"]
    for kind in (AdapterFacts, CheckpointFacts, Measured):
        assert set(described[kind.__name__]["properties"]) == set(kind.__dataclass_fields__)


@pytest.mark.parametrize("options", [(), ("--values", "--check"), ("--tensors",)], ids=" ".join)
def test_the_report_fits_80_columns(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loratool_demo(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["inspect", "demo/adapter", "demo/base", "--base", "demo/base", "--device", "cpu", *options]) == 0
    wide = [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]
    assert wide == []


@pytest.mark.parametrize("number", [1, 4, 6])
def test_a_long_word_stays_whole_and_long_sentences_are_broken(number: int) -> None:
    from loratool.results.text import COLUMNS, aligned

    text = aligned([("name", " ".join(["word"] * 10 * number) + " " + "x" * 90)], COLUMNS)
    assert all(len(line) <= 80 or "x" * 90 in line for line in text.splitlines())
    assert "x" * 90 in text


def test_progress_counts_the_modules(tmp_path: Path) -> None:
    path = write_factors(tmp_path / "a", {f"m.{n}.p": (normal(4, 2), normal(2, 4)) for n in range(5)})
    seen: list[tuple[int, int]] = []
    loratool.inspect(path, values=True, device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]


def test_experts_are_measured_together(tmp_path: Path) -> None:
    experts, rank, out, into = 3, 2, 6, 8
    a, b = normal(experts * rank, into, seed=1), normal(out, rank * experts, seed=2)
    path = tmp_path / "a"
    module = f"{PREFIX}model.layers.0.mlp.experts"
    save_peft(
        path,
        {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b},
        r=rank,
        lora_alpha=2 * rank,
        target_modules=None,
        target_parameters=["experts.down_proj"],
    )
    (found,) = values_of(path).modules
    matrices = [2.0 * b.double()[:, e::experts] @ a.double()[e * rank : (e + 1) * rank] for e in range(experts)]
    spectra = torch.stack([torch.linalg.svdvals(m)[:rank] for m in matrices])
    assert found.norm == pytest.approx(float(spectra.square().sum().sqrt()))
    assert found.spectral == pytest.approx(float(spectra.max()))
    assert found.singular_values == pytest.approx(spectra.square().sum(0).sqrt().tolist())
    assert found.stable_rank == pytest.approx(float((spectra.square().sum(1) / spectra[:, 0].square()).mean()))


def test_one_file_and_several_paths_are_taken_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "other")
    paths = [tmp_path / "other" / "adapter_model.safetensors", tmp_path / "base", tmp_path / "other"]
    assert cli.run(["inspect", "--json", *map(str, paths)]) == 0
    assert [r["kind"] for r in json.loads(capsys.readouterr().out)["results"]] == ["adapter", "checkpoint", "adapter"]


def test_a_folder_of_weights_without_a_config_is_not_sent_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`folder/adapter_config.json` looks like a name of a repository."""
    (tmp_path / "folder").mkdir()
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, tmp_path / "folder" / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["inspect", "folder"]) == 3
    assert capsys.readouterr().err.splitlines()[0] == (
        "Error: folder/adapter_config.json is missing, so the rank and alpha are unknown; copy it from the training "
        "output"
    )


def test_layers_without_dots_in_their_names_share_a_line(tmp_path: Path) -> None:
    """A kohya file of SDXL has 722 modules, and its targets and where they go should be a page."""
    tensors: dict[str, Tensor] = {}
    for block in range(3):
        module = f"lora_unet_down_blocks_{block}_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors |= {f"{module}.lora_down.weight": torch.ones(2, 4), f"{module}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    facts = loratool.inspect(tmp_path / "lora.safetensors")
    assert isinstance(facts, AdapterFacts)
    (only,) = facts.targets
    assert (only.name, only.count) == ("attn1_to_q", 3)
    weights = {
        f"unet.down_blocks.{block}.attentions.0.transformer_blocks.0.attn1.to_q.weight": torch.ones(4, 4)
        for block in range(3)
    }
    save_file(weights, tmp_path / "base.safetensors")
    told = " ".join(str(loratool.inspect(tmp_path / "lora.safetensors", base=tmp_path / "base.safetensors")).split())
    every = "{0-2}"  # of the base's names; those of the file have no dots that would tell their numbers apart
    assert (
        "unet_down_blocks_#_attentions_#_transformer_blocks_#_attn1_to_q.weight → "
        f"unet.down_blocks.{every}.attentions.0.transformer_blocks.0.attn1.to_q.weight ×3" in told
    )
