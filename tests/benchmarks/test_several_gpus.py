"""Rows of benchmarks/several_gpus.py on a tiny model, with the CPU in the place of GPUs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from small_benchmarks import run_here

sys.path.insert(0, str(ROOT / "benchmarks"))

import sections
import several_gpus

ROWS = "merge,parts,resize,combine,extract,dequantize,large"


def test_every_row_is_measured_with_stand_ins_and_the_page_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All ways make the bytes of one CPU, in both places; the page has ratios, runs and stages, and nothing is judged."""
    run_here(monkeypatch, capsys, several_gpus)
    monkeypatch.setattr(several_gpus, "filesystem", lambda folder: "ext4" if folder.parent.name == "disk" else "tmpfs")
    home, disk, result = tmp_path / "home", tmp_path / "disk", tmp_path / "result.json"
    home.mkdir()
    disk.mkdir()
    words = ["--shape", "tiny", "--rows", ROWS, "--turns", "1", "--devices", "cpu,cpu", "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/several_gpus.py", *words])
    several_gpus.main([*words, "--folder", str(home), "--disk", str(disk)])

    found = json.loads(result.read_text())
    assert list(found["rows"]) == ROWS.split(",")
    assert not any("skipped" in row for row in found["rows"].values())
    for name in ("merge", "large", "parts", "dequantize"):
        assert len(found["rows"][name]["roots"]) == 5
        assert len(set(found["rows"][name]["roots"].values())) == 1
    assert {each["met"] for each in found["findings"] if each["target"] != "all"} == {None}
    assert [*home.iterdir()] == [*disk.iterdir()] == []
    page = sections.performance([{**found, "commit": "0123456789"}])
    for text in (
        "### Several GPUs",
        "| tiny, merge: all devices over one device, after start-up, output on ext4 |",
        "| tiny, large: rate of all devices over that of tiny, output on tmpfs |",
        "| `parts` | a process each, tmpfs |",
        "| stage | `dequantize`, one device, tmpfs |",
    ):
        assert text in page


def run(wall: float, work: float) -> dict[str, Any]:
    return {"wall": wall, "work": work}


def test_ratios_are_those_of_the_turns_and_are_judged_on_gpus_alone() -> None:
    """Of merges, seconds after start-up; of Ray, seconds beyond those of a tiny model, as its tasks start one by one."""
    both = {"one device, tmpfs": [run(9, 6), run(9, 4)], "all devices, tmpfs": [run(9, 3), run(9, 4)]}
    ray = {"all devices, tmpfs": [run(10, 4)], "Ray, tmpfs": [run(14, 14)]}
    shared = {"shape": "tiny", "bytes": 10**9, "roots": {"cpu": "a", "other": "b"}}
    rows = {
        "merge": {**shared, "runs": both},
        "ray": {**shared, "runs": ray, "starts": {"all devices": 2.0, "Ray": 4.0}},
    }
    found = {each.what: each for each in several_gpus.judged(rows, real=True)}
    one = found["tiny, merge: all devices over one device, after start-up, output on tmpfs"]
    assert (one.value, one.target, one.met, one.aimed) == (1.5, "≥ 1.00, aim 1.50", True, True)
    other = found["tiny, ray: Ray over all devices, after start-up, output on tmpfs"]
    assert (other.value, other.met) == (0.8, False)
    assert found["tiny, merge: same digests as one CPU's"].met is False
    stand_ins = {each.what: each for each in several_gpus.judged(rows, real=False)}
    assert stand_ins[one.what].met is None


def test_without_two_gpus_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(several_gpus, "gpus", lambda: ["GPU"])
    with pytest.raises(SystemExit):
        several_gpus.main([])
    assert "this machine has 1 GPU, and two are needed" in capsys.readouterr().err
