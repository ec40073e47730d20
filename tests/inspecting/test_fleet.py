"""A folder of adapters as a table: who is in it, what is wrong, conditions, order, duplicates and neighbours."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed import write_adapter
from paths import ROOT
from peft_files import edit_config
from safetensors.numpy import load_file, save_file

import loratool
from loratool import cli
from loratool.errors import InputError, UsageError
from loratool.results.fleet import LISTED, FleetFacts, FleetRow

MODULES = {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 12)}
DESCRIBED: dict[str, Any] = json.loads((ROOT / "docs" / "schemas" / "inspect.schema.json").read_text("utf-8"))


def write_peft(folder: Path, rank: int, seed: int, base: str = "org/llama-8b", **config: Any) -> Path:
    """An adapter of PEFT's on two layers."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(2):
        for name, (out, into) in MODULES.items():
            start = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{start}.lora_A.weight"] = generator.standard_normal((rank, into)).astype(np.float32)
            tensors[f"{start}.lora_B.weight"] = generator.standard_normal((out, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    table = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps({**table, **config}))
    return folder


def write_kohya(path: Path, rank: int, alpha: float, seed: int, **metadata: str) -> Path:
    """An adapter in one file, its α in tensors."""
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = "lora_unet_down_blocks_1_attentions_0_proj_in"
    save_file(
        {
            f"{start}.lora_down.weight": generator.standard_normal((rank, 640)).astype(np.float16),
            f"{start}.lora_up.weight": generator.standard_normal((640, rank)).astype(np.float16),
            f"{start}.alpha": np.array(alpha, dtype=np.float32),
        },
        path,
        metadata={"ss_network_module": "networks.lora", **metadata},
    )
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 adapters of three bases in two dialects, two of them broken; a model, and other files."""
    folder = tmp_path_factory.mktemp("zoo")
    for number in range(30):
        base = ("org/llama-8b", "org/llama-70b", "org/qwen")[number % 3]
        write_peft(folder / "text" / f"a{number:02d}", (2, 4)[number % 2], number, base)
    for number in range(6):
        write_kohya(folder / "images" / f"k{number}.safetensors", 2, 1.0 + number, number, ss_session_id=str(number))
    tensors = load_file(folder / "text/a00/adapter_model.safetensors")
    twin = write_peft(folder / "text" / "twin", 2, 0)
    halved = {name: value / 4 if ".lora_A." in name else value * 2 for name, value in tensors.items()}
    save_file(dict(reversed(halved.items())), twin / "adapter_model.safetensors")
    edit_config(twin, lora_alpha=8)
    bad = write_peft(folder / "text" / "bad", 2, 50)
    (bad / "adapter_model.safetensors").write_bytes((bad / "adapter_model.safetensors").read_bytes()[:-3])
    (folder / "images" / "torn.safetensors").write_bytes(struct.pack("<Q", 500) + b"{")
    write_peft(folder / "text" / "nan", 2, 51)
    tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"][0, 0] = np.nan
    save_file(tensors, folder / "text" / "nan" / "adapter_model.safetensors")
    (folder / "model").mkdir()
    save_file({"model.embed_tokens.weight": np.ones((4, 2))}, folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    write_peft(folder / ".cache" / "hidden", 2, 52)
    (folder / "notes.txt").write_text("nothing")
    return folder


def fleet(*paths: Path | str, **options: Any) -> FleetFacts:
    found = loratool.inspect(paths[0] if len(paths) == 1 else list(paths), **options)
    assert isinstance(found, FleetFacts)
    return found


def names(found: FleetFacts) -> list[str]:
    return [row.name for row in found.adapters]


def row(found: FleetFacts, name: str) -> FleetRow:
    return next(each for each in found.adapters if each.name == name)


def test_every_adapter_of_a_folder_is_a_row_and_models_are_left_out(zoo: Path) -> None:
    found = fleet(zoo)
    expected = [f"images/k{n}.safetensors" for n in range(6)] + ["images/torn.safetensors"]
    expected += [f"text/a{n:02d}" for n in range(30)] + ["text/bad", "text/nan", "text/twin"]
    assert names(found) == expected
    assert found.left_out == ("model",)
    assert found.exit_code == 3
    one = row(found, "text/a04")
    assert (one.dialect, one.base, one.rank, one.alpha, one.scale) == (("peft",), "org/llama-70b", (2,), (4.0,), (2.0,))
    assert (one.targets, one.modules, one.parameters) == (("down_proj", "q_proj"), 4, 2 * 2 * (16 + 20))
    assert one.bytes == (zoo / "text/a04/adapter_model.safetensors").stat().st_size
    assert one.health == "ok"
    assert (one.norm, one.sketch, one.same_as) == (None, None, None)


def test_rows_of_adapters_that_are_alike_are_those_that_each_alone_has(zoo: Path) -> None:
    """Headers that were seen before are not read again; values that α depends on are."""
    found = fleet(zoo)
    assert [row(found, f"images/k{n}.safetensors").alpha for n in range(6)] == [(1.0 + n,) for n in range(6)]
    for each in found.adapters:
        if not each.exit_code:
            alone = loratool.inspect(each.path)
            assert isinstance(alone, loratool.AdapterFacts)
            assert (each.base, each.parameters, each.bytes, len(alone.modules)) == (
                *(alone.base, alone.parameters, alone.bytes),
                each.modules,
            )
            assert {str(r) for r in each.rank} == set(alone.ranks)
            assert {f"{s:.6g}" for s in each.scale} == set(alone.scalings)


def test_one_that_cannot_be_read_is_a_row_with_its_reason(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect", str(zoo)]) == 3
    shown = capsys.readouterr()
    assert "images/torn.safetensors: the file is truncated inside its header" in shown.out
    assert "text/a29" in shown.out
    assert shown.out.splitlines()[-2].endswith(", 2 unreadable")
    assert shown.err == (
        "Error: 2 of 40 adapters failed (2 unreadable); the reasons are below the table\n"
        f"hint: loratool inspect {zoo / 'images' / 'torn.safetensors'} --check\n"
    )
    for words in (["inspect", str(zoo), "-q"], ["index", str(zoo), "-o", str(tmp_path / "index"), "-q"]):
        assert cli.run(words) == 3
        assert "\n  images/torn.safetensors: the file is truncated inside its header" in capsys.readouterr().err
    found = fleet(zoo)
    assert {each.name: each.health for each in found.adapters if each.exit_code} == {
        "images/torn.safetensors": "unreadable",
        "text/bad": "unreadable",
    }


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("rank>2 and base=org/qwen", lambda r: 4 in r.rank and r.base == "org/qwen"),
        ("base~LLAMA and base!~70b", lambda r: r.base == "org/llama-8b"),
        ("alpha>=5 and dialect=kohya", lambda r: r.dialect == ("kohya",) and r.alpha[0] >= 5),
        ("health!=ok", lambda r: r.health != "ok"),
        ("targets=down_proj AND bytes<2kB", lambda r: "down_proj" in r.targets and r.bytes < 2000),
        ('name = "text/a07"', lambda r: r.name == "text/a07"),
        ("rank!=2 and rank!=4", lambda r: not r.rank),
        ("date>=2001-02 and date<2999", lambda _: True),
        ("date>=2024-02-29T12 and date!=2024-02-29T12:00Z", lambda _: True),
        ("model=''", lambda r: not r.model),
        ('model!="" and base=""', lambda r: bool(r.model) and not r.base),
        ("parameters>1k", lambda r: r.parameters > 1000),
        ("parameters>0.001M", lambda r: r.parameters > 1000),
        ("alpha<=-0.5 and scale>-1e3", lambda r: bool(r.alpha) and r.alpha[0] <= -0.5),
    ],
)
def test_conditions_choose_rows(condition: str, expected: Any, zoo: Path) -> None:
    every = fleet(zoo)
    found = fleet(zoo, where=condition)
    assert names(found) == [each.name for each in every.adapters if expected(each)]
    assert found.filtered == len(every.adapters) - len(found.adapters)


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ("", "is not understood at its end: expected a field, a comparison and a value"),
        ("rank", "is not understood at 'rank'"),
        ("rank>2 or rank<1", "at 'or rank<1': conditions are joined by `and`"),
        ("rank>2 and", "is not understood at its end"),
        ("rnak>2", "unknown field 'rnak'; did you mean 'rank'? The fields are name, path, dialect"),
        ("owner=me", "unknown field 'owner'. The fields are name, path, dialect"),
        ("rank>many", "--where rank>many: rank is a whole number, such as 16; compare it with <, <=, =, !=, >= or >"),
        ("rank~2", "rank is a whole number, such as 16; compare it with"),
        ("rank=2.5", "rank is a whole number, such as 16"),
        ("rank>-1", "rank is a whole number, such as 16"),
        ("modules=2GB", "modules is a whole number, such as 224"),
        ("parameters=1e-3", "parameters is a whole number, such as 50000 or 1.5M"),
        ("bytes>1.5", "bytes is a size, such as 500kB or 100MB"),
        ("bytes>5XB", "bytes is a size, such as 500kB or 100MB"),
        ("alpha=nan", "alpha is a number, such as 16 or 0.5"),
        ("scale>=1GB", "scale is a number, such as 2 or 0.5"),
        ("base>a", "base is text; compare it with =, !=, ~ (contains) or !~"),
        ("date>yesterday", "write a date like 2026"),
        (
            "date>2026-13",
            "--where date>2026-13: write a date like 2026, 2026-03, 2026-03-31 or 2026-03-31T12:00, in UTC",
        ),
        ("date=2026-02-29", "write a date like 2026"),
        ("date<2026-03-31T24:00", "write a date like 2026"),
        ("date<2026-03-31T12:0", "write a date like 2026"),
        ("date<26-03-31", "write a date like 2026"),
        ("date~2026", "compare it with <, <=, =, !=, >= or >"),
        ("norm>1", "norm is known only with --values"),
        ("__import__('os').system('true')", "is not understood at"),
        ("rank>2; rank<9", "rank is a whole number"),
    ],
)
def test_what_is_not_a_condition_is_refused_with_the_place(condition: str, sentence: str, zoo: Path) -> None:
    with pytest.raises(UsageError) as caught:
        loratool.inspect(zoo, where=condition)
    assert sentence in str(caught.value)


def test_sorting_puts_the_largest_first_and_what_is_missing_last(zoo: Path) -> None:
    found = fleet(zoo, sort="-rank,name")
    ranks = [max(each.rank, default=0) for each in found.adapters]
    assert ranks == sorted(ranks, reverse=True)
    fours = [each.name for each in found.adapters if 4 in each.rank]
    assert fours == sorted(fours)
    assert names(found)[-2:] == ["images/torn.safetensors", "text/bad"]
    with pytest.raises(UsageError, match="--sort: unknown field 'nmae'; did you mean 'name'"):
        loratool.inspect(zoo, sort="nmae")


def test_the_same_update_in_other_clothes_is_found_with_values(zoo: Path) -> None:
    found = fleet(zoo, values=True)
    same = {each.name: each.same_as for each in found.adapters if each.same_as}
    assert same == {"text/a00": ("text/twin",), "text/twin": ("text/a00",)}
    assert "same update: text/a00 = text/twin" in str(found)
    tensors = load_file(zoo / "text/a05/adapter_model.safetensors")
    ups = {name: value for name, value in tensors.items() if ".lora_B." in name}
    deltas = [2.0 * up.astype(float) @ tensors[name.replace("_B.", "_A.")] for name, up in ups.items()]
    assert row(found, "text/a05").norm == pytest.approx(np.sqrt(sum((d**2).sum() for d in deltas)), rel=1e-6)
    nan = row(found, "text/nan")
    assert (nan.health, nan.exit_code, nan.sketch) == ("not-finite", 3, None)


@pytest.mark.filterwarnings("error")
def test_an_update_beyond_float32_has_no_sketch_and_disturbs_no_other_row(tmp_path: Path) -> None:
    """Its factors are numbers, and ‖ΔW‖ is one in float64; distances to it would be infinite, or no numbers."""
    write_adapter(tmp_path / "plain")
    tensors = load_file(shutil.copytree(tmp_path / "plain", tmp_path / "huge") / "adapter_model.safetensors")
    huge = {name: np.full_like(value, 3e38) if ".lora_B." in name else value for name, value in tensors.items()}
    save_file(huge, tmp_path / "huge" / "adapter_model.safetensors")
    found = fleet(tmp_path, values=True)
    told = {each.name: (each.health, each.reason, each.sketch is None) for each in found.adapters}
    assert told == {
        "plain": ("ok", "", False),
        "huge": ("not-finite", "factors times their scaling overflow", True),
    }


def test_json_is_one_object_as_the_schema_says(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert cli.run(["inspect", str(zoo / "text"), "--values", "--check", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(DESCRIBED).validate(told)
    assert len(told["results"][0]["adapters"]) == 33
    assert told["results"][0]["adapters"][0]["findings"] is not None


def test_csv_is_read_by_the_csv_module(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(zoo), "--csv", "--where", "health=ok"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert tuple(rows[0]) == LISTED
    assert len(rows) == 38
    assert rows[-1]["targets"] == "down_proj;q_proj"
    assert rows[0]["dialect"] == "kohya"


def test_json_lines_are_in_the_order_read_with_twins_of_before(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(zoo), "--jsonl", "--values"]) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["name"] for each in rows] == names(fleet(zoo))
    assert {each["name"]: each["same_as"] for each in rows if each["same_as"]} == {"text/twin": ["text/a00"]}
    assert cli.run(["inspect", str(zoo), "--jsonl", "--sort", "name"]) == 2
    assert "--sort and --jsonl are mutually exclusive" in capsys.readouterr().err
    assert cli.run(["inspect", str(zoo), "--jsonl", "--csv"]) == 2


def test_patterns_lists_and_many_paths_are_tables_too(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo)
    assert names(fleet("text/a0[1-3]")) == ["text/a01", "text/a02", "text/a03"]
    assert len(fleet("**/k*.safetensors").adapters) == 6
    with pytest.raises(InputError, match="no file or folder matches this pattern"):
        loratool.inspect("text/z*")
    listing = tmp_path / "list.txt"
    listing.write_text("# mine\ntext/a01\n\n  images/k2.safetensors\nnowhere/at/all\n")
    assert cli.run(["inspect", "--from-file", str(listing), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)["results"][0]["adapters"]
    assert [(each["name"], each["health"]) for each in told] == [
        *(("text/a01", "ok"), ("images/k2.safetensors", "ok"), ("nowhere/at/all", "unreadable")),
    ]
    four = [f"text/a0{n}" for n in range(4)]
    assert cli.run(["inspect", *four]) == 0
    assert "4 adapters, " in capsys.readouterr().out
    assert cli.run(["inspect", *four[:3]]) == 0
    assert capsys.readouterr().out.count("adapter     text/a0") == 3
    assert cli.run(["inspect", *four, "--json"]) == 0
    assert [each["kind"] for each in json.loads(capsys.readouterr().out)["results"]] == ["adapter"] * 4


def test_pages_next_to_adapters_are_no_broken_ones(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern, or a shell, matches them as well as the adapters that they were made of."""
    for name in ("a01", "a02"):
        shutil.copytree(zoo / "text" / name, tmp_path / name)
    assert cli.run(["inspect", str(tmp_path), "--html", str(tmp_path / "fleet.html"), "-q"]) == 0
    monkeypatch.chdir(tmp_path)
    found = fleet("*")
    assert names(found) == ["a01", "a02"]
    assert found.left_out == ("fleet.html",)


def test_one_of_two_paths_that_is_bad_does_not_hide_the_other(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    paths = [str(zoo / "text/bad"), str(zoo / "text/a01")]
    assert cli.run(["inspect", *paths]) == 3
    shown = capsys.readouterr()
    assert "Error: " in shown.err
    assert shown.out.startswith("adapter")
    assert cli.run(["inspect", *paths, "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(DESCRIBED).validate(told)
    assert [each["kind"] for each in told["results"]] == ["unreadable", "adapter"]


def test_a_folder_that_is_an_adapter_or_a_model_is_no_table(zoo: Path, tmp_path: Path) -> None:
    assert loratool.inspect(zoo / "text/a01").kind == "adapter"
    assert loratool.inspect(zoo / "model").kind == "checkpoint"
    run = write_peft(tmp_path / "run", 2, 0)
    write_peft(run / "checkpoint-5", 2, 1)
    assert loratool.inspect(run).kind == "adapter"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        loratool.inspect(tmp_path / "empty")
    write_peft(tmp_path / "runs" / "one" / "checkpoint-5", 2, 1)
    os.symlink(tmp_path / "runs", tmp_path / "runs" / "one" / "loop")
    assert names(fleet(tmp_path / "runs")) == ["one/checkpoint-5"]


def test_the_nearest_of_an_index_are_those_of_dense_distances(zoo: Path, tmp_path: Path) -> None:
    index = tmp_path / "fleet.index"
    report = loratool.index(zoo / "text", index)
    assert len(report.adapters) == 31
    assert set(report.failed) == {"bad", "nan"}
    assert report.exit_code == 3
    found = loratool.inspect(zoo / "text/a00", near=index, top=3)
    assert isinstance(found, loratool.AdapterFacts)
    assert found.near is not None
    assert [(n.name, n.same) for n in found.near[:2]] == [("a00", "same update"), ("twin", "same update")]
    third = found.near[2]
    assert third.same == ""
    assert third.distance == pytest.approx(dense_distance(zoo / "text/a00", zoo / "text" / third.name), rel=0.25)
    stored = load_file(index)["sketches"]
    assert stored.shape == (31, 1024)
    assert stored.dtype == np.float32
    every = fleet(zoo / "text", near=index, top=1, where="health=ok")
    assert all(each.near and each.near[0].name in (each.name, "a00", "twin") for each in every.adapters)


def dense_distance(*folders: Path) -> float:
    found: list[dict[str, Any]] = []
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        ups = {name: value for name, value in tensors.items() if ".lora_B." in name}
        found.append({n: 2.0 * up.astype(float) @ tensors[n.replace("_B.", "_A.")] for n, up in ups.items()})
    return float(np.sqrt(sum(((found[0][n] - found[1][n]) ** 2).sum() for n in found[0])))


def test_an_index_replaces_nothing_but_an_index(zoo: Path, tmp_path: Path) -> None:
    """That may be one of another release, which no longer can be read."""
    other = write_peft(tmp_path / "adapter", 2, 0) / "adapter_model.safetensors"
    before = other.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="was not made by loratool, so it is never replaced"):
            loratool.index(zoo / "text/a00", other, overwrite=overwrite)
    assert other.read_bytes() == before
    with pytest.raises(InputError, match="not an index of adapters; `loratool index DIR -o INDEX` makes one"):
        loratool.inspect(zoo / "text/a00", near=other)
    loratool.index(zoo / "text/a00", tmp_path / "one.index")
    with pytest.raises(UsageError, match="already exists; pass --overwrite"):
        loratool.index(zoo / "text/a01", tmp_path / "one.index")
    loratool.index(zoo / "text/a01", tmp_path / "one.index", overwrite=True)
    old = {"sketches": np.zeros((0, 1024), np.float32)}
    save_file(old, tmp_path / "old.index", {"loratool-index": "loratool-sketch-0"})
    loratool.index(zoo / "text/a01", tmp_path / "old.index", overwrite=True)
    with pytest.raises(UsageError, match="does not exist"):
        loratool.index(zoo / "text/a01", tmp_path / "nowhere" / "one.index")


@pytest.mark.parametrize("adapters", ["[", "{}", "[1]", '[{"name": "a"}]', "[]"])
def test_a_malformed_index_is_refused(adapters: str, zoo: Path, tmp_path: Path) -> None:
    metadata = {"loratool-index": "loratool-sketch-1", "adapters": adapters}
    save_file({"sketches": np.zeros((1, 1024), np.float32)}, tmp_path / "odd", metadata=metadata)
    with pytest.raises(InputError, match="malformed index"):
        loratool.inspect(zoo / "text/a00", near=tmp_path / "odd")
    save_file({"sketches": np.zeros((0, 1024), np.float32)}, tmp_path / "new", {"loratool-index": "loratool-sketch-9"})
    with pytest.raises(InputError, match="make the index again"):
        loratool.inspect(zoo / "text/a00", near=tmp_path / "new")


def test_a_base_that_does_not_fit_is_told_in_the_row(zoo: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    weights = {f"model.layers.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in MODULES.items()}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    found = fleet(zoo / "text/a01", base=base, where="rank>1")
    assert [(each.health, each.exit_code) for each in found.adapters] == [("does-not-fit", 4)]


def test_options_of_one_adapter_are_refused_for_a_table_and_the_other_way_round(zoo: Path) -> None:
    with pytest.raises(UsageError, match="--tensors: for one adapter at a time"):
        loratool.inspect(zoo, tensors=True)
    found = fleet(zoo / "text/a01", where="rank>99")
    assert (found.adapters, found.filtered) == ((), 1)


@pytest.mark.parametrize("content", [b"text", b"PK\x03\x04 and more"])
def test_a_file_that_is_not_an_index_is_refused_with_the_command_that_makes_one(
    zoo: Path, tmp_path: Path, content: bytes
) -> None:
    """Whatever it is, it is told that an index is made by a command."""
    (tmp_path / "it").write_bytes(content)
    with pytest.raises(loratool.InputError, match="`loratool index DIR -o INDEX` makes"):
        loratool.inspect(zoo / "text" / "a00", near=tmp_path / "it")
    with pytest.raises(loratool.InputError, match=r"no such file or folder$"):
        loratool.inspect(zoo / "text" / "a00", near=tmp_path / "nowhere")
