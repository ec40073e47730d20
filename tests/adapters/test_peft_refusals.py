"""What cannot be merged right is refused with the reason; the table of what is supported names all of it."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from paths import ROOT
from peft import LoraConfig, TinyLoraConfig
from peft_files import save_peft
from peft_methods import CASES
from peft_zoo import make_zoo, train
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool.adapters.formats.peft import lora, methods, support
from loratool.cli import run

Tensors = dict[str, Tensor]
START = "base_model.model.linear."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a LoRA adapter on one linear layer of it, both sound."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["linear"])
    pair = train(tmp_path_factory.mktemp("plain"), make_zoo(), config)
    return pair.base, pair.adapter


def changed(adapter: Path, folder: Path, tensors: Callable[[Tensors], Tensors] | None = None, **config: Any) -> Path:
    """The adapter with other tensors or another config."""
    before = load_file(adapter / "adapter_model.safetensors")
    after = tensors(before) if tensors else before
    table = json.loads((adapter / "adapter_config.json").read_text())
    return save_peft(folder, after, **{**table, **config})


def refusal(base: Path, adapter: Path, out: Path, capsys: pytest.CaptureFixture[str], code: int = 3) -> str:
    assert run(["merge", str(base), str(adapter), "-o", str(out)]) == code
    assert not out.exists()
    return capsys.readouterr().err


REFUSED_TYPES = [name for name, row in support.TYPES.items() if row.refused]


@pytest.mark.parametrize("kind", REFUSED_TYPES)
def test_a_type_that_has_no_merged_weight_is_refused_with_its_reason(
    plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    adapter = changed(plain[1], tmp_path / "adapter", peft_type=kind)
    message = refusal(plain[0], adapter, tmp_path / "out", capsys)
    assert kind in message
    assert support.TYPES[kind].refused in message
    assert "malformed" not in message


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "aLoRA": ({"alora_invocation_tokens": [5, 1]}, "invocation tokens"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "depends on the input"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers"),
    "pissa_niter_16": ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
    "corda": ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
    "loftq": ({"init_lora_weights": "loftq"}, "quantised base"),
    "'of next year'": ({"init_lora_weights": "of next year"}, "unknown init_lora_weights"),
    "OF_NEXT_YEAR": ({"peft_type": "OF_NEXT_YEAR"}, "unknown"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_be_merged_is_refused_with_its_reason(
    plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config, reason = SETTINGS[name]
    message = refusal(plain[0], changed(plain[1], tmp_path / "adapter", **config), tmp_path / "out", capsys)
    assert name in message
    assert reason in message


def added(**tensors: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda before: {**before, **{START + name.replace("__", "."): tensor for name, tensor in tensors.items()}}


def squeezed(name: str, shape: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    return lambda before: {**before, START + name: torch.zeros(shape)}


ONES = torch.ones
# (what is done to the tensors, what to the config, what the message must name)
CONTRADICTIONS: dict[str, tuple[Callable[[Tensors], Tensors] | None, dict[str, Any], str]] = {
    "DoRA without magnitudes": (
        None,
        {"use_dora": True},
        "linear: lora_magnitude_vector is missing, although use_dora is set",
    ),
    "magnitudes without DoRA": (
        added(lora_magnitude_vector=ONES(16)),
        {},
        "use_dora is not set in adapter_config.json",
    ),
    "magnitudes of another size": (
        added(lora_magnitude_vector=ONES(15)),
        {"use_dora": True},
        "lora_magnitude_vector is [15]; expected 16 values",
    ),
    "lora_bias without biases": (None, {"lora_bias": True}, "lora_B.bias is missing, although lora_bias is set"),
    "biases without lora_bias": (added(lora_B__bias=ONES(16)), {}, "lora_bias is not set"),
    "a bias of another size": (added(lora_B__bias=ONES(4)), {"lora_bias": True}, "4 values; expected 16"),
    "KaSA without its diagonal": (None, {"kasa_config": {}}, "linear: lora_diag is missing"),
    "a diagonal without KaSA": (added(lora_diag=ONES(2)), {}, "has no kasa_config"),
    "a diagonal of another rank": (added(lora_diag=ONES(5)), {"kasa_config": {}}, "5 values for rank 2"),
    "a flag that is no flag": (None, {"use_dora": "yes"}, "use_dora is 'yes'"),
    "tensors of another method": (
        added(hada_w1_a=ONES(2, 2)),
        {},
        "spelled as LOHA, but adapter_config.json says peft_type LORA",
    ),
    "tensors of AdaLoRA": (added(lora_E=ONES(2, 1)), {}, "spelled as ADALORA"),
    "a module saved whole and adapted": (
        added(weight=ONES(16, 8)),
        {},
        "both adapter factors and a saved replacement",
    ),
    "a saved module in two spellings": (
        lambda before: {
            **before,
            "base_model.model.head.modules_to_save.weight": ONES(5, 4),
            "head.modules_to_save.default.weight": ONES(5, 4),
        },
        {},
        "head.weight is saved twice",
    ),
    "two wrappers around one key": (
        lambda before: {**before, f"module.{START}lora_A.weight": ONES(2, 8)},
        {},
        "two spellings of the same factor",
    ),
    "an empty factor of ZeRO-3": (squeezed("lora_A.weight", (0,)), {}, "ZeRO-3 or FSDP did not gather"),
    "a flat factor of FSDP": (squeezed("lora_B.weight", (32,)), {}, "ZeRO-3 or FSDP did not gather"),
    "an empty saved module of ZeRO-3": (added(bias=ONES(0)), {}, "ZeRO-3 or FSDP did not gather"),
    "ranks that differ": (squeezed("lora_B.weight", (16, 3)), {}, "lora_A has 2 rows and lora_B 3 columns"),
    "a rank that the config denies": (None, {"rank_pattern": {"linear": 7}}, "says r = 7, but the tensors have rank 2"),
    "blocks of both factors": (
        None,
        {"use_bdlora": {"target_modules_bd_a": ["linear"], "target_modules_bd_b": ["linear"], "nblocks": 2}},
        "both factors are in blocks",
    ),
    "blocks that do not divide": (
        None,
        {"use_bdlora": {"target_modules_bd_a": ["linear"], "nblocks": 3}},
        "not a multiple of 3 blocks",
    ),
    "a grouped convolution": (
        lambda _: {f"{START}lora_A.weight": ONES(4, 6, 3), f"{START}lora_B.weight": ONES(8, 2, 1)},
        {"r": 4},
        "grouped convolution",
    ),
    "kernels in lora_B": (
        lambda _: {f"{START}lora_A.weight": ONES(2, 6, 3), f"{START}lora_B.weight": ONES(8, 2, 3)},
        {},
        "expected a kernel of 1",
    ),
    "token rows without numbers": (
        added(token_adapter__trainable_tokens_delta=ONES(2, 8)),
        {},
        "no list of token ids",
    ),
    "token rows of another number": (
        added(token_adapter__trainable_tokens_delta=ONES(2, 8)),
        {"trainable_token_indices": [1, 2, 3]},
        "lists 3 tokens, but 2 rows are stored",
    ),
    "a token twice": (
        added(token_adapter__trainable_tokens_delta=ONES(2, 8)),
        {"trainable_token_indices": {"linear": [4, 4]}},
        "lists a token twice",
    ),
    "a negative token": (
        added(token_adapter__trainable_tokens_delta=ONES(2, 8)),
        {"trainable_token_indices": [-1, 4]},
        "no list of token ids",
    ),
}


def test_more_orthogonal_vectors_than_columns_are_refused_for_they_are_rounding_errors(
    plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of r vectors in fewer dimensions none is left over for the last ones; as they are they still reflect."""
    columns = make_zoo().linear.in_features
    tensors = {f"{START}hra_u": torch.randn(columns, columns + 1)}
    settings: dict[str, Any] = {"peft_type": "HRA", "r": columns + 1, "target_modules": ["linear"]}
    adapter = save_peft(tmp_path / "ordered", tensors, apply_GS=True, **settings)
    assert f"{columns + 1} vectors for {columns} columns" in refusal(plain[0], adapter, tmp_path / "out", capsys)
    loratool.merge(plain[0], save_peft(tmp_path / "free", tensors, **settings), tmp_path / "merged")


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_config_and_tensors_that_contradict_each_other_are_refused(
    plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tensors, config, told = CONTRADICTIONS[name]
    message = refusal(plain[0], changed(plain[1], tmp_path / "adapter", tensors, **config), tmp_path / "out", capsys)
    assert told in message


# type → (its tensors on `linear`, its config, what is wrong)
MALFORMED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "ADALORA": ({"lora_A": ONES(2, 8), "lora_B": ONES(16, 2), "lora_E": ONES(3, 1)}, {"init_r": 4}, "lora_E is [3, 1]"),
    "ADALORA, all pruned": (
        {"lora_A": ONES(0, 8), "lora_B": ONES(16, 0), "lora_E": ONES(0, 1)},
        {"init_r": 4},
        "pruning removed",
    ),
    "LOHA": (
        {"hada_w1_a": ONES(16, 2), "hada_w1_b": ONES(2, 8), "hada_w2_a": ONES(16, 2), "hada_w2_b": ONES(3, 8)},
        {"r": 2, "alpha": 2},
        "hada_w2_a and hada_w2_b have different ranks",
    ),
    "LOHA, half of it": ({"hada_w1_a": ONES(16, 2), "hada_w1_b": ONES(2, 8)}, {"r": 2}, "hada_w2_a is missing"),
    "LOKR": ({"lokr_w1": ONES(4, 2), "lokr_w2_a": ONES(4, 2)}, {"r": 2}, "lokr_w2_b is missing"),
    "LOKR, twice": (
        {"lokr_w1": ONES(4, 2), "lokr_w1_a": ONES(4, 2), "lokr_w2": ONES(4, 4)},
        {"r": 2},
        "stored both whole and as a product",
    ),
    "IA3": ({"ia3_l": ONES(16, 1)}, {"feedforward_modules": ["linear"]}, "feedforward_modules"),
    "VERA": ({"vera_lambda_b": ONES(16), "vera_lambda_d": ONES(4)}, {"r": 4}, "save_projection was false"),
    "PVERA": ({"pvera_lambda_b": ONES(16), "pvera_lambda_d": ONES(8)}, {"r": 4}, "save_projection was false"),
    "RANDLORA": (
        {"randlora_lambda": ONES(4, 2), "randlora_gamma": ONES(2, 8)},
        {},
        "config.save_projection = True",
    ),
    "RANDLORA, other bases": (
        {
            "randlora_lambda": ONES(4, 2),
            "randlora_gamma": ONES(2, 8),
            "randlora_A": ONES(4, 1, 7),
            "randlora_B": ONES(16, 2, 4),
        },
        {},
        "do not match its diagonals",
    ),
    "TINYLORA": (
        {"tinylora_A": ONES(2, 8), "tinylora_B": ONES(16, 2), "tinylora_v.0": ONES(3)},
        {},
        "config.save_projection = True",
    ),
    "UNILORA": ({"unilora_indices_A": torch.ones(2, 8, dtype=torch.int64)}, {}, "unilora_theta_d is missing"),
    "WAVEFT": ({"waveft_spectrum": ONES(5)}, {"wavelet_family": "sym4"}, "other than db1 to db10"),
    "SUPERTUNING": ({"supertuning_values": ONES(5)}, {}, "config.save_precomputed_indices = True"),
    "DEFT": ({"deft_P": ONES(16, 2), "deft_R": ONES(3, 8)}, {}, "have different ranks"),
    "DEFT, of next year": (
        {"deft_P": ONES(16, 2)},
        {"decomposition_method": "svd"},
        "unknown decomposition_method 'svd'",
    ),
    "PEANUT": ({"peanut_A": ONES(2, 16), "peanut_B": ONES(16, 2)}, {"depth": 1}, "has 0 encoders"),
    "PEANUT, of next year": (
        {"peanut_A": ONES(2, 16), "peanut_B": ONES(16, 2)},
        {"act_fn": "snake"},
        "act_fn 'snake'; supported: relu",
    ),
    "ROAD": ({"road_theta": ONES(8), "road_alpha": ONES(8)}, {"group_size": 12}, "not a multiple of the group size 12"),
    "ROAD, of next year": (
        {"road_theta": ONES(8), "road_alpha": ONES(8)},
        {"variant": "road_8"},
        "unknown variant 'road_8'",
    ),
    "GLORA": ({"glora_A.Xd": ONES(16, 2), "glora_A.Xu": ONES(3, 8)}, {}, "have different ranks"),
    "OSF": (
        {"osf_svd_params.U_low": ONES(16, 2), "osf_svd_params.S_low": ONES(3), "osf_svd_params.V_low": ONES(2, 8)},
        {},
        "cannot be multiplied",
    ),
    "FROD": ({"frod_lambda_l": ONES(8), "frod_lambda_s_values": ONES(2)}, {}, "decomposition of all layers"),
    "FROD, diagonal alone": (
        {
            "frod_lambda_l": ONES(8),
            "frod_lambda_s_values": ONES(0),
            "frod_V.linear": ONES(8, 8),
            "frod_s_indices.linear": torch.ones(2, 0, dtype=torch.int64),
        },
        {},
        "without entries outside of the diagonal",
    ),
    "OFT, blocks of 1": ({"oft_R.weight": ONES(8, 0)}, {"oft_block_size": 1}, "blocks of size 1"),
    "OFT": ({"oft_R.weight": ONES(2, 5)}, {}, "5 is not the number of elements of an upper triangle"),
    "OFT, of long ago": ({"oft_r": ONES(2, 4, 4), "oft_s": ONES(16, 1)}, {}, "an older PEFT"),
    "BOFT": ({"boft_R": ONES(2, 2, 4, 4), "boft_s": ONES(16, 1)}, {}, "several butterfly factors"),
    "DELORA": (
        {"delora_A": ONES(2, 8), "delora_B": ONES(16, 2), "delora_lambda": ONES(1), "delora_w_norm": ONES(7)},
        {},
        "delora_w_norm has 7 values for 8 columns",
    ),
    "MISS": ({"miss_block": ONES(4, 4, 4)}, {"init_weights": True}, "miss_block is [4, 4, 4], init_weights True"),
    "GRALORA": ({"gralora_A": ONES(2, 4, 3), "gralora_B": ONES(2, 3, 8)}, {}, "do not form a grid"),
    "SHIRA": ({"shira_weight": ONES(5)}, {}, "without its shira_indices"),
    "SHIRA, other indices": (
        {"shira_weight": ONES(5), "shira_indices": torch.ones(2, 4, dtype=torch.int32)},
        {},
        "[2, 4] for 5 values",
    ),
    "VBLORA": (
        {"vblora_logits_A": ONES(2, 2, 6), "vblora_logits_B": ONES(4, 2, 6)},
        {},
        "vblora_vector_bank is missing",
    ),
    "TRAINABLE_TOKENS": (
        {"trainable_tokens_delta": ONES(2, 8)},
        {"token_indices": [3]},
        "lists 1 tokens, but 2 rows are",
    ),
    "FOURIERFT": ({"fourierft_spectrum": ONES(5)}, {"random_loc_seed": "x"}, "random_loc_seed is 'x'"),
    "HIRA": ({"hira_A": ONES(2, 8)}, {}, "hira_B is missing"),
    "HRA": ({"hra_u": ONES(0)}, {}, "ZeRO-3 or FSDP did not gather"),
    "C3A": ({"c3a_kernel": ONES(4, 4)}, {}, "c3a_kernel: is [4, 4]"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_adapter_of_any_type_is_refused(
    plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tensors, config, told = MALFORMED[name]
    kind = name.partition(",")[0]
    save_peft(tmp_path / "adapter", {START + key: t for key, t in tensors.items()}, **{"peft_type": kind, **config})
    assert told in refusal(plain[0], tmp_path / "adapter", tmp_path / "out", capsys)


@pytest.mark.parametrize("index", [[[0, 99], [1, 2]], [[0, 1], [1, -2]], [[0, 1], [1, 8]]])
def test_places_outside_of_the_weight_end_the_merge(
    plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], index: list[list[int]]
) -> None:
    tensors = {f"{START}shira_weight": ONES(2), f"{START}shira_indices": torch.tensor(index)}
    save_peft(tmp_path / "adapter", tensors, peft_type="SHIRA")
    message = refusal(plain[0], tmp_path / "adapter", tmp_path / "out", capsys, code=4)
    assert "trained on a weight of another shape" in message


def test_a_seed_that_gives_none_of_the_stored_projections_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TinyLoRA's vectors go by the order of layers, which only their projections tell: those of another seed do not."""
    pair = train(tmp_path, make_zoo(), TinyLoraConfig(target_modules=["linear", "square"]))
    adapter = changed(pair.adapter, tmp_path / "other", projection_seed=9)
    told = refusal(pair.base, adapter, tmp_path / "out", capsys, code=4)
    assert ": its tinylora_P does not match projection_seed" in told


def test_values_that_are_not_finite_are_found_in_the_tensors_of_any_type(
    plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = ONES(4, 2, 4)
    kernel[1, 1, 1] = float("nan")
    save_peft(tmp_path / "adapter", {f"{START}c3a_kernel": kernel}, peft_type="C3A")
    assert "c3a_kernel contains NaN" in refusal(plain[0], tmp_path / "adapter", tmp_path / "out", capsys)


def test_the_table_names_every_type_and_every_option_of_peft() -> None:
    types = {kind.value for kind in peft.PeftType}
    assert set(support.TYPES) == {*types, "BONE"}  # which PEFT has dropped
    assert set(support.OPTIONS) == {field.name for field in dataclasses.fields(LoraConfig)}
    documented = LoraConfig.__dataclass_fields__["init_lora_weights"].type
    for value in ("gaussian", "eva", "olora", "pissa", "pissa_niter_[number of iters]", "corda", "loftq", "orthogonal"):
        assert value in str(documented)
    assert {"mica", "lora_ga"} <= set(support.INITIALISATIONS)


def test_what_the_table_says_is_merged_is_what_the_code_reads() -> None:
    merged = {name for name, row in support.TYPES.items() if row.merged}
    assert merged == {"LORA", *methods.METHODS}
    for rows in (support.TYPES, support.OPTIONS, support.INITIALISATIONS):
        for name, row in rows.items():
            assert bool(row.merged) != bool(row.refused), name
    assert set(lora.PARTS) <= {name for name, row in support.INITIALISATIONS.items() if row.merged}


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_table_names_is_there() -> None:
    rows = [*support.TYPES.values(), *support.OPTIONS.values(), *support.INITIALISATIONS.values()]
    named = {row.test for row in rows if row.test}
    assert named
    for test in named:
        file, _, function = test.partition("::")
        assert function in functions_of(file), test


def test_every_type_that_is_merged_has_a_case_of_its_own() -> None:
    cases = {name.partition(",")[0].partition(" ")[0] for name in CASES}
    assert cases == set(methods.METHODS)


def test_a_message_can_be_read_in_python_too(plain: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = changed(plain[1], tmp_path / "adapter", peft_type="XLORA")
    with pytest.raises(loratool.InputError, match=r"XLORA.*classifier"):
        loratool.merge(plain[0], [adapter], tmp_path / "out")
