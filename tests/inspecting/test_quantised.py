"""Quantised checkpoints: what `inspect` and `estimate` tell of them, and adapters held against them."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from packed_bnb import FourBit
from packed_hqq import Hqq
from packed_models import save_packed
from peft_files import save_peft
from quantised_models import FAMILIES, MATRICES
from safetensors import safe_open

import loratool

if TYPE_CHECKING:
    from numpy.typing import NDArray

DESCRIBED = json.loads((Path(__file__).parents[2] / "docs" / "schemas" / "inspect.schema.json").read_text("utf-8"))
LAYER = "model.layers.0."
ATTENTION = f"{LAYER}self_attn."
PACKED = {
    f"{ATTENTION}q_proj.weight": FourBit((64, 32), "nf4", 64, 4, seed=1),
    f"{ATTENTION}k_proj.weight": FourBit((32, 32), "nf4", 64, 4, seed=2),
    f"{ATTENTION}v_proj.weight": FourBit((32, 32), "nf4", 64, 4, seed=3),
    f"{LAYER}mlp.down_proj.weight": FourBit((32, 96), "fp4", 32, 0, seed=4),
}
PLAIN: dict[str, NDArray[Any]] = {
    "model.embed_tokens.weight": np.ones((50, 32), np.float32),
    "lm_head.weight": np.full((50, 32), 2, np.float32),
    "model.norm.weight": np.ones(32, np.float32),
}
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors: dict[str, NDArray[Any]] = {**PLAIN}
    for name, packed in PACKED.items():
        tensors |= packed.tensors(name)
    return save_packed(
        tmp_path_factory.mktemp("quantised") / "base", tensors, CONFIG, architectures=["LlamaForCausalLM"]
    )


def stored(folder: Path) -> dict[str, int]:
    """Bytes of each tensor of a model."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def save_adapter(folder: Path, *modules: str, base: str = "") -> tuple[Path, dict[str, NDArray[Any]]]:
    """A LoRA of rank 2 and scaling 1 on some modules, and the ΔW of each."""
    numbers, tensors = torch.Generator().manual_seed(5), dict[str, torch.Tensor]()
    deltas: dict[str, NDArray[Any]] = {}
    for module in modules:
        rows, columns = PACKED[f"{module}.weight"].shape
        a, b = (torch.randn(*shape, generator=numbers) for shape in ((2, columns), (rows, 2)))
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        deltas[f"{module}.weight"] = (b.double() @ a.double()).numpy()
    save_peft(folder, tensors, r=2, lora_alpha=2, base_model_name_or_path=base or None)
    return folder, deltas


def packing_of(folder: Path) -> Any:
    facts = loratool.inspect(folder)
    if find_spec("jsonschema") is not None:
        import jsonschema

        table = json.loads(json.dumps(facts.to_dict()))
        jsonschema.Draft202012Validator(DESCRIBED).validate({"schema": table.pop("schema"), "results": [table]})
    assert facts.kind == "checkpoint"
    return facts.packing


def test_bytes_are_told_by_kind_with_the_bits_that_a_weight_really_takes(base: Path) -> None:
    found, sizes = packing_of(base), stored(base)
    packed = sum(sizes[name] for name in PACKED)
    scales = sum(size for name, size in sizes.items() if any(name.startswith(f"{each}.") for each in PACKED))
    values = sum(packed.elements for packed in PACKED.values())
    assert (found.packed_bytes, found.scale_bytes) == (packed, scales)
    assert found.plain_bytes == sum(sizes[name] for name in PLAIN)
    assert found.parameters == values
    assert found.bits == pytest.approx(8 * (packed + scales) / values)
    assert {each.scheme: each.weights for each in found.schemes} == {
        "nf4, blocks of 64, nested statistics": 3,
        "fp4, blocks of 32": 1,
    }
    assert sum(each.packed_bytes + each.scale_bytes for each in found.schemes) == packed + scales
    assert found.plain == ("lm_head", "model.embed_tokens")
    assert found.mergeable


def test_weights_are_shown_with_the_shapes_of_their_values(base: Path) -> None:
    facts = loratool.inspect(base)
    assert facts.kind == "checkpoint"
    assert facts.parameters == sum(p.elements for p in PACKED.values()) + sum(v.size for v in PLAIN.values())
    assert {weight.name: weight.shape for weight in facts.weights}["down_proj"] == (32, 96)
    text = str(facts)
    assert "fp4, blocks of 32 ×1" in text
    assert "merge into" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("family", [*FAMILIES, *MATRICES])
def test_every_kind_is_taken_apart_into_packed_values_scales_and_the_rest(tmp_path: Path, family: str) -> None:
    numbers = torch.Generator().manual_seed(0)
    shapes = {f"{ATTENTION}q_proj.weight": (48, 64), f"{ATTENTION}o_proj.weight": (64, 96)}
    made = {**FAMILIES, **MATRICES}[family](
        {name: torch.randn(*shape, generator=numbers) for name, shape in shapes.items()}
    )
    folder = save_packed(tmp_path / "base", {**made.tensors, **PLAIN}, made.config)
    for name, content in made.files.items():
        (folder / name).write_text(json.dumps(content))
    found = packing_of(folder)
    every = sum(tensor.nbytes for tensor in made.tensors.values())
    assert found.packed_bytes + found.scale_bytes == every
    assert found.packed_bytes > found.scale_bytes > 0
    assert found.plain_bytes == sum(array.nbytes for array in PLAIN.values())
    assert found.parameters == 48 * 64 + 64 * 96
    assert found.mergeable
    (rank,) = loratool.estimate(folder, [2], "q_proj").ranks
    assert rank.qlora.weights == every + found.plain_bytes + 4 * rank.trainable


def test_a_kind_that_nobody_reads_is_told_by_its_name(tmp_path: Path) -> None:
    tensors = {f"{ATTENTION}q_proj.codes": np.ones((4, 4, 2), np.int8), **PLAIN}
    found = packing_of(save_packed(tmp_path / "base", tensors, {"quant_method": "aqlm"}))
    assert (found.family, found.mergeable, found.bits) == ("aqlm", False, None)
    assert "AQLM" in found.reason


def test_what_a_codec_refuses_is_the_reason_and_the_rest_is_told(tmp_path: Path) -> None:
    name = f"{ATTENTION}q_proj.weight"
    tensors = {**PACKED[name].tensors(name), **PLAIN}
    del tensors[f"{name}.absmax"]
    folder = save_packed(tmp_path / "base", tensors, CONFIG)
    found = packing_of(folder)
    assert not found.mergeable
    assert f"{name}.absmax" in found.reason
    checked = loratool.inspect(folder, check=True)
    assert [finding.code for finding in checked.findings or () if finding.level == "problem"] == ["not-decodable"]


def test_a_check_reads_the_scales(tmp_path: Path) -> None:
    name = f"{LAYER}mlp.down_proj.weight"
    tensors = {**PACKED[name].tensors(name), **PLAIN}
    tensors[f"{name}.absmax"][1] = np.nan
    folder = save_packed(tmp_path / "base", tensors, CONFIG)
    assert packing_of(folder).mergeable  # headers tell no more
    checked = loratool.inspect(folder, check=True)
    told = [finding.message for finding in checked.findings or () if finding.code == "not-decodable"]
    assert any(f"{name}.absmax" in message for message in told)


def test_a_plain_model_that_says_that_it_is_quantised_can_be_merged_into(tmp_path: Path) -> None:
    found = packing_of(save_packed(tmp_path / "base", PLAIN, {"quant_method": "gptq", "bits": 4, "group_size": 128}))
    assert found is None or found.mergeable
    assert packing_of(save_packed(tmp_path / "plain", PLAIN, None)) is None


def test_an_estimate_counts_values_and_holds_the_base_as_it_is_stored(base: Path, tmp_path: Path) -> None:
    found = loratool.estimate(base, [2], "q_proj")
    (rank,) = found.ranks
    sizes = stored(base)
    values = sum(packed.elements for packed in PACKED.values())
    assert found.parameters == values + sum(array.size for array in PLAIN.values())
    assert rank.trainable == 2 * (64 + 32)
    assert found.quantisable == values
    adapter = 4 * rank.trainable
    assert rank.qlora.weights == sum(sizes.values()) + adapter
    assert rank.lora.weights == 2 * values + sum(sizes[name] for name in PLAIN) + adapter  # as bfloat16
    assert "nf4, blocks of 64" in str(found)
    folder, _ = save_adapter(tmp_path / "adapter", f"{ATTENTION}q_proj")
    loratool.merge(base, folder, tmp_path / "out", device="cpu")
    assert found.merged_bytes == sum(stored(tmp_path / "out").values())


def test_an_estimate_of_what_nobody_reads_is_refused(tmp_path: Path) -> None:
    tensors = {f"{ATTENTION}q_proj.codes": np.ones((4, 4, 2), np.int8), **PLAIN}
    folder = save_packed(tmp_path / "base", tensors, {"quant_method": "aqlm"})
    with pytest.raises(loratool.InputError, match="does not read"):
        loratool.estimate(folder, [2], "q_proj")


def test_a_dry_run_and_a_measurement_refuse_what_cannot_be_decoded(tmp_path: Path) -> None:
    module = f"{ATTENTION}q_proj"
    made = MATRICES["GPTQ act-order"]({f"{module}.weight": torch.ones(64, 32)})
    made.tensors[f"{module}.g_idx"][3] = 77
    folder = save_packed(tmp_path / "base", {**made.tensors, **PLAIN}, made.config)
    adapter, _ = save_adapter(tmp_path / "adapter", module)
    for command in (
        lambda: loratool.plan(folder, [adapter], tmp_path / "out"),
        lambda: loratool.inspect(adapter, base=str(folder), values=True, device="cpu"),
    ):
        with pytest.raises(loratool.InputError) as refused:
            command()
        assert f"{module}.g_idx" in str(refused.value)


def test_an_adapter_is_measured_against_decoded_weights(base: Path, tmp_path: Path) -> None:
    modules = (f"{ATTENTION}q_proj", f"{LAYER}mlp.down_proj")
    folder, deltas = save_adapter(tmp_path / "adapter", *modules)
    found = loratool.inspect(folder, base=str(base), values=True, device="cpu")
    assert found.kind == "adapter"
    assert found.against is not None
    assert found.against.parameters == sum(p.elements for p in PACKED.values()) + sum(v.size for v in PLAIN.values())
    assert found.values is not None
    measured = {each.target: each.weight for each in found.values.modules}
    assert measured.keys() == deltas.keys()
    for name, delta in deltas.items():
        told, weight = measured[name], PACKED[name].values(name).astype(np.float64)
        assert told is not None
        assert told.norm == pytest.approx(np.linalg.norm(weight), rel=1e-6)
        assert told.ratio == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight), rel=1e-6)
        applied = torch.from_numpy(weight + delta).to(torch.bfloat16).double().numpy() - weight
        assert told.gain == pytest.approx((applied * delta).sum() / (delta**2).sum(), abs=1e-3)
        assert math.isfinite(told.gain or math.nan)


def test_a_base_whose_tied_head_no_file_holds_is_measured_too(tmp_path: Path) -> None:
    """With rows of a weight that are columns on disk."""
    packed = Hqq((64, 32), "4bit_u8", 32, 0)
    plain = {name: value for name, value in PLAIN.items() if name != "lm_head.weight"}
    tensors = {**packed.tensors(f"{ATTENTION}q_proj"), **plain}
    save_packed(tmp_path / "base", tensors, {"quant_method": "hqq"}, tie_word_embeddings=True)
    folder, _ = save_adapter(tmp_path / "adapter", f"{ATTENTION}q_proj")
    found = loratool.inspect(folder, base=str(tmp_path / "base"), values=True, device="cpu")
    assert found.kind == "adapter"
    assert found.values is not None
    (module,) = found.values.modules
    assert module.weight is not None
    assert module.weight.norm == pytest.approx(np.linalg.norm(packed.values().astype(np.float64)), rel=1e-6)
