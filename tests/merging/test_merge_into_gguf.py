"""Merges into GGUF models: edited tensors are W + ΔW as llama.cpp's converter would lay it out, all others the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_models import write_adapter
from torch import Tensor

import loratool

pytest.importorskip("gguf")
import numpy as np
from gguf_models import (
    HEADS,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
    Array,
    Kind,
    as_llama_cpp,
    llama_weights,
    permuted,
    raw_of,
    read_back,
    write_llama,
)

Factors = Mapping[str, tuple[Tensor, Tensor]]
RANK = 2
WEIGHTS = llama_weights()
QUANTISED = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.IQ4_NL, Kind.MXFP4]
SUPER_BLOCKS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS]


def factors(weights: Mapping[str, Tensor], *ends: str, size: float = 0.05) -> Factors:
    """Random A and B for each weight whose name ends so."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, weight in weights.items():
        if name.endswith(tuple(f"{end}.weight" for end in ends)):
            rows, columns = weight.shape
            down = torch.randn(RANK, columns, generator=generator).half()
            found[name] = down, (torch.randn(rows, RANK, generator=generator) * size).half()
    return found


def adapter(folder: Path, made: Factors, **settings: Any) -> Path:
    modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in made})
    return write_adapter(folder, made, torch.float16, r=RANK, lora_alpha=1, target_modules=modules, **settings)


def expected(made: Factors, base: Mapping[str, Array]) -> dict[str, Array]:
    """Float64 W + ½ B A of each edited tensor, in the order of the file."""
    found = {}
    for name, (down, up) in made.items():
        stored, change = as_llama_cpp(name, (0.5 * up.double() @ down.double()).numpy())
        found[stored] = base[stored].astype(np.float64) + change
    return found


def check(base: Path, out: Path, made: Factors, dtype: str) -> None:
    """Edited tensors have the dtype, and are their exact values rounded once; all others are the same bytes."""
    before, after, values = raw_of(base), raw_of(out), read_back(out)
    assert before.keys() == after.keys()
    wanted = expected(made, read_back(base))
    assert {name for name in before if before[name] != after[name]} == wanted.keys()
    for name, exact in wanted.items():
        assert after[name][0] == dtype
        steps = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24}[dtype]
        assert np.all(np.abs(values[name] - exact) <= steps * np.abs(exact) * (1 + 2.0**-10) + 2.0**-25)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, "F16"), (Kind.F32, "F32"), *((k, "BF16") for k in QUANTISED)])
def test_queries_and_keys_take_an_update_in_the_order_of_their_rows(tmp_path: Path, kind: Any, dtype: str) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, kind)
    made = factors(WEIGHTS, "q_proj", "k_proj", "v_proj", "down_proj")
    loratool.merge(base, adapter(tmp_path / "adapter", made), tmp_path / "out")
    check(base, tmp_path / "out" / "base.gguf", made, dtype)


@pytest.mark.parametrize("kind", SUPER_BLOCKS)
def test_blocks_of_256_values_are_decoded_as_the_package_does(tmp_path: Path, kind: Any) -> None:
    weights = llama_weights(hidden=256, mlp=256)
    base = write_llama(tmp_path / "base.gguf", weights, kind)
    made = factors(weights, "q_proj", "o_proj")
    loratool.merge(base, adapter(tmp_path / "adapter", made), tmp_path / "out")
    check(base, tmp_path / "out" / "base.gguf", made, "BF16")


def test_a_merge_of_nothing_but_a_norm_keeps_every_other_byte_and_the_header(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F16)
    made = factors(WEIGHTS, "o_proj")
    loratool.merge(base, adapter(tmp_path / "adapter", made), tmp_path / "out")
    before, after = base.read_bytes(), (tmp_path / "out" / "base.gguf").read_bytes()
    assert len(before) == len(after)
    start = before.index(b"blk.0.attn_q.weight")
    assert before[:start] == after[:start]


def test_dora_on_queries_has_the_norms_of_their_own_rows(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F32)
    made = factors(WEIGHTS, "q_proj")
    folder = adapter(tmp_path / "adapter", made, use_dora=True)
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / "adapter_model.safetensors")
    magnitudes = {name: 0.5 + torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)) for name in made}
    for name, magnitude in magnitudes.items():
        stored[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = magnitude
    save_file(stored, folder / "adapter_model.safetensors")
    loratool.merge(base, folder, tmp_path / "out")
    values = read_back(tmp_path / "out" / "base.gguf")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        down, up = made[name]
        moved = WEIGHTS[name].double() + 0.5 * up.double() @ down.double()
        exact = moved * (magnitudes[name].double() / moved.norm(dim=1))[:, None]
        found = values[f"blk.{layer}.attn_q.weight"]
        assert np.allclose(found, permuted(exact.numpy(), HEADS), rtol=2e-7, atol=1e-9)


def test_weights_in_a_type_that_is_not_decoded_are_copied_and_refused_where_they_change(tmp_path: Path) -> None:
    weights = llama_weights(hidden=256, mlp=256)
    kinds = {"blk.0.ffn_down.weight": Kind.IQ2_XXS}
    base = write_llama(tmp_path / "base.gguf", weights, Kind.F16, kinds)
    made = factors(weights, "q_proj")
    loratool.merge(base, adapter(tmp_path / "adapter", made), tmp_path / "out")
    check(base, tmp_path / "out" / "base.gguf", made, "F16")
    with pytest.raises(loratool.InputError, match="packed with IQ2_XXS, which loratool does not read"):
        loratool.merge(base, adapter(tmp_path / "other", factors(weights, "down_proj")), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F16)
    raw = base.read_bytes()
    at = raw.index(b"llama.attention.head_count\x04\0\0\0") + len("llama.attention.head_count") + 4
    base.write_bytes(raw[:at] + (7).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(loratool.FitError, match="do not fit the 7 heads"):
        loratool.merge(base, adapter(tmp_path / "adapter", factors(WEIGHTS, "q_proj")), tmp_path / "out")


def test_key_heads_are_those_of_keys() -> None:
    assert KEY_HEADS != HEADS
