"""What is wrong with a model folder, its index or its set of shards is found before anything is written.

Rows 23 to 32 of the table of malformed inputs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from malformed import (
    BASE,
    INDEX,
    MERGED,
    MODEL,
    NORM,
    SHARDS,
    WEIGHT,
    W,
    f32,
    pickled_trap,
    safetensors_bytes,
    total_size,
    weight_map,
    write_json,
    write_sharded,
)
from workbench import Workbench, check_is_merged, each, tensors_of


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workbench:
    made = Workbench(tmp_path, capsys)
    write_sharded(made.base)
    return made


def refuses_base(bench: Workbench, *told: str) -> None:
    """Neither `merge` nor `inspect` takes the base as it is now."""
    bench.refuses_to_merge(*told)
    bench.refuses_to_inspect(bench.base, *told)


SHARD_NAMES: dict[str, object] = {
    "way up": f"../{SHARDS[0]}",
    "detour": f"x/../{SHARDS[0]}",
    "way up at the end": "..",
    "backslash": f"..\\{SHARDS[0]}",
    "backslash inside": f"x\\{SHARDS[0]}",
    "absolute": "/etc/hostname.safetensors",
    "home folder": "~/../x",
    "URL": "https://example.invalid/model.safetensors",
    "file URL": "file:///etc/hostname.safetensors",
    "NUL": f"{SHARDS[0]}\0.safetensors",
    "empty": "",
    "dot": ".",
    "leading dot": f"./{SHARDS[0]}",
    "trailing slash": f"{SHARDS[0]}/",
    "double slash": f"x//{SHARDS[0]}",
    "number": 7,
    "null": None,
    "true": True,
    "list": [SHARDS[0]],
    "object": {SHARDS[0]: 1},
    "terminal codes": "../\x1b[2J.safetensors",
    "very long": "../" + "x" * 100_000,
}


@each(SHARD_NAMES)
def test_an_index_that_names_no_plain_file_of_its_folder_is_refused(bench: Workbench, case: object) -> None:
    """Row 23. What the names lead to is sound, so that following them would work."""
    sound = (bench.base / SHARDS[0]).read_bytes()
    (bench.inputs / SHARDS[0]).write_bytes(sound)
    (bench.base / "x").mkdir()
    (bench.base / "x" / SHARDS[0]).write_bytes(sound)
    (bench.base / f"x\\{SHARDS[0]}").write_bytes(sound)
    write_json(bench.base / INDEX, {"weight_map": {**weight_map(), WEIGHT: case}})
    refuses_base(bench, INDEX, "weight_map")


def test_an_absolute_name_of_the_right_file_is_refused_all_the_same(bench: Workbench) -> None:
    """Row 23."""
    write_sharded(bench.base, {**weight_map(), WEIGHT: str(bench.base / SHARDS[0])})
    refuses_base(bench, INDEX, "leaves the folder")


def test_a_shard_in_a_folder_below_is_taken_and_stays_there(bench: Workbench) -> None:
    """Row 23 from its other side: a plain relative path."""
    (bench.base / "sub").mkdir()
    (bench.base / SHARDS[0]).rename(bench.base / "sub" / SHARDS[0])
    write_json(bench.base / INDEX, {"weight_map": {**weight_map(), WEIGHT: f"sub/{SHARDS[0]}"}})
    tensors, _ = bench.merges()
    check_is_merged(tensors)
    assert json.loads((bench.out / INDEX).read_text())["weight_map"][WEIGHT] == f"sub/{SHARDS[0]}"
    assert (bench.out / "sub" / SHARDS[0]).is_file()


@each({"itself": INDEX, "config.json": "config.json", "pickle": "pytorch_model.bin", "no suffix": "weights"})
def test_an_index_that_names_what_is_no_safetensors_file_is_refused(bench: Workbench, case: str) -> None:
    """Row 24."""
    trap = bench.inputs / "sprung"
    (bench.base / "pytorch_model.bin").write_bytes(pickled_trap(trap, 2))
    (bench.base / "weights").write_bytes((bench.base / SHARDS[0]).read_bytes())
    write_json(bench.base / INDEX, {"weight_map": {**weight_map(), WEIGHT: case}})
    refuses_base(bench, INDEX, case, "not a .safetensors file")
    assert not trap.exists()


INDEXES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "text": (b"weight_map", "not valid JSON"),
    "cut": (json.dumps({"weight_map": weight_map()}).encode()[:-2], "not valid JSON"),
    "not UTF-8": (b'{"weight_map":{"\xff":"x"}}', "UTF-8"),
    "UTF-16": (json.dumps({"weight_map": weight_map()}).encode("utf-16"), "UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps({"weight_map": weight_map()}).encode(), "JSON"),
    "nested deeply": (b'{"weight_map":' + b"[" * 100_000, "nested too deeply"),
    "list": (b"[]", "object"),
    "null": (b"null", "object"),
    "no weight_map": (b'{"metadata":{}}', "weight_map"),
    "empty weight_map": (b'{"weight_map":{}}', "weight_map"),
    "null for weight_map": (b'{"weight_map":null}', "weight_map"),
    "list for weight_map": (json.dumps({"weight_map": [WEIGHT]}).encode(), "weight_map"),
    "text for weight_map": (b'{"weight_map":"model.safetensors"}', "weight_map"),
    "weight_map twice": (
        f'{{"weight_map":{{}},"weight_map":{json.dumps(weight_map())}}}'.encode(),
        "a key is duplicated",
    ),
    "tensor twice": (
        json.dumps({"weight_map": weight_map()}).replace(f'"{NORM}"', f'"{WEIGHT}"').encode(),
        "a key is duplicated",
    ),
    "half a surrogate pair": (b'{"weight_map":{"\\ud800":"model.safetensors"}}', "surrogate"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "not valid JSON"),
    "HTML page": (b"<!DOCTYPE html><html></html>", "not valid JSON"),
}


@each(INDEXES)
def test_an_index_that_is_no_weight_map_is_refused(bench: Workbench, case: tuple[bytes, str]) -> None:
    """Row 25."""
    raw, told = case
    (bench.base / INDEX).write_bytes(raw)
    refuses_base(bench, INDEX, told)


METADATA: dict[str, object] = {
    "no metadata": {},
    "null": {"metadata": None},
    "no total_size": {"metadata": {}},
    "wrong total_size": {"metadata": {"total_size": 1}},
    "negative total_size": {"metadata": {"total_size": -1}},
    "text for total_size": {"metadata": {"total_size": str(total_size(BASE))}},
    "float for total_size": {"metadata": {"total_size": 1.5}},
    "list for metadata": {"metadata": []},
}


@each(METADATA)
def test_an_index_without_a_true_total_size_is_taken_and_gets_one(bench: Workbench, case: Mapping[str, object]) -> None:
    """Row 26. PEFT with transformers refuses the first of these."""
    write_json(bench.base / INDEX, {"weight_map": weight_map(), **case})
    tensors, _ = bench.merges()
    check_is_merged(tensors)
    written = json.loads((bench.out / INDEX).read_text())
    assert written["metadata"]["total_size"] == total_size(BASE)
    assert type(written["metadata"]["total_size"]) is int
    assert written["weight_map"] == weight_map()


def test_other_metadata_of_an_index_is_kept(bench: Workbench) -> None:
    """Row 26."""
    write_json(bench.base / INDEX, {"metadata": {"total_size": 1, "who": "me"}, "weight_map": weight_map()})
    bench.merges()
    written = json.loads((bench.out / INDEX).read_text())
    assert written["metadata"] == {"total_size": total_size(BASE), "who": "me"}


BAD_SHARDS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no such file"),
    "empty": (b"", "empty"),
    "cut": (safetensors_bytes({WEIGHT: BASE[WEIGHT]})[:-7], "bytes of tensor data are missing"),
}


@each(BAD_SHARDS)
def test_all_bad_shards_are_told_at_once(bench: Workbench, case: tuple[bytes | None, str]) -> None:
    """Row 27."""
    raw, told = case
    for name in SHARDS:
        (bench.base / name).unlink()
        if raw is not None:
            (bench.base / name).write_bytes(raw)
        refuses_base(bench, name, told)
    refuses_base(
        bench, "2 of 2 shards" if raw is not None else "found the index but not its weight files", *SHARDS, told
    )


def test_a_missing_shard_is_told_without_an_index_too(bench: Workbench) -> None:
    """Row 27: the names say how many there are."""
    (bench.base / INDEX).unlink()
    (bench.base / SHARDS[1]).unlink()
    refuses_base(bench, str(bench.base), "missing", "[2]")


def test_a_tensor_that_is_not_where_the_index_says_is_refused(bench: Workbench) -> None:
    """Row 28: nowhere, or in another shard."""
    write_sharded(bench.base, {**weight_map(), "lost.weight": SHARDS[0]})
    refuses_base(bench, INDEX, f"lost.weight: the index says it is in {SHARDS[0]}", "no shard contains it")
    write_sharded(bench.base, {**weight_map(), NORM: SHARDS[0]})
    refuses_base(bench, INDEX, f"{NORM}: the index says it is in {SHARDS[0]}", f"it is in {SHARDS[1]}")


def test_a_tensor_that_the_index_does_not_know_is_refused(bench: Workbench) -> None:
    """Row 28: in no map."""
    write_sharded(bench.base, {name: shard for name, shard in weight_map().items() if name != NORM})
    refuses_base(bench, INDEX, f"{NORM}: in {SHARDS[1]}, but not in the index")


def test_a_tensor_in_two_shards_is_refused_with_and_without_an_index(bench: Workbench) -> None:
    """Row 28: in two shards."""
    twin = {WEIGHT: f32(-W), **{name: stored for name, stored in BASE.items() if name != WEIGHT}}
    (bench.base / SHARDS[1]).write_bytes(safetensors_bytes(twin))
    refuses_base(bench, INDEX, WEIGHT, *SHARDS)
    (bench.base / INDEX).unlink()
    refuses_base(bench, WEIGHT, *SHARDS)


def test_all_disagreements_of_index_and_shards_are_told_at_once(bench: Workbench) -> None:
    """Row 28."""
    write_sharded(bench.base, {WEIGHT: SHARDS[1], "lost.weight": SHARDS[0]})
    refuses_base(bench, INDEX, WEIGHT, "lost.weight", NORM)


def test_a_stale_extra_shard_is_told_and_not_copied(bench: Workbench) -> None:
    """Row 29. The stranger is not even sound."""
    stale = "model-00003-of-00003.safetensors"
    (bench.base / stale).write_bytes(b"left over")
    tensors, report = bench.merges()
    check_is_merged(tensors)
    assert stale not in os.listdir(bench.out)
    assert any(stale in note["text"] for note in report["notes"])
    assert stale in bench.run("merge", bench.base, bench.adapter, "-o", bench.outputs / "again").out


def test_the_single_file_wins_over_an_index_and_that_is_said(bench: Workbench) -> None:
    """Row 30: as transformers chooses. The shards hold another weight, so that it shows."""
    (bench.base / MODEL).write_bytes(safetensors_bytes(BASE))
    (bench.base / SHARDS[0]).write_bytes(safetensors_bytes({WEIGHT: f32(-W)}))
    tensors, report = bench.merges()
    check_is_merged(tensors)
    assert {name for name in os.listdir(bench.out) if "safetensors" in name} == {MODEL}
    assert any(MODEL in note["text"] and INDEX in note["text"] for note in report["notes"])
    assert "used" in bench.run("inspect", bench.base).out


@each({"nothing at all": "", "a config": "config.json", "a README": "README.md"})
def test_a_folder_without_weights_is_refused(bench: Workbench, case: str) -> None:
    """Row 31."""
    for path in bench.base.iterdir():
        path.unlink()
    if case:
        (bench.base / case).write_text("{}")
    refuses_base(bench, str(bench.base), ".safetensors")


@each({"single": "pytorch_model.bin", "sharded": "pytorch_model-00001-of-00002.bin", "torch": "model.pt"})
def test_a_model_that_is_pickled_only_is_refused_with_the_way_to_convert_it(bench: Workbench, case: str) -> None:
    """Row 31. Unpickling runs whatever the file says."""
    trap = bench.inputs / "sprung"
    for path in bench.base.glob("*.safetensors*"):
        path.unlink()
    (bench.base / case).write_bytes(pickled_trap(trap, 2))
    refuses_base(bench, case, "convert")
    bench.refuses("merge", bench.base / case, bench.adapter, "-o", bench.out, told=[case, "convert"])
    assert not trap.exists()


def test_code_of_a_checkpoint_is_never_run(bench: Workbench) -> None:
    """Row 32: `auto_map`, modules beside it, and the files that Python imports by itself."""
    trap = bench.inputs / "sprung"
    code = f"import os\nos.mkdir({str(trap)!r})\n"
    config = {
        "model_type": "evil",
        "architectures": ["EvilForCausalLM"],
        "auto_map": {"AutoConfig": "evil_config.EvilConfig", "AutoModelForCausalLM": "evil_model.Evil"},
        "trust_remote_code": True,
    }
    write_json(bench.base / "config.json", config)
    for name in ("evil_config.py", "evil_model.py", "sitecustomize.py", "torch.py", "__init__.py", "conftest.py"):
        (bench.base / name).write_text(code)
        (bench.adapter / name).write_text(code)
    write_json(bench.adapter / "config.json", config)
    tensors, _ = bench.merges("--dtype", "float32")
    check_is_merged(tensors)
    assert bench.run("inspect", bench.base, bench.adapter).code in (0, 3)
    assert not trap.exists()
    assert not {"evil_config", "evil_model"} & set(sys.modules)


BASE_CONFIGS: dict[str, bytes] = {
    "empty": b"",
    "text": b"no config",
    "list": b"[]",
    "not UTF-8": b'{"model_type": "\xff"}',
    "nested deeply": b'{"a":' + b"[" * 100_000,
    "byte order mark and nothing else": b"\xef\xbb\xbf",
}


@each(BASE_CONFIGS)
def test_a_malformed_config_of_the_base_is_refused(bench: Workbench, case: bytes) -> None:
    """The config tells how weights are stored and which are tied: guessing would be silent damage."""
    (bench.base / "config.json").write_bytes(case)
    refuses_base(bench, "config.json")


ODD_CONFIGS: dict[str, object] = {
    "infinity in it": {"model_type": "llama", "time_step_limit": [0.0, float("inf")]},
    "architectures no list": {"architectures": "LlamaForCausalLM"},
    "architectures null": {"architectures": None},
    "architectures a number": {"architectures": 7},
    "architectures of numbers": {"architectures": [7, None, {"x": 1}]},
    "model_type a list": {"model_type": ["llama"]},
    "model_type an object": {"model_type": {"a": 1}},
    "model_type a number": {"model_type": 7},
    "tie_word_embeddings a text": {"tie_word_embeddings": "no"},
    "terminal codes": {"model_type": "\x1b[31m", "architectures": ["\x1b[2J\u202e"]},
    "dtype a list": {"torch_dtype": ["float32"], "dtype": {"a": None}},
}


@each(ODD_CONFIGS)
def test_a_config_of_the_base_with_fields_of_odd_types_is_no_crash(
    bench: Workbench, case: Mapping[str, object]
) -> None:
    """Either the field does not matter for a merge, or the message names it; never a bug report."""
    write_json(bench.base / "config.json", case)
    for words in (
        ("inspect", bench.base),
        ("merge", bench.base, bench.adapter, "-o", bench.outputs / "a"),
        ("merge", bench.base, bench.adapter, "-o", bench.outputs / "b", "--dtype", "bfloat16"),
    ):
        outcome = bench.run(*words)
        assert outcome.code in (0, 3), outcome
        assert "\x1b" not in outcome.out + outcome.err
        assert "\u202e" not in outcome.out + outcome.err
    for out in bench.outputs.iterdir():
        assert np.allclose(tensors_of(out)[WEIGHT], MERGED, rtol=0.004)
