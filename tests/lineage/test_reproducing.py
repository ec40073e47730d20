"""`loratool reproduce` does what a record says again, from inputs with the digests of the record and no others."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import gguf_bytes
import numpy as np
import pytest
from malformed import f32, safetensors_bytes, write_adapter, write_base, write_json
from safetensors.numpy import load_file

import loratool
from loratool import cli
from loratool.errors import escaped


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter and a tuned model, and an output of each command."""
    home = tmp_path_factory.mktemp("runs")
    write_base(home / "base")
    write_adapter(home / "adapter")
    write_adapter(home / "other", lora_alpha=2)
    loratool.merge(home / "base", home / "adapter", home / "merge", weights=0.5, digests="full", device="cpu")
    loratool.merge(home / "base", home / "adapter", home / "quick", device="cpu")
    loratool.rescale(home / "adapter", home / "rescale", scale=0.5, match={"q_proj": 2})
    loratool.resize(home / "adapter", home / "resize", rank=1, device="cpu")
    loratool.combine([home / "adapter", home / "other"], home / "combine", weights=[1, -2], device="cpu")
    loratool.convert(home / "adapter", home / "convert", to="mlx")
    loratool.extract(home / "base", home / "merge", home / "extract", rank=2, device="cpu")
    loratool.compress([home / "adapter", home / "other"], home / "compress", rank=2)
    loratool.expand(home / "compress", "other", home / "expand")
    loratool.merge(home / "base", home / "other", home / "sibling", weights=0.1, device="cpu")
    loratool.rebase(home / "adapter", home / "rebase", base=home / "base", onto=home / "sibling", force=True)
    loratool.convert(home / "adapter", home / "with base", to="mlx", base=home / "base")
    return home


EVERY = ("merge", "rescale", "resize", "combine", "convert", "extract", "compress", "expand", "rebase")


@pytest.mark.parametrize("name", [*EVERY, "quick", "with base"])
def test_every_command_is_repeated_from_inputs_next_to_its_output(name: str, home: Path, tmp_path: Path) -> None:
    found = loratool.reproduce(home / name, tmp_path / "again")
    assert (found.passes, found.differences) == (True, ())
    assert content(tmp_path / "again") == content(home / name)
    weak = [note.code for note in found.notes]
    assert weak == (["input-known-by-header"] if name in ("quick", "with base") else [])


def test_a_file_that_stands_alone_is_repeated_by_what_its_header_says(tmp_path: Path) -> None:
    """Of adapters without a config, whose record is in the file itself."""
    numbers = np.random.default_rng(0)
    kinds = gguf_bytes.words("general.architecture", "llama"), gguf_bytes.number("llama.attention.head_count", 4)
    for name in ("base", "tuned"):
        tensors = {"blk.0.attn_q.weight": numbers.normal(size=(8, 8)), "output_norm.weight": np.ones(8)}
        (tmp_path / f"{name}.gguf").write_bytes(gguf_bytes.whole_file(kinds, tensors))
    loratool.extract(tmp_path / "base.gguf", tmp_path / "tuned.gguf", tmp_path / "one.gguf", rank=2, device="cpu")
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    for name in ("this", "that"):
        shapes = {"lora_down": (4, 640), "lora_up": (640, 4)}
        factors = {f"{module}.{side}.weight": f32(numbers.normal(size=shape)) for side, shape in shapes.items()}
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes(factors))
    loratool.compress([tmp_path / "this.safetensors", tmp_path / "that.safetensors"], tmp_path / "fleet", rank=4)
    loratool.expand(tmp_path / "fleet", "that", tmp_path / "two.safetensors")
    (tmp_path / "again").mkdir()
    for name in ("one.gguf", "two.safetensors"):
        assert loratool.reproduce(tmp_path / name, tmp_path / "again" / name).passes
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_merge_in_parts_is_repeated_by_one_process(home: Path, tmp_path: Path) -> None:
    """Its record has the fingerprint that its workers compared, and their device; the output is the same without."""
    loratool.merge_part(home / "base", home / "adapter", tmp_path / "parts", part="1/1", device="cpu")
    loratool.finish_merge(home / "base", home / "adapter", tmp_path / "parts")
    record = tmp_path / "parts" / "loratool.json"  # as another machine would have written it
    record.write_text(
        record.read_text(encoding="utf-8").replace('"device": "cpu"', '"device": "cuda:7"'), encoding="utf-8"
    )
    found = loratool.reproduce(tmp_path / "parts", tmp_path / "again", folders=[home])
    assert (found.passes, found.differences) == (True, ())


def test_inputs_are_found_by_their_digests_under_other_names_and_the_bytes_are_the_same(
    home: Path, tmp_path: Path
) -> None:
    """The record names the inputs, so they get their old names for the run."""
    shutil.copytree(home / "base", tmp_path / "store" / "models" / "renamed")
    (tmp_path / "store" / "loras").mkdir()
    shutil.copy(home / "adapter" / "adapter_model.safetensors", tmp_path / "store" / "loras" / "style.safetensors")
    shutil.copy(home / "adapter" / "adapter_config.json", tmp_path / "store" / "loras" / "style.json")
    shutil.copytree(home / "merge", tmp_path / "made")
    with pytest.raises(loratool.InputError, match="not found"):
        loratool.reproduce(tmp_path / "made", tmp_path / "again")
    found = loratool.reproduce(tmp_path / "made", tmp_path / "again", folders=tmp_path / "store")
    assert found.passes
    assert [each.how.rpartition(", ")[2] for each in found.inputs] == ["under another name"] * 2
    assert content(tmp_path / "again") == content(home / "merge")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["two\nlines", "a\tb \u200b"])
def test_inputs_are_found_whatever_their_names(name: str, home: Path, tmp_path: Path) -> None:
    """The record has names as they are: operands, and models and files that options name. The command line is shown."""
    base, adapter, mlx = (tmp_path / f"{what} {name}" for what in ("base", "adapter", "mlx"))
    shutil.copytree(home / "base", base)
    shutil.copytree(home / "adapter", adapter)
    extra = adapter / f"extra {name}.safetensors"
    extra.write_bytes(safetensors_bytes({"new.weight": f32(np.arange(3.0))}))
    out = tmp_path / f"out {name}"
    loratool.merge(base, adapter, out, also_load=extra, allow_new_tensors=True, device="cpu")
    loratool.convert(adapter, mlx, to="mlx", base=base)
    for made in (out, mlx):
        assert loratool.reproduce(made, tmp_path / f"again {made.name}").passes
        table = json.loads((made / "loratool.json").read_bytes())
        assert f"./{adapter.name}" in table["operands"]
        assert escaped(table["command"]) == table["command"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_an_input_whose_name_is_no_unicode_is_found_by_its_digests(home: Path, tmp_path: Path) -> None:
    """JSON cannot hold such a name, so it is escaped in the record."""
    adapter = tmp_path / os.fsdecode(b"no \xff unicode")
    shutil.copytree(home / "adapter", adapter)
    loratool.rescale(adapter, tmp_path / "out", scale=2)
    assert json.loads((tmp_path / "out" / "loratool.json").read_bytes())["operands"] == ["./no \\udcff unicode"]
    assert loratool.reproduce(tmp_path / "out", tmp_path / "again", folders=[tmp_path]).passes


CHANGED = {
    "merge": ["base/model.safetensors", "base/config.json", "adapter/adapter_model.safetensors"],
    "rebase": ["base/model.safetensors", "sibling/model.safetensors"],
    "with base": ["base/config.json"],
    "expand": ["compress/shared.safetensors", "compress/other.safetensors"],
}


@pytest.mark.parametrize(("output", "changed"), [(out, name) for out, names in CHANGED.items() for name in names])
def test_an_input_with_other_digests_is_refused_and_nothing_is_written(
    output: str, changed: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models that options name are inputs, too."""
    for name in ("base", "adapter", "sibling", "compress", output):
        shutil.copytree(home / name, tmp_path / name)
    raw = bytearray((tmp_path / changed).read_bytes())
    raw[-2] ^= 1
    (tmp_path / changed).write_bytes(raw)
    assert cli.run(["reproduce", str(tmp_path / output), "-o", str(tmp_path / "again")]) == 3
    told = capsys.readouterr().err
    assert f"{Path(changed).name} differs from the bytes" in told
    assert "--from FOLDER" in told
    assert not (tmp_path / "again").exists()


def test_what_differs_is_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here the record claims that another release wrote another config, and a file was edited since."""
    shutil.copytree(home / "rescale", tmp_path / "rescale")
    table = json.loads((tmp_path / "rescale" / "loratool.json").read_bytes())
    table["versions"]["torch"] = "1.0"
    table["files"]["adapter_config.json"]["sha256"] = "0" * 64
    write_json(tmp_path / "rescale" / "loratool.json", table)
    shutil.copytree(home / "adapter", tmp_path / "adapter")
    words = ["reproduce", str(tmp_path / "rescale"), "-o", str(tmp_path / "again")]
    assert cli.run([*words, "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    reasons = [(each["name"].rpartition("/")[2], each["reason"]) for each in found["differences"]]
    assert ("adapter_config.json", "differs from the bytes that were written") in reasons
    assert ("loratool.json", "differs in versions") in reasons
    assert any(name == "rescale" and "no longer matches its record" in reason for name, reason in reasons)


HOSTILE: dict[str, dict[str, Any]] = {
    "an option that sends": {"options": {"push_to_hub": "evil/repo"}},
    "an option that replaces": {"options": {"overwrite": True}},
    "a file outside": {"options": {"also_load": ["../../secret.safetensors"]}},
    "an unknown command": {"made_by": "loratool push"},
    "no options": {"options": None},
    "more operands than inputs": {"operands": ["./base", "./adapter", "./third"]},
    "an input without digests": {"base": {"name": "base"}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_record_that_asks_for_more_than_a_run_is_refused(case: str, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "merge", tmp_path / "merge")
    table = json.loads((tmp_path / "merge" / "loratool.json").read_bytes())
    write_json(tmp_path / "merge" / "loratool.json", {**table, **HOSTILE[case]})
    with pytest.raises(loratool.InputError):
        loratool.reproduce(tmp_path / "merge", tmp_path / "again", folders=home)
    assert not (tmp_path / "again").exists()


def test_the_recorded_command_and_the_recorded_keywords_say_the_same(home: Path) -> None:
    """Click's reading of the command line is compared with the options and operands of the record."""
    for name in EVERY:
        table = json.loads((home / name / "loratool.json").read_bytes())
        words = shlex.split(table["command"])
        context = cli.command(name).make_context(name, words[2:])
        given = {key: value for key, value in context.params.items() if value not in (None, (), False)}
        options = {key: value for key, value in given.items() if key in table["options"]}
        assert options.keys() == table["options"].keys(), name
        assert [word for word in words[2:] if word in table["operands"]] == table["operands"]


def test_a_file_that_stands_alone_is_repeated_by_the_record_in_its_header(tmp_path: Path) -> None:

    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {
        f"{module}.lora_down.weight": f32(np.ones((2, 4))),
        f"{module}.lora_up.weight": f32(np.ones((6, 2))),
        f"{module}.alpha": f32(np.array(2.0)),
    }
    (tmp_path / "one.safetensors").write_bytes(safetensors_bytes(factors))
    loratool.rescale(tmp_path / "one.safetensors", tmp_path / "two.safetensors", scale=2)
    found = loratool.reproduce(tmp_path / "two.safetensors", tmp_path / "again.safetensors")
    assert found.passes
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_file_that_an_option_names_is_found_by_its_name_and_another_one_is_noticed(
    home: Path, tmp_path: Path
) -> None:
    """The record has its name alone: whether it is the same file, the output tells."""
    shutil.copytree(home / "adapter", tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    end = ".lora_A.weight"
    grams = {name[len("base_model.model.") : -len(end)]: len(a) for name, a in factors.items() if name.endswith(end)}

    def calibrate(place: Path, slope: float) -> None:
        place.write_bytes(
            safetensors_bytes({name: f32(np.diag(1 + slope * np.arange(rank))) for name, rank in grams.items()})
        )

    calibrate(tmp_path / "seen.safetensors", 3)
    loratool.resize(tmp_path / "adapter", tmp_path / "out", rank=1, calibration=tmp_path / "seen.safetensors")
    assert loratool.reproduce(tmp_path / "out", tmp_path / "again").passes
    (tmp_path / "store").mkdir()
    (tmp_path / "seen.safetensors").rename(tmp_path / "store" / "seen.safetensors")
    with pytest.raises(loratool.InputError, match=r"--calibration: .*seen\.safetensors was not found"):
        loratool.reproduce(tmp_path / "out", tmp_path / "without")
    assert loratool.reproduce(tmp_path / "out", tmp_path / "moved", folders=[tmp_path / "store"]).passes
    calibrate(tmp_path / "store" / "seen.safetensors", -0.4)
    assert not loratool.reproduce(tmp_path / "out", tmp_path / "other", folders=[tmp_path / "store"]).passes
