"""`verify`, `extract` and `inspect --values` by many workers give what one process gives, whatever happens to them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from safetensors.torch import load_file, save_file

import loratool
from loratool.cli import run
from loratool.errors import UsageError, VerificationError
from loratool.results.base import Cost, plain
from loratool.verifying import in_parts as verifying

SHARDS, HIDDEN = 3, 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("partial")
    faults.make_base(home / "base", SHARDS, HIDDEN)
    faults.make_adapter(home / "adapter", SHARDS, HIDDEN)
    loratool.merge(home / "base", home / "adapter", home / "merged", device="cpu")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, an adapter and what they make; a few units of work each."""
    monkeypatch.setattr(verifying, "UNIT", 10_000)
    monkeypatch.setattr("loratool.inspecting.in_parts.UNIT", 2)
    monkeypatch.setattr("loratool.reworking.extracting.in_parts.TOGETHER", 2)
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter", "merged"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def same(one: Any, other: Any) -> bool:
    """Whether two results are the same but for their cost."""
    found, wanted = (plain(dataclasses.replace(each, cost=Cost())) for each in (one, other))
    return bool(found == wanted)


def run_parts(work: Callable[..., loratool.PartialReport], *operands: Any, **settings: Any) -> int:
    """Do a command's parts with three workers, out of order; how many units were done."""
    reports = [work(*operands, part=f"{number}/3", into="shared", **settings) for number in (3, 1, 2)]
    assert all(report.made + report.kept <= report.units for report in reports)
    assert sum(report.made for report in reports) == reports[0].units
    return reports[0].units


def test_a_proof_by_many_is_that_of_one(home: Path) -> None:
    sound = "merged", "base", "adapter"
    assert run_parts(loratool.verify_part, *sound, device="cpu") > 3
    found = loratool.finish_verify(*sound, into="shared", device="cpu")
    assert found.passes
    assert same(found, loratool.verify(*sound, device="cpu"))


def test_a_model_that_is_wrong_is_wrong_for_many_too(home: Path) -> None:
    """Its diagnoses are the same, and so is the exit code of the command."""
    path = Path("merged/model-00002-of-00003.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path, {"format": "pt"})
    run_parts(loratool.verify_part, "merged", "base", "adapter", device="cpu")
    found = loratool.finish_verify("merged", "base", "adapter", into="shared", device="cpu")
    assert same(found, loratool.verify("merged", "base", "adapter", device="cpu"))
    words = ["verify", "merged", "--base", "base", "--adapter", "adapter", "--device", "cpu", "--into", "shared"]
    assert run([*words, "--part", "1/1"]) == 0
    assert run([*words, "--finish"]) == 5


def test_another_rounding_is_found_out_in_the_end(home: Path) -> None:
    loratool.merge("base", "adapter", "other", dtype="bfloat16", rounding="stochastic", device="cpu")
    settings = {"dtype": "bfloat16", "device": "cpu"}
    run_parts(loratool.verify_part, "other", "base", "adapter", **settings)
    found = loratool.finish_verify("other", "base", "adapter", into="shared", **settings)  # type: ignore[arg-type]
    assert found.rounding == "stochastic"
    assert found.passes


@pytest.mark.parametrize("damaged", [False, True])
def test_a_record_is_checked_by_many(home: Path, damaged: bool) -> None:
    if damaged:
        path = Path("merged/model-00002-of-00003.safetensors")
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    assert run_parts(loratool.verify_part, "merged") >= SHARDS
    found = loratool.finish_verify("merged", into="shared")
    assert found.passes is not damaged
    assert same(found, loratool.verify("merged"))


def test_values_by_many_are_those_of_one(home: Path) -> None:
    every: tuple[dict[str, Any], ...] = ({}, {"base": "base"})
    for settings in every:
        shutil.rmtree("shared", ignore_errors=True)
        run_parts(loratool.inspect_part, "adapter", values=True, device="cpu", **settings)
        found = loratool.finish_inspect("adapter", into="shared", values=True, device="cpu", **settings)
        wanted = loratool.inspect("adapter", values=True, device="cpu", **settings)
        assert isinstance(found, loratool.AdapterFacts)
        assert isinstance(wanted, loratool.AdapterFacts)
        values = [dataclasses.replace(each.values, cost=Cost()) for each in (found, wanted) if each.values]
        assert plain(values[0]) == plain(values[1])
        assert same(dataclasses.replace(found, values=None), dataclasses.replace(wanted, values=None))


@pytest.mark.parametrize("rank", [None, 2])
def test_an_adapter_that_many_extract_is_that_of_one(home: Path, rank: int | None) -> None:
    """Bit for bit, the record but for its command's words among it."""
    operands = "base", "merged", "out"
    run_parts(loratool.extract_part, *operands, rank=rank, device="cpu")
    assert not Path("out").exists()
    found = loratool.finish_extract(*operands, into="shared", rank=rank, device="cpu")
    picture = faults.picture(Path("out"))
    shutil.move("out", "first")
    wanted = loratool.extract(*operands, rank=rank, device="cpu")
    assert picture == faults.picture(Path("out"))
    assert same(found, wanted)


def test_workers_that_come_and_go(home: Path) -> None:
    """Another number of workers continues; a result that is damaged or missing is named, and made again."""
    work = "merged", "base", "adapter"
    first = loratool.verify_part(*work, part="1/2", into="shared", device="cpu")
    with pytest.raises(VerificationError, match="missing or damaged"):
        loratool.finish_verify(*work, into="shared", device="cpu")
    second = loratool.verify_part(*work, part="1/1", into="shared", device="cpu")
    assert (second.kept, second.made + second.kept) == (first.made, first.units)
    path = Path("shared/partial-000001.json")
    path.write_bytes(path.read_bytes().replace(b'"unequal": 0', b'"unequal": 1'))
    with pytest.raises(VerificationError, match=f"1 of {first.units} partial results"):
        loratool.finish_verify(*work, into="shared", device="cpu")
    assert loratool.verify_part(*work, part="1/1", into="shared", device="cpu").made == 1
    assert loratool.finish_verify(*work, into="shared", device="cpu").passes


def test_damaged_factors_are_found_and_made_again(home: Path) -> None:
    work = "base", "merged", "out"
    loratool.extract_part(*work, part="1/1", into="shared", rank=2, device="cpu")
    path = min(Path("shared").glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match="missing or damaged"):
        loratool.finish_extract(*work, into="shared", rank=2, device="cpu")
    assert not Path("out").exists()
    assert loratool.extract_part(*work, part="1/1", into="shared", rank=2, device="cpu").made == 1
    loratool.finish_extract(*work, into="shared", rank=2, device="cpu")


def test_results_of_something_else_are_refused(home: Path) -> None:
    loratool.verify_part("merged", "base", "adapter", part="1/2", into="shared", device="cpu")
    before = faults.picture(Path("shared"))
    with pytest.raises(UsageError, match="other inputs or options"):
        loratool.verify_part("merged", "base", "adapter", part="2/2", into="shared", weights=[2], device="cpu")
    with pytest.raises(UsageError, match="other inputs or options"):
        loratool.inspect_part("adapter", part="2/2", into="shared", values=True, device="cpu")
    assert faults.picture(Path("shared")) == before
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="did not write"):
        loratool.verify_part("merged", part="1/2", into="mine")
    with pytest.raises(UsageError, match="no partial results"):
        loratool.finish_verify("merged", into="nowhere")
    assert os.listdir("mine") == ["notes.txt"]


def test_layers_of_one_rank_need_a_number(home: Path) -> None:
    """To choose it, every worker would have to decompose all of them. MLX has one rank for all layers."""
    operands = "base", "merged", "out"
    with pytest.raises(UsageError, match="--rank N"):
        loratool.extract_part(*operands, to="mlx", part="1/2", into="shared", device="cpu")
    run_parts(loratool.extract_part, *operands, to="mlx", rank=2, device="cpu")
    loratool.finish_extract(*operands, to="mlx", into="shared", rank=2, device="cpu")
    picture = faults.picture(Path("out"))
    shutil.rmtree("out")
    loratool.extract(*operands, to="mlx", rank=2, device="cpu")
    assert picture == faults.picture(Path("out"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "merged", "--part", "1/2"], "--part needs --into"),
        (["verify", "merged", "--finish"], "--finish needs --into"),
        (["verify", "merged", "--into", "shared"], "--into needs --part or --finish"),
        (["verify", "merged", "--part", "1/2", "--finish", "--into", "shared"], "mutually exclusive"),
        (["inspect", "adapter", "--part", "1/2", "--into", "shared"], "need --values"),
        (["inspect", "adapter", "base", "--values", "--part", "1/2", "--into", "shared"], "take one adapter"),
        (["inspect", "base", "--values", "--part", "1/2", "--into", "shared"], "not an adapter"),
        (["extract", "base", "merged", "-o", "out", "--part", "3/2", "--into", "shared"], "from 1 to N"),
        (
            ["extract", "base", "merged", "-o", "out", "--part", "1/2", "--into", "shared", "--push-to-hub", "me/it"],
            "with --finish",
        ),
    ],
)
def test_words_that_do_not_go_together(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(words) == 2
    assert said in capsys.readouterr().err
    assert not Path("shared").exists()


def test_the_commands_do_what_the_functions_do(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (
        (["inspect", "adapter", "--values", "--device", "cpu", "--into", "one"], 0),
        (["extract", "base", "merged", "-o", "out", "--rank", "2", "--device", "cpu", "--into", "two"], 0),
        (["verify", "merged", "--into", "three"], 0),
    ):
        for more in (["--part", "2/2"], ["--part", "1/2"], ["--finish"]):
            assert run([*words, *more]) == code
    assert "as loratool.json says" in " ".join(capsys.readouterr().out.split()) or Path("out").is_dir()
    assert Path("out/adapter_model.safetensors").is_file()
