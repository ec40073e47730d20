"""Rows of benchmarks/engine.py on a tiny model. Merges run in this process, so that torch is imported once."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
from paths import ROOT
from small_benchmarks import SMALL, run_here

from loratool import cli

sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy
import engine
import figures
import programs
import running
import shapes


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(monkeypatch, capsys)


@pytest.mark.usefixtures("in_this_process")
def test_rows_are_measured_and_everything_that_was_made_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row that needs nothing but loratool and `cp` finds its numbers on a tiny model, and leaves only its result."""
    result = tmp_path / "result.json"
    rows = "merge,cold,layer,single,large,batch,bytes,compensated"
    words = ["--shape", "tiny", "--rows", rows, "--turns", "1", "--folder", str(tmp_path), "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/engine.py", *words])
    engine.main()

    found = json.loads(result.read_text())
    assert list(found["rows"]) == rows.split(",")
    assert not any("skipped" in row for row in found["rows"].values())
    assert found["rows"]["bytes"]["exact"] == {"elements": 500, "different": 0}
    assert len(set(found["rows"]["bytes"]["roots"].values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert found["command"].startswith("python benchmarks/engine.py --shape tiny --rows merge,")
    assert str(tmp_path) not in result.read_text()
    said = {each["what"]: each for each in found["findings"]}
    assert said["tiny, cpu: peak memory"]["met"] is True
    assert 0.3 < said["tiny, ‖ΔW‖/‖W‖ = 0.001, bf16, compensated: gain with `nearest`"]["value"] < 0.7


@pytest.mark.usefixtures("in_this_process")
def test_what_a_cut_run_has_measured_is_kept_and_its_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C in the second row, the result holds the first one, and the folder nothing else."""

    def interrupted(_bench: engine.Bench) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Bench, "row_cold", interrupted)
    result = tmp_path / "result.json"
    words = ["--shape", "tiny", "--rows", "merge,cold", "--turns", "1", "--folder", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        engine.main([*words, "--json", str(result)])
    assert list(json.loads(result.read_text())["rows"]) == ["merge"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.usefixtures("in_this_process")
def test_a_program_that_fails_costs_its_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later rows are measured, the result says which one is missing, and the exit code is 1."""

    def fails(_bench: engine.Bench) -> None:
        raise SystemExit("PEFT failed")

    monkeypatch.setattr(engine.Bench, "row_peft", fails)
    result = tmp_path / "result.json"
    words = ["--shape", "tiny", "--rows", "peft,layer", "--turns", "1", "--folder", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        engine.main([*words, "--json", str(result)])
    assert ended.value.code == 1
    rows = json.loads(result.read_text())["rows"]
    assert list(rows) == ["peft", "layer"]
    assert rows["peft"] == {"skipped": "a program failed"}
    assert "runs" in rows["layer"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says how much is free and what each row needs."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(SystemExit, match=r"1\.0 GB are free: batch needs 12\.7 GB"):
        engine.main(["--rows", "batch", "--folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_engine_in_float32_is_another_one_and_merges(tmp_path: Path) -> None:
    """Its elements are the exact value rounded once, save for a few, by which its bytes differ from the engine's."""
    shapes.make(SMALL, tmp_path)
    words = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--device=cpu", "-q", "-o"]
    command = [sys.executable, str(ROOT / "benchmarks/programs.py"), "altered", "--float32", "--block=65536"]
    subprocess.run([*command, *words, str(tmp_path / "float32")], check=True, env=running.environment())
    assert cli.run([*words, str(tmp_path / "exact")]) == 0
    counts = accuracy.exact(tmp_path / "base", tmp_path / "adapter", tmp_path / "float32", 1000)
    assert counts["different"] <= 2
    names = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert any((tmp_path / "float32" / n).read_bytes() != (tmp_path / "exact" / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Fraction(1), 1.0),
        (1 + Fraction(1, 256), 1.0),  # a tie, to even
        (1 + Fraction(3, 256), 1 + 2 / 128),  # a tie, to even
        (1 + Fraction(1, 256) + Fraction(1, 2**90), 1 + 1 / 128),
        (-(2 - Fraction(1, 2**90)), -2.0),
        (Fraction(0), 0.0),
    ],
)
def test_the_oracle_rounds_to_the_nearest_bfloat16(value: Fraction, expected: float) -> None:
    """Rational numbers are rounded once, ties to even; expected values are by hand."""
    bits = accuracy.nearest_bf16(value)
    assert accuracy.widen("BF16", numpy.array([bits], "<u2"))[0] == expected


def test_a_model_is_cut_to_as_many_blocks_as_fit() -> None:
    """A 70B model cut to 18 GB has no more bytes than that, and one more block would not fit."""
    shape = shapes.SHAPES["llama-3-70b"].cut(18 * 10**9)
    assert shape.base_bytes <= 18 * 10**9 < shape.base_bytes + shape.block_bytes
    assert shape.layers > 1


def test_start_up_is_taken_out_of_processor_time() -> None:
    """CPU seconds over those of another engine, after start-up of each: (5 − 1) / (9 − 1) of two such runs."""

    def run(program: str, processor: float) -> dict[str, Any]:
        numbers = dict.fromkeys(("wall", "work", "sync", "startup", "peak_memory", "gpu_memory", "workers"), 1.0)
        return {**numbers, "bytes": 10**9, "program": program, "processor": processor}

    runs = {"cp -r": [run("", 0)], "merge cpu": [run("merge cpu", 5)], "older cpu": [run("older cpu", 9)]}
    row = {"shape": "tiny", "bytes": 10**9, "runs": runs, "older": "0.2.0"}
    startup = {name: {"processor": 1.0} for name in ("merge cpu", "older cpu")}
    measured = figures.Measured({"merge": row}, startup, 2, has_gpu=False)
    values = {found.what: found.value for found in measured.findings()}
    assert math.isclose(values["tiny, cpu: CPU seconds a GB over those of 0.2.0"], 0.5)
    assert math.isclose(values["tiny, cpu: CPU seconds a GB, without start-up"], 4.0)


def test_programs_of_other_names_are_refused() -> None:
    """The usage is shown for a program that is not there."""
    with pytest.raises(SystemExit, match="peft-merge BASE ADAPTER OUT"):
        programs.main(["peft"])


def test_another_source_tree_runs_its_own_package_in_whatever_folder_this_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--over` compares with what the other tree holds, though `python -m` prefers a package of the current folder."""
    package = tmp_path / "loratool"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("print('another loratool')")
    monkeypatch.chdir(ROOT)
    _, said, _ = running.run([sys.executable, "-m", "loratool"], tmp_path)
    assert said == "another loratool\n"
