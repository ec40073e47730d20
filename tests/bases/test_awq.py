"""AWQ: decoded rows are the documented formula, and what does not fit together is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from packed_grouped import Grouped
from packed_models import check_rows, open_packed, refusal, save_packed

from loratool.bases.weights import Room

Array = NDArray[Any]
MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"
PLAIN = {"model.norm.weight": np.ones(8, np.float32), "lm_head.weight": np.ones((4, 8), np.float32)}


def said(group: int = 16, **more: object) -> dict[str, Any]:
    """The config as AutoAWQ writes it."""
    found = {"quant_method": "awq", "zero_point": True, "group_size": group, "bits": 4, "version": "gemm"}
    return {**found, "modules_to_not_convert": None, **more}


@pytest.mark.parametrize(("inputs", "group"), [(96, -1), (96, 32), (64, 24), (33, 11)])
@pytest.mark.parametrize("scales", [np.float16, np.float32])
def test_a_word_holds_eight_outputs_in_an_order_of_its_own(
    tmp_path: Path, inputs: int, group: int, scales: type
) -> None:
    """Zero points are stored as they are, and may be 0 and 15."""
    packed = Grouped(24, inputs, 4, group, lowest_zero=0, scales=scales)
    assert {0, 15} <= {*packed.drawn[1].flat} or group == -1
    folder = save_packed(tmp_path / "base", {**packed.awq(MODULE), **PLAIN}, said(group))
    check_rows(folder, NAME, packed.values())
    assert open_packed(folder).weights[NAME].scheme.startswith("AWQ, 4 bits")


def test_files_of_their_own_tell_the_packing_too(tmp_path: Path) -> None:
    """So older tools write it, in capitals; GPTQModel names the layout twice."""
    packed = Grouped(8, 64, 4, 16)
    folder = save_packed(tmp_path / "a", packed.awq(MODULE), None)
    old = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(old))
    check_rows(folder, NAME, packed.values())
    new = said(version="gemm", format="gemm", checkpoint_format="gemm", method="awq", meta={"quantizer": "gptqmodel:5"})
    check_rows(save_packed(tmp_path / "b", packed.awq(MODULE), new), NAME, packed.values())


def test_rules_change_the_groups_of_single_modules(tmp_path: Path) -> None:
    packed, other = Grouped(8, 64, 4, 16), "model.layers.1.self_attn.q_proj"
    coarse = Grouped(8, 64, 4, 32, seed=3)
    rules = {r"+:model\.layers\.1\.": {"group_size": 32}}
    folder = save_packed(tmp_path / "base", {**packed.awq(MODULE), **coarse.awq(other)}, said(dynamic=rules))
    check_rows(folder, NAME, packed.values())
    check_rows(folder, f"{other}.weight", coarse.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": "gemv"}, "the layout (version) must be gemm, but it is 'gemv'"),
        ({"version": "GEMV_FAST"}, "the layout (version) must be gemm, but it is 'gemv_fast'"),
        ({"checkpoint_format": "marlin"}, "the layout (version) must be gemm, but it is 'marlin'"),
        ({"backend": "llm-awq"}, "the layout (version) must be gemm, but it is 'llm-awq'"),
        ({"bits": 8}, "bits must be 4, but it is 8"),
        ({"group_size": "16"}, "group_size must be -1 or a number of inputs, but it is '16'"),
        ({"dynamic": {".*": {"bits": 8}}}, "the rule '.*' applies, and bits must be 4, but it is 8"),
        ({"dynamic": {"-:.*q_proj": {}}}, "is packed, but the rule '-:.*q_proj' says that it is not quantised"),
        ({"group_size": 32}, "qzeros: must be I32 [2, 1] for [8, 64] in groups of 32, but it is I32 [4, 1]"),
    ],
)
def test_an_unknown_config_is_refused_with_what_was_found(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    folder = save_packed(tmp_path / "base", Grouped(8, 64, 4, 16).awq(MODULE), said(**change))
    assert sentence in refusal(folder)


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        ("qweight", lambda _: None, "qweight: must be I32"),
        ("qweight", lambda a: a.astype(np.int16), "qweight: must be I32 for [8, 64] in groups of 16, but it is I16"),
        ("qweight", lambda a: a[None], "qweight: must be a matrix with values, but it is I32 [1, 64, 1]"),
        ("qweight", lambda a: a[:0], "qweight: must be a matrix with values, but it is I32 [0, 1]"),
        ("qzeros", lambda _: None, "qzeros: must be I32 [4, 1] for [8, 64] in groups of 16, but it is missing"),
        (
            "scales",
            lambda a: a[:-1],
            "scales: must be F16 or BF16 or F32 [4, 8] for [8, 64] in groups of 16, but it is",
        ),
        ("scales", lambda a: a.T, "but it is F16 [8, 4]"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(
    tmp_path: Path, part: str, change: Callable[[Array], Array | None], sentence: str
) -> None:
    tensors = Grouped(8, 64, 4, 16).awq(MODULE)
    found = change(tensors.pop(f"{MODULE}.{part}"))
    if found is not None:
        tensors[f"{MODULE}.{part}"] = np.ascontiguousarray(found)
    message = refusal(save_packed(tmp_path / "base", tensors, said()))
    assert sentence in message
    assert MODULE in message


def test_a_module_both_plain_and_packed_is_refused(tmp_path: Path) -> None:
    tensors = {**Grouped(8, 64, 4, 16).awq(MODULE), NAME: np.zeros((8, 64), np.float32)}
    message = refusal(save_packed(tmp_path / "base", tensors, said()))
    assert f"{NAME}: is there as well as {MODULE}.qweight" in message


@pytest.mark.parametrize(
    ("value", "sentence"), [(np.nan, "1 of 32 values are NaN or infinite"), (0, "1 of 32 values are zero")]
)
def test_values_that_no_quantiser_writes_are_found(tmp_path: Path, value: float, sentence: str) -> None:
    tensors = Grouped(8, 64, 4, 16).awq(MODULE)
    tensors[f"{MODULE}.scales"].flat[5] = value
    weight = open_packed(save_packed(tmp_path / "base", tensors, said())).weights[NAME]
    assert weight.check(Room()) == f"{MODULE}.scales: {sentence}"
