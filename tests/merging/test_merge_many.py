"""Several outputs at one reading of their base: each is what its own merge makes, and fails by itself."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import torch
from peft_files import edit_config, save_peft
from safetensors.torch import load_file, save_file
from workbench import snapshot

import loratool
from loratool.cli import run
from loratool.files import digests, safefile, shard_writer, staging
from loratool.files.journal import FinishedShard
from loratool.results.merge_many import MergeManyReport

SHARDS, HIDDEN = 2, 256


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base, an adapter, another on other modules, and one with DoRA."""
    faults.make_base(tmp_path / "base", SHARDS, HIDDEN)
    faults.make_adapter(tmp_path / "plain", SHARDS, HIDDEN)
    save_other(tmp_path / "other")
    save_dora(tmp_path / "plain", tmp_path / "dora")
    return tmp_path


def save_other(folder: Path) -> None:
    """An adapter on `gate_proj`, which the others leave alone, and on `q_proj` of the first layer."""
    tensors = {}
    for path, rows in (("layers.0.mlp.gate_proj", 2 * HIDDEN), ("layers.0.self_attn.q_proj", HIDDEN)):
        tensors[f"base_model.model.model.{path}.lora_A.weight"] = torch.randn(4, HIDDEN)
        tensors[f"base_model.model.model.{path}.lora_B.weight"] = torch.randn(rows, 4)
    save_peft(folder, tensors, r=4, lora_alpha=4)


def save_dora(plain: Path, folder: Path) -> None:
    """The plain adapter with magnitudes."""
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if "lora_B" in name]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.rand(len(tensors[name])) + 0.5
    save_file(tensors, folder / "adapter_model.safetensors")
    edit_config(folder, use_dora=True)


def many(home: Path, outputs: dict[str, Any], **settings: Any) -> MergeManyReport:
    return loratool.merge_many(home / "base", {home / out: made for out, made in outputs.items()}, **settings)


def single(home: Path, name: str, *adapters: str, **settings: Any) -> faults.Picture:
    """What a merge of its own makes."""
    loratool.merge(home / "base", [home / each for each in adapters], home / name, device="cpu", **settings)
    return faults.picture(home / name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"workers": 3, "max_memory": "8GB"},
        {"dtype": "float32", "shard_size": 300_000, "sha256": True},
        {"rounding": "compensated"},
    ],
    ids=lambda settings: ",".join(settings) or "defaults",
)
def test_each_output_is_what_its_own_merge_makes(home: Path, settings: dict[str, Any]) -> None:
    """Weights, side files, card and record are equal, byte for byte; the record has the command of its own merge."""
    outputs = {
        "one": home / "plain",
        "two": [home / "dora"],
        "three": [(home / "plain", 0.5), (home / "other", -1)],
        "four": (home / "other", 2.0),
    }
    results = many(home, outputs, device="cpu", **settings)
    assert not results.errors
    assert results.exit_code == 0
    assert faults.picture(home / "one") == single(home, "alone1", "plain", **settings)
    assert faults.picture(home / "two") == single(home, "alone2", "dora", **settings)
    assert faults.picture(home / "three") == single(home, "alone3", "plain", "other", weights=[0.5, -1], **settings)
    assert faults.picture(home / "four") == single(home, "alone4", "other", weights=[2], **settings)
    assert "-w 0.5 -w -1" in json.loads((home / "three" / "loratool.json").read_text())["command"].replace(".0", "")
    assert results[home / "one"].out == home / "one"


class Readings:
    """How often each byte of a base's edited tensors is read; samples of a page, by which a rerun knows it, are not counted."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = [safefile.read_safefile(path) for path in sorted(base.glob("*.safetensors"))]
        self.clear()
        readings = self

        class TracingSource(safefile.LocalSource):
            def read(self, start: int, count: int, into: memoryview) -> None:
                if self.path in readings.counts and count > 4096:
                    readings.counts[self.path][start : start + count] += 1
                super().read(start, count, into)

        monkeypatch.setattr(safefile, "LocalSource", TracingSource)

    def clear(self) -> None:
        self.counts = {file.path: np.zeros(file.layout.size, dtype=int) for file in self.files}

    def found(self) -> set[int]:
        edited = [
            self.counts[file.path][file.position(info) :][: info.nbytes]
            for file in self.files
            for info in file.tensors.values()
            if "q_proj" in info.name or "up_proj" in info.name
        ]
        return {int(count) for counts in edited for count in counts}


@pytest.mark.parametrize("rows", [100, 1000])
def test_rows_that_several_outputs_edit_are_read_once(home: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Whatever the size of blocks, no byte of an edited tensor is asked of the base twice."""
    readings = Readings(home / "base", monkeypatch)
    monkeypatch.setattr("loratool.merging.resources.CPU_BLOCK", rows * 2 * HIDDEN)
    both = [home / "other", home / "plain"]
    results = many(home, {"one": home / "plain", "two": (home / "plain", 2), "three": both}, device="cpu")
    assert not results.errors
    assert readings.found() == {1}


def test_outputs_that_need_blocks_of_different_sizes_share_the_rows(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formula of DoRA is computed in blocks of a fixed size, which do not fill the others' blocks."""
    readings = Readings(home / "base", monkeypatch)
    monkeypatch.setattr("loratool.merging.resources.CPU_BLOCK", 100 * 2 * HIDDEN)
    monkeypatch.setattr("loratool.merging.resources.FORMULA_BLOCK", 32 * HIDDEN)
    loratool.merge(home / "base", home / "dora", home / "alone", device="cpu")
    readings.clear()
    results = many(home, {"one": home / "plain", "two": home / "dora", "three": home / "plain"}, device="cpu")
    assert readings.found() == {1}
    assert not results.errors
    assert faults.picture(home / "two") == faults.picture(home / "alone")
    assert faults.picture(home / "one") == single(home, "alone1", "plain")


def test_untouched_tensors_are_hashed_once_for_all_outputs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of bytes that are the same in every output are computed for one of them."""
    hashed = 0
    real = digests.new_state

    class Counting:
        def __init__(self) -> None:
            self.state = real()

        def update(self, piece: memoryview) -> None:
            nonlocal hashed
            hashed += len(piece)
            self.state.update(piece)

        def hexdigest(self) -> str:
            return self.state.hexdigest()

    monkeypatch.setattr("loratool.merging.engine.new_state", Counting)
    loratool.merge(home / "base", home / "other", home / "alone", device="cpu")
    alone, hashed = hashed, 0
    results = many(home, {"one": home / "other", "two": home / "other"}, device="cpu", workers=1)
    edited = (2 * HIDDEN + HIDDEN) * HIDDEN * 2  # bytes of the two tensors that the adapter edits
    assert not results.errors
    assert hashed == alone + edited


def full_disk_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of one output is full."""
    real = shard_writer.LocalFile.write

    def write(self: shard_writer.LocalFile, memory: memoryview, at: int) -> None:
        if f"{name}.partial" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        real(self, memory, at)

    monkeypatch.setattr(shard_writer.LocalFile, "write", write)


def test_an_output_whose_disk_is_full_fails_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are complete, and equal to their own merges; nothing is left of the one that failed."""
    alone = single(home, "alone", "plain")
    full_disk_for("two", monkeypatch)
    results = many(home, {"one": home / "plain", "two": home / "other", "three": home / "plain"}, device="cpu")
    assert list(results.reports) == [str(home / "one"), str(home / "three")]
    assert faults.picture(home / "one") == faults.picture(home / "three") == alone
    assert "disk is full" in str(results.errors[str(home / "two")])
    assert results.exit_code == 6
    assert not list(home.glob("two*"))
    with pytest.raises(loratool.StorageError, match="disk is full"):
        results[home / "two"]


def spoil_shape(home: Path) -> None:
    tensors = load_file(home / "other" / "adapter_model.safetensors")
    save_file(
        {name: value[:, :3].contiguous() for name, value in tensors.items()}, home / "other/adapter_model.safetensors"
    )


def spoil_values(home: Path) -> None:
    tensors = load_file(home / "other" / "adapter_model.safetensors")
    save_file({name: value * float("nan") for name, value in tensors.items()}, home / "other/adapter_model.safetensors")


def spoil_effect(home: Path) -> None:
    tensors = load_file(home / "other" / "adapter_model.safetensors")
    save_file({name: value * 0 for name, value in tensors.items()}, home / "other/adapter_model.safetensors")


def occupy(home: Path) -> None:
    (home / "two").mkdir()


def remove(home: Path) -> None:
    shutil.rmtree(home / "other")


FAILURES = (spoil_shape, spoil_values, spoil_effect, occupy, remove)


@pytest.mark.parametrize("spoil", FAILURES)
def test_an_output_that_cannot_be_planned_fails_alone(
    home: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    """The exit code is its own, its error is the one of its own merge, and `--json` has it in the list.

    The next command is that of its own merge too.
    """
    spoil(home)
    before = snapshot(home)
    words = ["merge", str(home / "base"), str(home / "plain"), "--device", "cpu", "--json"]
    ended = run([*words[:2], str(home / "other"), *words[3:], "-o", str(home / "two")])
    alone = json.loads(capsys.readouterr().out)["error"]
    assert ended == alone["exit_code"]
    assert snapshot(home) == before
    several = [*words, "-o", str(home / "one"), "--also", f"{home / 'two'}={home / 'other'}"]
    ended = run(several)
    out, err = capsys.readouterr()
    made, failed = json.loads(out)["outputs"]
    assert (made["out"], failed["out"]) == (str(home / "one"), str(home / "two"))
    assert "error" not in made
    assert failed["error"] == alone
    assert ended == alone["exit_code"]
    whose = "" if spoil is occupy else f"{home / 'two'}: "  # that message begins with the output
    assert f"Error: {whose}{alone['message']}" in err
    assert f"hint: {alone['hint']}\n" in err
    assert faults.picture(home / "one") == single(home, "alone", "plain")


def test_the_exit_code_is_the_worst(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is the smallest other than 0, as of several adapters: 2 for a folder that is in the way, 4 for one that does
    not fit.
    """
    spoil_effect(home)
    (home / "three").mkdir()
    words = ["merge", str(home / "base"), str(home / "plain"), "-o", str(home / "one"), "--device", "cpu"]
    ended = run([*words, "--also", f"{home / 'two'}={home / 'other'}", "--also", f"{home / 'three'}={home / 'plain'}"])
    _, err = capsys.readouterr()
    assert ended == 2
    told = [line for line in err.splitlines() if line.startswith("Error")]
    assert [line.split()[1] for line in told] == [f"{home / 'two'}:", str(home / "three")]
    assert (home / "one" / "config.json").exists()


def test_the_hint_for_an_output_that_failed_is_the_merge_that_makes_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the name that was probably meant, and without the outputs that are complete; they are not named twice."""
    (home / "three").mkdir()
    words = ["merge", str(home / "base"), str(home / "plain"), "-o", str(home / "one"), "--device", "cpu"]
    also = [f"{home / 'two'}={home / 'othr'}", f"{home / 'two'}={home / 'plain'}", f"{home / 'three'}={home / 'other'}"]
    assert run([*words, "--also", also[0], "--also", also[1], "--also", also[2]]) == 2
    lines = capsys.readouterr().err.splitlines()
    hints = [shlex.split(line.removeprefix("hint: loratool ")) for line in lines if line.startswith("hint: ")]
    told = [line for line in lines if line.startswith("Error: ")]
    assert [line.count(name) for line, name in zip(told, (str(home / "two"), str(home / "three")), strict=True)] == [
        1,
        1,
    ]
    three = ["merge", str(home / "base"), str(home / "other"), "--device", "cpu", "-o", str(home / "three")]
    assert hints[1] == [*three, "--overwrite"]
    assert run(hints[0]) == 0
    loratool.merge(home / "base", [home / "other", home / "plain"], home / "alone", device="cpu")
    assert faults.picture(home / "two") == faults.picture(home / "alone")


def test_errors_of_the_library_have_the_merge_of_one_output_as_the_next_command(home: Path) -> None:
    """With the name that was probably meant, of the base or of an adapter, and with the weights of that output."""
    (home / "three").mkdir()
    outputs = {"two": [(home / "othr", 0.5), home / "plain"], "three": home / "other"}
    errors = many(home, outputs, device="cpu").errors
    words = ["loratool", "merge", str(home / "base")]
    two = [str(home / "other"), str(home / "plain"), "--device", "cpu", "-w", "0.5", "-w", "1", "-o", str(home / "two")]
    assert sorted(shlex.split(errors[str(home / "two")].hint)) == sorted([*words, *two])
    three = [str(home / "other"), "--device", "cpu", "-o", str(home / "three"), "--overwrite"]
    assert shlex.split(errors[str(home / "three")].hint) == [*words, *three]
    with pytest.raises(loratool.InputError) as caught:
        loratool.merge_many(home / "bas", {home / "four": home / "other"})
    assert shlex.split(caught.value.hint) == [*words, str(home / "other"), "-o", str(home / "four")]


def test_each_output_is_continued_after_an_interrupt(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are finished are kept; one of the outputs may be continued by a merge of its own."""
    stopped: list[str] = []

    class Interrupting(staging.Stage):
        def record(self, shard: FinishedShard) -> None:
            if stopped:
                raise KeyboardInterrupt
            super().record(shard)
            if len(self.finished) and self.out.name == "two":
                stopped.append(shard.name)
                raise KeyboardInterrupt

    outputs = {"one": home / "plain", "two": home / "other"}
    with monkeypatch.context() as patch:
        patch.setattr(staging, "Stage", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            many(home, outputs, device="cpu", workers=1)
    assert not (home / "one").exists()
    assert (home / "two.partial" / "model" / stopped[0]).exists()
    results = many(home, outputs, device="cpu")
    assert results[home / "two"].resumed == tuple(stopped)
    assert faults.picture(home / "one") == single(home, "alone1", "plain")
    assert faults.picture(home / "two") == single(home, "alone2", "other")
    assert not list(home.glob("*.partial"))


def test_the_adapters_of_one_out_are_merged_together(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", str(home / "base"), str(home / "plain"), "-o", str(home / "one"), "--device", "cpu"]
    both = [f"{home / 'two'}={home / 'plain'}", f"{home / 'two'}={home / 'other'}"]
    assert run([*words, "--also", both[0], "--also", both[1]]) == 0
    out, _ = capsys.readouterr()
    assert out.index(str(home / "one")) < out.index(str(home / "two"))
    assert faults.picture(home / "two") == single(home, "alone", "plain", "other")


def test_a_dry_run_shows_every_plan_and_writes_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "three").mkdir()
    before = snapshot(home)
    words = ["merge", str(home / "base"), str(home / "plain"), "-o", str(home / "one"), "--dry-run", "--json"]
    also = [f"{home / 'two'}={home / 'other'}", f"{home / 'three'}={home / 'other'}"]
    assert run([*words, "--also", also[0], "--also", also[1]]) == 2
    first, second, third = json.loads(capsys.readouterr().out)["outputs"]
    assert [len(each["edits"]) for each in (first, second)] == [2 * SHARDS, 2]
    assert third["error"]["code"] == "wrong-usage"
    assert run([*words[:-1], "--also", also[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(":") and line != "edits:"] == [
        f"{home / name}:" for name in ("one", "two")
    ]
    assert snapshot(home) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--also", "two"], "--also takes OUT=ADAPTER (got 'two')"),
        (["--also", "=plain"], "--also takes OUT=ADAPTER"),
        (["--also", "two="], "--also takes OUT=ADAPTER"),
        (["--also", "./one=other"], "OUT is the same as that of -o"),
        (["--also", "one/two=other"], "one/two is inside one, which is another output"),
        (["--also", "one.partial=other"], "one.partial is inside one, which is another output"),
        (["--also", "two=other", "--also", "./two/.=other", "--also", "x/../two=other"], "are the same folder"),
        (["--also", "two=other", "-w", "0.5"], "-w cannot be used with --also"),
        (
            ["--also", "two=other", "--stream", "--push-to-hub", "me/x"],
            "--also cannot be used with --stream or --push-to-hub",
        ),
        (["--also", "two=other", "--push-to-hub", "me/x"], "--also cannot be used with --stream or --push-to-hub"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_cannot_be_meant_are_refused_before_anything_is_written(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(home)
    before = snapshot(home)
    assert run(["merge", "base", "plain", "-o", "one", *words]) == 2
    assert told in capsys.readouterr().err
    assert snapshot(home) == before


def test_what_an_output_is_read_from_is_no_output(home: Path) -> None:
    """An output may not replace the adapter of another one."""
    outputs = {"one": home / "plain", "other": home / "plain", "two": home / "other"}
    results = many(home, outputs, device="cpu", overwrite=True)
    assert list(results.errors) == [str(home / "other")]
    assert "inside the input" in str(results.errors[str(home / "other")])
    assert faults.picture(home / "two") == single(home, "alone", "other", overwrite=True)


def test_calls_that_cannot_be_meant_are_refused(home: Path) -> None:
    with pytest.raises(loratool.UsageError, match="at least one output"):
        many(home, {})
    with pytest.raises(loratool.UsageError, match="at least one adapter"):
        many(home, {"one": []})
    with pytest.raises(loratool.UsageError, match=r"\(adapter, weight\)"):
        many(home, {"one": home / "plain"}, weights=[0.5])
    with pytest.raises(loratool.InputError):
        loratool.merge_many(home / "plain", {home / "one": home / "plain"})
