"""The next command to type is on every error, in Python as on the command line.

The two are compared with each other: the command line knows the words that were typed, the library its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from malformed import ADAPTER_CONFIG, MODEL, write_adapter, write_base
from workbench import check_hint

import loratool
from loratool import cli, errors


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and an adapter, a file that is neither, an adapter without its config, and a base that is damaged."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "style")
    write_adapter(tmp_path / "bare")
    (tmp_path / "bare" / ADAPTER_CONFIG).unlink()
    write_base(tmp_path / "broken")
    (tmp_path / "broken" / MODEL).write_bytes(b"nothing")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("mine")
    return tmp_path


# The same mistake by either door.
BOTH: dict[str, tuple[Callable[[], object], str]] = {
    "no such adapter": (lambda: loratool.merge("base", "stile", "out"), "merge base stile -o out"),
    "no such base": (lambda: loratool.plan("bass", ["style"], "out"), "merge bass style -o out"),
    "a malformed adapter": (lambda: loratool.merge("base", ["bare"], "out"), "merge base bare -o out"),
    "a malformed base": (lambda: loratool.merge("broken", "style", "out"), "merge broken style -o out"),
    "an option out of range": (lambda: loratool.resize("style", "out", rank=-1), "resize style -o out --rank -1"),
    "an option at odds": (lambda: loratool.rescale("style", "out"), "rescale style -o out"),
    "an input that is nothing": (lambda: loratool.inspect("nowhere"), "inspect nowhere"),
    "an adapter that does not fit": (
        lambda: loratool.rebase("style", "out", base="base", onto="there"),
        "rebase style -o out --from base --onto there",
    ),
    "an unknown dialect": (lambda: loratool.convert("style", "out"), "convert style -o out"),
    "no rank": (lambda: loratool.estimate("base", (), "q_proj"), "estimate base --target q_proj --rank 0"),
    "a target that is nowhere": (lambda: loratool.estimate("base", 2, "q"), "estimate base --target q --rank 2"),
    "nothing recorded": (lambda: loratool.record("style"), "record style"),
    "nothing to repeat": (lambda: loratool.reproduce("style", "out"), "reproduce style -o out"),
    "no manifest": (lambda: loratool.run("models.yaml"), "run models.yaml"),
    "nothing compressed": (lambda: loratool.expand("style", "it", "out"), "expand style it -o out"),
    "nothing to verify by": (lambda: loratool.verify("base"), "verify base"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", BOTH)
def test_an_error_in_python_has_the_next_command_of_the_command_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call, words = BOTH[name]
    with pytest.raises(loratool.LoratoolError) as caught:
        call()
    assert cli.run(words.split()) == caught.value.exit_code
    (hint,) = re.findall(r"^hint: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert caught.value.hint == hint
    check_hint(hint)


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LoratoolError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_nothing_is_known_about_has_what_helps_with_most_of_its_kind(
    kind: type[errors.LoratoolError], capsys: pytest.CaptureFixture[str]
) -> None:
    hint = kind("something is wrong").hint
    assert cli.run(hint.split()[1:]) == 0
    assert capsys.readouterr().out


def test_a_command_of_python_has_the_options_that_were_given(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that refuses is no reason to type another command than before."""

    def refused(*_: object) -> None:
        raise loratool.StorageError("the disk is gone")

    monkeypatch.setattr("loratool.reworking.rescale.read_adapter", refused)
    with pytest.raises(loratool.StorageError) as caught:
        loratool.rescale(here / "style", here / "out", scale=0.5, match={"q_proj": 2}, overwrite=True)
    words = ["rescale", str(here / "style"), "--scale", "0.5", "--match", "q_proj=2", "--overwrite"]
    assert caught.value.hint == " ".join(["loratool", *words, "-o", str(here / "out")])


def test_a_hint_names_the_place_that_a_folder_of_this_disk_stands_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder of a store or of the Hub is gone when the command ends, and so must not be in one to type."""
    monkeypatch.setitem(errors.shown_as, str(tmp_path), "s3://models/team")
    error = errors.InputError("compressed", hint=f"loratool expand {tmp_path}/style a0 -o ./a0")
    assert error.hint == "loratool expand s3://models/team/style a0 -o ./a0"
