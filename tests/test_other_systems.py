"""Windows and macOS, simulated: what they lack is taken away, and every command works all the same, or says why not."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import faults
import other_places
import pytest
from other_places import Elsewhere
from paths import PACKAGE, ROOT
from safetensors.torch import load_file, save_file

from loratool.cli import COMMANDS as NAMES, command as command_of, run
from loratool.cli.operands import Output, Place
from loratool.files import names, process, system
from loratool.files.hub_names import parse

if TYPE_CHECKING:
    import click

HELPERS = ROOT / "tests" / "helpers"

MERGE = ["merge", "in/base", "in/adapter", "-v", "-o"]
VERIFY = ["verify", "made/merged", "--base", "in/base", "--adapter", "in/adapter", "-v"]
COMMANDS = [
    [*MERGE, "made/merged"],
    [*MERGE, "made/replaced"],
    [*MERGE, "made/replaced", "-w", "0.5", "--overwrite"],
    ["killed", *MERGE, "made/resumed", "--workers", "1"],
    [*MERGE, "made/resumed"],
    [*MERGE, "made/planned", "--dry-run"],
    ["rescale", "in/adapter", "-o", "made/scaled", "--scale", "0.5", "-v"],
    ["resize", "in/adapter", "-o", "made/small", "--rank", "1", "-v"],
    ["combine", "in/adapter", "made/scaled", "-o", "made/both", "-v"],
    ["extract", "in/base", "made/merged", "-o", "made/extracted", "--rank", "2", "-v"],
    ["compare", "in/adapter", "made/scaled", "-v"],
    ["verify", "made/merged", "-v"],
    VERIFY,
    ["inspect", "in/adapter", "made/merged", "--check", "--html", "made/page.html", "-v"],
    ["inspect", "in/adapter", "--base", "in/base", "--values", "-v"],
    [
        "estimate",
        "in/base",
        "--rank",
        "4",
        "--target",
        "q_proj",
        "--html",
        "made/estimate.html",
        "--svg",
        "made/svg",
        "-v",
    ],
    ["push", "made/merged", "me/merged", "--dry-run", "-v"],
    ["merge", "in/base", "in/adapter", "--stream", "--push-to-hub", "me/merged", "--dry-run", "-v"],
    ["merge", "in/one.safetensors", "in/adapter", "-o", "made/one.safetensors", "-v"],
    ["merge", "in/one.safetensors", "in/adapter", "-w", "2", "-o", "made/one.safetensors", "--overwrite", "-v"],
    [*MERGE, "made/first", "--also", "made/second=in/adapter"],
    *([*MERGE, "made/parts", *way] for way in (["--part", "1/2"], ["--status"], ["--part", "2/2"], ["--finish"])),
    [*MERGE, "made/given-up", "--part", "1/2"],
    [*MERGE, "made/given-up", "--abort"],
    [*VERIFY, "--part", "1/1", "--into", "made/verified"],
    [*VERIFY, "--finish", "--into", "made/verified"],
    ["plan", "in/base", "in/adapter", "--simulate", "1,2", "-v"],
    ["convert", "in/adapter", "-o", "made/mlx", "--to", "mlx", "-v"],
    ["convert", "in/adapter", "-o", "made/adapter.gguf", "--to", "gguf", "--base", "in/base", "-v"],
    ["compress", "in/adapter", "made/scaled", "-o", "made/fleet", "--rank", "2", "-v"],
    ["compress", "made/small", "--into", "made/fleet", "-v"],
    ["expand", "made/fleet", "scaled", "-o", "made/expanded", "-v"],
    ["rebase", "in/adapter", "--from", "in/base", "--onto", "made/merged", "-o", "made/rebased", "--force", "-v"],
    ["index", "in/adapter", "made/scaled", "-o", "made/adapters.index", "-v"],
    ["inspect", "in/adapter", "--near", "made/adapters.index", "-v"],
    ["inspect", "made", "--where", "rank>0", "-v"],
    ["record", "made/merged", "-v"],
    ["reproduce", "made/merged", "--from", "in", "-o", "made/again", "-v"],
    ["run", "in/steps.yaml", "-v"],
    ["run", "in/steps.yaml", "-v"],
    ["demo", "made/demo", "-v"],
    ["completion", "bash"],
    ["help", "operands", "-v"],
    ["--help"],
]
STEPS = """\
steps:
- rescale: {adapter: ./adapter, scale: 2, output: ../made/doubled}
- merge: {base: ./base, adapters: [../made/doubled], output: ../made/stepped}
"""
DIRECT = "no direct disk writes on this system; output files are written through the page cache"
SWAPS = (
    "folders cannot be swapped in one step on this system; while an output was being replaced, it did not exist for a "
    "moment"
)
MEMORY = "this system does not report process memory; peak memory is reported as 0"
FOLDERS = "folders cannot be synced on this system; a power failure right after the end may undo the last rename"
LOCKS = "no file locks on this system; two runs may write the same output at once"
SPACE = "this system does not report free disk space, so it is not checked whether the output fits"
LINKS = (
    "no links in the Hub's cache on this system, which name files by their SHA-256; digests of files from the Hub are "
    "computed"
)
LACKING = {"macos": {DIRECT, SWAPS}, "windows": {DIRECT, SWAPS, MEMORY, FOLDERS, LINKS}}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def make_inputs(folder: Path) -> None:
    faults.make_base(folder / "base")
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "torch_dtype": "bfloat16"}
    (folder / "base" / "config.json").write_text(json.dumps({**config, **more}))
    faults.make_adapter(folder / "adapter")
    shards = [load_file(path) for path in sorted((folder / "base").glob("*.safetensors"))]
    save_file({name: value for shard in shards for name, value in shard.items()}, folder / "one.safetensors")
    (folder / "steps.yaml").write_text(STEPS)
    (folder / "elsewhere.yaml").write_text(other_places.STEPS)


def run_on(
    name: str, root: Path, commands: Sequence[Sequence[str]], elsewhere: Mapping[str, str]
) -> tuple[list[Ended], int]:
    """The commands on a simulated system, in one process; and how often a disk was told to empty its own cache."""
    settings = {
        **elsewhere,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",  # text is ASCII, where nobody says what it is
    }
    done = subprocess.run(
        [sys.executable, str(HELPERS / "other_systems.py"), name, str(root)],
        input=json.dumps(commands), env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return [Ended(each["code"], each["out"], each["err"]) for each in answer["outcomes"]], answer["synced"]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands make on this system, with nothing taken away."""
    root = tmp_path_factory.mktemp("usual")
    make_inputs(root / "in")
    (root / "made").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in COMMANDS:
            if command[0] != "killed":
                assert run(command) == 0, command
    shutil.copytree(root / "made" / "fleet", root / "in" / "fleet")
    return root


@pytest.fixture(scope="module")
def elsewhere(usual: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """A Hub and a store."""
    with other_places.serving(usual / "in", tmp_path_factory.mktemp("elsewhere")) as servers:
        yield servers


@pytest.fixture(scope="module")
def usual_elsewhere(usual: Path, elsewhere: Elsewhere) -> dict[str, bytes]:
    """What the commands make on the Hub and in a store, with nothing taken away."""
    done = other_places.run_apart(other_places.MAKING, usual, elsewhere.settings(usual))
    assert [*zip(other_places.MAKING, done, strict=True)] == [(words, 0) for words in other_places.MAKING]
    return elsewhere.cleared()


@dataclass(frozen=True)
class Simulated:
    """What a simulated system made, and how its commands ended."""

    root: Path
    ended: list[Ended]  # with commands that use what is here
    ended_elsewhere: list[Ended]
    refused: list[Ended]
    synced: int
    made_elsewhere: dict[str, bytes]


def simulated(
    name: str,
    root: Path,
    elsewhere: Elsewhere,
    commands: Sequence[Sequence[str]],
    refused: Sequence[Sequence[str]] = (),
) -> Simulated:
    """A system on which commands were run, then those with places elsewhere, then those that are refused."""
    every = [*commands, *other_places.COMMANDS, *refused]
    ended, synced = run_on(name, root, every, elsewhere.settings(root))
    here, there = len(commands), len(commands) + len(other_places.COMMANDS)
    return Simulated(root, ended[:here], ended[here:there], ended[there:], synced, elsewhere.cleared())


@pytest.fixture(scope="module")
def windows(
    usual: Path, usual_elsewhere: object, elsewhere: Elsewhere, tmp_path_factory: pytest.TempPathFactory
) -> Simulated:
    """All commands, as somebody at Windows would type them, and then those that are refused there: in one process."""
    root = tmp_path_factory.mktemp("windows") / "root"
    shutil.copytree(usual / "in", root / "in")
    (root / "made").mkdir()
    for name, files in ELSEWHERE.items():
        shutil.copytree(usual / "in" / name, root.parent / name)
        for file in files:
            (root.parent / name / file).write_text(file)
    typed = [
        [word.replace("/", "\\") if word.startswith(("in/", "made/")) else word for word in command]
        for command in COMMANDS
    ]
    deep = "d" * (225 - len(str(root)))  # the stage has room for its journal, and not for the longest file
    refused = [[w.replace("HERE", str(root.parent)).replace("DEEP", deep) for w in command] for command in REFUSED]
    return simulated("windows", root, elsewhere, typed, refused)


@pytest.fixture(scope="module")
def macos(
    usual: Path, usual_elsewhere: object, elsewhere: Elsewhere, tmp_path_factory: pytest.TempPathFactory
) -> Simulated:
    """All commands."""
    root = tmp_path_factory.mktemp("macos")
    shutil.copytree(usual / "in", root / "in")
    (root / "made").mkdir()
    return simulated("macos", root, elsewhere, COMMANDS)


def test_every_command_is_tried() -> None:
    assert {word for command in COMMANDS for word in command[:2]} >= {*NAMES}


# Commands whose places their parameters do not tell; an index and a plan are never written elsewhere.
PLACES = {"record": {"store"}, "reproduce": {"store", "into a store"}, "push": {"store", "Hub"}}
ONLY_HERE = ("index", "plan")


def places_of(command: click.Command) -> set[str]:
    """The kinds of places that a command takes, by its parameters."""
    found = set(PLACES.get(str(command.name), ()))
    if any(isinstance(each.type, Place) and each.type.role not in ("folder", "repository") for each in command.params):
        found |= {"Hub", "store"}
    if command.name not in (*ONLY_HERE, *PLACES) and any(isinstance(each, Output) for each in command.params):
        found.add("into a store")
    return found | {"to the Hub" for each in command.params if each.name == "push_to_hub"}


def test_every_command_is_tried_with_every_kind_of_place_that_it_takes() -> None:
    """As operands, and as outputs; addresses of all forms, of several workers' outputs, and of streams are among them."""
    tried: dict[str, set[str]] = {}
    for words in other_places.COMMANDS:
        tried.setdefault(words[0], set()).update(other_places.kinds_of(words))
    del tried["run"]  # whose places are in its file
    assert tried == {name: places for name in NAMES if (places := places_of(command_of(name)))}
    every = {word for words in other_places.COMMANDS for word in words}
    assert every >= {"auto", "hf://org/base@main", "org/adapters@main:style", "in/elsewhere.yaml"}
    assert every >= {"--stream", "--part", "--status", "--finish", "--abort", "--also"}
    assert any(word.startswith("s3:") and word.endswith(".safetensors") for word in every)


@pytest.mark.parametrize("name", LACKING)
def test_every_command_works_and_makes_the_same_bytes(name: str, usual: Path, request: pytest.FixtureRequest) -> None:
    """Also after a kill; and with -v a command says once what it does without."""
    found: Simulated = request.getfixturevalue(name)
    said: set[str] = set()
    for command, ended in zip(COMMANDS, found.ended, strict=True):
        assert ended.code == (-9 if command[0] == "killed" else 0), (command, ended)
        said |= notes_of(ended)
    assert said == LACKING[name] - {LINKS}
    made, expected = (comparable(contents(root / "made")) for root in (found.root, usual))
    assert unlike(made, expected) == []


@pytest.mark.parametrize("name", LACKING)
def test_every_command_works_with_the_hub_and_with_a_store(
    name: str, usual_elsewhere: Mapping[str, bytes], request: pytest.FixtureRequest
) -> None:
    """What it makes there has the same bytes, nothing is left on the disk, and it says what it does without."""
    found: Simulated = request.getfixturevalue(name)
    said: set[str] = set()
    for words, ended in zip(other_places.COMMANDS, found.ended_elsewhere, strict=True):
        assert ended.code == 0, (words, ended)
        said |= notes_of(ended)
    assert said == LACKING[name] - {SWAPS}
    assert unlike(comparable(found.made_elsewhere), comparable(usual_elsewhere)) == []
    assert os.listdir(found.root / "temp") == []


def notes_of(ended: Ended) -> set[str]:
    """What a command says that it does without, once each."""
    notes = [line.removeprefix("note: ") for line in ended.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == len(set(notes))
    return {*notes}


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, and its folders as empty ones."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")
    }


def comparable(files: Mapping[str, bytes]) -> dict[str, object]:
    """Files as they are, but for records and pages.

    A cache without links does not know the digests of a base from the Hub. Pages name paths, which Windows
    separates by another character.
    """
    found: dict[str, object] = dict(files)
    for name, content in files.items():
        if name.endswith("loratool.json"):
            table = json.loads(content)
            if "hub" in table.get("base", ()):
                del table["base"]["files"]
                found[name] = table
        elif name.endswith((".html", ".svg")):
            found[name] = content.replace(b"\\", b"/")
    return found


def unlike(made: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    """Names of what differs."""
    return sorted(name for name in {*made, *expected} if made.get(name) != expected.get(name))


def test_a_disk_with_a_cache_of_its_own_is_told_to_empty_it(macos: Simulated) -> None:
    """Where `fsync` does not do that, there is F_FULLFSYNC."""
    assert macos.synced > 0


def test_a_console_with_few_characters_shows_the_nearest_that_it_has(windows: Simulated) -> None:
    """cp1252 has neither ‖ nor Δ, and Windows writes it into files and pipes."""
    (ended,) = (e for c, e in zip(COMMANDS, windows.ended, strict=True) if "--values" in c)
    assert "|dW|/|W0|" in ended.out
    for each in windows.ended:
        assert "?" not in each.out + each.err


@pytest.mark.parametrize(
    ("word", "typed"),
    [
        ("base", "base"),
        (".\\my-adapter\\", ".\\my-adapter\\"),
        ("My Models\\one", '"My Models\\one"'),
        ("ends in\\", '"ends in\\\\"'),
        (r"^decoder\.(\d+)\b=blocks.\1", r'"^decoder\.(\d+)\b=blocks.\1"'),
        ("a&b", '"a&b"'),
        ('say "so"', '"say \\"so\\""'),
        ("", '""'),
    ],
)
def test_a_hint_is_quoted_for_the_shell_of_windows(word: str, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cmd.exe passes single quotes on, and changes ^, & and parentheses outside of double ones."""
    monkeypatch.setattr(os, "altsep", "/")
    assert system.shell_word(word) == typed
    assert system.shell_line(["loratool", "inspect", word]) == f"loratool inspect {typed}"


# Inputs on a disk that can hold more: a copy of which, and the side files it has besides.
ELSEWHERE = {"base": ["aux.txt"], "adapter": ["Notes.txt", "notes.txt"]}
NO_FOLDER = "this file system does not allow that folder name"
ONTO = ["merge", "in\\base", "in\\adapter", "-o"]
TABLE: list[tuple[list[str], int, str]] = [  # a command, its exit code, and what it says
    ([*ONTO, "CON"], 6, NO_FOLDER),
    ([*ONTO, "aux.txt"], 6, NO_FOLDER),
    ([*ONTO, "made."], 6, NO_FOLDER),
    ([*ONTO, "a:b"], 6, NO_FOLDER),
    ([*ONTO, "IN\\BASE\\merged"], 2, "is inside the input"),
    ([*ONTO, "long" * 50], 6, "a shorter OUT may work"),
    ([*ONTO, "DEEP"], 6, "too long for this system"),
    (["merge", "HERE/base", "in\\adapter", "-o", "out"], 6, "aux.txt: this file system does not allow that name"),
    (["rescale", "HERE/adapter", "--scale", "2", "-o", "out"], 6, "differs from another file only in case"),
    (["failing", "header", *ONTO, "failed"], 6, os.strerror(errno.EIO)),
    (["failing", "tensors", *ONTO, "failed"], 6, os.strerror(errno.EIO)),
    (["interrupted", *ONTO, "stopped", "--workers", "1"], 130, "run the same command again to continue"),
    ([*ONTO, "stopped"], 0, ""),
    (["busy", "busy.partial", *ONTO, "busy"], 2, "another run is writing this output"),
    (["index", "in\\adapter", "-o", "s3://models/index"], 2, "cannot be written into a store"),
    (["push", "made\\merged", "s3://models/merged"], 2, "only repositories of the Hub can be pushed to"),
    (["unlocked", *ONTO, "free", "-v"], 0, f"note: {LOCKS}"),
    (["unlocked", *ONTO, "FREE", "-v"], 2, "already exists"),
    (["unlocked", *ONTO, "free", "-v", "--overwrite"], 0, f"note: {SPACE}"),
]
REFUSED = [command for command, _, _ in TABLE]


def test_what_windows_cannot_hold_is_refused_in_a_sentence_and_leaves_nothing(windows: Simulated, usual: Path) -> None:
    """Names that are reserved, paths that are too long, files that differ in case only, and an output that is locked."""
    for (command, code, sentence), ended in zip(TABLE, windows.refused, strict=True):
        assert (ended.code, sentence in ended.err) == (code, True), (command, ended)
        assert "a bug in loratool" not in ended.err
    assert sorted(os.listdir(windows.root)) == ["busy.partial", "cache", "free", "in", "made", "stopped", "temp"]
    assert os.listdir(windows.root / "busy.partial") == []
    assert faults.picture(windows.root / "in") == faults.picture(usual / "in")
    assert faults.picture(windows.root / "stopped") == faults.picture(usual / "made" / "merged")
    assert faults.picture(windows.root / "free") == faults.picture(usual / "made" / "merged")


def test_reading_and_writing_at_a_position_needs_no_call_that_does_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many threads at one descriptor each gets what it asked for."""
    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    content = os.urandom(1 << 16)
    descriptor = system.create_file(tmp_path / "file")
    wrong: list[int] = []

    def work(first: int) -> None:
        for at in range(first, len(content), 8 * 64):
            assert system.write_at(descriptor, memoryview(content)[at : at + 64], at) == 64
            piece = bytearray(64)
            if system.read_at(descriptor, memoryview(piece), at) != 64 or piece != content[at : at + 64]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(64 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    assert wrong == []
    assert (tmp_path / "file").read_bytes() == content


def test_a_link_is_not_followed_where_no_flag_forbids_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    monkeypatch.delattr(os, "O_NOFOLLOW")
    for links in (True, False):
        if links:
            os.close(system.open_file(tmp_path / "link", os.O_RDONLY, links=True))
        else:
            with pytest.raises(OSError, match="symbolic links"):
                system.open_file(tmp_path / "link", os.O_RDONLY)


@pytest.mark.parametrize("name", ["..\\..\\x.safetensors", "C:x.safetensors", "a\\b", "C:/x", "\\x"])
def test_a_name_that_windows_would_read_as_another_path_is_no_plain_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "PurePath", PureWindowsPath)
    assert names.has_other_parts(name)
    assert not names.has_other_parts("folder/model-00001-of-00002.safetensors")


def test_a_place_on_the_hub_is_known_in_a_path_of_windows() -> None:
    """The command line's operands are paths, in which Windows turns the slashes round."""
    place = parse(PureWindowsPath("me/adapter@main:sub/folder"))
    assert place is not None
    assert str(place) == "me/adapter@main:sub/folder"
    assert parse(PureWindowsPath("C:/models/adapter")) is None


# ---------------------------------------------------------------- files/ alone knows

MODULES = {"ctypes", "fcntl", "msvcrt", "resource", "signal", "platform", "pwd", "grp", "errno", "multiprocessing"}
OF_OS = {
    *("fsync", "fdatasync", "sync", "sysconf", "sched_getaffinity", "statvfs", "fork", "kill", "dup", "dup2", "open"),
    *("pread", "preadv", "pwrite", "pwritev", "sendfile", "copy_file_range", "posix_fallocate", "posix_fadvise"),
    *("getuid", "geteuid", "link", "symlink", "chmod", "umask", "name", "uname", "altsep"),
}


@cache
def knowledge(path: Path) -> list[str]:
    """What a module knows of operating systems, and in which line."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=aliases):
                known: Sequence[Any] = [alias.name for alias in aliases if alias.name in MODULES]
            case ast.ImportFrom(module=str(module)):
                known = [module] if module in MODULES else []
            case ast.Attribute(value=ast.Name(id="os"), attr=name):
                known = [f"os.{name}"] if name in OF_OS or name.startswith(("O_", "posix_")) else []
            case ast.Attribute(value=ast.Name(id="sys"), attr="platform"):
                known = ["sys.platform"]
            case ast.Constant(value=str(text)):
                known = [text] if text.startswith("/proc") or text in MODULES - {"signal", "resource"} else []
            case _:
                continue
        found += [f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}: {each}" for each in known]
    return found


def test_only_files_knows_what_operating_systems_do_differently() -> None:
    outside = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "files"]
    assert [each for path in outside for each in knowledge(path)] == []
    assert len(knowledge(PACKAGE / "files" / "system.py")) > 10


def test_no_module_asks_for_the_name_of_the_system() -> None:
    asked = [each for path in PACKAGE.rglob("*.py") for each in knowledge(path)]
    assert [each for each in asked if each.endswith((": os.name", ": sys.platform", ": platform", ": os.uname"))] == []


def test_threads_share_heaps_where_the_allocator_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Glibc's settings are called by their numbers in malloc.h; what the user has set, another allocator, or no ctypes is left alone."""
    asked: dict[int, int] = {}

    class Library:
        mallopt = staticmethod(asked.__setitem__)

    names = {-8: "MALLOC_ARENA_MAX", -3: "MALLOC_MMAP_THRESHOLD_", -1: "MALLOC_TRIM_THRESHOLD_"}
    for name in names.values():
        monkeypatch.delenv(name, raising=False)
    for library, expected in ((Library, {*names}), (object, set())):
        asked.clear()
        found = SimpleNamespace(CDLL=lambda _name, library=library: library())
        monkeypatch.setattr(system, "optional", lambda _module, found=found: found)
        process.share_heaps()
        assert {*asked} == expected
    monkeypatch.setattr(system, "optional", lambda _module: None)
    process.share_heaps()
    assert asked == {}
    monkeypatch.setattr(system, "optional", lambda _module: SimpleNamespace(CDLL=lambda _name: Library()))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    process.share_heaps()
    assert {*asked} == {-8, -3}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1"),
        ({"OPENBLAS_NUM_THREADS": "2"}, "2"),
        ({"OMP_NUM_THREADS": "4"}, None),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}, "2"),
    ],
)
def test_the_command_line_multiplies_on_its_own_threads_unless_told_otherwise(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenBLAS is asked for one thread, in the variable of its manual; a number that the user has set stays what it is."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
        if name in given:
            monkeypatch.setenv(name, given[name])
    assert process.multiplies_alone() is (given == {"OMP_NUM_THREADS": "1"})
    process.multiply_on_own_threads()
    assert os.environ.get("OPENBLAS_NUM_THREADS") == expected
    assert process.multiplies_alone() is (given in ({}, {"OMP_NUM_THREADS": "1"}))
