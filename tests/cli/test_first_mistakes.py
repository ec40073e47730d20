"""What a newcomer types first, and what happens then: no command, names that need quotes, folders that are not there."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from loratool import cli, demo as demos
from loratool.cli import run
from loratool.errors import StorageError
from loratool.files import staging
from loratool.files.locks import lock_folder
from loratool.files.system import shell_word


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo."""
    home = tmp_path_factory.mktemp("home") / "demo"
    demos.demo(home)
    return home


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to work in, with the demo's `base`, `adapter` and `merged`."""
    for name in ("base", "adapter", "merged"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command, and what it wrote to stderr."""
    capsys.readouterr()
    return run(shlex.split(words)), capsys.readouterr().err


def test_no_words_are_answered_by_the_help_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, with the exit code of wrong usage, and not as an error whose message is the help."""
    code, shown = said("", capsys)
    assert run(["--help"]) == 0
    assert (code, shown) == (2, capsys.readouterr().out)


def test_choices_are_listed_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Choose from:\n  bash,\n  zsh,\n  fish\n" in said("completion", capsys)[1]


@pytest.mark.parametrize(
    "words", ["verify merged --adapter ./style", "merge auto style.safetensors -o out", "verify merged --adapter a/b/c"]
)
def test_an_adapter_that_is_not_there_is_said_where_its_base_is_looked_for(
    words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not a config that is missing in the folder around it."""
    code, shown = said(words, capsys)
    assert code == 3
    assert "no such file or folder" in shown
    assert "adapter_config.json" not in shown
    assert sorted(os.listdir(here)) == ["adapter", "base", "merged"]


ABSENT = {  # what is absent in each command, in whatever order it is looked at
    "merge": "first second -o no/out --also-load third",
    "verify": "first --base second --adapter third",
    "inspect": "first --base second --near third",
    "index": "first -o second.index --base third",
    "rescale": "first -o no/out --scale 2 --base second",
    "combine": "first second -o no/out --base third",
    "resize": "first -o no/out --rank 2 --base second --calibration third",
    "compress": "first second --into third",
    "expand": "first second -o no/out",
    "rebase": "first --from second --onto third -o no/out",
    "convert": "first --base second --to mlx -o no/out",
    "extract": "first second -o no/out",
    "compare": "first second --base third",
    "plan": "first second --also-load third",
    "record": "first",
    "reproduce": "first -o no/out --from second",
    "run": "first",
    "push": "first me/second",
    "estimate": "first --rank 2 --target q_proj",
}
WITHOUT_INPUTS = {"demo", "help", "completion"}
PART = "--part 1/2 --into no"
MORE = {
    "verify in parts": f"verify {ABSENT['verify']} {PART}",
    "extract in parts": f"extract {ABSENT['extract']} {PART}",
}
MORE |= {
    "merge in parts": "merge first second -o no/out --part 1/2",
    "several": "merge first second -o a --also b=third",
}
MORE |= {
    "stream": "merge first second --stream --push-to-hub me/repo",
    "dry run": "merge first second -o no/out --dry-run",
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("words", [*(f"{name} {more}" for name, more in ABSENT.items()), *MORE.values()])
def test_of_several_things_that_are_not_there_the_first_operand_is_named(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, shown = said(words, capsys)
    assert code in (2, 3)
    assert shown.startswith("Error: first: no such file or folder"), shown


def test_every_command_with_inputs_is_asked_for_some_that_are_not_there() -> None:
    assert {*ABSENT, *WITHOUT_INPUTS} == {*cli.COMMANDS}


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash to read words as people type them")
@pytest.mark.parametrize("word", ["my folder", "new\nline", "tab\tit's\\", "\u202eevil\x1b[2J", "half\udcff", "ü"])
def test_a_word_with_any_character_is_typed_so_that_bash_reads_it_and_a_terminal_shows_it(word: str) -> None:
    typed = shell_word(word)
    assert typed.isprintable()
    printed = subprocess.run(["bash", "-c", f"printf %s {typed}"], capture_output=True, check=True).stdout
    assert os.fsdecode(printed) == word


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash to read words as people type them")
def test_the_command_of_a_hint_works_where_a_name_has_a_line_break(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hint stays on one line, and typed into bash it names the same folder."""
    (here / "new\nline").symlink_to(here / "adapter")
    assert run(["resize", "new\nline", "--rank", "4"]) == 2
    hint = capsys.readouterr().err.splitlines()[-1].removeprefix("hint: loratool ")
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {hint}"], capture_output=True, check=True).stdout
    assert words.decode().split("\0")[:-1] == ["resize", "new\nline", "--rank", "4", "-o", "./new\nline-resized"]


@pytest.mark.usefixtures("here")
def test_room_that_is_missing_is_told_in_units_that_show_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of 0.9 MB does not need 0.00 GB."""
    monkeypatch.setattr(staging, "free_space", lambda _folder: 96_256)
    code, shown = said("resize adapter --rank 4 -o out", capsys)
    assert code == 6
    assert "kB of disk, but only 96.26 kB is free" in shown


def test_a_second_run_for_one_output_is_told_another_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out.partial").mkdir()
    lock = lock_folder(here / "out.partial")
    try:
        code, shown = said("merge base adapter -o out", capsys)
    finally:
        lock.release()
    assert code == 2
    assert "another run is writing this output; wait for it to end\n" in shown
    assert shown.splitlines()[-1].startswith("hint: loratool merge base adapter -o ./")


# ---------------------------------------------------------------- the demo


def test_the_demo_s_own_command_works_where_its_folder_needs_quotes(tmp_path: Path) -> None:
    command = str(demos.demo(tmp_path / "a first demo's folder")).splitlines()[-1].removeprefix("by hand")
    assert run(shlex.split(command)[1:]) == 0
    with safe_open(tmp_path / "a first demo's folder" / "again" / "model-00001-of-00003.safetensors", "pt") as file:
        assert len(file.keys()) > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("words", ["", "--learn"])
def test_a_disk_that_is_full_is_no_bug_of_the_demo_and_leaves_nothing(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is the system's own."""
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda _path, content: write(Path("/dev/full"), content))
    code, shown = said(f"demo {shlex.quote(str(tmp_path / 'demo'))} {words}", capsys)
    assert code == 6
    assert "No space left on device" in shown
    assert str(tmp_path / "demo") in shown
    assert os.listdir(tmp_path) == []


def test_an_interrupted_demo_leaves_nothing_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demos, "check", stopped)
    code, shown = said(f"demo {shlex.quote(str(tmp_path / 'demo'))}", capsys)
    assert (code, shown.strip()) == (130, "Interrupted; nothing was written.")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_that_an_import_makes_another_error_of_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where numpy is being imported by torch, which then misses a name in it."""

    def swallowed(*_arguments: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            cli.stop(terminated=True)
        raise AttributeError("module 'numpy' has no attribute 'matrix'")

    monkeypatch.setattr(cli, "stops", [])
    monkeypatch.setattr(demos, "check", swallowed)
    code, shown = said(f"demo {shlex.quote(str(tmp_path / 'demo'))}", capsys)
    assert (code, shown.strip()) == (143, "Interrupted; nothing was written.")
    monkeypatch.setattr(demos, "check", None)  # which cannot be called
    code, shown = said(f"demo {shlex.quote(str(tmp_path / 'another'))}", capsys)  # in the same process, and not stopped
    assert code == 1
    assert "this is a bug in loratool: TypeError" in shown


def test_a_demo_that_fails_leaves_an_empty_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demos, "make_base", failed)
    with pytest.raises(StorageError, match="No space left on device"):
        demos.demo(tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == []


def test_a_demo_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    """A kill leaves the merge's stage, which the next demo's merge knows as its own."""
    home = tmp_path / "demo"
    demos.demo(home)
    shutil.rmtree(home / "merged")
    killed = "import os, sys\nfrom loratool.files import staging\nstaging.Stage.publish = lambda *_: os._exit(9)\n"
    program = f"{killed}import loratool\nhome = sys.argv[1]\nloratool.merge(home + '/base', [home + '/adapter'], home + '/merged')"
    assert subprocess.run([sys.executable, "-c", program, str(home)], check=False).returncode == 9
    assert sorted(os.listdir(home)) == ["adapter", "base", "merged.partial"]
    demos.demo(home, overwrite=True)
    assert sorted(os.listdir(home)) == ["adapter", "base", "merged"]


# ---------------------------------------------------------------- options that can have no effect


@pytest.mark.usefixtures("here")
def test_figures_that_there_are_none_of_make_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "base", "--svg", "pictures"]) == 0
    assert "note: --svg pictures: nothing was written, because there are no figures for this" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


@pytest.mark.usefixtures("here")
def test_values_of_a_model_are_said_not_to_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """A mixed list of paths is measured as far as it can be."""
    assert run(["inspect", "base", "--values"]) == 0
    assert "values of a model are not measured; --values is for adapters" in " ".join(capsys.readouterr().out.split())
    assert run(["inspect", "base"]) == 0
    assert "ignored" not in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_a_folder_to_look_for_inputs_in_has_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = said("reproduce merged -o again --from nowhere", capsys)
    assert code == 3
    assert "--from nowhere: no such folder" in shown


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["combine", "merge base"])
def test_numbers_in_messages_are_in_agreement_with_their_nouns(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "got 1 weight for 2 adapters" in said(f"{command} adapter adapter -w 1 -o out", capsys)[1]
