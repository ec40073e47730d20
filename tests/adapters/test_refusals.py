"""Adapters that cannot be merged right are refused: one message with the reason, exit code 3 or 4, nothing written.

Codes: 3, the adapter contradicts itself or cannot be merged at all; 4, it does not fit this base. What is malformed
in other ways is in `test_malformed_adapters.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from oracle import PREFIX, picture, read_tensors
from safetensors.torch import save_file
from torch import Tensor

from loratool.cli import run

WIDTH, RANK, EXPERTS, LAYERS = 8, 2, 3, 2
ATTENTION = [f"model.layers.{n}.self_attn.{name}" for n in range(LAYERS) for name in ("q_proj", "v_proj")]
GENERATOR = torch.Generator().manual_seed(8)
Tensors = dict[str, Tensor]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def pair(module: str, out: int = WIDTH, into: int = WIDTH, rank: int = RANK) -> Tensors:
    """The factors of one module."""
    return {
        f"{PREFIX}{module}.lora_A.weight": noise(rank, into),
        f"{PREFIX}{module}.lora_B.weight": noise(out, rank),
    }


def pairs(*modules: str) -> Tensors:
    return {key: tensor for module in modules for key, tensor in pair(module).items()}


def llama() -> Tensors:
    weights = {f"{module}.weight": noise(WIDTH, WIDTH) for module in ATTENTION}
    return {**weights, "model.embed_tokens.weight": noise(20, WIDTH), "lm_head.weight": noise(20, WIDTH)}


def mixtral() -> Tensors:
    """Experts one by one, as the checkpoint of a Mixtral has them."""
    shapes = {"w1": (12, WIDTH), "w2": (WIDTH, 12), "w3": (12, WIDTH)}
    experts = {
        f"model.layers.{n}.block_sparse_moe.experts.{e}.{name}.weight": noise(*shape)
        for n in range(LAYERS)
        for e in range(EXPERTS)
        for name, shape in shapes.items()
    }
    return {**llama(), **experts}


def fused() -> Tensors:
    """Experts as they are in memory."""
    return {
        **llama(),
        **{f"model.layers.{n}.mlp.experts.gate_up_proj": noise(EXPERTS, 24, WIDTH) for n in range(LAYERS)},
        **{f"model.layers.{n}.mlp.experts.down_proj": noise(EXPERTS, WIDTH, 12) for n in range(LAYERS)},
    }


def expert_pairs(experts: int = EXPERTS, rank: int = RANK) -> Tensors:
    """The factors of down_proj, alone on its container."""
    found: Tensors = {}
    for n in range(LAYERS):
        module = f"{PREFIX}model.layers.{n}.mlp.experts"
        found[f"{module}.lora_A.weight"] = noise(experts * rank, 12)
        found[f"{module}.lora_B.weight"] = noise(WIDTH, rank * experts)
    return found


def without(tensors: Tensors, part: str) -> Tensors:
    left = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(left) < len(tensors)
    return left


PARAMETERS = {"target_modules": None, "target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.21.2"}


@dataclass(frozen=True)
class Refusal:
    adapter: Callable[[], Tensors]
    config: Mapping[str, Any]
    code: int
    told: tuple[str, ...]  # what the message must name
    base: Callable[[], Tensors] = llama
    base_config: Mapping[str, Any] = field(default_factory=lambda: {"model_type": "llama"})


def plain() -> Tensors:
    return pairs(*ATTENTION)


MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
REFUSALS: dict[str, Refusal] = {
    # what the config says and the tensors deny
    "DoRA without magnitudes": Refusal(plain, {"use_dora": True}, 3, ("magnitude", "q_proj")),
    "magnitudes without DoRA": Refusal(
        lambda: {**plain(), f"{PREFIX}{ATTENTION[0]}.lora_magnitude_vector": noise(WIDTH)},
        {"use_dora": False},
        3,
        ("lora_magnitude_vector",),
    ),
    "a magnitude of another length": Refusal(
        lambda: {
            **pair(ATTENTION[0]),
            f"{PREFIX}{ATTENTION[0]}.lora_magnitude_vector": noise(WIDTH + 1),
        },
        {"use_dora": True},
        3,
        ("lora_magnitude_vector", ATTENTION[0]),
    ),
    "LoHa of LoRA's tensors": Refusal(plain, {"peft_type": "LOHA"}, 3, ("LOHA",)),
    "LoRA of LoHa's tensors": Refusal(
        lambda: {
            f"{PREFIX}{ATTENTION[0]}.hada_{name}": noise(WIDTH, WIDTH) for name in ("w1_a", "w1_b", "w2_a", "w2_b")
        },
        {},
        3,
        ("hada_w1_a",),
    ),
    "KaSA without its diagonal": Refusal(plain, {"kasa_config": {}}, 3, ("lora_diag", "q_proj")),
    "another rank than the config's": Refusal(plain, {"r": RANK + 1}, 3, ("q_proj", str(RANK), str(RANK + 1))),
    "factors of different ranks": Refusal(
        lambda: {**plain(), f"{PREFIX}{ATTENTION[1]}.lora_B.weight": noise(WIDTH, RANK + 1)},
        {},
        3,
        (ATTENTION[1], "rank"),
    ),
    "a pattern of ranks that names nothing": Refusal(
        plain, {"rank_pattern": {"k_proj": 4}}, 3, ("rank_pattern", "k_proj")
    ),
    "more token rows than indices": Refusal(
        lambda: {**plain(), f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": noise(3, WIDTH)},
        {"trainable_token_indices": [1, 5]},
        3,
        ("embed_tokens", "3 rows", "2 tokens"),
    ),
    "token rows that the vocabulary has not": Refusal(
        lambda: {**plain(), f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": noise(2, WIDTH)},
        {"trainable_token_indices": [1, 20]},
        4,
        ("embed_tokens", "20"),
    ),
    "experts that no target_parameters names": Refusal(
        expert_pairs, {"target_modules": ["q_proj"], "peft_version": "0.21.2"}, 3, ("mlp.experts", "rank"), fused
    ),
    # shards of a distributed training that were never gathered
    "empty factors of ZeRO-3": Refusal(
        lambda: {key: tensor[:0] if "lora_B" in key else tensor for key, tensor in plain().items()},
        {},
        3,
        ("ZeRO-3", "q_proj"),
    ),
    "flat factors of FSDP": Refusal(
        lambda: {key: tensor.flatten() for key, tensor in plain().items()}, {}, 3, ("FSDP", "q_proj")
    ),
    # experts
    "an expert that the base has not": Refusal(
        lambda: expert_pairs(),
        PARAMETERS,
        4,
        ("layers.1.mlp.experts.down_proj", "expert 1 of 3"),
        lambda: without(mixtral(), "1.block_sparse_moe.experts.1.w2"),
        MIXTRAL,
    ),
    "all experts missing": Refusal(expert_pairs, PARAMETERS, 4, ("mlp.experts",)),
    "factors of more experts than the base has": Refusal(
        lambda: expert_pairs(EXPERTS + 1), PARAMETERS, 4, ("mlp.experts",), fused
    ),
    "an expert beyond the last": Refusal(
        lambda: pair(f"model.layers.0.block_sparse_moe.experts.{EXPERTS}.w2", WIDTH, 12),
        {},
        4,
        (f"experts.{EXPERTS}",),
        fused,
        MIXTRAL,
    ),
    "expert factors of different ranks": Refusal(
        lambda: {key: t[:, :-1] if "lora_B" in key else t for key, t in expert_pairs().items()},
        PARAMETERS,
        3,
        ("mlp.experts", "rank"),
        fused,
    ),
    # two claims on one place
    "a module under two names": Refusal(
        lambda: {**plain(), **pair(f"_orig_mod.{ATTENTION[0]}")}, {}, 3, (ATTENTION[0],)
    ),
    "a weight that is changed and replaced": Refusal(
        lambda: {**plain(), f"{PREFIX}{ATTENTION[0]}.weight": noise(WIDTH, WIDTH)}, {}, 3, (ATTENTION[0],)
    ),
    "a fused weight and a part of it": Refusal(
        lambda: {**pair("model.layers.0.self_attn.qkv_proj", 3 * WIDTH), **pair("model.layers.0.self_attn.q_proj")},
        {},
        4,
        ("qkv_proj", "q_proj"),
        lambda: {"model.layers.0.self_attn.qkv_proj.weight": noise(3 * WIDTH, WIDTH)},
        {"model_type": "phi3", "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": WIDTH},
    ),
    # one name, several places
    "a name that fits in two towers": Refusal(
        lambda: pairs("layers.0.self_attn.q_proj"),
        {},
        4,
        ("layers.0.self_attn.q_proj", "--map"),
        lambda: {f"{tower}.layers.0.self_attn.q_proj.weight": noise(WIDTH, WIDTH) for tower in ("left", "right")},
        {},
    ),
    "names that nothing explains": Refusal(
        lambda: pairs(*(f"blocks.{n}.mixer.project" for n in range(12))), {}, 4, ("blocks", "mixer.project", "--map")
    ),
    # tensors that no rule knows
    "a tensor of unknown kind": Refusal(
        lambda: {**plain(), f"{PREFIX}{ATTENTION[0]}.lora_Q.weight": noise(2, 2)}, {}, 4, ("lora_Q",)
    ),
    "half of a module": Refusal(lambda: without(plain(), "1.self_attn.v_proj.lora_B"), {}, 3, ("lora_B", "v_proj")),
    "a convolution in groups": Refusal(
        lambda: {
            f"{PREFIX}conv.lora_A.weight": noise(4, WIDTH, 3),
            f"{PREFIX}conv.lora_B.weight": noise(WIDTH, 2, 1),
        },
        {"r": 4},
        3,
        ("conv", "group"),
        lambda: {"conv.weight": noise(WIDTH, WIDTH // 2, 3)},
        {},
    ),
    # methods that are no change of weights, or whose base is not at hand
    "aLoRA": Refusal(plain, {"alora_invocation_tokens": [3]}, 3, ("aLoRA",)),
    "Arrow": Refusal(plain, {"arrow_config": {"top_k": 2}}, 3, ("Arrow",)),
    "X-LoRA": Refusal(
        lambda: {"base_model.internal_xlora_classifier.last.weight": noise(2, WIDTH)},
        {"peft_type": "XLORA", "adapters": {"0": "one", "1": "two"}},
        3,
        ("XLORA", "classifier"),
    ),
    "layer replication": Refusal(plain, {"layer_replication": [[0, 2], [0, 2]]}, 3, ("layer_replication",)),
    "LoRA-GA": Refusal(
        plain, {"init_lora_weights": "lora_ga"}, 3, ("lora_ga", "path_initial_model_for_weight_conversion")
    ),
    "CorDA": Refusal(plain, {"init_lora_weights": "corda"}, 3, ("corda", "path_initial_model_for_weight_conversion")),
    "LoftQ": Refusal(plain, {"init_lora_weights": "loftq"}, 3, ("loftq",)),
    "an initialisation of the future": Refusal(plain, {"init_lora_weights": "sunrise"}, 3, ("sunrise",)),
    "a type of the future": Refusal(plain, {"peft_type": "SUNRISE"}, 3, ("SUNRISE",)),
    **{
        kind: Refusal(lambda: {"prompt_embeddings": noise(4, WIDTH)}, {"peft_type": kind}, 3, (kind, "weight"))
        for kind in (
            "PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "CPT",
            "CARTRIDGE",
            "ADAPTION_PROMPT",
        )
    },
    **{kind: Refusal(plain, {"peft_type": kind}, 3, (kind,)) for kind in ("POLY", "LILY", "SHADOW")},
}


def write_base(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    return save_model(folder, tensors, {"tie_word_embeddings": False, **config})


def write_adapter(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(facts, sort_keys=True))
    return folder


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and message; inputs are as they were, and nothing lies where the output would."""
    before = picture(folder)
    code = run(["merge", *arguments, "-o", str(folder / "out")])
    said = capsys.readouterr()
    assert picture(folder) == before
    assert said.out == ""
    assert "Traceback" not in said.err
    assert said.err.count("Error:") == 1, said.err
    return code, said.err


@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused_with_the_reason_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    case = REFUSALS[name]
    base = write_base(tmp_path / "base", case.base(), case.base_config)
    adapter = write_adapter(tmp_path / "adapter", case.adapter(), case.config)
    code, message = refused(tmp_path, capsys, str(base), str(adapter))
    assert code == case.code, message
    for word in case.told:
        assert word.lower() in message.lower(), message


@pytest.mark.parametrize("name", ["mixtral", "fused", "llama"])
def test_the_bases_and_the_adapters_of_these_tests_do_merge_where_nothing_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tensors: dict[str, tuple[Callable[[], Tensors], Callable[[], Tensors], dict[str, Any]]] = {
        "mixtral": (mixtral, expert_pairs, PARAMETERS),
        "fused": (fused, expert_pairs, PARAMETERS),
        "llama": (llama, plain, {}),
    }
    base, adapter, config = tensors[name]
    kind = {"model_type": "mixtral" if name == "mixtral" else "llama"}
    write_base(tmp_path / "base", base(), kind)
    write_adapter(tmp_path / "adapter", adapter(), config)
    code = run(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().err
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "out")
    assert any(not torch.equal(before[each], after[each]) for each in before)


def test_two_adapters_that_replace_one_module_are_refused_with_both_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", llama(), {"model_type": "llama"})
    for each in ("style", "facts"):
        tensors = {**plain(), f"{PREFIX}lm_head.weight": noise(20, WIDTH)}
        write_adapter(tmp_path / each, tensors, {"modules_to_save": ["lm_head"]})
    code, message = refused(tmp_path, capsys, str(base), str(tmp_path / "style"), str(tmp_path / "facts"))
    assert code == 4
    assert all(word in message for word in ("lm_head.weight", "style", "facts"))


def test_two_adapters_that_replace_one_token_are_refused_with_both_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", llama(), {"model_type": "llama"})
    for number, each in enumerate(("style", "facts")):
        delta = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
        tensors = {**plain(), delta: noise(2, WIDTH)}
        write_adapter(tmp_path / each, tensors, {"trainable_token_indices": [3, 7 + number]})
    code, message = refused(tmp_path, capsys, str(base), str(tmp_path / "style"), str(tmp_path / "facts"))
    assert code == 4
    assert all(word in message for word in ("embed_tokens", "style", "facts"))


def test_every_problem_of_an_adapter_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", llama(), {"model_type": "llama"})
    tensors = {**plain(), **pair("model.layers.9.self_attn.q_proj"), **pair("model.layers.0.mlp.up_proj", 5)}
    write_adapter(tmp_path / "adapter", tensors, {})
    code, message = refused(tmp_path, capsys, str(base), str(tmp_path / "adapter"))
    assert code == 4
    assert "self_attn.q_proj" in message
    assert "mlp.up_proj" in message


@pytest.mark.parametrize("name", ["config.json", "model_index.json"])
def test_a_model_in_the_place_of_an_adapter_is_told_as_one(name: str, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / name).write_text('{"model_type": "llama"}')
    save_file(llama(), model / "model.safetensors")
    assert run(["rescale", str(model), "-o", str(tmp_path / "out"), "--scale", "2"]) == 3
    assert "this is a model; an adapter is expected here" in capsys.readouterr().err
