"""`loratool estimate`: what PEFT counts on the real model, from headers or a config alone."""

from __future__ import annotations

import json
import re
import shlex
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from paths import ROOT
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file as save_arrays

import loratool
from loratool import FitError, InputError, UsageError, cli
from loratool.bases.decoders import SHAPES
from loratool.inspecting.estimate import full_memory

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DOCS = ROOT / "docs"
LLAMA_2_7B = {  # as the Hub has it
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
BERT = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"} | {"max_position_embeddings": 24}
T5 = {"vocab_size": 96, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}

DECODERS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12}),
    ("mistral", {"head_dim": 12}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "head_dim": 16}),
    ("gemma", {}),
    ("gemma", {"tie_word_embeddings": False}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("phi3", {"pad_token_id": 0}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 40}),
]


def sizes(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, pairs: int) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip(names, (vocabulary, hidden, inner, layers, heads), strict=True)), "num_key_value_heads": pairs}


def config_of(kind: str, changes: dict[str, Any]) -> Any:
    sizes = {"gpt2": GPT2, "bert": BERT, "t5": T5}.get(kind, SIZES)
    return transformers.AutoConfig.for_model(kind, **{**sizes, **changes})


def build(config: Any, auto: str = "AutoModelForCausalLM", device: str = "meta") -> Any:
    with torch.device(device):
        return getattr(transformers, auto).from_config(config)


def counted(model: Any, rank: int, targets: Any) -> tuple[int, int]:
    """(trainable, all) parameters, as PEFT counts them."""
    found: tuple[int, int] = get_peft_model(
        model, LoraConfig(r=rank, target_modules=targets)
    ).get_nb_trainable_parameters()
    return found


def printed(model: Any, rank: int, targets: Any, capsys: pytest.CaptureFixture[str]) -> str:
    get_peft_model(model, LoraConfig(r=rank, target_modules=targets)).print_trainable_parameters()
    return capsys.readouterr().out.strip()


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    return write_config(tmp_path / "Llama-2-7b-hf", LLAMA_2_7B)


# Parameters, with PEFT as the oracle


@pytest.mark.parametrize(
    ("kind", "changes"), DECODERS, ids=lambda value: value if isinstance(value, str) else str(value)
)
def test_a_config_stands_for_the_shapes_of_the_model_class(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(kind, changes)
    config.save_pretrained(tmp_path)
    shapes, _ = SHAPES[kind](json.loads((tmp_path / "config.json").read_text()))
    model = build(config)
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(
    ("kind", "changes"), DECODERS, ids=lambda value: value if isinstance(value, str) else str(value)
)
def test_from_a_config_it_counts_what_peft_counts(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(kind, changes)
    config.save_pretrained(tmp_path)
    attention = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}.get(kind, ["q_proj", "v_proj"])
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    for targets in ("all-linear", attention, [embedding], ["lm_head"], [*attention, embedding]):
        wanted = [counted(build(config), rank, targets) for rank in (3, 8)]
        for path in (tmp_path, tmp_path / "config.json"):
            result = loratool.estimate(path, [3, 8], targets)
            assert [(one.trainable, one.all_parameters) for one in result.ranks] == wanted, targets


ON_DISK: list[tuple[str, dict[str, Any], str, list[Any]]] = [
    ("llama", {}, "AutoModelForCausalLM", ["all-linear", ["q_proj"], ["lm_head"], ["0.self_attn.q_proj"]]),
    ("gpt2", {}, "AutoModelForCausalLM", ["all-linear", ["c_proj"], ["mlp.c_proj"], ["wte"], ["wpe"], ["lm_head"]]),
    ("gpt2", {}, "AutoModel", ["all-linear", ["c_attn", "wte"]]),
    ("gemma", {}, "AutoModelForCausalLM", ["all-linear", ["lm_head"], ["embed_tokens"]]),
    ("bert", {}, "AutoModel", ["all-linear", ["query", "value"], ["word_embeddings"]]),
    ("bert", {}, "AutoModelForMaskedLM", ["all-linear", ["dense"], ["attention.output.dense"]]),
    ("t5", {}, "AutoModelForSeq2SeqLM", ["all-linear", ["q", "v"], ["wo"]]),
    ("qwen3", {}, "AutoModelForSequenceClassification", ["all-linear", ["q_proj"], ["score"]]),
]


@pytest.mark.parametrize(
    ("kind", "changes", "auto", "targets"), ON_DISK, ids=[f"{kind} {auto}" for kind, _, auto, _ in ON_DISK]
)
def test_from_headers_it_counts_what_peft_counts(
    kind: str, changes: dict[str, Any], auto: str, targets: list[Any], tmp_path: Path
) -> None:
    config = config_of(kind, changes)
    build(config, auto, "cpu").save_pretrained(tmp_path)
    for target in targets:
        one = loratool.estimate(tmp_path, 5, target).ranks[0]
        assert (one.trainable, one.all_parameters) == counted(build(config, auto), 5, target), target


@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "wpe"])])
def test_the_line_is_peft_s_own(
    kind: str, targets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(kind, {})
    config.save_pretrained(tmp_path)
    line = printed(build(config), 4, targets, capsys)
    assert loratool.estimate(tmp_path, 4, targets).ranks[0].line == line
    assert cli.run(["estimate", str(tmp_path), "--rank", "4", "--target", ",".join(targets)]) == 0
    assert line in capsys.readouterr().out.splitlines()


def test_llama_2_7b_gives_the_line_that_peft_is_known_for(seven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622"
    assert cli.run(["estimate", str(seven), "--rank", "8", "--target", "q_proj,v_proj"]) == 0
    assert line in capsys.readouterr().out.splitlines()


PUBLISHED: list[
    tuple[str, dict[str, Any], int]
] = [  # sizes by the models' configs, parameters by their cards on the Hub
    (
        "Llama-3.2-1B",
        {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 64, **sizes(128256, 2048, 8192, 16, 32, 8)},
        1_235_814_400,
    ),
    ("Mistral-7B-v0.1", {"model_type": "mistral", **sizes(32000, 4096, 14336, 32, 32, 8)}, 7_241_732_096),
    (
        "Qwen2.5-0.5B",
        {"model_type": "qwen2", "tie_word_embeddings": True, **sizes(151936, 896, 4864, 24, 14, 2)},
        494_032_768,
    ),
    (
        "Qwen3-0.6B",
        {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 128, **sizes(151936, 1024, 3072, 28, 16, 8)},
        596_049_920,
    ),
    ("gemma-2b", {"model_type": "gemma", "head_dim": 256, **sizes(256000, 2048, 16384, 18, 8, 1)}, 2_506_172_416),
    ("gemma-2-2b", {"model_type": "gemma2", "head_dim": 256, **sizes(256000, 2304, 9216, 26, 8, 4)}, 2_614_341_888),
    ("gemma-3-1b", {"model_type": "gemma3_text", "head_dim": 256, **sizes(262144, 1152, 6912, 26, 4, 1)}, 999_885_952),
    ("Phi-3-mini", {"model_type": "phi3", **sizes(32064, 3072, 8192, 32, 32, 32)}, 3_821_079_552),
    (
        "gpt2",
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
]


@pytest.mark.parametrize(("config", "parameters"), [p[1:] for p in PUBLISHED], ids=[p[0] for p in PUBLISHED])
def test_published_models_have_the_parameters_that_they_are_known_for(
    config: dict[str, Any], parameters: int, tmp_path: Path
) -> None:
    assert loratool.estimate(write_config(tmp_path, config), 8, "all-linear").parameters == parameters


def test_a_shared_head_that_files_hold_twice_is_counted_once(tmp_path: Path) -> None:
    table: Any = np.zeros((10, 4), np.float32)
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.layers.0.fc.weight": table[:4],
    }
    save_arrays(tensors, tmp_path / "model.safetensors")
    for tied, parameters in ((True, 40 + 16), (False, 40 + 40 + 16)):
        write_config(tmp_path, {"architectures": ["XForCausalLM"], "tie_word_embeddings": tied})
        result = loratool.estimate(tmp_path, 1, "fc")
        assert result.parameters == parameters
        assert result.merged_bytes == 4 * (40 + 40 + 16)


def test_buffers_of_old_checkpoints_are_no_parameters(tmp_path: Path) -> None:
    """As `openai-community/gpt2` has them: the causal mask, and rotary frequencies of old Llamas."""
    tensors: dict[str, Any] = {
        "h.0.attn.bias": np.zeros((1, 1, 6, 6), np.float32),
        "h.0.attn.masked_bias": np.zeros((), np.float32),
        "h.0.attn.c_attn.bias": np.zeros(12, np.float32),
        "h.0.attn.c_attn.weight": np.zeros((4, 12), np.float32),
        "h.0.rotary_emb.inv_freq": np.zeros(2, np.float32),
        "position_ids": np.zeros((1, 6), np.int64),
    }
    save_arrays(tensors, tmp_path / "model.safetensors")
    result = loratool.estimate(tmp_path / "model.safetensors", 2, "c_attn")
    assert (result.parameters, result.ranks[0].trainable) == (12 + 48, 2 * (4 + 12))


# Targets and ranks


def test_commas_repeats_and_lists_mean_the_same(seven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = loratool.estimate(seven, 8, "q_proj,v_proj")
    assert one == loratool.estimate(seven, [8], ["q_proj", "v_proj"])
    assert one == loratool.estimate(str(seven), (8, 8), ["v_proj, q_proj", "q_proj"])
    arguments = ["--rank", "8", "--target", "q_proj", "--target", "v_proj"]
    assert cli.run(["estimate", str(seven), *arguments]) == 0
    assert capsys.readouterr().out == f"{one}\n"


def test_parts_add_up_and_grow_with_the_rank(seven: Path) -> None:
    result = loratool.estimate(seven, [8, 128], "all-linear")
    low, high = result.ranks
    assert high.trainable == 16 * low.trainable
    assert sum(target.per_rank for target in result.targets) == result.per_rank == low.trainable // 8
    by_hand = {"q_proj": 8192, "k_proj": 8192, "v_proj": 8192, "o_proj": 8192}
    by_hand |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4096 + 11008)
    assert {t.name: (t.per_rank, t.count) for t in result.targets} == {n: (32 * p, 32) for n, p in by_hand.items()}


# Sizes and memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "targets"), [("llama", "all-linear"), ("gpt2", ["c_attn", "wpe"])])
def test_the_adapter_is_as_large_as_the_file_that_peft_saves(
    kind: str, targets: Any, dtype: str, tmp_path: Path
) -> None:
    config = config_of(kind, {})
    config.save_pretrained(tmp_path)
    model = get_peft_model(build(config, device="cpu"), LoraConfig(r=6, target_modules=targets))
    model.to(getattr(torch, dtype)).save_pretrained(str(tmp_path / "adapter"))
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    found = loratool.estimate(tmp_path / "config.json", 6, targets, dtype=dtype).ranks[0].adapter_bytes
    assert abs(found - size) <= 64  # the tensors lie in another order there, so offsets have other lengths


def test_the_example_of_seven_billion_parameters_comes_out() -> None:
    """14 GB of weights, 14 GB of gradients, 56 GB of AdamW's moments: 84 GB."""
    memory = full_memory(7_000_000_000, 2 * 7_000_000_000)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.total) == (14e9, 14e9, 56e9, 84e9)


def test_a_checkpoint_of_seven_billion_parameters_says_so_with_the_formula(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = json.dumps(
        {"model.fc.weight": {"dtype": "BF16", "shape": [70_000, 100_000], "data_offsets": [0, 14_000_000_000]}}
    ).encode()
    with open(tmp_path / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 14_000_000_000)  # a hole: nothing is on the disk
    assert cli.run(["estimate", str(tmp_path), "--rank", "8", "--target", "fc"]) == 0
    text = capsys.readouterr().out
    assert "P·2 + P·2 + P·8 = 14.00 + 14.00 + 56.00 = 84.00 GB" in text


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_memory_of_lora_and_qlora_is_the_formula(seven: Path, dtype: str, size: int) -> None:
    result = loratool.estimate(seven, 8, "q_proj,v_proj", dtype=dtype)
    base, trained = 6_738_415_616, 4_194_304
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    one = result.ranks[0]
    assert one.lora.weights == 2 * base + size * trained
    assert (one.lora.gradients, one.lora.optimizer) == (size * trained, 8 * trained)
    four_bits = linear // 2 + linear // 64 + linear // (64 * 256) * 4  # a code, a byte a block, a float for 256 of them
    assert one.qlora.weights == pytest.approx(four_bits + 2 * (base - linear) + size * trained, abs=4)
    for memory in (one.lora, one.qlora, result.full):
        assert memory.total == memory.weights + memory.gradients + memory.optimizer
    assert result.full.total == 12 * base
    assert result.merged_bytes == 2 * base


# What is printed


def test_json_has_every_number(seven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rank", "8", "--rank", "64", "--target", "all-linear", "--dtype", "bfloat16", "--json"]
    assert cli.run(["estimate", str(seven), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    result = loratool.estimate(seven, [8, 64], "all-linear", dtype="bfloat16")
    assert (found["kind"], found["source"], found["dtype"]) == ("estimate", "config", "bfloat16")
    assert [one["trainable"] for one in found["ranks"]] == [one.trainable for one in result.ranks]
    assert found["ranks"][1]["lora"]["total"] == result.ranks[1].lora.total
    assert found["full"]["total"] == 12 * found["parameters"]


def test_the_text_fits_eighty_columns(seven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(seven.parent.parent)
    text = str(loratool.estimate("Llama-2-7b-hf", [8, 64], "all-linear"))
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_shows_what_is_printed_for_llama_2_7b(
    seven: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(seven.parent.parent)
    page = (DOCS / "estimating.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^\$ (loratool estimate \./Llama-2-7b-hf.*)\n((?:.*\n)*?)```", page, re.MULTILINE)
    shown = [(shlex.split(command)[1:], output) for command, output in blocks if output]
    assert shown
    for words, output in shown:
        assert cli.run(words) == 0
        assert output == capsys.readouterr().out


# What cannot be estimated


@pytest.mark.parametrize("ranks", [0, -8, [8, 0], [], True])
def test_a_rank_below_one_is_refused(ranks: Any, seven: Path) -> None:
    with pytest.raises(UsageError, match="rank"):
        loratool.estimate(seven, ranks, "q_proj")


@pytest.mark.parametrize("targets", ["", " , ", []])
def test_targets_are_wanted(targets: Any, seven: Path) -> None:
    with pytest.raises(UsageError, match="one target"):
        loratool.estimate(seven, 8, targets)


def test_an_unknown_dtype_is_refused(seven: Path) -> None:
    with pytest.raises(UsageError, match="must be one of float32, bfloat16, float16"):
        loratool.estimate(seven, 8, "q_proj", dtype="int8")


def test_every_target_that_is_not_there_is_told_with_the_nearest(
    seven: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = "q_prj,q_proj,norm,proj,zzz"
    with pytest.raises(FitError) as caught:
        loratool.estimate(seven, 8, targets)
    told = str(caught.value).splitlines()
    assert told[1].startswith("  q_prj: the base has no such weight; the closest names are q_proj")
    assert told[2] == "  norm: model.norm.weight [4096] is neither a linear layer nor an embedding"
    assert told[3].startswith("  proj: the base has no such weight; ")  # a part of a name is no name, as for PEFT
    assert told[4].startswith("  zzz: the base has no such weight; the base has embed_tokens, q_proj, k_proj")
    assert len(told) == 5
    assert cli.run(["estimate", str(seven), "--rank", "8", "--target", targets]) == 4


def test_a_convolution_is_told_and_not_counted(tmp_path: Path) -> None:
    save_arrays({"patch.projection.weight": np.zeros((8, 3, 4, 4), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(FitError, match=r"patch\.projection\.weight \[8, 3, 4, 4\] is neither a linear layer"):
        loratool.estimate(tmp_path, 8, "projection")


WRONG_CONFIGS: list[tuple[str, str]] = [
    (
        '{"model_type": "mamba"}',
        "'mamba', only for gemma, gemma2, gemma3_text, gpt2, llama, mistral, phi3, qwen2, qwen3",
    ),
    ("{}", "model type None"),
    ('{"model_type": ["llama"]}', "model type"),
    ('{"model_type": "llama", "architectures": ["LlamaForTokenClassification"]}', "LlamaForTokenClassification"),
    (json.dumps({k: v for k, v in LLAMA_2_7B.items() if k != "hidden_size"}), "hidden_size is missing"),
    (json.dumps({**LLAMA_2_7B, "hidden_size": "4096"}), "must be whole numbers"),
    (json.dumps({**LLAMA_2_7B, "num_attention_heads": 0}), "must be whole numbers"),
    (json.dumps({**LLAMA_2_7B, "intermediate_size": -1}), "must be whole numbers"),
    (json.dumps({**LLAMA_2_7B, "num_hidden_layers": 2.5}), "must be whole numbers"),
    (json.dumps({**LLAMA_2_7B, "num_hidden_layers": 10**15}), "plausible for a model"),
    ('{"peft_type": "LORA", "r": 8}', "this is an adapter's config"),
    ("[]", "expected a JSON object"),
    ("{", "not valid JSON"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG_CONFIGS, ids=[sentence for _, sentence in WRONG_CONFIGS])
def test_a_config_that_stands_for_no_shapes_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        loratool.estimate(tmp_path / "config.json", 8, "q_proj")
    assert sentence in str(caught.value)


def adapter_folder(folder: Path) -> Path:
    model = get_peft_model(build(config_of("llama", {}), device="cpu"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_in_the_place_of_a_base_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is an adapter"):
        loratool.estimate(adapter_folder(tmp_path / "adapter") / name, 8, "q_proj")


def quantised(name: str, dtype: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_arrays({name: np.zeros((8, 4), dtype)}, folder / "model.safetensors")

    return write


@pytest.mark.parametrize(
    "write",
    [
        quantised("model.layers.0.q_proj.qweight", np.int32),
        quantised("model.layers.0.q_proj.weight", np.uint8),
    ],
)
def test_a_quantised_base_is_told(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match="quantised"):
        loratool.estimate(tmp_path, 8, "q_proj")


@pytest.mark.parametrize("name", ["nowhere", "nowhere.json"])
def test_a_path_that_is_not_there_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: no such file or folder"):
        loratool.estimate(tmp_path / name, 8, "q_proj")
