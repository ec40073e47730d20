"""Each finding of `inspect --check`, from a file that is wrong in just that way; a sound adapter has none."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import save_model
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import cli

if TYPE_CHECKING:
    from loratool.inspecting.health import Finding

LAYERS = ("model.layers.0.self_attn.", "model.layers.1.self_attn.")
NAMES = ("q_proj", "k_proj", "v_proj")
PREFIX = "base_model.model."
FIRST = f"{PREFIX}{LAYERS[0]}q_proj"
SOUND: Mapping[str, Any] = {
    "base_model_name_or_path": "some/base",
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": list(NAMES),
    "task_type": "CAUSAL_LM",
}
Tensors = dict[str, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def sound_tensors() -> Tensors:
    tensors: Tensors = {}
    for n, module in enumerate(f"{PREFIX}{layer}{name}" for layer in LAYERS for name in NAMES):
        tensors[f"{module}.lora_A.weight"] = normal(4, 8, seed=2 * n)
        tensors[f"{module}.lora_B.weight"] = normal(8, 4, seed=2 * n + 1)
    return tensors


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    return save_peft(folder, tensors, **{**SOUND, **config})


def write_base(folder: Path, **config: Any) -> Path:
    tensors = {f"{layer}{name}.weight": normal(8, 8, seed=50) for layer in LAYERS for name in NAMES}
    tensors["model.embed_tokens.weight"] = normal(12, 8, seed=51)
    return save_model(
        folder,
        tensors,
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, **config},
    )


def check(path: Path, base: Path | None = None) -> dict[str, Finding]:
    """What a check finds, by code; the exit code must say the same."""
    facts = loratool.inspect(path, check=True, base=base)
    assert facts.findings is not None
    code = cli.run(["inspect", str(path), "--check", "-q", *(["--base", str(base)] if base else [])])
    assert code == (3 if any(finding.level == "problem" for finding in facts.findings) else 0)
    return {finding.code: finding for finding in facts.findings}


@dataclass(frozen=True)
class Case:
    """How a sound adapter is made wrong, and what is said of it."""

    spoil: Callable[[Tensors], None] = lambda _: None
    config: Mapping[str, Any] = field(default_factory=dict)
    level: str = "problem"
    told: str = ""  # a pattern
    repair: str = ""  # a pattern


def drop(name: str) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        del tensors[name]

    return spoil


def put(**changes: Tensor) -> Callable[[Tensors], None]:
    """Other tensors for A or B of the first module."""

    def spoil(tensors: Tensors) -> None:
        for side, tensor in changes.items():
            tensors[f"{FIRST}.lora_{side}.weight"] = tensor

    return spoil


def add(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        tensors[name] = tensor

    return spoil


def zero(only: str = "") -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name and only in name:
                tensor.zero_()

    return spoil


def scaled(factor: float, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{FIRST}.lora_B.weight"] = (tensors[f"{FIRST}.lora_B.weight"] * factor).to(dtype)

    return spoil


def wrapped(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("model.layers", "_orig_mod.model.layers")] = tensors.pop(name)


def doubled(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[PREFIX + name] = tensors.pop(name)


def named(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)


def halved(tensors: Tensors) -> None:
    for name in [name for name in tensors if "lora_B" in name]:
        del tensors[name]


def ranks(rank: int, only: str = "") -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        for name, tensor in list(tensors.items()):
            if only in name:
                tensors[name] = normal(rank, 8, seed=1) if tensor.shape[0] == 4 else normal(8, rank, seed=2)

    return spoil


def with_magnitudes(tensors: Tensors) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensors[name.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(8)


def convolution(tensors: Tensors) -> None:
    tensors[f"{PREFIX}conv.lora_A.weight"] = normal(4, 3, 3, 3, seed=7)
    tensors[f"{PREFIX}conv.lora_B.weight"] = normal(6, 4, 1, 1, seed=8)


def experts(tensors: Tensors) -> None:
    tensors[f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight"] = normal(12, 8, seed=7)
    tensors[f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight"] = normal(8, 12, seed=8)


def head(tensors: Tensors) -> None:
    tensors[f"{PREFIX}lm_head.lora_A.weight"] = normal(4, 8, seed=7)
    tensors[f"{PREFIX}lm_head.lora_B.weight"] = normal(12, 4, seed=8)


def biases(tensors: Tensors) -> None:
    for name in [name for name in tensors if "lora_B" in name]:
        tensors[name.replace("lora_B.weight", "lora_B.bias")] = normal(8, seed=3)


SMALL = torch.full((8, 4), 1e-6, dtype=torch.float16)
TWO_PATTERNS = {"layers.0.self_attn.q_proj": 4, "q_proj": 16}
CASES: dict[str, Case] = {
    # what is wrong
    "untrained": Case(zero(), told="every update is zero .6 modules"),
    "zero-scaling": Case(config={"lora_alpha": 0}, told="alpha is 0", repair="set alpha in adapter_config.json"),
    "partly-untrained": Case(zero("layers.1"), level="note", told="zero in 3 of 6 modules"),
    "ungathered": Case(put(A=torch.empty(0)), told="ZeRO-3", repair="gather"),
    "ungathered, both": Case(put(A=torch.empty(0), B=torch.empty(0))),
    "ungathered, flat": Case(put(B=torch.ones(32)), told=r"\[32\]"),
    "wrapper-prefix": Case(wrapped, told="_orig_mod.*silently skips", repair="loratool rescale .* --bake"),
    "prefix-doubled": Case(doubled, told="prefix twice.*silently skips", repair="loratool merge BASE"),
    "adapter-name-in-names": Case(named, level="note", told="reads only …lora_A.weight", repair="loratool rescale .* --bake"),
    "task-unknown": Case(
        config={"task_type": "SEQUENCE_CLASSIFICATION"}, level="note", told="'SEQUENCE_CLASSIFICATION'.*SEQ_CLS", repair="null"
    ),
    "task-not-named": Case(config={"task_type": None}, level="note", told="no task_type", repair="CAUSAL_LM"),
    "missing-partner, everywhere": Case(halved, told="^6 modules: lora_B is missing.* and 3 more.$"),
    "missing-partner": Case(drop(f"{FIRST}.lora_B.weight"), told="lora_B is missing"),
    "unknown-tensor": Case(add(f"{PREFIX}model.x.lora_C.weight", torch.ones(2, 2)), told="unrecognised tensors: "
                                                                                         ".*lora_C"),
    "config-against-tensors": Case(config={"r": 6}, told="says r = 6, but the tensors have rank 4"),
    "config-against-tensors, DoRA": Case(config={"use_dora": True}, told="use_dora is set"),
    "config-against-tensors, pattern": Case(config={"rank_pattern": {"nothing": 4}}, told="patterns in rank_pattern"),
    "config-against-tensors, type": Case(config={"peft_type": "LOHA"}, told="spelled as LORA"),
    "sorted-patterns": Case(
        config={"alpha_pattern": TWO_PATTERNS}, told="several entries of alpha_pattern", repair="rescale .* --match"
    ),
    "sorted-patterns, ranks": Case(
        ranks(16, "q_proj"), {"rank_pattern": TWO_PATTERNS}, told="entries of rank_pattern", repair="--bake"
    ),
    "base-moved": Case(config={"init_lora_weights": "lora_ga"}, told="changed the base", repair="path_initial_model"),
    "base-moved, PiSSA": Case(config={"init_lora_weights": "pissa"}, level="note", repair="loratool merge BASE"),
    "base-moved, OLoRA": Case(config={"init_lora_weights": "olora"}, level="note", told="subtracting a part"),
    "base-moved, LoftQ": Case(config={"init_lora_weights": "loftq"}),
    "base-moved, PiSSA by iterations": Case(config={"init_lora_weights": "pissa_niter_4"}),
    "not-finite": Case(put(B=torch.full((8, 4), float("nan"))), told="NaN or infinite values in .*lora_B"),
    "not-finite, infinite": Case(put(A=torch.full((4, 8), float("inf")))),
    "float16-overflow": Case(scaled(1e7), told="infinite in float16", repair="loratool resize"),
    "subnormal": Case(put(B=SMALL), level="note", told="subnormal values of F16, up to 100 %", repair="resize"),
    "base-not-named": Case(config={"base_model_name_or_path": None}, level="note"),
    "not-mergeable": Case(config={"alora_invocation_tokens": [1]}, level="note", told="aLoRA"),
    "idle-targets": Case(config={"target_modules": [*NAMES, "V"]}, level="note", told="target_modules names V"),
    # what servers make of it
    "vllm-rank": Case(ranks(24), {"r": 24}, "note", "--max-lora-rank 32", "loratool resize .* --rank 16"),
    "vllm-rank, above all": Case(ranks(513), {"r": 513}, "note", "up to 512", "--rank 512"),
    "vllm-dora": Case(with_magnitudes, {"use_dora": True}, "note", "refuses DoRA", "loratool merge BASE"),
    "vllm-saved": Case(
        add(f"{PREFIX}score.weight", torch.ones(2, 8)), {"modules_to_save": ["score"]}, "note", "score.weight"
    ),
    "vllm-bias": Case(biases, {"lora_bias": True}, "note", "lora_bias"),
    "vllm-embeddings": Case(head, {}, "note", "lm_head"),
    "vllm-layers": Case(convolution, {}, "note", "convolutions"),
    "vllm-experts": Case(experts, {"target_parameters": ["experts.down_proj"]}, "note", "grouped by expert"),
    "vllm-initialisation": Case(config={"init_lora_weights": "pissa"}, level="note", told="'pissa'", repair="merge"),
    "vllm-variant": Case(config={"layer_replication": [[0, 1]]}, level="note", told="layer_replication"),
    "vllm-tokens": Case(
        add(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 8)),
        {"trainable_token_indices": {"embed_tokens": [1, 5]}},
        "note",
    ),
    "sglang-fused": Case(
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "k_proj" in name and "layers.1" in name],  # type: ignore[arg-type]
        {},
        "note",
        r"earlier releases fail .* \(here k_proj\)",
    ),
    "sglang-scaling": Case(config={"use_rslora": True}, level="note", told="√r too weak", repair="--bake"),
    "sglang-scaling, alpha": Case(config={"alpha_pattern": {"q_proj": 2}}, level="note", repair="--bake"),
    "sglang-scaling, ranks": Case(
        ranks(6, "q_proj"), {"rank_pattern": {"q_proj": 6}}, "note", "ignores rank_pattern", "resize .* --rank 6 --uniform"
    ),
    "sglang-dora": Case(with_magnitudes, {"use_dora": True}, "note", "refuses DoRA", "loratool merge BASE"),
    "llama.cpp-scaling": Case(config={"use_rslora": True}, level="note", told="ignores use_rslora", repair="--bake"),
    "llama.cpp-scaling, patterns": Case(config={"alpha_pattern": {"q_proj": 2}}, level="note", told="alpha_pattern"),
    "llama.cpp-tensors": Case(with_magnitudes, {"use_dora": True}, "note", "DoRA's magnitudes"),
    "llama.cpp-tensors, saved": Case(
        add(f"{PREFIX}score.weight", torch.ones(2, 8)), {"modules_to_save": ["score"]}, "note", "saved whole"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_fault_is_found_told_and_given_its_repair(name: str, tmp_path: Path) -> None:
    case, code = CASES[name], name.partition(",")[0]
    tensors = sound_tensors()
    case.spoil(tensors)
    found = check(write(tmp_path / "adapter", tensors, **case.config))
    assert code in found, found
    finding = found[code]
    assert finding.level == case.level
    assert re.search(case.told, finding.message), finding.message
    assert re.search(case.repair, finding.repair), finding.repair


def test_a_sound_adapter_has_no_findings(tmp_path: Path) -> None:
    assert check(write(tmp_path / "adapter", sound_tensors())) == {}
    assert check(tmp_path / "adapter", write_base(tmp_path / "base")) == {}


SERVERS = ("vllm-", "sglang-", "llama.cpp-")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(SERVERS)])
def test_what_is_said_of_a_server_names_its_release_and_the_month(name: str, tmp_path: Path) -> None:
    """Servers change: a reader sees how old the fact is."""
    tensors = sound_tensors()
    CASES[name].spoil(tensors)
    found = check(write(tmp_path / "adapter", tensors, **CASES[name].config))
    for code, finding in found.items():
        if code.startswith(SERVERS):
            assert re.match(r"(vLLM|SGLang|llama\.cpp's converter) [\w .-]+ \(20\d\d-\d\d\) ", finding.message), finding


def test_every_fact_about_a_server_is_tested() -> None:
    from loratool.inspecting.health.servers import FACTS

    elsewhere = {"vllm-type", "llama.cpp-tied-head", "sglang-tokens"}  # in tests of their own
    assert {name.partition(",")[0] for name in CASES if name.startswith(SERVERS)} | elsewhere == set(FACTS)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss", "mixtral"])
def test_fused_experts_that_vllm_reads_are_no_finding(family: str, tmp_path: Path) -> None:
    tensors = sound_tensors()
    experts(tensors)
    base = write_base(tmp_path / "base", model_type=family)
    found = check(write(tmp_path / "a", tensors, target_parameters=["experts.down_proj"]), base)
    assert ("vllm-experts" in found) == (family == "mixtral")


def test_tokens_that_were_added_are_told_for_sglang(tmp_path: Path) -> None:
    path = write(tmp_path / "a", sound_tensors())
    (path / "added_tokens.json").write_text('{"<new>": 99}')
    assert "added_tokens.json" in check(path)["sglang-tokens"].message


def test_several_faults_are_told_at_once_problems_first(tmp_path: Path) -> None:
    tensors = sound_tensors()
    put(A=torch.empty(0))(tensors)
    drop(f"{PREFIX}{LAYERS[1]}v_proj.lora_A.weight")(tensors)
    wrapped(tensors)
    facts = loratool.inspect(write(tmp_path / "a", tensors, use_rslora=True), check=True)
    assert facts.findings is not None
    codes = [finding.code for finding in facts.findings]
    assert {"ungathered", "missing-partner", "wrapper-prefix", "llama.cpp-scaling"} <= set(codes)
    levels = [finding.level for finding in facts.findings]
    assert levels == sorted(levels, reverse=True)
    assert isinstance(facts, loratool.AdapterFacts)
    assert len(facts.modules) == 4  # those that can be read are described


def test_a_target_without_a_place_is_a_finding(tmp_path: Path) -> None:
    tensors = sound_tensors()
    tensors[f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight"] = normal(4, 8, seed=1)
    tensors[f"{PREFIX}model.layers.9.mlp.up_proj.lora_B.weight"] = normal(8, 4, seed=1)
    found = check(write(tmp_path / "a", tensors), write_base(tmp_path / "base"))["does-not-fit"]
    assert "model.layers.9.mlp.up_proj" in found.message
    assert "--map" in found.repair


def test_a_head_that_is_tied_to_the_embedding_is_a_trap(tmp_path: Path) -> None:
    tensors = sound_tensors()
    head(tensors)
    path = write(tmp_path / "a", tensors)
    found = check(path, write_base(tmp_path / "base"))
    assert "ties model.embed_tokens.weight, lm_head.weight" in found["tied-embeddings"].message
    assert found["tied-embeddings"].where == ("lm_head.weight",)
    assert "llama.cpp-tied-head" in found


# What cannot even be opened


def no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def pointer(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def both(folder: Path) -> None:
    pointer(folder)
    bad_config(folder)


UNREADABLE: dict[Callable[[Path], None], str] = {
    no_config: "adapter_config.json",
    bad_config: "not valid JSON",
    pointer: "Git LFS pointer",
    pickled: "weights_only=True",
    cut: "adapter_model.safetensors",
}


@pytest.mark.parametrize("spoil", UNREADABLE)
def test_what_cannot_be_opened_is_a_finding_and_the_other_paths_are_told_all_the_same(
    spoil: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, broken = write(tmp_path / "sound", sound_tensors()), write(tmp_path / "broken", sound_tensors())
    spoil(broken)
    assert cli.run(["inspect", str(broken), str(sound), "--check", "--json"]) == 3
    shown = capsys.readouterr()
    assert shown.err.startswith(f"Error: {broken}")
    assert shown.err.count(f"{broken}:") <= 1
    assert UNREADABLE[spoil] in shown.err
    first, second = json.loads(shown.out)["results"]
    assert (first["kind"], second["kind"]) == ("unreadable", "adapter")
    assert UNREADABLE[spoil] in first["findings"][0]["message"]
    assert cli.run(["inspect", str(sound)]) == 0
    alone = capsys.readouterr().out
    assert cli.run(["inspect", str(broken), str(sound)]) == 3
    shown = capsys.readouterr()
    assert shown.out == alone
    assert shown.err.startswith("Error: ")
    assert UNREADABLE[spoil] in shown.err


def test_weights_and_config_are_both_told_where_both_are_broken(tmp_path: Path) -> None:
    path = write(tmp_path / "a", sound_tensors())
    both(path)
    facts = loratool.inspect(path, check=True)
    assert facts.findings is not None
    assert len(facts.findings) == 2


def test_a_broken_checkpoint_is_a_finding_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"\0" * 20)
    assert cli.run(["inspect", str(base), "--check"]) == 3
    assert "problem unreadable" in capsys.readouterr().out


# The repairs


REPAIRED = {
    "wrapper-prefix": ("wrapper-prefix",),
    "adapter-name-in-names": ("adapter-name-in-names",),
    "sglang-scaling": ("sglang-scaling", "llama.cpp-scaling"),
    "sglang-scaling, alpha": ("sglang-scaling", "llama.cpp-scaling"),
    "sglang-scaling, ranks": ("sglang-scaling", "llama.cpp-scaling"),
    "llama.cpp-scaling": ("llama.cpp-scaling",),
    "vllm-rank": ("vllm-rank",),
    "sorted-patterns, ranks": ("sorted-patterns",),
    "float16-overflow": ("float16-overflow",),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_the_command_that_a_finding_names_repairs_it(name: str, tmp_path: Path) -> None:
    case, code = CASES[name], name.partition(",")[0]
    tensors = sound_tensors()
    case.spoil(tensors)
    path = write(tmp_path / "adapter", tensors, **case.config)
    words = shlex.split(check(path)[code].repair)
    words[words.index("OUT")] = str(tmp_path / "out")
    assert cli.run([*words[1:], "-q"]) == 0
    assert not set(REPAIRED[name]) & set(check(tmp_path / "out"))


@pytest.mark.parametrize("spoil", [doubled, wrapped])
def test_peft_loads_nothing_of_names_that_are_told_as_a_problem(spoil: Callable[[Tensors], None]) -> None:
    """The oracle of these findings: the factors of PEFT's model stay what they were, with no error."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    layer = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in NAMES})
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"self_attn": layer}) for _ in range(2))
    wrapped_model: Any = get_peft_model(model, LoraConfig(r=4, target_modules=list(NAMES)))
    before = {name: tensor.clone() for name, tensor in wrapped_model.state_dict().items()}
    tensors = sound_tensors()
    spoil(tensors)
    set_peft_model_state_dict(wrapped_model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped_model.state_dict().items())
    set_peft_model_state_dict(wrapped_model, sound_tensors())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in wrapped_model.state_dict().items())


def test_names_with_a_double_prefix_are_merged_as_the_repair_says(tmp_path: Path) -> None:
    base, tensors = write_base(tmp_path / "base"), sound_tensors()
    doubled(tensors)
    path = write(tmp_path / "adapter", tensors)
    words = shlex.split(check(path, base)["prefix-doubled"].repair.replace("BASE", str(base)))
    words[words.index("OUT")] = str(tmp_path / "out")
    assert cli.run([*words[1:], "-q"]) == 0
    first = f"{LAYERS[0]}q_proj.weight"
    wanted = load_file(base / "model.safetensors")[first] + 2 * normal(8, 4, seed=1) @ normal(4, 8, seed=0)
    (merged,) = (tmp_path / "out").glob("*.safetensors")
    assert torch.allclose(load_file(merged)[first], wanted, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_folder_that_holds_an_index_only_is_told_what_is_missing(count: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    shards = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {f"t{n}": s for n, s in enumerate(shards)}})
    )
    finding = check(base)["unreadable"]
    assert "found the index but not its weight files" in finding.message
    assert shards[0] in finding.message


def test_a_path_with_a_space_is_quoted_in_a_repair(tmp_path: Path) -> None:
    tensors = sound_tensors()
    wrapped(tensors)
    repair = check(write(tmp_path / "my adapter", tensors))["wrapper-prefix"].repair
    assert shlex.split(repair)[2] == str(tmp_path / "my adapter")


def test_names_from_the_file_are_escaped_in_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {**sound_tensors(), f"{PREFIX}a\x1b[31m.lora_C.weight": torch.ones(2, 2)}
    assert cli.run(["inspect", str(write(tmp_path / "a", tensors)), "--check"]) == 3
    assert "\x1b" not in capsys.readouterr().out


def test_values_are_scanned_as_numpy_and_torch_see_them(tmp_path: Path) -> None:
    from loratool.inspecting.health.scanning import scan_all

    odd = torch.tensor([0.0, -0.0, 1.5, -70000.0, 1e-40, float("inf"), float("nan"), -float("inf")])
    tensors = {f"t.{dtype}": odd.to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
    path = write(tmp_path / "a", {**sound_tensors(), **tensors})
    scans = scan_all(loratool.read_adapter(path))
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        found, finite = scans[name], tensor[tensor.isfinite()]
        tiny = torch.finfo(tensor.dtype).tiny
        assert found.count == tensor.numel()
        assert found.nonfinite == int((~tensor.isfinite()).sum())
        assert found.zeros == int((tensor == 0).sum())
        assert found.subnormal == int(((tensor != 0) & (tensor.abs() < tiny)).sum())
        assert found.largest == pytest.approx(float(finite.abs().max()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_with_values_that_are_no_numbers_is_found(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base")
    (weights,) = base.glob("*.safetensors")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
    tensors["model.layers.0.attention.masked_bias"] = torch.tensor([float("-inf")], dtype=torch.float16)
    save_file(tensors, weights)
    sound: Any = loratool.inspect(base, check=True)
    assert not [finding for finding in sound.findings if finding.level == "problem"]
    tensors["model.embed_tokens.weight"][3, 2] = value
    save_file(tensors, weights)
    facts: Any = loratool.inspect(base, check=True)
    (finding,) = (finding for finding in facts.findings if finding.level == "problem")
    assert (finding.code, finding.where) == ("not-finite", ("model.embed_tokens.weight",))
    assert cli.run(["inspect", str(base), "--check", "-q"]) == 3


@pytest.mark.parametrize("config", [{"lora_alpha": "much"}, {"lora_alpha": None}, {"r": 0}])
def test_an_alpha_that_cannot_be_read_is_not_told_as_zero(config: dict[str, Any], tmp_path: Path) -> None:
    facts: Any = loratool.inspect(write(tmp_path / "adapter", sound_tensors(), **config), check=True)
    assert {f.code for f in facts.findings if f.level == "problem"} == {"config-against-tensors"}


def test_a_type_that_is_not_merged_is_not_sent_to_a_merge(tmp_path: Path) -> None:
    facts: Any = loratool.inspect(write(tmp_path / "adapter", sound_tensors(), peft_type="SOUP"), check=True)
    assert {f.code for f in facts.findings} == {"not-mergeable", "vllm-type"}
    assert not [f.repair for f in facts.findings if "loratool merge" in f.repair]


def test_an_image_model_s_adapter_in_peft_s_format_has_no_notes_on_servers_of_language_models(tmp_path: Path) -> None:
    """Flux has projections called as heads of language models are, and diffusers asks for no task."""
    module = "base_model.model.single_transformer_blocks.0.proj_out"
    tensors = {f"{module}.lora_A.weight": normal(1, 15360, seed=1), f"{module}.lora_B.weight": normal(3072, 1, seed=2)}
    facts: Any = loratool.inspect(
        write(tmp_path / "adapter", tensors, r=1, target_modules=["proj_out"], task_type=None), check=True
    )
    assert facts.models == ("Flux", "HunyuanVideo")
    assert facts.findings == ()


def test_what_cannot_be_merged_is_not_sent_to_a_merge_for_a_server(tmp_path: Path) -> None:
    """A classifier that is adapted and saved whole, in PEFT's own copies of it."""
    tensors = sound_tensors()
    for way in ("modules_to_save", "original_module"):
        tensors[f"{PREFIX}score.{way}.lora_A.weight"] = normal(4, 8, seed=90)
        tensors[f"{PREFIX}score.{way}.lora_B.weight"] = normal(2, 4, seed=91)
    tensors[f"{PREFIX}score.weight"] = normal(2, 8, seed=92)
    found = check(write(tmp_path / "adapter", tensors, modules_to_save=["score"]))
    assert {"not-mergeable", "vllm-saved"} <= found.keys()
    assert not [f.repair for f in found.values() if "loratool merge" in f.repair]


def test_the_tasks_that_are_known_are_pefts() -> None:
    """PEFT refuses a config with any other."""
    from peft import TaskType

    from loratool.adapters.formats.peft.health import TASKS

    assert {*TASKS} == {task.value for task in TaskType}


def test_no_rank_is_advised_for_updates_that_have_none(tmp_path: Path) -> None:
    """A LoKr of subnormal values: `resize --rank 1`, the rank of nothing, would lose most of it."""
    small = torch.full((4, 4), 1e-7, dtype=torch.float16)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    alpha = torch.tensor(1.0, dtype=torch.float16)
    tensors = {f"{name}.lokr_w1": small, f"{name}.lokr_w2": torch.ones(80, 80).half(), f"{name}.alpha": alpha}
    save_file(tensors, tmp_path / "lokr.safetensors")
    facts = loratool.inspect(tmp_path / "lokr.safetensors", check=True)
    assert isinstance(facts, loratool.AdapterFacts)
    (found,) = [each for each in facts.findings or () if each.code == "subnormal"]
    assert not found.repair
