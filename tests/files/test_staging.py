"""A stage is cleared, continued or published only as far as its journal proves it ours; else nothing in it is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from hub_client import Client
from hub_server import WRITER, Fault, HubServer
from workbench import interrupted, tree

import loratool
from loratool.cli import run
from loratool.errors import StorageError
from loratool.files import staging
from loratool.files.journal import look
from loratool.files.locks import lock_folder

SHARDS, HIDDEN = 2, 32
FIRST = "model-00001-of-00002.safetensors"
HEAD = {"loratool_stage": 2, "plan": "x", "inputs": {}, "files": ["config.json", FIRST, "extra/notes.txt"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    faults.make_base(home / "base", SHARDS, HIDDEN)
    for name in ("adapter", "other"):
        faults.make_adapter(home / name, SHARDS, HIDDEN)
    loratool.merge(home / "base", home / "adapter", home / "tuned", weights=[0.5], device="cpu")
    return home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path


def journal(stage: Path, *lines: object, **changes: object) -> None:
    """A stage with a journal of ours, and its folder `model`."""
    (stage / "model").mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in ({**HEAD, **changes}, *lines))
    (stage / "journal").write_text(text)


def notes_and_a_journal(stage: Path) -> None:
    """Somebody's diary: a file called journal proves nothing."""
    stage.mkdir()
    (stage / "journal").write_text("Monday: rain.\n")
    (stage / "notes.txt").write_text("mine")


def an_empty_journal(stage: Path) -> None:
    stage.mkdir()
    (stage / "journal").touch()


def a_journal_of_an_earlier_release(stage: Path) -> None:
    (stage / "model").mkdir(parents=True)
    (stage / "journal").write_text('{"plan": "0123"}\n')
    (stage / "model" / FIRST).write_text("finished by 0.1.0")


def a_journal_of_a_later_release(stage: Path) -> None:
    journal(stage, loratool_stage=3)


def a_journal_with_a_line_of_somebody_else(stage: Path) -> None:
    journal(stage, {"shopping": ["milk"]})


def a_journal_that_names_files_elsewhere(stage: Path) -> None:
    journal(stage, {"files": ["../../in/base/config.json"]})
    (stage.parent / "photo.jpg").write_text("mine")


def a_journal_whose_names_are_no_list(stage: Path) -> None:
    journal(stage, files="config.json")


def a_journal_that_is_a_link(stage: Path) -> None:
    journal(stage)
    (stage / "journal").rename(stage.parent / "kept")
    (stage / "journal").symlink_to(stage.parent / "kept")


def a_journal_that_is_a_pipe(stage: Path) -> None:
    stage.mkdir()
    os.mkfifo(stage / "journal")


def a_note_in_our_stage(stage: Path) -> None:
    journal(stage)
    (stage / "notes.txt").write_text("mine")


def a_note_in_the_model(stage: Path) -> None:
    journal(stage)
    (stage / "model" / "notes.txt").write_text("mine")


def a_folder_in_the_model(stage: Path) -> None:
    journal(stage)
    (stage / "model" / "checkpoint-5").mkdir()
    (stage / "model" / "checkpoint-5" / "config.json").write_text("mine")


def an_empty_folder(stage: Path) -> None:
    journal(stage)
    (stage / "model" / "mine").mkdir()


def a_hidden_file(stage: Path) -> None:
    journal(stage)
    (stage / ".notes").write_text("mine")


def a_link_in_the_place_of_a_file(stage: Path) -> None:
    journal(stage)
    (stage.parent / "kept").write_text("mine")
    (stage / "model" / "config.json").symlink_to(stage.parent / "kept")


def a_link_in_the_place_of_a_folder(stage: Path) -> None:
    journal(stage)
    (stage.parent / "kept").mkdir()
    (stage.parent / "kept" / "notes.txt").write_text("mine")
    (stage / "model" / "extra").symlink_to(stage.parent / "kept")


def a_model_that_is_a_link(stage: Path) -> None:
    journal(stage)
    (stage / "model").rmdir()
    (stage.parent / "kept").mkdir()
    (stage.parent / "kept" / "config.json").write_text("mine")
    (stage / "model").symlink_to(stage.parent / "kept")


def a_pipe_in_the_place_of_a_file(stage: Path) -> None:
    journal(stage)
    os.mkfifo(stage / "model" / "config.json")


def a_socket(stage: Path) -> None:
    journal(stage)
    place = os.open(stage, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:  # by a short way: a socket's path has 107 bytes at most
        server.bind(f"/proc/self/fd/{place}/socket")
    os.close(place)


def a_folder_in_the_place_of_a_file(stage: Path) -> None:
    journal(stage)
    (stage / "model" / "config.json").mkdir()


def a_file_of_another_user(stage: Path) -> None:
    journal(stage)
    (stage / "model" / "config.json").write_text("theirs")
    give_away(stage / "model" / "config.json")


def a_stage_of_another_user(stage: Path) -> None:
    journal(stage)
    give_away(stage)


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(path, 12345, -1)


def a_stage_that_is_a_link(stage: Path) -> None:
    journal(stage.parent / "kept")
    stage.symlink_to("kept")


def a_stage_that_is_a_file(stage: Path) -> None:
    stage.write_text("mine")


def what_fetching_leaves_in_a_stage_that_fetches_nothing(stage: Path) -> None:
    journal(stage)
    (stage / "fetched" / ("0" * 32)).mkdir(parents=True)
    (stage / "fetched" / ("0" * 32) / "config.json").write_text("mine")


def what_is_replaced_in_a_stage_that_replaces_nothing(stage: Path) -> None:
    journal(stage)
    (stage / "discarded").mkdir()
    (stage / "discarded" / "config.json").write_text("mine")


STRANGERS = (
    notes_and_a_journal,
    an_empty_journal,
    a_journal_of_an_earlier_release,
    a_journal_of_a_later_release,
    a_journal_with_a_line_of_somebody_else,
    a_journal_that_names_files_elsewhere,
    a_journal_whose_names_are_no_list,
    a_journal_that_is_a_link,
    a_journal_that_is_a_pipe,
    a_note_in_our_stage,
    a_note_in_the_model,
    a_folder_in_the_model,
    an_empty_folder,
    a_hidden_file,
    a_link_in_the_place_of_a_file,
    a_link_in_the_place_of_a_folder,
    a_model_that_is_a_link,
    a_pipe_in_the_place_of_a_file,
    a_socket,
    a_folder_in_the_place_of_a_file,
    a_file_of_another_user,
    a_stage_of_another_user,
    a_stage_that_is_a_link,
    a_stage_that_is_a_file,
    what_fetching_leaves_in_a_stage_that_fetches_nothing,
    what_is_replaced_in_a_stage_that_replaces_nothing,
)


def refused(words: list[str], root: Path, capsys: pytest.CaptureFixture[str], code: int = 6) -> str:
    """What a command says that is refused; nothing below `root` changes, not even a time."""
    before = tree(root)
    capsys.readouterr()
    assert run(words) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "Error: " in said.err
    assert tree(root) == before
    return said.err


# Every command has some of them, and the two that make a folder in different ways have all.
SOME = (notes_and_a_journal, a_journal_of_an_earlier_release, a_note_in_the_model, a_stage_that_is_a_link)
CELLS = [(c, s) for c in faults.COMMANDS for s in STRANGERS if c in ("merge", "rescale --bake") or s in SOME]


@pytest.mark.parametrize(("command", "stranger"), CELLS)
def test_a_stage_that_holds_what_is_not_ours_is_refused_and_nothing_changes(
    inputs: Path, home: Path, capsys: pytest.CaptureFixture[str], command: str, stranger: Callable[[Path], None]
) -> None:
    """By the command, by its dry run, and where an output is replaced too; the message names the stage."""
    out = home / "out" / "merged"
    stranger(home / "out" / "merged.partial")
    words = [*faults.COMMANDS[command](inputs), "-o", str(out)]
    for more in ([], ["--dry-run"]):
        assert "merged.partial" in refused([*words, *more], home, capsys)
    shutil.copytree(inputs / ("tuned" if command == "merge" else "adapter"), out)
    assert "merged.partial" in refused([*words, "--overwrite"], home, capsys)


ODD: dict[Callable[[Path], None], str] = {
    a_note_in_our_stage: "notes.txt",
    a_note_in_the_model: "model/notes.txt",
    a_folder_in_the_model: "model/checkpoint-5",
    an_empty_folder: "model/mine",
    a_hidden_file: ".notes",
    a_link_in_the_place_of_a_file: "model/config.json",
    a_pipe_in_the_place_of_a_file: "model/config.json",
    a_socket: "socket",
    notes_and_a_journal: "journal",
    an_empty_journal: "journal",
    a_journal_of_an_earlier_release: "journal",
}


@pytest.mark.parametrize("stranger", ODD)
@pytest.mark.parametrize("command", ["merge", "rescale"])
def test_both_ways_out_that_the_refusal_tells_work(
    inputs: Path, home: Path, capsys: pytest.CaptureFixture[str], command: str, stranger: Callable[[Path], None]
) -> None:
    """Another OUT, and moving away what the message names: all of it, where no journal is ours."""
    stage, away = home / "out" / "merged.partial", home / "away"
    stranger(stage)
    words = [*faults.COMMANDS[command](inputs), "-o"]
    said = refused([*words, str(home / "out" / "merged")], home, capsys)
    assert "another OUT" in said
    assert "move them away" in said
    named = re.findall(r"^  (\S+): ", said, re.MULTILINE)
    assert ODD[stranger] in named
    before = tree(stage)
    assert run([*words, str(home / "out" / "other")]) == 0
    assert tree(stage) == before
    away.mkdir()
    for name in named:
        if os.path.lexists(stage / name):  # it may have gone with its folder
            (stage / name).rename(away / Path(name).name)
    assert run([*words, str(home / "out" / "merged")]) == 0
    assert sorted(os.listdir(home / "out")) == sorted({"merged", "other"} | ({"kept"} & set(os.listdir(home / "out"))))


def test_a_stage_that_was_begun_and_no_more_is_begun_again(inputs: Path, home: Path) -> None:
    """Empty, or with a journal that a kill tore at any byte: nothing of anybody's can be lost."""
    head = json.dumps(HEAD).encode() + b"\n"
    for torn in (None, *range(0, 60, 7), len(head) - 1, len(head)):
        stage = home / "out" / "merged.partial"
        stage.mkdir()
        if torn is not None:
            (stage / "journal.new").write_bytes(head[:torn])
        loratool.rescale(inputs / "adapter", home / "out" / "merged", scale=2)
        assert os.listdir(home / "out") == ["merged"]
        shutil.rmtree(home / "out" / "merged")


def test_what_only_looks_like_a_torn_journal_is_not_ours(
    inputs: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = home / "out" / "merged.partial"
    stage.mkdir()
    (stage / "journal.new").write_text('{"plans": "for the summer"}')
    said = refused([*faults.COMMANDS["rescale"](inputs), "-o", str(home / "out" / "merged")], home, capsys)
    assert "journal.new" in said


def test_the_journal_names_every_file_before_it_is_there(inputs: Path, home: Path) -> None:
    """At every moment of every command: what a kill leaves is ours by its journal."""
    seen: list[str] = []
    real = os.open

    def opening(path: Any, flags: int, *more: Any, **named: Any) -> int:
        descriptor = real(path, flags, *more, **named)
        stage = home / "out" / "merged.partial"
        if flags & os.O_CREAT and str(path).startswith(f"{stage}/"):
            assert look(stage) is None or Path(path).name != "journal.new"
            seen.append(str(path))
        return descriptor

    for command, words in faults.COMMANDS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", opening)
            seen.clear()
            assert run([*words(inputs), "-o", str(home / "out" / "merged"), "-q"]) == 0, command
        assert len(seen) > 3
        shutil.rmtree(home / "out" / "merged")


# ---------------------------------------------------------------- files that somebody drops into a stage


@pytest.mark.parametrize("place", ["notes.txt", "model/notes.txt", "model/extra/notes.md"])
def test_a_file_that_is_dropped_into_an_interrupted_merge_survives(inputs: Path, home: Path, place: str) -> None:
    """It is refused until the file is moved away; then the merge goes on where it was."""
    out = home / "out" / "merged"
    finished = interrupted(inputs / "base", inputs / "adapter", out)
    dropped = home / "out" / "merged.partial" / place
    dropped.parent.mkdir(exist_ok=True)
    dropped.write_text("mine")
    before = tree(home)
    with pytest.raises(StorageError, match=Path(place).name):
        loratool.merge(inputs / "base", inputs / "adapter", out, device="cpu")
    assert tree(home) == before
    dropped.rename(home / "mine")
    report = loratool.merge(inputs / "base", inputs / "adapter", out, device="cpu")
    assert list(report.resumed) == finished
    assert (home / "mine").read_text() == "mine"
    assert os.listdir(home / "out") == ["merged"]


class Dropping(staging.Stage):
    """A stage into which somebody puts a file while it is being filled."""

    place = ""

    def write(self, name: str, content: bytes) -> None:
        super().write(name, content)
        (self.home / self.place).write_text("mine")


@pytest.mark.parametrize("place", ["notes.txt", "model/notes.txt"])
@pytest.mark.parametrize("command", faults.COMMANDS)
def test_a_file_that_is_dropped_while_a_command_runs_is_neither_published_nor_deleted(
    inputs: Path, home: Path, capsys: pytest.CaptureFixture[str], command: str, place: str
) -> None:
    """The command ends with exit code 6. What was its own is gone, or waits to be continued; the file stays."""
    words = [*faults.COMMANDS[command](inputs), "-o", str(home / "out" / "merged"), "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dropping, "place", place)
        patch.setattr(staging, "Stage", Dropping)
        assert run(words) == 6
    assert place in capsys.readouterr().err
    dropped = home / "out" / "merged.partial" / place
    assert dropped.read_text() == "mine"
    assert not (home / "out" / "merged").exists()
    dropped.rename(home / "mine")
    if command != "merge":  # whose finished files wait; the others begin anew, in an empty folder
        assert [path for path in dropped.parents[len(Path(place).parts) - 1].rglob("*") if path.is_file()] == []
        shutil.rmtree(home / "out" / "merged.partial")
    assert run(words) == 0
    assert os.listdir(home / "out") == ["merged"]


def test_a_file_in_the_place_of_one_that_will_be_written_is_not_written_over(inputs: Path, home: Path) -> None:
    """A link, say, that somebody puts there after the stage was looked at."""

    class Linking(staging.Stage):
        def write(self, name: str, content: bytes) -> None:
            (self.folder / name).symlink_to(home / "mine")
            super().write(name, content)

    (home / "mine").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "Stage", Linking)
        with pytest.raises(StorageError):
            loratool.rescale(inputs / "adapter", home / "out" / "merged", scale=2)
    assert (home / "mine").read_text() == "mine"


# ---------------------------------------------------------------- commands that are refused for other reasons


REFUSED: dict[str, tuple[list[str], int]] = {
    "OUT is there": ([], 2),
    "OUT is there, dry run": (["--dry-run"], 2),
    "a wrong option": (["--no-such-option"], 2),
    "a weight too many": (["-w", "1", "-w", "2"], 2),
    "a map without a pattern": (["--map", "nonsense"], 2),
    "no memory": (["--max-memory", "1MB", "--overwrite"], 2),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("state", ["nothing", "finished files", "a published stage"])
def test_a_refused_merge_changes_nothing_whatever_stands_beside_its_output(
    inputs: Path, home: Path, capsys: pytest.CaptureFixture[str], case: str, state: str
) -> None:
    """Not the stage that an interrupted run of the same merge left, and not the one of a run that was killed at its end."""
    out = home / "out" / "merged"
    shutil.copytree(inputs / "tuned", out)
    if state == "finished files":
        interrupted(inputs / "base", inputs / "adapter", out, overwrite=True)
    elif state == "a published stage":
        journal(home / "out" / "merged.partial", {"replaces": ["config.json"]})
        (home / "out" / "merged.partial" / "model" / "config.json").write_text("{}")
    more, code = REFUSED[case]
    refused([*faults.COMMANDS["merge"](inputs), "-o", str(out), *more], home, capsys, code)


EMPTY: dict[str, list[object]] = {"a journal": [], "one of an earlier run": [{"files": ["model.safetensors"]}]}


@pytest.mark.parametrize("command", ["merge", "rescale", "combine"])
@pytest.mark.parametrize("case", [*EMPTY, "no journal", "folders alone"])
def test_an_output_that_is_refused_loses_a_stage_in_which_nothing_was_left(
    inputs: Path, home: Path, capsys: pytest.CaptureFixture[str], command: str, case: str
) -> None:
    """A kill while a run cleared up leaves such a stage. Nothing says here that OUT is of that run, so nobody claims it."""
    out = home / "out" / "merged"
    stage = home / "out" / "merged.partial"
    shutil.copytree(inputs / "tuned", out)
    before = tree(out)
    if case == "folders alone":
        journal(stage)
    elif case == "no journal":
        stage.mkdir()
    else:
        journal(stage, *EMPTY[case])
        (stage / "model").rmdir()
    assert run([*faults.COMMANDS[command](inputs), "-o", str(out)]) == 2
    assert f"{out} already exists; pass --overwrite" in capsys.readouterr().err
    assert tree(out) == before
    assert os.listdir(home / "out") == ["merged"]


@pytest.mark.parametrize("case", ["parts", "a note", "a link", "in use"])
def test_a_stage_in_which_something_is_stays_when_its_output_is_refused(
    inputs: Path, home: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """Workers of a merge in parts hold no lock, so that of theirs even a journal alone stays."""
    out, stage = home / "out" / "merged", home / "out" / "merged.partial"
    shutil.copytree(inputs / "tuned", out)
    journal(stage, **({"parts": {"count": 2}} if case == "parts" else {}))
    if case == "a note":
        (stage / "notes.txt").write_text("mine")
    elif case == "a link":
        (stage / "model" / "config.json").symlink_to(out / "config.json")
    lock = lock_folder(stage) if case == "in use" else None
    refused([*faults.COMMANDS["merge"](inputs), "-o", str(out)], home, capsys, 2)
    if lock is not None:
        lock.release()


@pytest.mark.parametrize("state", ["nothing", "finished files"])
def test_a_merge_that_does_not_fit_or_is_malformed_changes_nothing(
    inputs: Path, home: Path, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    out = home / "out" / "merged"
    if state == "finished files":
        interrupted(inputs / "base", inputs / "adapter", out)
    (home / "in").mkdir()
    unfit = faults.make_adapter(home / "in" / "unfit", SHARDS, HIDDEN * 2)
    broken = faults.make_adapter(home / "in" / "broken", SHARDS, HIDDEN)
    (broken / "adapter_config.json").write_text("{")
    for adapter, code in ((unfit, 4), (broken, 3), (home / "nowhere", 3)):
        for more in ([], ["--dry-run"], ["--overwrite"]):
            refused(["merge", f"{inputs}/base", str(adapter), "-o", str(out), *more], home, capsys, code)


@pytest.mark.parametrize("command", faults.COMMANDS)
def test_a_dry_run_changes_nothing(inputs: Path, home: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    out = home / "out" / "merged"
    interrupted(inputs / "base", inputs / "adapter", out)
    before = tree(home), tree(inputs)
    assert run([*faults.COMMANDS[command](inputs), "-o", str(out), "--dry-run"]) == 0
    assert (tree(home), tree(inputs)) == before


def test_a_disk_without_room_changes_nothing(
    inputs: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(home)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    for words in faults.COMMANDS.values():
        assert "100 B is free" in refused([*words(inputs), "-o", str(home / "out" / "merged")], home, capsys)


# ---------------------------------------------------------------- streaming merges


@pytest.fixture
def hub(inputs: Path) -> Any:
    with HubServer() as server:
        server.add("org/base", inputs / "base")
        yield server


def test_a_local_and_a_streaming_merge_of_the_same_name_are_interrupted_side_by_side_and_both_go_on(
    hub: HubServer, inputs: Path, home: Path
) -> None:
    """`merge -o merged` and `merge --stream --push-to-hub alice/merged` in one folder, whatever the order."""
    client, work = Client(hub, home / "home", WRITER), home / "out"
    words = ["merge", "org/base", inputs / "adapter", "--stream", "--push-to-hub", "alice/merged"]
    finished = interrupted(inputs / "base", inputs / "adapter", work / "merged")
    stage = tree(work / "merged.partial")
    hub.faults.append(Fault("POST", "/commit/", skip=2, times=99, status=403))
    client.refused(*words, cwd=work)
    assert tree(work / "merged.partial") == stage
    hub.faults.clear()
    ran = json.loads(client.works(*words, "--json", cwd=work).out)
    assert len(ran["resumed"]) == 1
    assert tree(work / "merged.partial") == stage
    assert os.listdir(work) == ["merged.partial"]
    report = loratool.merge(inputs / "base", inputs / "adapter", work / "merged", device="cpu")
    assert list(report.resumed) == finished


@pytest.mark.parametrize(
    "stranger", [notes_and_a_journal, a_note_in_our_stage, a_note_in_the_model, a_stage_that_is_a_link]
)
def test_a_streaming_merge_touches_nothing_of_others_in_its_own_place(
    hub: HubServer, inputs: Path, home: Path, stranger: Callable[[Path], None]
) -> None:
    """Nor does its dry run, and no repository is made."""
    client, work = Client(hub, home / "home", WRITER), home / "out"
    words = ["merge", "org/base", inputs / "adapter", "--stream", "--push-to-hub", "alice/merged"]
    stranger(work / "merged.streaming")
    before = tree(work)
    for more in ([], ["--dry-run"]):
        assert "merged.streaming" in client.refused(*words, *more, code=6, cwd=work)
        assert tree(work) == before
    assert "alice/merged" not in hub.repos


def test_a_streaming_merge_that_is_refused_and_its_dry_run_change_nothing(
    hub: HubServer, inputs: Path, home: Path
) -> None:
    client, work = Client(hub, home / "home", WRITER), home / "out"
    unfit = faults.make_adapter(home / "in" / "unfit", SHARDS, HIDDEN * 2)
    before = tree(work)
    client.refused("merge", "org/base", unfit, "--stream", "--push-to-hub", "alice/merged", code=4, cwd=work)
    assert tree(work) == before
    client.works("merge", "org/base", inputs / "adapter", "--stream", "--push-to-hub", "alice/a", "--dry-run", cwd=work)
    assert tree(work) == before
