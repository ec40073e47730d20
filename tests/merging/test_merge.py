"""What a merge writes: bytes, names, places; beside the weights; and when it is to write nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    Exact,
    assert_exact_merge,
    assert_single_rounding,
    exact_merge,
    files_of,
    header,
    header_bytes,
    nearest,
    needs_dtypes,
    picture,
    raw_tensors,
    read_tensors,
    same_bits,
    sha256,
    steps,
    unchanged,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tree_digests import entry_of, file_entry, root_of
from working_plans import working_plan

import loratool
from loratool.cli import run
from loratool.merging.resources import estimated_memory

QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
Entry = tuple[str, str, tuple[int, ...], bytes]  # name, dtype, shape, data


def randn(*shape: int, seed: int = 0, scale: float = 0.05) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def write_raw(path: Path, entries: Sequence[Entry], table: str) -> None:
    """A safetensors file whose header is `table`, in which each tensor's name stands for its entry."""
    at = 0
    for name, dtype, shape, data in entries:
        entry = f'{{"data_offsets": [{at}, {at + len(data)}], "dtype":"{dtype}","shape":{json.dumps(shape)}}}'
        table = table.replace(f'"{name}"', f'"{name}" : {entry}')
        at += len(data)
    text = table.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in entries))


def write_adapter(
    folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], alpha: float = 4.0, **config: Any
) -> Path:
    """An adapter as PEFT saves it: module → (A, B). The rank of the config is that of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    rank = next(iter(factors.values()))[0].shape[0]
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(rows: int, columns: int, rank: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A and B of a (rows, columns) weight."""
    return randn(rank, columns, seed=seed, scale=0.3), randn(rows, rank, seed=seed + 100, scale=0.1)


def write_model(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Three shards of one layer, with an index that no program would write in just this way."""
    folder.mkdir()
    shards = [
        {"model.embed_tokens.weight": randn(40, 24, seed=1), f"{QUERY}.weight": randn(24, 24, seed=2)},
        {f"{DOWN}.weight": randn(24, 32, seed=3), "model.norm.weight": 1 + randn(24, seed=4)},
        {"lm_head.weight": randn(40, 24, seed=5)},
    ]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-00003.safetensors"
        save_file({k: v.to(dtype) for k, v in shard.items()}, folder / name, {"format": "pt", "shard": str(number)})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.numel() * dtype.itemsize for shard in shards for tensor in shard.values())
    index = {"weight_map": weight_map, "metadata": {"total_size": total, "note": "naïve"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=7, ensure_ascii=False) + "\n\n")
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": str(dtype).removeprefix("torch."), **config}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", {QUERY: factors(24, 24), DOWN: factors(24, 32, seed=2)})


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    words = [sys.executable, "-m", "loratool", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_an_adapter_that_is_given_twice_is_merged_twice_and_said(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the update is rarely meant; the same bytes as with the weight 2."""
    assert run(["merge", str(base), str(adapter), str(adapter), "-o", str(tmp_path / "twice")]) == 0
    assert "adapter: given 2 times, so its update is added 2 times" in capsys.readouterr().out
    assert run(["merge", str(base), str(adapter), "-w", "2", "-o", str(tmp_path / "double")]) == 0
    assert "given 2 times" not in capsys.readouterr().out
    weights = {name for name in files_of(base) if name.endswith(".safetensors")}
    for name in weights:
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "double" / name).read_bytes()


# -- the bytes of the weights ------------------------------------------------------------------------

# name, dtype, shape, data: one tensor to edit among one of every dtype that no float arithmetic knows
ODD: list[Entry] = [
    ("scales", "F8_E8M0", (5,), bytes(range(120, 125))),
    ("flags", "BOOL", (3,), b"\x01\x00\x01"),
    ("packed", "F4", (2, 3, 2), b"\x12\x34\x56\x78\x9a\xbc"),
    (f"{QUERY}.weight", "F32", (16, 8), randn(16, 8).numpy().tobytes()),
    ("nothing", "F32", (0, 7), b""),
    ("codes", "I8", (2, 2), b"\x80\xff\x00\x7f"),
    ("fp8", "F8_E4M3", (2, 4), bytes.fromhex("7f ff 00 80 38 b8 01 7e")),
    ("fp8.e5m2", "F8_E5M2", (1,), b"\x7c"),
    ("step", "I64", (), struct.pack("<q", -3)),
    ("counts", "U16", (2,), struct.pack("<2H", 65535, 1)),
    ("phases", "C64", (1,), struct.pack("<2f", math.nan, -0.0)),
    ("größe", "F64", (1,), struct.pack("<d", 1e-310)),
    ("half", "F16", (2,), b"\x01\x7c\xff\xff"),  # NaNs with a payload
    ("six", "F6_E2M3", (4,), b"\xab\xcd\xef"),
]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A file whose header is in another order than its data, spaced by hand, with metadata in the middle."""
    table = (
        '{"six",\n  "step",   "' + f'{QUERY}.weight", "flags","phases", '
        '"__metadata__": {"format": "pt", "\\u00e4": "\\"quoted\\" \\u2713", "empty": ""},'
        '"packed", "nothing","codes","fp8","fp8.e5m2" ,"scales","counts","größe","half"}     '
    )
    write_raw(tmp_path / "odd.safetensors", ODD, table)
    needs_dtypes(*{dtype for _, dtype, *_ in ODD})
    with safe_open(tmp_path / "odd.safetensors", "np") as file:
        assert set(file.keys()) == {name for name, *_ in ODD}, "the safetensors package takes the file for sound"
    return tmp_path / "odd.safetensors"


def test_the_header_is_the_bases_and_tensors_of_every_dtype_pass_through_untouched(odd: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {QUERY: factors(16, 8)})
    report = loratool.merge(odd, [adapter], tmp_path / "out")
    merged = tmp_path / "out" / "odd.safetensors"
    assert header_bytes(merged) == header_bytes(odd)
    assert merged.stat().st_size == odd.stat().st_size
    before, after = raw_tensors(odd), raw_tensors(merged)
    assert {name for name in before if before[name] != after[name]} == {f"{QUERY}.weight"}
    assert (report.edited, report.copied, report.converted) == (1, len(ODD) - 1, 0)


def test_changing_the_dtype_converts_floats_and_leaves_every_other_dtype_as_it_is(odd: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {QUERY: factors(16, 8)})
    loratool.merge(odd, [adapter], tmp_path / "out", dtype="bfloat16")
    merged = tmp_path / "out" / "odd.safetensors"
    table, before = header(merged), header(odd)
    floats = {f"{QUERY}.weight", "nothing", "größe", "half"}
    for name, entry in table.items():
        if name in floats:
            assert (entry["dtype"], entry["shape"]) == ("BF16", before[name]["shape"])
        elif name != "__metadata__":
            assert (entry["dtype"], entry["shape"]) == (before[name]["dtype"], before[name]["shape"])
            assert raw_tensors(merged)[name] == raw_tensors(odd)[name]
    assert table["__metadata__"] == before["__metadata__"]
    found = load_file_of_floats(merged, floats)
    assert bool(found["half"].isnan().all())
    assert float(found["größe"]) == 0.0


def load_file_of_floats(path: Path, names: set[str]) -> dict[str, Tensor]:
    """Some bfloat16 tensors of a file that holds dtypes torch has no name for."""
    raw, table = raw_tensors(path), header(path)
    return {
        n: torch.tensor(list(raw[n]), dtype=torch.uint8).view(torch.bfloat16).reshape(table[n]["shape"]) for n in names
    }


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x8B1F])
def test_a_header_length_that_looks_like_another_format_is_no_other_format(tmp_path: Path, length: int) -> None:
    """80 02 … 80 05 begin a pickle and 1f 8b a gzip file, and each a safetensors file of some header length."""
    tensors: list[Entry] = [(f"{QUERY}.weight", "F32", (8, 8), randn(8, 8).numpy().tobytes())]
    path = tmp_path / "model.safetensors"
    write_raw(path, tensors, f'{{"{QUERY}.weight"}}')
    padding = " " * (length + 8 - len(header_bytes(path)))
    write_raw(path, tensors, f'{{"{QUERY}.weight"}}{padding}')
    assert path.read_bytes()[:8] == struct.pack("<Q", length)
    assert set(load_file(path)) == {f"{QUERY}.weight"}, "the safetensors package reads it"
    adapter = write_adapter(tmp_path / "adapter", {QUERY: factors(8, 8)})
    loratool.merge(path, [adapter], tmp_path / "out")
    assert header_bytes(tmp_path / "out" / path.name) == header_bytes(path)


def test_shards_index_order_and_metadata_are_the_bases(base: Path, adapter: Path, tmp_path: Path) -> None:
    loratool.merge(base, [adapter], tmp_path / "out")
    before, after = files_of(base), files_of(tmp_path / "out")
    assert set(after) == set(before) | {"README.md", "loratool.json"}
    for name in before:
        if name.endswith(".safetensors"):
            assert header_bytes(tmp_path / "out" / name) == header_bytes(base / name)
        else:
            assert after[name] == before[name]
    tensors = read_tensors(base)
    assert_exact_merge(tmp_path / "out", tensors, exact_merge(tensors, (adapter, 1.0)))


def test_inputs_are_left_as_they_were(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = picture(base), picture(adapter)
    loratool.merge(base, [adapter], tmp_path / "out")
    assert (picture(base), picture(adapter)) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_where_a_weight_and_its_update_cancel_what_is_left_is_nearest_too(tmp_path: Path, dtype: torch.dtype) -> None:
    down, up = factors(200, 300, rank=4)
    change = 4.0 / 4 * up.double() @ down.double()
    tensors = {f"{QUERY}.weight": (-change).to(dtype)}  # a merge leaves the rounding error of this
    save_file(tensors, tmp_path / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", {QUERY: (down, up)})
    loratool.merge(tmp_path / "model.safetensors", [adapter], tmp_path / "out")
    exact = exact_merge(tensors, (adapter, 1.0))[f"{QUERY}.weight"]
    off = steps(read_tensors(tmp_path / "out")[f"{QUERY}.weight"], nearest(exact.value, dtype))
    assert int(off.max()) <= 1
    assert int((off > 0).sum()) <= off.numel() / 1000


SHAPES = [(1, 700_001), (700_001, 1), (3, 300_000), (2049, 513), (1, 1), (5, 4, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "×".join(map(str, shape)))
def test_weights_of_any_shape_are_merged_across_the_borders_of_blocks(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rows, columns = shape[0], math.prod(shape[1:])
    tensors = {f"{QUERY}.weight": randn(rows, columns), "model.norm.weight": randn(*shape[1:])}
    save_file(tensors, tmp_path / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", {QUERY: factors(rows, columns, rank=3)})
    loratool.merge(tmp_path / "model.safetensors", [adapter], tmp_path / "out")
    assert_exact_merge(tmp_path / "out", tensors, exact_merge(tensors, (adapter, 1.0)))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of some megabytes in two files, so that there is work for several workers; and its adapter."""
    home = tmp_path_factory.mktemp("wide")
    (home / "base").mkdir()
    for number, names in enumerate((("a", "b"), ("c",)), 1):
        tensors = {f"{n}.weight": randn(1536, 1024, seed=ord(n)).bfloat16() for n in names}
        save_file(tensors, home / "base" / f"model-{number:05d}-of-00002.safetensors")
    write_adapter(home / "adapter", {n: factors(1536, 1024, rank=8, seed=ord(n)) for n in "abc"})
    return home / "base", home / "adapter"


def test_the_number_of_workers_does_not_change_a_byte(wide: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = wide
    for workers in (1, 2, 5):
        report = loratool.merge(base, [adapter], tmp_path / str(workers), workers=workers)
        assert report.workers == workers
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2") == files_of(tmp_path / "5")


def least_told(message: str) -> int:
    """The smallest memory limit that a refusal says would do."""
    match = re.search(r"at least (\d+) MB", message)
    assert match, message
    return int(match[1]) * 1_000_000


def test_neither_the_memory_limit_nor_the_block_size_changes_a_byte(wide: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = wide
    loratool.merge(base, [adapter], tmp_path / "free")
    with pytest.raises(loratool.UsageError) as caught:
        loratool.merge(base, [adapter], tmp_path / "tight", max_memory=1)
    loratool.merge(base, [adapter], tmp_path / "tight", max_memory=least_told(str(caught.value)) + 5_000_000)
    assert raw_tensors(tmp_path / "free") == raw_tensors(tmp_path / "tight")


def test_progress_counts_up_to_the_end_and_never_back(wide: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = wide
    seen: list[tuple[int, int]] = []
    loratool.merge(base, [adapter], tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    total = sum(len(data) for data in raw_tensors(base).values())
    assert {t for _, t in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


# -- other shards, other dtypes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama that transformers saved in four shards, and an adapter for it."""
    import transformers

    home = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype="float32",
    )
    transformers.LlamaForCausalLM(config).save_pretrained(home / "base", max_shard_size="20kB")
    modules = {f"model.layers.{n}.mlp.down_proj": factors(32, 48, seed=n) for n in range(2)}
    write_adapter(home / "adapter", modules)
    return home / "base", home / "adapter"


def logits(folder: Path) -> Tensor:
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        result: Tensor = model(torch.arange(1, 9).unsqueeze(0)).logits
    return result


@pytest.mark.parametrize("limit", [1, 5_000, 12_000, 40_000, 10**9])
def test_other_shard_sizes_hold_the_same_tensors(llama: tuple[Path, Path], tmp_path: Path, limit: int) -> None:
    base, adapter = llama
    loratool.merge(base, [adapter], tmp_path / "as-it-is")
    loratool.merge(base, [adapter], tmp_path / "out", shard_size=limit)
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "as-it-is")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    for shard in shards:
        sizes = [len(data) for data in raw_tensors(shard).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
        assert header(shard)["__metadata__"] == {"format": "pt"}
    index = tmp_path / "out" / "model.safetensors.index.json"
    if len(shards) == 1:
        assert shards[0].name == "model.safetensors"
        assert not index.exists()
    else:
        count = len(shards)
        assert [s.name for s in shards] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        table = json.loads(index.read_text())
        assert table["weight_map"] == {name: shard.name for shard in shards for name in raw_tensors(shard)}
        assert table["metadata"]["total_size"] == sum(map(len, raw_tensors(tmp_path / "out").values()))
    # the same weights, but at other places of memory, which decides how some processors add
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "as-it-is"), rtol=1e-5, atol=1e-6)


def test_shard_sizes_may_carry_a_unit(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    assert run(["merge", str(base), str(adapter), "-o", str(tmp_path / "a"), "-q", "--shard-size", "12kB"]) == 0
    loratool.merge(base, [adapter], tmp_path / "b", shard_size=12_000)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_new_dtype_is_the_formula_rounded_once_to_it(
    adapter: Path, tmp_path: Path, dtype: str, stored: torch.dtype
) -> None:
    base = write_model(tmp_path / "model", stored)
    report = loratool.merge(base, [adapter], tmp_path / "out", dtype=dtype)
    wanted: torch.dtype = getattr(torch, dtype)
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    exact = exact_merge(before, (adapter, 1.0))
    assert list(after) == list(before)
    for name, found in after.items():
        assert found.dtype == wanted
        if name in exact:
            assert_single_rounding(found, exact[name], name)
        else:
            assert same_bits(found, nearest(before[name].double(), wanted)), name
    assert (report.edited, report.converted) == (2, 0 if stored == wanted else 3)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in after.values()), "note": "naïve"}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert header(shard)["__metadata__"] == header(base / shard.name)["__metadata__"]


def test_the_config_tells_the_new_dtype_wherever_it_told_the_old_and_nothing_else_changes(
    adapter: Path, tmp_path: Path
) -> None:
    config: dict[str, Any] = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "hidden_size": 24, "deep": {"torch_dtype": "float32"}},
        "quantization_note": {"dtypes": ["float32"]},
        "rope_theta": 10000.0,
        "eps": 1e-06,
        "name": "naïve",
    }
    base = write_model(tmp_path / "model", **config)
    loratool.merge(base, [adapter], tmp_path / "out", dtype="bfloat16")
    wanted = json.loads((base / "config.json").read_text().replace('ype": "float32"', 'ype": "bfloat16"'))
    found = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(found) == wanted
    assert list(json.loads(found)) == list(wanted)
    assert '"rope_theta": 10000.0' in found


def test_the_config_is_byte_identical_where_the_dtype_is_its_own_already(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    loratool.merge(base, [adapter], tmp_path / "out", dtype="float32")
    before, after = files_of(base), files_of(tmp_path / "out")
    for name in ("config.json", "model.safetensors.index.json"):
        assert after[name] == before[name]
    for shard in base.glob("*.safetensors"):
        assert header_bytes(tmp_path / "out" / shard.name) == header_bytes(shard)


def test_transformers_takes_the_new_dtype_from_the_config(llama: tuple[Path, Path], tmp_path: Path) -> None:
    import transformers

    base, adapter = llama
    loratool.merge(base, [adapter], tmp_path / "out", dtype="bfloat16", shard_size=10**9)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_saved_module_is_rounded_to_the_bases_dtype(tmp_path: Path) -> None:
    base = write_model(tmp_path / "model", torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", {QUERY: factors(24, 24)}, modules_to_save=["lm_head"])
    path = adapter / "adapter_model.safetensors"
    head = randn(40, 24, seed=9)
    save_file({**load_file(path), "base_model.model.lm_head.weight": head}, path)
    for number, weight in enumerate((1.0, 0.5)):  # a replacement is no matter of strength
        report = loratool.merge(base, [adapter], tmp_path / f"out{number}", weights=[weight])
        found = read_tensors(tmp_path / f"out{number}")["lm_head.weight"]
        assert same_bits(found, head.bfloat16())
    assert any("regardless of the weight" in note for note in map(str, report.notes))


def test_two_adapters_that_replace_one_module_do_not_both_win(base: Path, tmp_path: Path) -> None:
    adapters = []
    for number in range(2):
        adapter = write_adapter(tmp_path / f"adapter{number}", {QUERY: factors(24, 24)}, modules_to_save=["lm_head"])
        path = adapter / "adapter_model.safetensors"
        save_file({**load_file(path), "base_model.model.lm_head.weight": randn(40, 24, seed=number)}, path)
        adapters.append(adapter)
    with pytest.raises(loratool.FitError, match=r"lm_head\.weight.*adapter0, adapter1"):
        loratool.merge(base, adapters, tmp_path / "out")


# -- single files and shards without an index --------------------------------------------------------


def test_a_single_file_gives_a_folder_with_that_file(adapter: Path, tmp_path: Path) -> None:
    tensors = read_tensors(write_model(tmp_path / "model"))
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "my-model.safetensors"
    save_file(tensors, path)
    (tmp_path / "files" / "config.json").write_text("{}")
    loratool.merge(path, [adapter], tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == ["README.md", "loratool.json", "my-model.safetensors"]
    assert header_bytes(tmp_path / "out" / path.name) == header_bytes(path)
    assert_exact_merge(tmp_path / "out", tensors, exact_merge(tensors, (adapter, 1.0)))


def test_shards_without_an_index_merge_and_get_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    loratool.merge(base, [adapter], tmp_path / "with")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    (base / "model.safetensors.index.json").unlink()
    report = loratool.merge(base, [adapter], tmp_path / "without")
    assert any("no index" in note for note in map(str, report.notes))
    with_index, without = files_of(tmp_path / "with"), files_of(tmp_path / "without")
    for name in with_index:
        if name.endswith(".safetensors"):
            assert without[name] == with_index[name]
    made = json.loads(without["model.safetensors.index.json"])
    assert made["weight_map"] == index["weight_map"]
    assert made["metadata"]["total_size"] == index["metadata"]["total_size"]


def test_a_missing_shard_is_told_whether_or_not_there_is_an_index(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(loratool.InputError, match="model-00002-of-00003"):
        loratool.merge(base, [adapter], tmp_path / "out")
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(loratool.InputError, match=r"\[2\].*missing"):
        loratool.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- the files beside the weights --------------------------------------------------------------------

CARRIED = {
    "LICENSE": "Apache",
    "NOTICE.txt": "who made it",
    "README.md": "# base",
    "generation_config.json": '{"do_sample": true}',
    "modeling_custom.py": "class Custom: ...",
    "chat_template.jinja": "{{ base }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"eos_token": "base"}',
    "1_Pooling/config.json": "{}",
    "assets/logo.png": "\x89PNG",
}
TWINS = {
    "original/consolidated.00.pth": "pickle",
    "original/params.json": "{}",
    "onnx/model.onnx": "graph",
    "consolidated.safetensors": "",
    "pytorch_model.bin": "pickle",
    "pytorch_model.bin.index.json": "{}",
    "model-Q4_K_M.gguf": "GGUF",
    "tf_model.h5": "hdf",
    "flax_model.msgpack": "msgpack",
    "optimizer.pt": "state",
    "trainer_state.json": "{}",
    "checkpoint-100/model.safetensors": "old",
}
HIDDEN = {".gitattributes": "lfs", ".git/config": "[core]", ".cache/huggingface/download.lock": ""}


def scatter(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_what_belongs_to_the_model_is_carried_over_and_what_the_merge_makes_stale_is_not(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    before = set(files_of(base))
    for files in (CARRIED, TWINS, HIDDEN):
        scatter(base, files)
    report = loratool.merge(base, [adapter], tmp_path / "out")
    found = files_of(tmp_path / "out")
    assert set(found) == before | set(CARRIED) | {"loratool.json"}
    for name in CARRIED:
        assert found[name] == (base / name).read_bytes()
    told = " ".join(report.left_out)
    for name in TWINS:
        folder = name.partition("/")[0] if "/" in name else name
        assert folder in told, f"{name} is left out and not told"
    assert "LICENSE" not in told


def test_a_module_in_a_subfolder_keeps_its_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "2_Dense").mkdir()
    save_file({"linear.weight": randn(4, 4)}, base / "2_Dense" / "model.safetensors")
    loratool.merge(base, [adapter], tmp_path / "out")
    name = "2_Dense/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_the_adapters_tokenizer_and_chat_template_win(base: Path, adapter: Path, tmp_path: Path) -> None:
    scatter(base, CARRIED)
    own = {
        "tokenizer.json": '{"own": 1}',
        "tokenizer_config.json": '{"eos_token": "own"}',
        "chat_template.jinja": "{{ own }}",
        "additional_chat_templates/rag.jinja": "{{ own }}",
        "added_tokens.json": "{}",
    }
    others = {"README.md": "# adapter", "training_args.bin": "pickle", "config.json": '{"own": 1}', "LICENSE": "MIT"}
    scatter(adapter, {**own, **others})
    report = loratool.merge(base, [adapter], tmp_path / "out")
    found = files_of(tmp_path / "out")
    for name, text in own.items():
        assert found[name].decode() == text
    for name in ("README.md", "config.json", "LICENSE"):
        assert found[name] == (base / name).read_bytes()
    assert "training_args.bin" not in found
    assert "adapter_config.json" not in found
    assert any("tokenizer.json" in note and "replace" in note for note in map(str, report.notes))


def test_a_chat_template_inside_the_adapters_tokenizer_config_is_not_hidden_by_the_bases_file(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    scatter(base, CARRIED)
    scatter(adapter, {"tokenizer_config.json": '{"chat_template": "{{ own }}"}'})
    report = loratool.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert any("chat_template.jinja" in name for name in report.left_out)


# -- provenance --------------------------------------------------------------------------------------


def test_provenance_names_every_input_and_output_with_its_digest(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", {QUERY: factors(24, 24, seed=7)})
    report = loratool.merge(base, [adapter, other], tmp_path / "out", weights=[1.0, -0.25])
    table = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert [(a["name"], a["weight"]) for a in table["adapters"]] == [("adapter", 1.0), ("other", -0.25)]
    for entry, folder in zip(table["adapters"], (adapter, other), strict=True):
        names = ("adapter_model.safetensors", "adapter_config.json")
        assert entry["sha256"] == {name: sha256(folder / name) for name in names}
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    written = [p for p in (tmp_path / "out").iterdir() if p.name != "loratool.json"]
    assert table["files"] == {p.name: file_entry(p.name, p.read_bytes()) for p in written}
    assert report.digests == {s.name: root_of(s.read_bytes()) for s in shards}
    assert table["base"] == {
        "name": "base",
        "files": {
            **{p.name: file_entry(p.name, p.read_bytes()) for p in base.glob("*.json")},
            **{
                s.name: {key: entry_of(s.read_bytes())[key] for key in ("size", "function", "header")}
                for s in base.glob("*.safetensors")
            },
        },
    }
    assert table["versions"]["loratool"] == loratool.__version__
    assert table["tensors"] == {"edited": 2, "copied": 3, "all": 5}
    assert str(tmp_path) not in json.dumps(table), "where the files lay is nobody's business"


def test_the_same_merge_anywhere_gives_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    loratool.merge(base, [adapter], tmp_path / "out", weights=[0.3])
    (tmp_path / "elsewhere").mkdir()
    for folder in (base, adapter):
        shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    second = tmp_path / "elsewhere" / "result"
    loratool.merge(tmp_path / "elsewhere" / "base", [tmp_path / "elsewhere" / "adapter"], second, weights=[0.3])
    assert files_of(second) == files_of(tmp_path / "out")


def test_an_earlier_merges_provenance_is_not_carried_over(base: Path, adapter: Path, tmp_path: Path) -> None:
    loratool.merge(base, [adapter], tmp_path / "first")
    loratool.merge(tmp_path / "first", [adapter], tmp_path / "second", weights=[-1.0])
    table = json.loads((tmp_path / "second" / "loratool.json").read_text())
    assert table["base"]["name"] == "first"
    assert table["adapters"][0]["weight"] == -1.0


# -- the command line --------------------------------------------------------------------------------


def test_the_command_line_and_the_library_write_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    scatter(base, CARRIED)
    options: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        (["-w", "-0.5"], {"weights": [-0.5]}),
        (["--dtype", "float16", "--shard-size", "3kB"], {"dtype": "float16", "shard_size": 3000}),
        (["--workers", "1", "--device", "cpu"], {"workers": 1, "device": "cpu"}),
    ]
    for number, (words, keywords) in enumerate(options):
        by_hand, by_call = tmp_path / f"cli{number}", tmp_path / f"library{number}"
        assert run(["merge", str(base), str(adapter), "-o", str(by_hand), "-q", *words]) == 0
        loratool.merge(base, [adapter], by_call, **keywords)
        assert files_of(by_hand) == files_of(by_call)


def test_a_dry_run_touches_nothing_and_tells_the_plan_and_imports_no_torch_where_nothing_is_rounded(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    before = picture(tmp_path)
    code = (
        "import sys; from loratool.cli import run; code = run(sys.argv[1:]); "
        "sys.exit(code or 100 * ('torch' in sys.modules) + 50 * ('numpy' in sys.modules))"
    )
    words = ["merge", base, adapter, "-o", tmp_path / "out", "--dry-run", "--json", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert picture(tmp_path) == before
    table = json.loads(done.stdout)
    assert sorted(edit["tensor"] for edit in table["edits"]) == [f"{DOWN}.weight", f"{QUERY}.weight"]
    loratool.merge(base, [adapter], tmp_path / "out", dtype="float32")
    weights = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert table["files"] == weights
    assert sorted([*table["side_files"], *weights, "README.md", "loratool.json"]) == sorted(files_of(tmp_path / "out"))


def test_a_dry_run_fails_where_the_merge_would(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "misfit", {QUERY: factors(24, 25)})
    before = picture(tmp_path)
    for words in ([], ["--dry-run"]):
        assert run(["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), *words]) == 4
    assert picture(tmp_path) == before


def test_files_and_folders_have_the_rights_that_the_umask_leaves(base: Path, adapter: Path, tmp_path: Path) -> None:
    scatter(base, CARRIED)
    for path in base.rglob("*"):
        if path.is_file():
            path.chmod(0o400)
    before = os.umask(0)
    try:
        for mask in (0o022, 0o027, 0o002):
            os.umask(mask)
            out = tmp_path / f"out{mask:o}"
            loratool.merge(base, [adapter], out)
            for path in [out, *out.rglob("*")]:
                wanted = (0o777 if path.is_dir() else 0o666) & ~mask
                assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    finally:
        os.umask(before)


# -- memory ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A weight of 268 MB, which a sparse file holds in no space; and its adapter."""
    home = tmp_path_factory.mktemp("huge")
    rows, columns = 32_768, 2_048
    write_raw(home / "model.safetensors", [("wide.weight", "F32", (0, columns), b"")], '{"wide.weight"}')
    text = (home / "model.safetensors").read_bytes()[8:].decode()
    size = rows * columns * 4
    text = text.replace("[0, 0]", f"[0, {size}]").replace(f"[0, {columns}]", f"[{rows}, {columns}]")
    with (home / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text.encode())
        file.truncate(8 + len(text) + size)
    write_adapter(home / "adapter", {"wide": factors(rows, columns)})
    yield home / "model.safetensors", home / "adapter"
    shutil.rmtree(home)


@cache
def bare_memory() -> int:
    """The largest resident set of a process that imports torch and does nothing, in bytes."""
    code = "import resource, torch; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_a_memory_limit_below_one_weights_size_is_kept(huge: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = huge
    limit = 200_000_000
    done = command("merge", base, adapter, "-o", tmp_path / "out", "--max-memory", "200MB", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cost"]["peak_memory"] <= limit
    rows = slice(30_000, 30_100)
    with torch.inference_mode():
        tensors = load_file(adapter / "adapter_model.safetensors")
        down, up = (tensors[f"base_model.model.wide.lora_{f}.weight"].double() for f in "AB")
    found = raw_rows(tmp_path / "out" / base.name, rows, 2_048)
    change, terms = 2 * up[rows] @ down, 2 * up[rows].abs() @ down.abs()
    assert_single_rounding(found, Exact(change, terms))
    shutil.rmtree(tmp_path / "out")


def raw_rows(path: Path, rows: slice, columns: int) -> Tensor:
    """Some rows of the only tensor of a float32 file."""
    with path.open("rb") as file:
        file.seek(len(header_bytes(path)) + rows.start * columns * 4)
        raw = bytearray(file.read((rows.stop - rows.start) * columns * 4))
    return torch.frombuffer(raw, dtype=torch.float32).reshape(-1, columns)


def test_rows_that_an_adapter_leaves_alone_cost_no_memory(tmp_path: Path) -> None:
    """An embedding's unseen or padding tokens: W is zero there, and so is ΔW."""
    weight, (down, up) = randn(4096, 1024), factors(4096, 1024, rank=64)
    weight[256:], up[256:] = 0, 0
    save_file({"wide.weight": weight.bfloat16()}, tmp_path / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", {"wide": (down, up)})
    words = ("merge", tmp_path / "model.safetensors", adapter, "-o", tmp_path / "out", "--device", "cpu", "--json")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table["cost"]["peak_memory"] <= bare_memory() + 200_000_000
    assert table["cost"]["seconds"] - table["cost"]["startup_seconds"] < 5


# -- numbers that are none ---------------------------------------------------------------------------


def test_a_result_beyond_float16_is_an_error_that_names_the_tensor(tmp_path: Path, unwritten: Path) -> None:
    base = write_model(tmp_path / "model", torch.float16)
    down, up = factors(24, 32)
    adapter = write_adapter(tmp_path / "adapter", {DOWN: (down, up * 1e7), QUERY: factors(24, 24)})
    with pytest.raises(loratool.FitError, match=rf"{DOWN}\.weight.*F16"):
        loratool.merge(base, [adapter], unwritten)
    loratool.merge(base, [adapter], tmp_path / "out", dtype="bfloat16")


def test_a_dtype_too_narrow_for_the_bases_own_values_is_an_error_too(
    base: Path, adapter: Path, tmp_path: Path, unwritten: Path
) -> None:
    shard = base / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"][3, 4] = 70_000
    save_file(tensors, shard)
    with pytest.raises(loratool.FitError, match=r"lm_head\.weight.*F16"):
        loratool.merge(base, [adapter], unwritten, dtype="float16")


def test_the_largest_numbers_that_still_fit_are_no_overflow(tmp_path: Path) -> None:
    tensors = {f"{QUERY}.weight": torch.full((4, 4), 65504.0).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    down, up = torch.ones(1, 4), torch.tensor([[15.0], [-15.0], [0.0], [-65504.0]])
    adapter = write_adapter(tmp_path / "adapter", {QUERY: (down, up)}, alpha=1.0)
    loratool.merge(tmp_path / "model.safetensors", [adapter], tmp_path / "out")
    found = read_tensors(tmp_path / "out")[f"{QUERY}.weight"][:, 0]
    assert found.tolist() == [65504.0, 65504.0, 65504.0, 0.0]
    adapter = write_adapter(tmp_path / "more", {QUERY: (down, up + torch.tensor([[2.0], [0], [0], [0]]))}, alpha=1.0)
    with pytest.raises(loratool.FitError, match="exceed"):
        loratool.merge(tmp_path / "model.safetensors", [adapter], tmp_path / "not")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_broken_tensor_of_an_adapter_is_named(
    base: Path, tmp_path: Path, unwritten: Path, value: float, dtype: torch.dtype
) -> None:
    broken, sound = factors(24, 24), factors(24, 32)
    broken[1][17, 1] = value
    sound[0][0, 0] = value
    pairs = {QUERY: (broken[0].to(dtype), broken[1].to(dtype)), DOWN: (sound[0].to(dtype), sound[1].to(dtype))}
    adapter = write_adapter(tmp_path / "adapter", pairs)
    with pytest.raises(loratool.InputError) as caught:
        loratool.merge(base, [adapter], unwritten)
    assert f"{QUERY}.lora_B.weight" in str(caught.value)
    assert f"{DOWN}.lora_A.weight" in str(caught.value)
    assert f"{QUERY}.lora_A.weight" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_bases_own_nan_and_inf_stay_and_are_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = randn(24, 24).to(dtype)
    weight[0, 0], weight[5, 6], weight[23, 23] = math.nan, math.inf, -math.inf
    elsewhere = torch.full((3,), math.nan, dtype=dtype)
    save_file({f"{QUERY}.weight": weight, "other.weight": elsewhere}, tmp_path / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", {QUERY: factors(24, 24)})
    report = loratool.merge(tmp_path / "model.safetensors", [adapter], tmp_path / "out")
    assert report.nonfinite == {f"{QUERY}.weight": 3}
    found = read_tensors(tmp_path / "out")
    assert same_bits(found["other.weight"], elsewhere)
    merged = found[f"{QUERY}.weight"]
    sound = weight.isfinite()
    assert torch.equal(merged.isfinite(), sound)
    assert (merged[5, 6].item(), merged[23, 23].item()) == (math.inf, -math.inf)
    exact = exact_merge({f"{QUERY}.weight": weight}, (adapter, 1.0))[f"{QUERY}.weight"]
    assert_single_rounding(merged[sound], Exact(exact.value[sound], exact.terms[sound]))


# -- when there is nothing to write ------------------------------------------------------------------


def test_an_adapter_tensor_without_a_place_is_an_error_before_a_byte_is_written(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unwritten: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    sound = load_file(path)
    module = "base_model.model.model.layers.7.self_attn.q_proj"
    strays: list[tuple[dict[str, Tensor], str]] = [
        (dict(zip([f"{module}.lora_A.weight", f"{module}.lora_B.weight"], factors(24, 24), strict=True)), "layers.7"),
        ({"base_model.model.model.layers.0.mlp.extra.weight": randn(2, 2)}, "mlp.extra"),
        ({f"base_model.model.{QUERY}.lora_C.weight": randn(2, 2)}, "lora_C"),
    ]
    touched = unwritten.parent.stat().st_mtime_ns
    for extra, name in strays:
        save_file({**sound, **extra}, path)
        assert run(["merge", str(base), str(adapter), "-o", str(unwritten)]) == 4
        assert name in capsys.readouterr().err
        assert unwritten.parent.stat().st_mtime_ns == touched


def test_all_misfits_are_told_at_once(base: Path, tmp_path: Path, unwritten: Path) -> None:
    pairs = {QUERY: factors(24, 25), DOWN: factors(9, 32), "model.layers.3.mlp.down_proj": factors(24, 32)}
    adapter = write_adapter(tmp_path / "adapter", pairs)
    with pytest.raises(loratool.FitError) as caught:
        loratool.merge(base, [adapter], unwritten)
    told = str(caught.value)
    for part in (f"{QUERY}.weight", "[24, 25]", f"{DOWN}.weight", "[9, 32]", "layers.3.mlp.down_proj.weight"):
        assert part in told


def test_a_merge_that_would_change_nothing_is_an_error(
    base: Path, adapter: Path, tmp_path: Path, unwritten: Path
) -> None:
    down, up = factors(24, 24)
    untrained = write_adapter(tmp_path / "untrained", {QUERY: (down, torch.zeros_like(up))})
    tiny = write_adapter(tmp_path / "tiny", {QUERY: (down, up * 1e-12)})
    for path, weights in ((untrained, [1.0]), (adapter, [0.0]), (tiny, [1.0])):
        with pytest.raises(loratool.FitError, match="zero"):
            loratool.merge(base, [path], unwritten, weights=weights)


def test_an_adapter_of_weight_zero_beside_another_leaves_no_trace(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", {"lm_head": factors(40, 24)})
    loratool.merge(base, [adapter], tmp_path / "alone")
    loratool.merge(base, [adapter, other], tmp_path / "both", weights=[1.0, 0.0])
    assert raw_tensors(tmp_path / "both") == raw_tensors(tmp_path / "alone")


def test_merging_and_unmerging_returns_to_the_base_within_one_rounding(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    loratool.merge(base, [adapter], tmp_path / "there", weights=[0.8])
    loratool.merge(tmp_path / "there", [adapter], tmp_path / "back", weights=[-0.8])
    before = read_tensors(base)
    exact = exact_merge(before, (adapter, 0.8))
    for name, found in read_tensors(tmp_path / "back").items():
        terms = exact[name].terms if name in exact else unchanged(before[name]).terms
        error = (found.double() - before[name].double()).abs() / terms.clamp_min(1e-300)
        assert float(error.max()) <= 4 * torch.finfo(torch.float32).eps


def test_the_factors_of_all_experts_are_counted_once_however_many_rows_they_have(tmp_path: Path) -> None:
    """As they are read and as they are used: twice the bytes of A and B, whatever the number of workers."""
    base = tmp_path / "base"
    base.mkdir()
    name = "model.layers.0.mlp.experts"
    save_file({f"{name}.gate_up_proj": randn(8, 48, 32, seed=1)}, base / "model.safetensors", {"format": "pt"})
    expected = []
    for rank in (2, 6):
        a, b = randn(8 * rank, 32, seed=2), randn(48, rank * 8, seed=3)
        adapter = write_adapter(
            tmp_path / str(rank),
            {name: (a, b)},
            target_parameters=["mlp.experts.gate_up_proj"],
            r=rank,
            peft_version="0.21.2",
        )
        spans = working_plan(base, adapter).spans
        expected.append([estimated_memory(spans, "cpu", workers, None) for workers in (1, 4)])
    grown = 2 * 4 * (8 * 4 * 32 + 48 * 4 * 8)
    assert [after - before for before, after in zip(*expected, strict=True)] == [grown, grown]
