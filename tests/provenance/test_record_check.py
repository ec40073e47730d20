"""A folder that loratool made is held to its own loratool.json by `inspect --check` and by `push`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
from hub_client import Client
from hub_server import WRITER, HubServer
from peft_files import edit_config
from spoiling import flip
from tree_digests import file_entry

import loratool
from loratool import cli
from loratool.errors import VerificationError

HIDDEN, LAYERS = 64, 2


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each command that writes a folder has written."""
    home = tmp_path_factory.mktemp("outputs")
    base, adapter, other = home / "base", home / "adapter", home / "other"
    faults.make_base(base, shards=LAYERS, hidden=HIDDEN)
    faults.make_adapter(adapter, layers=LAYERS, hidden=HIDDEN, rank=4)
    faults.make_adapter(other, layers=LAYERS, hidden=HIDDEN, rank=2)
    for folder in (base, adapter):
        (folder / "tokenizer.json").write_text('{"a": 1}')
        (folder / "LICENSE").write_text("terms")
    loratool.merge(base, adapter, home / "merge", device="cpu")
    loratool.rescale(adapter, home / "rescale", scale=0.5)
    loratool.combine([adapter, other], home / "combine", device="cpu")
    loratool.resize(adapter, home / "resize", rank=2, device="cpu")
    loratool.extract(base, home / "merge", home / "extract", rank=2, device="cpu")
    return home


COMMANDS = ("merge", "rescale", "combine", "resize", "extract")


@pytest.mark.parametrize("command", ["inspect --check", "record", "verify"])
@pytest.mark.parametrize("place", [".", "adapter_model.safetensors"])
def test_the_working_folder_and_a_file_in_it_have_the_record_that_is_there(
    command: str, place: str, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of the folder has no name, to which that of a file's own record could be added."""
    monkeypatch.chdir(outputs / "rescale")
    name, *options = command.split()
    assert cli.run([name, place, *options]) == 0


def flip_low_bit(path: Path) -> None:
    """The lowest bit of the last value: what nothing but a digest finds."""
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "the lowest bit of a value": flip_low_bit,
    "a bit of the header": lambda path: flip(path, 0.0005),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 8),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroes": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "a folder": become_a_folder,
}


def checked(path: Path, *more: str) -> tuple[int, list[dict[str, str]]]:
    """The exit code of a check, and what it found."""
    facts = loratool.inspect(path, check=True)
    code = cli.run(["inspect", str(path), "--check", "-q", *more])
    return code, [{"level": f.level, "code": f.code, "message": f.message} for f in facts.findings or ()]


def decisive(folder: Path) -> list[str]:
    """The files of an output that decide what it computes."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(("model", "adapter_", "config")))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_output_is_what_its_record_says_of_every_file(outputs: Path, command: str) -> None:
    """By hashlib, and by the check, which has nothing to say of an output that nobody touched."""
    folder = outputs / command
    listed = json.loads((folder / "loratool.json").read_text())["files"]
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del found["loratool.json"]
    expected = {name: file_entry(name, content) for name, content in found.items()}
    assert listed == expected
    code, findings = checked(folder)
    assert code == 0
    assert not {"not-as-written", "edited-since", "not-in-record", "record-is-partial"} & {f["code"] for f in findings}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named_with_exit_code_5(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, damage: str
) -> None:
    """Every weight file of every kind of output, also where it cannot even be read any more; push sends nothing."""
    folder = Path(shutil.copytree(outputs / command, tmp_path / "x"))
    name = next(n for n in decisive(folder) if n.endswith(".safetensors"))
    DAMAGES[damage](folder / name)
    code, findings = checked(folder)
    assert code == 5
    assert any(f["code"] == "not-as-written" and f["message"].startswith(f"{name}: ") for f in findings), findings
    capsys.readouterr()
    assert cli.run(["push", str(folder), "alice/new", "--dry-run"]) == 5
    told = capsys.readouterr()
    assert f"  {name}: " in told.err
    assert told.out == ""


@pytest.mark.parametrize("command", ["merge", "rescale"])
def test_an_index_or_a_config_that_is_another_is_a_problem_too(outputs: Path, tmp_path: Path, command: str) -> None:
    """They decide what is computed as much as the weights do; files that were swapped are both named."""
    for name in decisive(outputs / command):
        folder = Path(shutil.copytree(outputs / command, tmp_path / name))
        if name.endswith(".json"):
            (folder / name).write_text((folder / name).read_text() + "\n")
            code, findings = checked(folder)
            assert code == 5
            assert [f["message"].split(":")[0] for f in findings if f["code"] == "not-as-written"] == [name]
    if command == "merge":
        folder = Path(shutil.copytree(outputs / command, tmp_path / "swapped"))
        one, other = sorted(folder.glob("model-*.safetensors"))
        one.rename(folder / "x"), other.rename(one), (folder / "x").rename(other)
        code, findings = checked(folder)
        assert code == 5
        assert len([f for f in findings if f["code"] == "not-as-written"]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_what_people_edit_is_a_note(outputs: Path, tmp_path: Path, command: str) -> None:
    """A card, a tokenizer and a licence that were edited or removed, and files that were added, are told and no more."""
    folder = Path(shutil.copytree(outputs / command, tmp_path / "x"))
    (folder / "README.md").write_text("# mine\n")
    names = ["README.md"]
    if (folder / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_text("{}")
        (folder / "LICENSE").unlink()
        names += ["LICENSE", "tokenizer.json"]
    (folder / "notes.txt").write_text("added")
    code, findings = checked(folder)
    assert code == 0
    told = {f["message"] for f in findings if f["code"] == "edited-since"}
    assert {message.split()[0] for message in told} == set(names)
    assert any("notes.txt" in f["message"] for f in findings if f["code"] == "not-in-record")
    report = loratool.push(folder, "alice/new", dry_run=True)
    assert {"edited-since", "not-in-record"} <= {note.code for note in report.notes}


def test_the_way_out_of_a_change_on_purpose_works(outputs: Path, tmp_path: Path) -> None:
    """Whoever edits a config removes loratool.json, as the message says; then the folder is pushed as any other."""
    folder = Path(shutil.copytree(outputs / "rescale", tmp_path / "x"))
    edit_config(folder, base_model_name_or_path="org/base")
    with pytest.raises(VerificationError, match=r"delete loratool\.json"):
        loratool.push(folder, "alice/new", dry_run=True)
    (folder / "loratool.json").unlink()
    assert loratool.push(folder, "alice/new", dry_run=True).kind == "adapter"
    assert checked(folder)[0] == 0


def test_a_record_of_the_first_release_lists_weights_alone_and_that_is_said(outputs: Path, tmp_path: Path) -> None:
    """0.1.0 wrote "shards" for a merged model, and nothing of the kind for an adapter."""
    folder = Path(shutil.copytree(outputs / "merge", tmp_path / "model"))
    table = json.loads((folder / "loratool.json").read_text())
    weights = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
    table["shards"] = {n: {"size": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in weights.items()}
    del table["files"]
    (folder / "loratool.json").write_text(json.dumps(table))
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    code, findings = checked(folder)
    assert code == 0
    assert ["weights only" in f["message"] for f in findings if f["code"] == "record-is-partial"] == [True]
    flip_low_bit(folder / "model-00002-of-00002.safetensors")
    assert checked(folder)[0] == 5
    folder = Path(shutil.copytree(outputs / "rescale", tmp_path / "adapter"))
    table = json.loads((folder / "loratool.json").read_text())
    del table["files"]
    (folder / "loratool.json").write_text(json.dumps(table))
    code, findings = checked(folder)
    assert code == 0
    assert ["no files" in f["message"] for f in findings if f["code"] == "record-is-partial"] == [True]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"files": 7}',
        b'{"files": {"../x": {"size": 1, "sha256": "0"}}}',
        b'{"files": {"a": 1}}',
    ],
)
def test_a_record_that_is_none_is_no_bug(outputs: Path, tmp_path: Path, content: bytes) -> None:
    """What cannot be read is a problem, for the record itself may be what was damaged; odd entries are passed over."""
    folder = Path(shutil.copytree(outputs / "rescale", tmp_path / "x"))
    (folder / "loratool.json").write_bytes(content)
    code, findings = checked(folder)
    assert code == (5 if not content.startswith(b'{"files') else 0), findings


def test_one_file_of_an_output_is_compared_by_itself(outputs: Path, tmp_path: Path) -> None:
    """Where one file is named, the others do not count."""
    folder = Path(shutil.copytree(outputs / "merge", tmp_path / "x"))
    flip_low_bit(folder / "model-00002-of-00002.safetensors")
    assert checked(folder / "model-00001-of-00002.safetensors")[0] == 0
    assert checked(folder / "model-00002-of-00002.safetensors")[0] == 5


def test_of_several_paths_the_worst_counts(outputs: Path, tmp_path: Path) -> None:
    """3 is worse than 5, as the smallest code other than 0 is."""
    damaged = Path(shutil.copytree(outputs / "rescale", tmp_path / "damaged"))
    flip_low_bit(damaged / "adapter_model.safetensors")
    malformed = tmp_path / "malformed"
    shutil.copytree(damaged, malformed)
    (malformed / "loratool.json").unlink()
    os.truncate(malformed / "adapter_model.safetensors", 100)
    words = ["inspect", "--check", "-q", str(outputs / "resize")]
    assert cli.run([*words, str(damaged)]) == 5
    assert cli.run([*words, str(damaged), str(malformed)]) == 3


def test_a_streamed_merge_is_checked_where_it_is(outputs: Path, tmp_path: Path) -> None:
    """By the real client: the repository's loratool.json comes along, and a weight file that changed there is named."""
    with HubServer() as hub:
        hub.add("org/base", outputs / "base")
        hub.add("org/adapter", outputs / "adapter")
        client = Client(hub, tmp_path / "home", WRITER)
        client.works("merge", "org/base", "org/adapter", "--stream", "--push-to-hub", "alice/new", cwd=tmp_path)
        client.works("inspect", "alice/new", "--check")
        files = dict(hub.repos["alice/new"].commits[hub.repos["alice/new"].branches["main"]])
        raw = bytearray(files["model-00001-of-00002.safetensors"].content)
        raw[-2] ^= 1
        hub.repos["alice/new"].commit("main", {**files, "model-00001-of-00002.safetensors": hub.blob(bytes(raw))}, "x")
        ran = client.run("inspect", "alice/new", "--check")
        assert ran.code == 5, ran
        assert "model-00001-of-00002.safetensors" in ran.out


def test_a_quiet_check_that_fails_says_why(outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An exit code alone would tell a script that something is wrong, and nobody what it was."""
    folder = tmp_path / "damaged"
    shutil.copytree(outputs / "merge", folder)
    weights = min(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    (folder / "config.json").unlink()
    capsys.readouterr()
    assert cli.run(["inspect", str(folder), "--check", "-q"]) == 5
    found = capsys.readouterr()
    assert found.out == ""
    error, hint = found.err.splitlines()
    assert error.startswith(f"Error: {folder}: ")
    assert ", and " in error
    assert hint == f"hint: loratool inspect {folder} --check"
