"""Whatever is spoilt in a quantised base, a merge ends with a message that says where, or with what it gives without."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from oracle import read_tensors
from spoiling import MODULE, SIZES, every, spoilings, write_adapter, write_spoilt
from workbench import is_clean, snapshot, within

from loratool.cli import run

# of each family, besides a plain weight beside the packed one; LORATOOL_SPOILINGS=1000 tries all
COUNT = int(os.environ.get("LORATOOL_SPOILINGS", "5"))
SEED = os.environ.get("LORATOOL_SEED", "11")
LONGEST = 20.0  # seconds until a command counts as hanging
MODELS = every()


@pytest.mark.parametrize("family", MODELS)
def test_a_spoilt_base_is_refused_with_its_module_or_merges_to_the_same(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what no value depends on may be wrong unseen, such as the scale of a layer's inputs."""
    adapter, base, out = write_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out" / "made"
    out.parent.mkdir()
    words = ["merge", str(base), str(adapter), "-o", str(out), "--workers", "1"]
    write_spoilt(base, MODELS[family], None)
    assert run(words) == 0
    wanted = read_tensors(out)[f"{MODULE}.weight"]
    failures = []
    for spoiling in spoilings(MODELS[family], COUNT, f"{SEED} {family}"):
        for folder in (out, base):
            shutil.rmtree(folder, ignore_errors=True)
        write_spoilt(base, MODELS[family], spoiling)
        before = snapshot(base)
        capsys.readouterr()
        with within(LONGEST):
            code = run(words)
        told = capsys.readouterr()
        if code == 0:
            right = torch.equal(read_tensors(out)[f"{MODULE}.weight"], wanted)
        else:
            named = MODULE in told.err or any(f"{size} must" in told.err or f"a {size}," in told.err for size in SIZES)
            right = code in (3, 4) and named and told.err.startswith("Error: ") and told.out == "" and not left(out)
        if not right or snapshot(base) != before or not is_clean(told.err) or told.err.count("Error:") > 1:
            failures.append(f"{spoiling.told}: code {code}: {told.err}")
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("GPTQ 4 bits", "g_idx is out of range"),
        ("int4 groups, zero points", "weight_scale has a NaN"),
        ("int7 rows", "weight_scale has a zero"),
        ("HQQ", "scale has an infinity"),
    ],
)
def test_scales_and_indices_that_mean_nothing_are_refused_wherever_they_are_decoded(
    family: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a merge that packs weights anew, and by `verify` in either of its models."""
    model, adapter = MODELS[family], str(write_adapter(tmp_path / "adapter"))
    (spoiling,) = (each for each in spoilings(model, 10**6, SEED) if each.told == f"{MODULE}.{told}")
    sound, spoilt = (str(write_spoilt(tmp_path / str(way), model, way)) for way in (None, spoiling))
    merged, out = str(tmp_path / "merged"), str(tmp_path / "out")
    assert run(["merge", sound, adapter, "-o", merged]) == 0
    commands = [
        ["merge", spoilt, adapter, "-o", out, "--requantize", "--accept-loss"],
        ["verify", merged, "--base", spoilt, "--adapter", adapter],
        ["verify", spoilt, "--base", merged, "--adapter", adapter],
    ]
    for command in commands:
        capsys.readouterr()
        assert run(command) == 3, command
        error = capsys.readouterr().err
        assert MODULE in error
        assert "packed weights that cannot be decoded" in error
    assert not (tmp_path / "out").exists()


def left(out: Path) -> list[str]:
    return os.listdir(out.parent)
