"""A command that fails says why on stderr, whatever else it prints, and however quiet it is to be."""

from __future__ import annotations

import errno
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from malformed import ADAPTER, ADAPTER_CONFIG, MODEL, A, B, f32, write_adapter, write_base

from loratool import cli

NAN = np.full((2, 8), np.nan)
WAYS = [[*way] for way in itertools.product(("", "-q"), ("", "--json"))]
# What fails → whether the command has a result all the same, which is then the object on stdout.
FAILING: dict[str, bool] = {
    "merge BASE nowhere -o out": False,
    "merge BASE bare -o out": False,
    "merge BROKEN style -o out": False,
    "merge BASE style -o there": False,
    "merge BASE style -o nowhere/out": False,
    "merge BASE style -o out --part 1/2 --finish": False,
    "merge BASE style -o out --finish": False,
    "merge BASE style -o there --status": False,
    "merge -o out --abort": False,
    "merge BASE style -o there --also other=bare": True,
    "merge BASE style": False,
    "verify CHANGED": True,
    "verify BASE --base BASE --adapter style": True,
    "verify nowhere": False,
    "verify BASE": False,
    "inspect nowhere": False,
    "inspect bare": False,
    "inspect bare --check": True,
    "inspect nan --check": True,
    "inspect CHANGED --check": True,
    "inspect style nan bare --check": True,
    "inspect fleet": True,
    "inspect fleet --check --values": True,
    "inspect fleet --where rank>many": False,
    "inspect nowhere bare": True,
    "inspect style --near style/adapter_config.json": False,
    "index fleet -o fleet.index --overwrite": True,
    "index nowhere -o no.index": False,
    "rescale bare -o out --scale 2": False,
    "rescale style -o out": False,
    "combine style bare -o out": False,
    "combine style style -o there": False,
    "resize nan -o out --rank 1": False,
    "resize style -o out --rank 0": False,
    "compress style bare -o out": False,
    "expand style it -o out": False,
    "rebase style -o out --from BASE --onto nowhere": False,
    "convert style -o out --to elvish": False,
    "convert style -o out --to kohya": False,
    "extract BASE style -o out": False,
    "extract BASE BASE -o out": False,
    "compare style bare": False,
    "estimate BASE --rank 8 --target nothing": False,
    "plan BASE bare": False,
    "plan BASE style --simulate none": False,
    "record style": False,
    "reproduce style -o out": False,
    "run models.yaml": False,
    "run failing.yaml": False,
    "push nowhere me/it": False,
    "push there me/it": False,
    "push style not_a_repository_/of/any": False,
    "demo there": False,
    "help nonsense": False,
    "completion powershell": False,
}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, sound and damaged adapters and models, and a folder that is somebody's own."""
    home = tmp_path_factory.mktemp("failing")
    write_base(home / "BASE")
    write_base(home / "BROKEN")
    (home / "BROKEN" / MODEL).write_bytes(b"nothing")
    for name in ("style", "bare", "fleet/one", "fleet/two", "fleet/three"):
        write_adapter(home / name)
    (home / "bare" / ADAPTER_CONFIG).unlink()
    (home / "fleet" / "two" / ADAPTER).write_bytes(b"nothing")
    for name in ("nan", "fleet/nan"):
        write_adapter(home / name, {A: f32(NAN), B: f32(np.ones((8, 2)))})
    (home / "there").mkdir()
    (home / "there" / "thesis.txt").write_text("mine")
    (home / "failing.yaml").write_text("steps:\n  - rescale: {adapter: bare, out: weak, scale: 0.5}\n")
    assert cli.run(["merge", str(home / "BASE"), str(home / "style"), "-o", str(home / "CHANGED"), "-q"]) == 0
    weights = bytearray((home / "CHANGED" / MODEL).read_bytes())
    weights[-1] ^= 1
    (home / "CHANGED" / MODEL).write_bytes(weights)
    return home


def check(words: list[str], has_result: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """In each way to be quiet or to print JSON, the exit code is the same, and there is a sentence on stderr."""
    codes = set()
    for way in WAYS:
        arguments = [*words, *filter(None, way)]
        codes.add(cli.run(arguments))
        shown = capsys.readouterr()
        assert "Error: " in shown.err, arguments
        assert "this is a bug" not in shown.err, shown.err
        if "--json" in way:
            assert ("error" in json.loads(shown.out)) != has_result, arguments
        elif "-q" in way:
            assert shown.out == "", arguments
    assert len(codes) == 1
    assert codes <= {2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("line", FAILING)
def test_every_failure_has_a_sentence_on_stderr(
    line: str, there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with `-q` and with `--json`, where the error is the object on stdout besides."""
    monkeypatch.chdir(there)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check(line.split(), FAILING[line], capsys)
    assert not (there / "out").exists()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_an_unknown_option_is_said_by_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command is among those that fail above, too."""
    check([command, "--no-such-option"], False, capsys)
    assert command in {line.split()[0] for line in FAILING}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (SystemExit(3), "this is a bug in loratool: SystemExit: 3"),
        (SystemExit(), "this is a bug in loratool: SystemExit"),
        (EOFError("the file ends"), "this is a bug in loratool: EOFError: the file ends"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Error: Broken pipe"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Error: Connection reset by peer"),
        (MemoryError(), "out of memory"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_what_a_library_ends_with_is_no_silent_end(
    error: BaseException,
    sentence: str,
    there: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library's exit, or its pipe that breaks, is not the closed stdout of this command, about which nothing is said."""

    def ended(*_: object) -> None:
        raise error

    monkeypatch.setattr("loratool.inspecting.inspect.inspect", ended)
    monkeypatch.setattr("loratool.cli.is_unread", lambda: False)
    monkeypatch.setattr("loratool.cli.silence_stdout", lambda: None)
    assert cli.run(["inspect", str(there / "BASE"), "-q"]) in (1, 6)
    assert sentence in capsys.readouterr().err
