"""Large models, which are headers and holes of their full length: memory of a worker, and what a page shows of them."""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from loratool import cli

SHAPES = runpy.run_path(str(ROOT / "benchmarks" / "shapes.py"))
HOLLOW = runpy.run_path(str(ROOT / "fixtures" / "make_headers.py"))["write_hollow"]
SIMULATING = ROOT / "docs" / "simulating.md"
MB = 10**6
SHARE = 300 * MB  # of the output, which a worker makes
MOST = 500 * MB  # that a merge by one process may take with the same settings


def make_hollow(shape: Any, folder: Path) -> None:
    """A base of zeros that takes no room on disk, and a real adapter of rank 2 on the first block."""
    (folder / "base").mkdir(parents=True)
    shards = SHAPES["split"](shape.tensors, shape.shard_bytes)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys((tensor[0] for tensor in shard), name)
        HOLLOW(folder / "base" / name, sorted(shard))
    index = {"metadata": {"total_size": shape.base_bytes}, "weight_map": places}
    SHAPES["write_json"](folder / "base" / "model.safetensors.index.json", index)
    SHAPES["write_json"](folder / "base" / "config.json", shape.model_config)
    SHAPES["make_adapter"](shape, folder / "adapter", rank=2, layers=1)


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3-70b"])
def test_a_worker_takes_as_much_memory_as_a_merge_by_one_process(name: str, tmp_path: Path) -> None:
    """Neither the size of the model nor the number of workers changes the peak: buffers, factors and torch."""
    shape = SHAPES["SHAPES"][name]
    make_hollow(shape, tmp_path)
    count = shape.base_bytes // SHARE
    line = [sys.executable, "-m", "loratool", "merge", str(tmp_path / "base"), str(tmp_path / "adapter")]
    line += ["-o", str(tmp_path / "out"), "--device", "cpu", "--workers", "2", "--json"]
    planned = subprocess.run([*line, "--dry-run"], capture_output=True, text=True, check=True)
    expected = json.loads(planned.stdout)["peak_memory"]
    assert expected < MOST
    computed = 0
    for index in (1, 2, count):
        made = subprocess.run([*line, "--part", f"{index}/{count}"], capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        report = json.loads(made.stdout)
        computed += report["cost"]["device"] == "cpu"
        assert 0 < report["cost"]["peak_memory"] < 1.1 * expected
        assert report["bytes_written"] < 5 * SHARE
    assert computed  # at least one of them had weights to compute
    stage = sum(path.stat().st_blocks * 512 for path in (tmp_path / "out.partial").rglob("*") if path.is_file())
    assert stage < 10 * SHARE  # what the other workers have not made yet takes no room


def test_the_page_of_simulations_shows_what_is_printed_for_a_terabyte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `$ loratool plan kimi/…` of the page, after the command before them has made the headers."""
    monkeypatch.chdir(tmp_path)
    lines = iter(SIMULATING.read_text(encoding="utf-8").splitlines())
    seen = 0
    for line in lines:
        match shlex.split(line.removeprefix("$ ")) if line.startswith("$ ") and "kimi" in line else ():
            case ["python", script, *words]:
                subprocess.run([sys.executable, str(ROOT / script), *words], check=True)
            case ["loratool", *words]:
                assert next(lines) == "…"
                shown = []
                while (row := next(lines)) != "```":
                    shown.append(row)
                assert cli.run(words) == 0
                assert capsys.readouterr().out.splitlines()[-len(shown) :] == shown
                seen += 1
    assert seen == 2
