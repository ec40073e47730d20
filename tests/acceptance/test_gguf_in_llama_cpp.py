"""llama.cpp itself: its converter makes of merged models what merges into GGUF make, and it runs those.

`make acceptance` puts llama.cpp's converters (from the source package of llama-cpp-python) and node-llama-cpp next to
the environment's packages; without them these tests are skipped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from merged_models import write_adapter
from paths import ROOT
from peft import LoraConfig, get_peft_model

import loratool

pytest.importorskip("gguf")
import gguf
from gguf_models import (
    Array,
    Kind,
    as_llama_cpp,
    llama_weights,
    q4_k_blocks,
    raw_of,
    read_back,
    write_adapter_tensors,
    write_llama,
)

CONVERTERS, RUNTIME = Path(sys.prefix) / "llama.cpp", Path(sys.prefix) / "node_modules" / "node-llama-cpp"
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
STACKS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
ALL = {"target_modules": "all-linear"}
ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
Case = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]  # class, config, targets, what its config.json lacks
CASES: dict[str, Case] = {
    "llama": ("Llama", {"tie_word_embeddings": False}, ALL, {}),
    "llama with biases": ("Llama", {"tie_word_embeddings": False, "attention_bias": True}, ATTENTION, {}),
    "mistral": ("Mistral", {}, ALL, {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}, STACKS, {}),
    "qwen2": ("Qwen2", {}, ALL, {}),
    "qwen2moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 40}, ATTENTION, {}),
    "qwen3": ("Qwen3", {"head_dim": 8}, ALL, {}),
    "qwen3moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 8}, STACKS, {}),
    "gemma": ("Gemma", {"head_dim": 8}, ALL, {}),
    "gemma2": ("Gemma2", {"head_dim": 8}, ALL, {}),
    "phi2": ("Phi", {}, ALL, {}),
    "phi3": ("Phi3", {"pad_token_id": 0}, ALL, {}),
    "gpt2": ("GPT2LMHead", {**GPT2, "n_ctx": 64}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}, {}),
    "starcoder": ("GPTBigCode", GPT2, ALL, {}),
    "starcoder2": ("Starcoder2", {}, ALL, {}),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}, ALL, {}),
    "falcon": ("Falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, ALL, {}),
    "falcon with one key head": ("Falcon", {}, ALL, {"num_kv_heads": 1}),
    "mpt": (
        "Mpt",
        {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        ALL,
        {"architectures": ["MPTForCausalLM"]},
    ),
    "stablelm": ("StableLm", {}, ALL, {}),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"target_modules": ["q_proj", "k_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        {},
    ),
    "olmo": ("Olmo", {}, ALL, {}),
    "olmo2": ("Olmo2", {}, ALL, {}),
    "command-r": ("Cohere", {}, ALL, {}),
    "granite": ("Granite", {}, ALL, {}),
    "smollm3": ("SmolLM3", {"pad_token_id": 0}, ALL, {}),
    "arcee": ("Arcee", {}, ALL, {}),
    "seed_oss": ("SeedOss", {"head_dim": 8}, ALL, {}),
    "exaone4": ("Exaone4", {"sliding_window": 16, "sliding_window_pattern": 4}, ALL, {}),
}
ADAPTED = ("llama", "qwen2", "gemma2")  # whose adapters the converter takes as they are


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with adapters, before and after a merge by PEFT, all of them as llama.cpp's converter writes them."""
    if not (CONVERTERS / "convert_lora_to_gguf.py").is_file():
        pytest.skip("llama.cpp's converters are not installed")
    home = tmp_path_factory.mktemp("models")
    jobs = [job for case in CASES for job in built(home / case, *CASES[case], name=case)]
    script = ROOT / "tests" / "helpers" / "llama_cpp_convert.py"
    subprocess.run([sys.executable, str(script), str(CONVERTERS), json.dumps(jobs)], check=True, capture_output=True)
    return home


def built(
    home: Path, model: str, config: dict[str, Any], targets: dict[str, Any], missing: dict[str, Any], name: str
) -> list[list[str]]:
    """A base, an adapter and what PEFT makes of them, with the work that is left to the converter."""
    cls: Any = getattr(
        transformers, f"{model}{'' if model.endswith('Head') else 'ForCausalLM'}".replace("Head", "HeadModel")
    )
    sizes = {} if {"n_embd", "d_model", "n_layer"} & config.keys() else SIZES
    torch.manual_seed(1)
    made = cls(cls.config_class(**{**sizes, **config}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    made.save_pretrained(home / "base")
    wrapped = get_peft_model(made, LoraConfig(r=2, lora_alpha=1, task_type="CAUSAL_LM", **targets))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.3)
    wrapped.save_pretrained(home / "adapter")
    wrapped.merge_and_unload().save_pretrained(home / "merged")
    for folder in (home / "base", home / "merged"):
        table = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**table, **missing}))
    jobs = [[str(home / kind), str(home / f"{kind}.gguf")] for kind in ("base", "merged")]
    if name in ADAPTED:
        jobs.append([str(home / "base"), str(home / "adapter.gguf"), str(home / "adapter")])
    return jobs


@pytest.mark.parametrize("case", CASES)
def test_a_merge_into_a_converted_base_is_the_conversion_of_a_merged_one(converted: Path, case: str) -> None:
    home = converted / case
    loratool.merge(home / "base.gguf", home / "adapter", home / "out.gguf")
    check_same(home)


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_as_the_converter_writes_them_merge_into_both_kinds_of_base(converted: Path, case: str) -> None:
    home = converted / case
    loratool.merge(home / "base.gguf", home / "adapter.gguf", home / "by-gguf.gguf")
    check_same(home, "by-gguf.gguf")
    loratool.merge(home / "base", home / "adapter.gguf", home / "by-gguf")
    assert loratool.verify(home / "by-gguf", base=home / "base", adapters=home / "adapter").exit_code == 0


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_are_written_as_the_converter_writes_them(converted: Path, case: str) -> None:
    home = converted / case
    loratool.convert(home / "adapter", home / "ours.gguf", to="gguf", base=home / "base")
    assert raw_of(home / "ours.gguf") == raw_of(home / "adapter.gguf")
    ours, theirs = (gguf.GGUFReader(home / name).fields for name in ("ours.gguf", "adapter.gguf"))
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours[key].contents() == theirs[key].contents()


def check_same(home: Path, out: str = "out.gguf") -> None:
    """A merge changed what PEFT changed, to the same values, and no other byte of a tensor."""
    before, after = raw_of(home / "base.gguf"), raw_of(home / out)
    wanted, found = read_back(home / "merged.gguf"), read_back(home / out)
    assert found.keys() == wanted.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if raw_of(home / "merged.gguf")[name] != before[name]}
    for name in wanted:
        assert np.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6), name


SCRIPT = """
import {getLlama} from "node-llama-cpp";
const [,, model, lora, prompt, count] = process.argv;
const llama = await getLlama({build: "never", gpu: false, logLevel: "error", maxThreads: 2});
const loaded = await llama.loadModel({modelPath: model});
const adapters = lora ? {lora: {adapters: [{filePath: lora}]}} : {};
const context = await loaded.createContext({contextSize: 128, batchSize: 64, ...adapters});
const sequence = context.getSequence();
const tokens = prompt.split(",").map(Number);
const wish = {generateNext: {probabilities: true, options: {temperature: 0}}};
const out = await sequence.controlledEvaluate(tokens.map((t, i) => i + 1 === tokens.length ? [t, wish] : t));
const probabilities = [...out.at(-1).next.probabilities.entries()];
await sequence.clearHistory();
const greedy = [];
for await (const token of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true}))
    if (greedy.push(token) >= Number(count)) break;
console.log(JSON.stringify({greedy, probabilities}));
process.exit(0);
"""
SIZE, TOKENS = 256, 320
Runner = Callable[..., tuple[list[int], Array]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Greedy tokens after a prompt, and the log-probabilities of the first, of a model with or without an adapter."""
    node = shutil.which("node")
    if node is None or not RUNTIME.is_dir():
        pytest.skip("node-llama-cpp is not installed")
    home = tmp_path_factory.mktemp("node")
    (home / "run.mjs").write_text(SCRIPT)
    (home / "node_modules").symlink_to(RUNTIME.parent)

    def through(model: Path, lora: Path | None = None) -> tuple[list[int], Array]:
        words = [node, "run.mjs", str(model), str(lora or ""), "1,7,30,12,5", "24"]
        done = subprocess.run(words, cwd=home, check=True, capture_output=True, text=True)
        told = json.loads(done.stdout.splitlines()[-1])
        values = np.full(TOKENS, 1e-12)
        for token, value in told["probabilities"]:
            values[token] = value
        return told["greedy"], np.log(values)

    return through


# How many times nearer to the base with its adapter than to the base alone the merged file is, at least: by type of the
# base. llama.cpp rounds what goes into packed matrices too, to 8 bits, and what goes into BF16 less.
NEARER = {"F16": 100.0, "Q8_0": 20.0, "Q4_K": 5.0}


@pytest.mark.parametrize("kind", NEARER)
def test_llama_cpp_computes_with_a_merged_file_what_it_computes_with_the_adapter(
    tmp_path: Path, run: Runner, kind: str
) -> None:
    weights = llama_weights(hidden=SIZE, mlp=SIZE, vocabulary=TOKENS)
    weights = {name: w * 1.5 if w.ndim > 1 else 1 + w for name, w in weights.items()}
    blocks = q4_k_blocks if kind == "Q4_K" else None
    base = write_llama(tmp_path / "base.gguf", weights, Kind[kind], blocks=blocks)
    generator = torch.Generator().manual_seed(1)
    ends = tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate"))
    made = {
        name: (torch.randn(2, w.shape[1], generator=generator), torch.randn(w.shape[0], 2, generator=generator) * 0.12)
        for name, w in weights.items()
        if name.endswith(ends)
    }
    write_adapter(tmp_path / "adapter", made, r=2, lora_alpha=1)
    tensors: dict[str, Array] = {}
    for name, (down, up) in made.items():
        stored, rows = as_llama_cpp(name, up.numpy())
        tensors |= {f"{stored}.lora_a": down.numpy(), f"{stored}.lora_b": rows}
    write_adapter_tensors(tmp_path / "adapter.gguf", tensors, alpha=1.0)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "merged.gguf")
    (alone, before), (with_adapter, wanted) = run(base), run(base, tmp_path / "adapter.gguf")
    merged, found = run(tmp_path / "merged.gguf")
    far, near = (float(np.sqrt(np.mean((each - wanted) ** 2))) for each in (before, found))
    assert far > NEARER[kind] * near, (far, near)
    if kind == "F16":
        assert merged == with_adapter
        assert merged != alone
