"""Merges into GGUF models: edited tensors are W + ΔW as llama.cpp's converter would lay it out, all others the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merged_models import write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.layouts.gguf import ARCHITECTURES

pytest.importorskip("gguf")
import gguf
from gguf import quants
from gguf_models import (
    HEADS,
    HIDDEN,
    LAYERS,
    Array,
    Kind,
    as_llama_cpp,
    llama_weights,
    permuted,
    raw_of,
    read_back,
    split,
    write_llama,
    write_tensors,
)

Factors = Mapping[str, tuple[Tensor, Tensor]]
RANK = 2
WEIGHTS = llama_weights()
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SUPER_BLOCKS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS]
BLOCKS_OF_32 = [Kind.Q8_0, Kind.Q4_1, Kind.Q5_0, Kind.IQ4_NL, Kind.MXFP4]


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


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, "F16"), (Kind.F32, "F32"), (Kind.Q4_0, "BF16")])
def test_queries_and_keys_take_an_update_in_the_order_of_their_rows(tmp_path: Path, kind: Any, dtype: str) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, kind)
    made = factors(WEIGHTS, "q_proj", "k_proj", "v_proj", "down_proj")
    loratool.merge(base, adapter(tmp_path / "adapter", made), tmp_path / "out")
    check(base, tmp_path / "out" / "base.gguf", made, dtype)


@pytest.mark.parametrize("rounding", ["compensated", "stochastic"])
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_0])
def test_edited_matrices_are_rounded_in_other_ways_too(tmp_path: Path, kind: Any, rounding: str) -> None:
    """The gain in the report is that of the files, and `verify` recognises how they were rounded."""
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, kind)
    made = factors(WEIGHTS, "q_proj", "down_proj", size=0.002)
    inputs, out = (base, adapter(tmp_path / "adapter", made)), tmp_path / "out.gguf"
    report = loratool.merge(*inputs, out, rounding=rounding, device="cpu")
    before, after = read_back(base), read_back(out)
    kept = whole = 0.0
    for name, exact in expected(made, before).items():
        change = exact - before[name]
        kept, whole = kept + ((after[name].astype(np.float64) - before[name]) * change).sum(), whole + (change**2).sum()
    assert report.gain == pytest.approx(kept / whole, abs=1e-6)
    found = loratool.verify(out, *inputs, device="cpu")
    assert (found.verdict, found.rounding) == ("proven", rounding), str(found)


def test_every_type_of_blocks_is_decoded_as_the_package_does(tmp_path: Path) -> None:
    """Each matrix is in a type of its own, so that one merge decodes them all."""
    weights = llama_weights(hidden=256, mlp=256)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    kinds = {f"blk.0.{name}.weight": kind for name, kind in zip(names, SUPER_BLOCKS, strict=False)}
    kinds |= {f"blk.1.{name}.weight": kind for name, kind in zip(names, BLOCKS_OF_32, strict=False)}
    base = write_llama(tmp_path / "base.gguf", weights, Kind.Q5_1, kinds)
    made = factors(weights, *MODULES)
    loratool.merge(base, adapter(tmp_path / "adapter", made), tmp_path / "out.gguf")
    check(base, tmp_path / "out.gguf", made, "BF16")


def test_the_header_is_the_base_s_where_no_type_changes(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F16)
    loratool.merge(base, adapter(tmp_path / "adapter", factors(WEIGHTS, "o_proj")), tmp_path / "out.gguf")
    before, after = base.read_bytes(), (tmp_path / "out.gguf").read_bytes()
    start = gguf.GGUFReader(base).data_offset
    assert (len(before), before[:start]) == (len(after), after[:start])


def test_metadata_are_the_same_bytes_where_a_type_changes(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.Q8_0)
    loratool.merge(base, adapter(tmp_path / "adapter", factors(WEIGHTS, "o_proj")), tmp_path / "out.gguf")
    before, after = base.read_bytes(), (tmp_path / "out.gguf").read_bytes()
    stop = min(before.index(name.encode()) for name in raw_of(base))  # of the list of tensors, which comes last
    assert before[:stop] == after[:stop]


def test_an_output_of_one_file_has_its_record_beside_it(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F16)
    folder, out = adapter(tmp_path / "adapter", factors(WEIGHTS, "q_proj")), tmp_path / "out.gguf"
    loratool.merge(base, folder, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base.gguf", "out.gguf", "out.gguf.loratool.json"]
    assert loratool.verify(out).exit_code == 0
    assert loratool.verify(out, base=base, adapters=folder).exit_code == 0
    with pytest.raises(loratool.UsageError, match="already exists"):
        loratool.merge(base, folder, out)
    loratool.merge(base, folder, out, weights=[2.0], overwrite=True)
    raw = bytearray(out.read_bytes())
    raw[-1] ^= 1
    out.write_bytes(raw)
    assert loratool.verify(out).exit_code == 5
    with pytest.raises(loratool.UsageError, match="was not made by loratool"):
        loratool.merge(base, folder, out, overwrite=True)
    assert out.read_bytes() == raw


def test_an_output_of_one_file_takes_a_base_of_one_file_of_its_format(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F16)
    folder = adapter(tmp_path / "adapter", factors(WEIGHTS, "q_proj"))
    with pytest.raises(loratool.UsageError, match=r"OUT must end in \.gguf"):
        loratool.merge(base, folder, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base.gguf"]


@pytest.mark.parametrize(("kind", "dtype"), [("f32", "F32"), ("f16", "F16")])
def test_the_type_of_edited_matrices_may_be_chosen(tmp_path: Path, kind: str, dtype: str) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.Q8_0)
    made = factors(WEIGHTS, "k_proj")
    folder = adapter(tmp_path / "adapter", made)
    loratool.merge(base, folder, tmp_path / "out.gguf", gguf_type=kind)
    check(base, tmp_path / "out.gguf", made, dtype)
    assert loratool.verify(tmp_path / "out.gguf", base=base, adapters=folder, gguf_type=kind).exit_code == 0


@pytest.mark.parametrize(("kind", "options"), [(Kind.F16, {"gguf_type": "q8_0"}), (Kind.Q8_0, {"requantize": True})])
def test_edited_matrices_may_be_packed_as_the_package_packs_them(
    tmp_path: Path, kind: Any, options: dict[str, Any]
) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, kind)
    made = factors(WEIGHTS, "q_proj", size=0.5)
    folder = adapter(tmp_path / "adapter", made)
    report = loratool.merge(base, folder, tmp_path / "out.gguf", **options)
    before, after, exact = raw_of(base), raw_of(tmp_path / "out.gguf"), expected(made, read_back(base))
    assert {name for name in before if before[name] != after[name]} == exact.keys()
    for name, values in exact.items():
        assert after[name] == ("Q8_0", quants.quantize(values.astype(np.float32), Kind.Q8_0).tobytes())
    unedited, merged = read_back(base), read_back(tmp_path / "out.gguf")
    lost = sum(float(np.sum((merged[name] - values) ** 2)) for name, values in exact.items())
    changed = sum(float(np.sum((values - unedited[name]) ** 2)) for name, values in exact.items())
    assert report.error_added == pytest.approx((lost / changed) ** 0.5, rel=1e-3)
    assert loratool.verify(tmp_path / "out.gguf", base=base, adapters=folder).exit_code == 0


def test_a_plan_does_not_call_plain_what_is_packed_anew(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.Q8_0)
    folder = adapter(tmp_path / "adapter", factors(WEIGHTS, "q_proj"))
    again, other, plain = (loratool.plan(base, folder, gguf_type=kind) for kind in ("q8_0", "q4_0", "f16"))
    queries = tuple(f"blk.{layer}.attn_q.weight" for layer in range(LAYERS))
    assert (again.requantized, again.plain) == (other.requantized, other.plain) == (queries, ())
    assert (plain.requantized, plain.plain) == ((), queries)
    packed = sum(kind == "Q8_0" for kind, _ in raw_of(base).values())
    for plan in (again, other, plain):
        assert f"stay as they are: {packed - LAYERS}" in str(plan)
        assert ("become plain" in str(plan)) == (plan is plain)


def test_packing_that_loses_the_update_is_refused_unless_it_is_accepted(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F16)
    folder = adapter(tmp_path / "adapter", factors(WEIGHTS, "q_proj", size=1e-3))
    with pytest.raises(loratool.FitError, match="leave out --gguf-type q4_0"):
        loratool.merge(base, folder, tmp_path / "out.gguf", gguf_type="q4_0")
    assert not (tmp_path / "out.gguf").exists()
    loratool.merge(base, folder, tmp_path / "out.gguf", gguf_type="q4_0", accept_loss=True)


def test_options_that_are_not_for_gguf_are_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F16)
    folder = adapter(tmp_path / "adapter", factors(WEIGHTS, "q_proj"))
    refused: list[dict[str, Any]] = [
        {"dtype": "float32"},
        {"shard_size": 10**9},
        {"gguf_type": "q8_0", "rounding": "stochastic"},
        {"gguf_type": "q8_0", "requantize": True},
    ]
    for options in refused:
        with pytest.raises(loratool.UsageError):
            loratool.merge(base, folder, tmp_path / "out.gguf", **options)


def test_a_split_model_stays_split(tmp_path: Path) -> None:
    whole = write_llama(tmp_path / "whole.gguf", WEIGHTS, Kind.F16)
    base = split(whole, tmp_path / "base")
    made = factors(WEIGHTS, "q_proj", "down_proj")
    loratool.merge(base, adapter(tmp_path / "adapter", made), tmp_path / "out")
    names = sorted(path.name for path in base.parent.iterdir())
    assert len(names) == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.gguf")) == names
    merged = {name: raw for part in names for name, raw in raw_of(tmp_path / "out" / part).items()}
    before, wanted = raw_of(whole), expected(made, read_back(whole))
    assert {name for name in before if before[name] != merged[name]} == wanted.keys()
    for name in names:
        stop = gguf.GGUFReader(base.parent / name).data_offset
        assert (tmp_path / "out" / name).read_bytes()[:stop] == (base.parent / name).read_bytes()[:stop]
    with pytest.raises(loratool.UsageError, match="OUT must be a folder"):
        loratool.merge(base, tmp_path / "adapter", tmp_path / "out.gguf")


def test_parts_that_are_missing_or_of_another_model_are_refused(tmp_path: Path) -> None:
    base = split(write_llama(tmp_path / "whole.gguf", WEIGHTS, Kind.F16), tmp_path / "base")
    second, third = sorted(base.parent.iterdir())[1:]
    kept = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(loratool.InputError, match="do not belong together") as refused:
        loratool.inspect(base)
    assert any("split.no is 2, but must be 1" in problem for problem in refused.value.problems)
    second.unlink()
    with pytest.raises(loratool.InputError, match="1 of its 3 parts are missing"):
        loratool.inspect(base)
    second.write_bytes(kept)
    third.unlink()
    third.symlink_to(third)
    with pytest.raises(loratool.InputError, match="leads to itself"):
        loratool.inspect(base)


def test_a_head_of_its_own_becomes_a_tensor_where_the_base_ties_it(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F16, tied=True)
    made = factors(WEIGHTS, "lm_head")
    loratool.merge(base, adapter(tmp_path / "adapter", made), tmp_path / "out.gguf")
    before, after = raw_of(base), raw_of(tmp_path / "out.gguf")
    assert after.keys() - before.keys() == {"output.weight"}
    assert all(after[name] == before[name] for name in before)
    down, up = made["lm_head.weight"]
    exact = read_back(base)["token_embd.weight"] + (0.5 * up.double() @ down.double()).numpy()
    assert np.allclose(read_back(tmp_path / "out.gguf")["output.weight"], exact, rtol=2.0**-10, atol=1e-6)


def test_architectures_without_a_head_are_those_of_the_package() -> None:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    for name, architecture in ARCHITECTURES.items():
        assert architecture.has_head == (gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[kinds[name]]), name


def test_a_head_of_its_own_is_refused_where_llama_cpp_loads_none(tmp_path: Path) -> None:
    embedding = WEIGHTS["model.embed_tokens.weight"].numpy()
    base = write_tensors(tmp_path / "base.gguf", "gemma2", {"token_embd.weight": embedding})
    with pytest.raises(loratool.FitError, match="does not load a gemma2 model with a head of its own"):
        loratool.merge(base, adapter(tmp_path / "adapter", factors(WEIGHTS, "lm_head")), tmp_path / "out.gguf")


def test_names_of_modules_are_those_that_the_package_maps() -> None:
    """Each name of transformers in the tables is one that llama.cpp's converter gives the tensor's name."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    for kind, architecture in ARCHITECTURES.items():
        names = gguf.get_tensor_name_map(kinds[kind], 1)
        pairs = {f"blk.0.{name}": f"{architecture.layers}.0.{there}" for name, there in architecture.modules.items()}
        for name, there in {**pairs, **architecture.outside}.items():
            assert names.get_name(there) in (name, None), (kind, name, there)


def test_experts_of_an_adapter_find_their_rows_of_a_stack(tmp_path: Path) -> None:
    """An adapter names each expert; the file has a stack of all of them for each part."""
    experts, mlp, hidden = 3, 32, 64
    generator = torch.Generator().manual_seed(2)
    shapes = {"gate": (experts, mlp, hidden), "up": (experts, mlp, hidden), "down": (experts, hidden, mlp)}
    stacks = {part: torch.randn(shape, generator=generator) / 8 for part, shape in shapes.items()}
    tensors = {f"blk.0.ffn_{part}_exps.weight": stack.numpy() for part, stack in stacks.items()}
    base = write_tensors(tmp_path / "base.gguf", "qwen3moe", tensors)
    made = {
        f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight": (
            torch.randn(RANK, stack.shape[2], generator=generator),
            torch.randn(stack.shape[1], RANK, generator=generator),
        )
        for expert in range(experts)
        for part, stack in stacks.items()
    }
    loratool.merge(base, write_adapter(tmp_path / "adapter", made, r=RANK, lora_alpha=1), tmp_path / "out.gguf")
    found = read_back(tmp_path / "out.gguf")
    for part, stack in stacks.items():
        for expert in range(experts):
            down, up = made[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"]
            exact = stack[expert].double() + 0.5 * up.double() @ down.double()
            assert np.allclose(found[f"blk.0.ffn_{part}_exps.weight"][expert], exact.numpy(), rtol=1e-6, atol=1e-6)


def test_dora_on_queries_has_the_norms_of_their_own_rows(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F32)
    made = factors(WEIGHTS, "q_proj")
    folder = adapter(tmp_path / "adapter", made, use_dora=True)
    stored = load_file(folder / "adapter_model.safetensors")
    magnitudes = {name: 0.5 + torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)) for name in made}
    for name, magnitude in magnitudes.items():
        stored[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = magnitude
    save_file(stored, folder / "adapter_model.safetensors")
    loratool.merge(base, folder, tmp_path / "out.gguf")
    values = read_back(tmp_path / "out.gguf")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        down, up = made[name]
        moved = WEIGHTS[name].double() + 0.5 * up.double() @ down.double()
        exact = moved * (magnitudes[name].double() / moved.norm(dim=1))[:, None]
        found = values[f"blk.{layer}.attn_q.weight"]
        assert np.allclose(found, permuted(exact.numpy(), HEADS), rtol=2e-7, atol=1e-9)


def test_weights_in_a_type_that_is_not_decoded_are_copied_and_refused_where_they_change(tmp_path: Path) -> None:
    weights = llama_weights(hidden=256, mlp=256)
    base = write_llama(tmp_path / "base.gguf", weights, Kind.F16, {"blk.0.ffn_down.weight": Kind.IQ2_XXS})
    folder = adapter(tmp_path / "adapter", factors(weights, "q_proj"))
    loratool.merge(base, folder, tmp_path / "out.gguf")
    name = "blk.0.ffn_down.weight"
    assert raw_of(tmp_path / "out.gguf")[name] == raw_of(base)[name]
    with pytest.raises(loratool.InputError, match="packed with IQ2_XXS, which loratool does not read"):
        loratool.merge(base, adapter(tmp_path / "other", factors(weights, "down_proj")), tmp_path / "none.gguf")
    assert not (tmp_path / "none.gguf").exists()


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.F16)
    raw = base.read_bytes()
    at = raw.index(b"llama.attention.head_count\x04\0\0\0") + len("llama.attention.head_count") + 4
    base.write_bytes(raw[:at] + (7).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(loratool.FitError, match="do not fit the 7 heads"):
        loratool.merge(base, adapter(tmp_path / "adapter", factors(WEIGHTS, "q_proj")), tmp_path / "out.gguf")


def test_an_architecture_that_no_table_has_is_refused_by_its_name(tmp_path: Path) -> None:
    base = write_tensors(tmp_path / "base.gguf", "rwkv7", {"token_embd.weight": np.ones((8, 32), np.float32)})
    with pytest.raises(loratool.InputError, match="architecture 'rwkv7'"):
        loratool.merge(base, adapter(tmp_path / "adapter", factors(WEIGHTS, "q_proj")), tmp_path / "out.gguf")


def test_packed_tensors_come_into_memory_decoded_or_not_at_all(tmp_path: Path) -> None:
    """torch has no dtype for blocks, so it takes `dequantize`, or `changed_only`, which leaves out what stays packed."""
    base = write_llama(tmp_path / "base.gguf", WEIGHTS, Kind.Q4_0)
    made = factors(WEIGHTS, "q_proj", "down_proj")
    trained = adapter(tmp_path / "adapter", made)
    with pytest.raises(loratool.InputError, match=r"no dtype for Q4_0; pass dequantize=True .* changed_only=True"):
        loratool.merged(base, trained)
    wanted = expected(made, values := read_back(base))
    found = loratool.merged(base, trained, dequantize=True, gguf_type="f32")
    assert found.keys() == values.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        exact = torch.from_numpy(np.asarray(wanted.get(name, values[name]), np.float64))
        assert torch.equal(tensor, exact.float())
    changed = loratool.merged(base, trained, changed_only=True)
    assert {name: tensor.dtype for name, tensor in changed.items()} == dict.fromkeys(wanted, torch.bfloat16)
