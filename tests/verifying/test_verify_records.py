"""A folder that loratool wrote is held to its `loratool.json`, later by `verify` and at once by `merge --verify`."""

from __future__ import annotations

import json
from pathlib import Path

import faults
import pytest
from spoiling import flip

import loratool
from loratool import cli
from loratool.errors import UsageError, VerificationError
from loratool.files import staging

FILES = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    faults.make_base(tmp_path / "base", shards=2, hidden=32)
    faults.make_adapter(tmp_path / "adapter", layers=2, hidden=32, rank=2)
    return tmp_path


@pytest.fixture
def merged(inputs: Path) -> Path:
    loratool.merge(inputs / "base", inputs / "adapter", inputs / "merged", device="cpu", verify=True)
    return inputs / "merged"


def test_an_output_as_it_was_written_passes_by_its_record_alone(merged: Path) -> None:
    told: list[tuple[int, int]] = []
    found = loratool.verify(merged, progress=lambda done, every: told.append((done, every)))
    assert (found.verdict, found.exit_code, found.diagnoses) == ("as-recorded", 0, ())
    assert told == sorted(told)
    assert (len(told), told[-1]) == (found.files, (found.bytes_read, found.bytes_read))
    assert found.files == len(json.loads((merged / "loratool.json").read_text())["files"])
    assert "every file is what loratool.json says" in str(found)


@pytest.mark.parametrize("at", [0.3, 1.0])
@pytest.mark.parametrize("file", FILES)
def test_a_bit_in_a_weight_file_is_found_with_its_file_and_tensor(
    merged: Path, file: str, at: float, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(merged / file, at)
    found = loratool.verify(merged)
    assert (found.verdict, found.exit_code, [each.code for each in found.diagnoses]) == (
        "not-proven",
        5,
        ["file-differs"],
    )
    assert file in found.diagnoses[0].text
    assert "model.layers." in found.diagnoses[0].text or "header" in found.diagnoses[0].text
    assert cli.run(["verify", str(merged)]) == 5
    told = capsys.readouterr()
    assert file in told.out
    assert told.err.startswith("Error: ")
    assert loratool.verify(merged / file).exit_code == 5
    (other,) = {*FILES} - {file}
    assert loratool.verify(merged / other).exit_code == 0


def test_files_that_decide_nothing_are_noted(merged: Path) -> None:
    (merged / "README.md").write_text("edited")
    (merged / "more.txt").write_text("added")
    found = loratool.verify(merged)
    assert found.exit_code == 0
    assert {note.code for note in found.notes} == {"edited-since", "not-in-record"}


def test_a_file_that_is_missing_is_a_fault(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (merged / FILES[1]).unlink()
    assert cli.run(["verify", str(merged), "--quiet"]) == 5
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 2)
    assert err.splitlines()[1].startswith(f"  {FILES[1]}: ")  # which is all that there is to read
    found = loratool.verify(merged)
    assert (found.exit_code, "is missing" in str(found)) == (5, True)


def test_the_records_of_the_first_release_are_read(merged: Path) -> None:
    """It listed weights only, as "shards"."""
    record = merged / "loratool.json"
    table = json.loads(record.read_text())
    import hashlib

    digests = {name: hashlib.sha256((merged / name).read_bytes()).hexdigest() for name in FILES}
    table["shards"] = {name: {"size": (merged / name).stat().st_size, "sha256": digests[name]} for name in FILES}
    del table["files"]
    record.write_text(json.dumps(table))
    found = loratool.verify(merged)
    assert (found.exit_code, found.files, [note.code for note in found.notes]) == (0, 2, ["record-is-partial"])
    flip(merged / FILES[0], 0.9)
    assert loratool.verify(merged).exit_code == 5


def test_a_folder_without_a_record_needs_a_base_and_an_adapter(inputs: Path) -> None:
    with pytest.raises(UsageError, match="name what was merged") as raised:
        loratool.verify(inputs / "base")
    assert raised.value.hint == f"loratool verify {inputs / 'base'} --base BASE --adapter ADAPTER"


def test_merge_verify_reads_everything_again_and_says_so(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", str(inputs / "base"), str(inputs / "adapter"), "-o", str(inputs / "out"), "--device", "cpu"]
    assert cli.run([*words, "--verify"]) == 0
    assert "files read again, each as it was written" in capsys.readouterr().out
    report = loratool.merge(inputs / "base", inputs / "adapter", inputs / "again", device="cpu")
    assert report.verified == 0


def test_merge_verify_writes_nothing_where_the_disk_gives_other_bytes(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit changes after the last file was recorded, as on a faulty disk."""
    write = staging.Stage.write

    def spoil(stage: staging.Stage, name: str, content: bytes) -> None:
        if name == "loratool.json":
            flip(stage.folder / FILES[1], 0.9)
        write(stage, name, content)

    monkeypatch.setattr(staging.Stage, "write", spoil)
    loratool.merge(inputs / "base", inputs / "adapter", inputs / "unseen", device="cpu")
    assert (inputs / "unseen").is_dir()
    with pytest.raises(VerificationError, match=FILES[1]) as caught:
        loratool.merge(inputs / "base", inputs / "adapter", inputs / "out", device="cpu", verify=True)
    assert caught.value.exit_code == 5
    assert not (inputs / "out").exists()
    assert not (inputs / "out.partial").exists()
