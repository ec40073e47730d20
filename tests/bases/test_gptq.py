"""GPTQ: decoded rows are the documented formula, and what does not fit together is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_grouped import Grouped, gptq_values
from packed_models import check_rows, open_packed, refusal, save_packed
from quantised_models import MATRICES

from loratool.bases.weights import Held, Room
from loratool.files.open_sources import OpenSources

Array = NDArray[Any]
LAYER = "model.layers.0."
MODULE = f"{LAYER}self_attn.q_proj"
NAME = f"{MODULE}.weight"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
PLAIN = {"model.norm.weight": np.ones(8, np.float32), "lm_head.weight": np.ones((4, 8), np.float32)}


def said(bits: int = 4, group: int = -1, **more: object) -> dict[str, Any]:
    """The config as AutoGPTQ and optimum write it."""
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False, **more}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("inputs", "group"), [(96, -1), (64, 24)])
@pytest.mark.parametrize("version", [1, 2])
def test_integers_lie_down_columns_and_are_scaled_by_the_group_of_their_input(
    tmp_path: Path, bits: int, shuffled: bool, inputs: int, group: int, version: int
) -> None:
    """Groups may be in any order, the last one may be short, and words may hold parts of 3-bit integers."""
    packed = Grouped(40, inputs, bits, group, shuffled)
    config = said(bits, group, checkpoint_format="gptq" if version == 1 else "gptq_v2")
    folder = save_packed(tmp_path / "base", {**packed.gptq(MODULE, less=2 - version), **PLAIN}, config)
    check_rows(folder, NAME, packed.values())
    assert open_packed(folder).weights[NAME].doubt(Room()) == ""


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_thread_holds_some_columns_of_the_packed_values_whatever_rows_are_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is that of other threads too; a block may begin in the midst of one, and be larger than it."""
    for limit, size in {"PART": 1000, "MOST_READINGS": 9, "PIECE": 700}.items():
        monkeypatch.setattr(f"loratool.bases.codecs.grouped.{limit}", size)
    packed = Grouped(120, 48, 4, 16)
    tensors, config = (packed.gptq(MODULE), said(4, 16)) if kind == "gptq" else (packed.awq(MODULE), {**AWQ})
    weight = open_packed(save_packed(tmp_path / "base", tensors, config)).weights[NAME]
    held, wanted, cpu = Held(), packed.values(), torch.device("cpu")

    def check(block: tuple[int, int]) -> None:
        with OpenSources() as sources:
            found = weight.rows(*block, cpu, torch.float32, Room(sources, held=held))
        assert np.array_equal(found.numpy(), wanted[block[0] : sum(block)])

    with ThreadPoolExecutor(3) as threads:
        [*threads.map(check, [(first, 1 + first % 61) for first in [*range(0, 60, 7), 3, 0, 59, 1]])]
    assert held.parts
    assert all(part.stop - part.first < packed.outputs for part in held.parts.values())


def test_scales_may_be_float32_and_bfloat16(tmp_path: Path) -> None:
    packed = Grouped(8, 32, 4, 8, scales=np.float32)
    check_rows(save_packed(tmp_path / "a", packed.gptq(MODULE), said(4, 8)), NAME, packed.values())
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in packed.gptq(MODULE).items()}
    scales = tensors[f"{MODULE}.scales"] = tensors[f"{MODULE}.scales"].bfloat16()
    stored = {**packed.gptq(MODULE), f"{MODULE}.scales": scales.float().numpy()}
    check_rows(save_packed(tmp_path / "b", tensors, said(4, 8)), NAME, gptq_values(stored, MODULE, 4))


def test_without_g_idx_groups_are_in_the_order_of_their_inputs(tmp_path: Path) -> None:
    packed = Grouped(8, 64, 4, 16)
    check_rows(save_packed(tmp_path / "base", packed.gptq(MODULE, order=False), said(4, 16)), NAME, packed.values())


def test_a_conv1d_is_seen_in_out_as_its_plain_weight_is(tmp_path: Path) -> None:
    packed = Grouped(8, 64, 4, 16)
    folder = save_packed(tmp_path / "base", packed.gptq("h.0.attn.c_attn"), said(4, 16), model_type="gpt2")
    check_rows(folder, "h.0.attn.c_attn.weight", packed.values().T.copy())


def test_autogptq_writes_the_config_as_a_file_of_its_own(tmp_path: Path) -> None:
    packed = Grouped(8, 64, 4, 16)
    folder = save_packed(tmp_path / "base", packed.gptq(MODULE), None)
    (folder / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 16, "damp_percent": 0.01, "desc_act": True, "is_marlin_format": False})
    )
    check_rows(folder, NAME, packed.values())
    assert open_packed(folder).weights[NAME].scheme == "GPTQ, 4 bits, groups of 16, act-order"


# The word that some tools make of the zero points of one group, the first of which is 0.
BORROWED = 0x98_1F_00_50 - 0x11111111  # the whole word less 1 in each field


@pytest.mark.parametrize(
    ("writer", "word", "wanted"),
    [
        ("gptqmodel:5.0.0", BORROWED, [0, 5, 0, 0, 15, 1, 8, 9]),
        (["optimum:1.24.0", "gptqmodel:2.0.0"], BORROWED, [0, 5, 0, 0, 15, 1, 8, 9]),
        (None, 0xFFFFFFF4, [5, 0, 0, 0, 0, 0, 0, 0]),  # a zero point of 0 in the second field, and ones after it
    ],
)
def test_a_zero_point_of_0_in_version_1_is_read_as_its_writer_stored_it(
    tmp_path: Path, writer: object, word: int, wanted: list[int]
) -> None:
    """GPTQModel subtracts 1 from each field of the word at once, so that fields borrow; AutoGPTQ fills the rest with
    ones. A user is told where a field is all ones."""
    packed = Grouped(8, 32)
    tensors = packed.gptq(MODULE)
    tensors[f"{MODULE}.qzeros"] = np.array([[word % 2**32]], np.uint32).view(np.int32)
    config = said(meta={"quantizer": writer}) if writer else said()
    folder = save_packed(tmp_path / "base", tensors, config)
    integers, _, scales = packed.drawn
    values = scales.astype(np.float32).T * (integers - np.array(wanted)[:, None]).astype(np.float32)
    check_rows(folder, NAME, values)
    assert "are stored as all ones" in open_packed(folder).weights[NAME].doubt(Room())


def test_three_bit_zero_points_of_0_are_taken_modulo_8(tmp_path: Path) -> None:
    packed = Grouped(40, 32, 3, lowest_zero=0)
    assert not packed.drawn[1].all()
    folder = save_packed(tmp_path / "base", packed.gptq(MODULE), said(3, meta={"quantizer": ["gptqmodel:5.0.0"]}))
    check_rows(folder, NAME, packed.values())


@pytest.mark.parametrize("family", MATRICES)
def test_models_as_tools_write_them_are_decoded(tmp_path: Path, family: str) -> None:
    made = MATRICES[family]({f"{LAYER}{name}.weight": torch.randn(32, 96) for name in ("up_proj", "down_proj")})
    folder = save_packed(tmp_path / "base", made.tensors, made.config)
    for name, values in made.values.items():
        check_rows(folder, name, values.numpy())


def test_dynamic_rules_change_single_modules_and_the_first_that_matches_counts(tmp_path: Path) -> None:
    """Patterns are matched from the start of a name, and those that exclude come first."""
    eight, four = Grouped(8, 64, 8, 32), Grouped(8, 64, 4, 16, seed=1)
    other = "model.layers.1.self_attn.q_proj"
    dynamic = {r"+:.*\.1\..*": {"bits": 8, "group_size": 32}, r".*layers\.1": {"bits": 2}, r"-:lm_head": {}}
    folder = save_packed(
        tmp_path / "base", {**four.gptq(MODULE), **eight.gptq(other), **PLAIN}, said(4, 16, dynamic=dynamic)
    )
    check_rows(folder, NAME, four.values())
    check_rows(folder, f"{other}.weight", eight.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, but it is 5"),
        ({"bits": None}, "bits must be 2, 3, 4 or 8, but it is missing"),
        ({"group_size": 0}, "group_size must be -1 or a number of inputs, but it is 0"),
        ({"checkpoint_format": "gptq_p"}, "the format 'gptq_p' is unknown; known are gptq and gptq_v2"),
        ({"format": "marlin"}, "the format 'marlin' is unknown"),
        ({"is_marlin_format": True}, "the format 'marlin' is unknown"),
        ({"quant_method": "marlin"}, "the format 'marlin' is unknown"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format and format disagree"),
        ({"pack_dtype": "int64"}, "pack_dtype must be int32, but it is 'int64'"),
        ({"dynamic": ["model"]}, "dynamic must be an object of objects"),
        ({"dynamic": {"+:.*": 4}}, "dynamic must be an object of objects"),
        ({"dynamic": {"(": {}}}, "not a valid regular expression: '('"),
        ({"dynamic": {r".*q_proj": {"bits": 6}}}, r"the rule '.*q_proj' applies, and bits must be 2, 3, 4 or 8"),
        ({"dynamic": {r"-:.*q_proj": {}}}, "is packed, but the rule '-:.*q_proj' says that it is not quantised"),
        ({"bits": 8}, "qweight: must be I32 [16, 8] for 8 bits of [8, 64] in groups of 16, but it is I32 [8, 8]"),
        ({"group_size": 32}, "scales: must be F16 or BF16 or F32 [2, 8] for 4 bits of [8, 64] in groups of 32"),
    ],
)
def test_an_unknown_config_is_refused_with_what_was_found(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    folder = save_packed(tmp_path / "base", Grouped(8, 64, 4, 16).gptq(MODULE), {**said(4, 16), **change})
    assert sentence in refusal(folder)


def spoilt(tensors: dict[str, Array], part: str, change: Callable[[Array], Array | None]) -> dict[str, Array]:
    """The tensors with one of them changed, or without it."""
    found = change(tensors[f"{MODULE}.{part}"])
    others = {name: value for name, value in tensors.items() if name != f"{MODULE}.{part}"}
    return others if found is None else {**others, f"{MODULE}.{part}": np.ascontiguousarray(found)}


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        (
            "qweight",
            lambda _: None,
            "qweight: must be I32 [8, 8] for 4 bits of [8, 64] in groups of 16, but it is missing",
        ),
        ("qweight", lambda a: a[:-1], "qweight: must be I32 [8, 8]"),
        ("qweight", lambda a: a.astype(np.int64), "but it is I64 [8, 8]"),
        ("qweight", lambda a: a[None], "qweight: must be a matrix with values, but it is I32 [1, 8, 8]"),
        ("qweight", lambda a: a[:0], "qweight: must be a matrix with values, but it is I32 [0, 8]"),
        ("qzeros", lambda _: None, "qzeros: must be I32 [4, 1]"),
        ("qzeros", lambda a: a[:, :0], "qzeros: must be I32 [4, 1]"),
        ("scales", lambda _: None, "scales: must be F16 or BF16 or F32 [4, 8]"),
        ("scales", lambda a: a[:-1], "but it is F16 [3, 8]"),
        ("scales", lambda a: a.astype(np.int8), "but it is I8 [4, 8]"),
        ("g_idx", lambda a: a[:-8], "qweight: must be I32 [7, 8] for 4 bits of [8, 56]"),
        ("g_idx", lambda a: a.astype(np.float32), "g_idx: must be I32 or I64 [64]"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(
    tmp_path: Path, part: str, change: Callable[[Array], Array | None], sentence: str
) -> None:
    tensors = spoilt(Grouped(8, 64, 4, 16).gptq(MODULE), part, change)
    message = refusal(save_packed(tmp_path / "base", tensors, said(4, 16)))
    assert sentence in message
    assert MODULE in message


def test_a_module_both_plain_and_packed_is_refused(tmp_path: Path) -> None:
    tensors = {**Grouped(8, 64, 4, 16).gptq(MODULE), NAME: np.zeros((8, 64), np.float32)}
    message = refusal(save_packed(tmp_path / "base", tensors, said(4, 16)))
    assert f"{NAME}: is there as well as {MODULE}.qweight" in message


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    other = f"{LAYER}mlp.up_proj"
    packed = Grouped(8, 64, 4, 16)
    tensors = spoilt(packed.gptq(MODULE), "qzeros", lambda _: None) | packed.gptq(other)
    del tensors[f"{other}.scales"]
    message = refusal(save_packed(tmp_path / "base", tensors, said(4, 16)))
    assert f"{MODULE}.qzeros" in message
    assert f"{other}.scales" in message


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("scales", np.nan, "1 of 32 values are NaN or infinite"),
        ("scales", np.inf, "1 of 32 values are NaN or infinite"),
        ("scales", 0, "1 of 32 values are zero"),
        ("g_idx", 4, "1 of 64 values, such as 4, are not one of the 4 groups"),
        ("g_idx", -1, "1 of 64 values, such as -1, are not one of the 4 groups"),
    ],
)
def test_values_that_no_quantiser_writes_are_found(tmp_path: Path, part: str, value: float, sentence: str) -> None:
    tensors = Grouped(8, 64, 4, 16).gptq(MODULE)
    tensors[f"{MODULE}.{part}"].flat[5] = value
    weight = open_packed(save_packed(tmp_path / "base", tensors, said(4, 16))).weights[NAME]
    assert weight.check(Room()) == f"{MODULE}.{part}: {sentence}"


OTHER = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "config", "is_told"),
    [
        ("gptq", {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, False),
        ("gptq", {"modules_in_block_to_quantize": [[MODULE]]}, True),
        ("gptq", {"modules_in_block_to_quantize": [["q_proj"]], "dynamic": {"-:.*layers.11": {}}}, True),
        ("gptq", {}, True),
        ("awq", {"modules_to_not_convert": ["lm_head", "layers.21"]}, False),
        ("awq", {"modules_to_not_convert": ["layers.11."]}, True),
        ("awq", {"modules_to_not_convert": [r"model\.layers\.1\d\..*"]}, True),
        ("awq", {"modules_to_not_convert": None}, True),
    ],
)
def test_a_weight_that_is_plain_in_one_layer_must_be_plain_by_the_config_where_that_has_a_list(
    kind: str, config: dict[str, Any], is_told: bool, tmp_path: Path
) -> None:
    """Loaders would take it for a packed one. Without a list they go by what is in the files."""
    packed = Grouped(8, 64, 4, 16)
    tensors = packed.gptq(MODULE) if kind == "gptq" else packed.awq(MODULE)
    tensors |= {f"{OTHER}.weight": np.zeros((8, 64), np.float32), **PLAIN}
    base = save_packed(tmp_path / "base", tensors, {**(said(4, 16) if kind == "gptq" else AWQ), **config})
    if is_told:
        assert [*open_packed(base).weights] == [NAME]
    else:
        assert f"{OTHER}.weight: is F32 [8, 64], but the config says that it is packed" in refusal(base)
