"""Where somebody is looking, a bar on stderr goes to the end of the work, and goes."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tqdm
from malformed import write_adapter, write_base

import loratool
from loratool import cli

# command → what its bars are called
BARS = {
    "merge base style -o out": ["merging"],
    "merge base style -o out --also out2=other": ["merging"],
    "merge base style -o whole --part 1/1": ["merging 1/1"],
    "verify merged --base base --adapter style": ["verifying"],
    "inspect style --values": ["measuring"],
    "inspect style other --values": ["measuring"],
    "inspect . --values": ["reading"],
    "index . -o index.json": ["reading"],
    "resize style -o out --rank 1": ["resizing"],
    "compare style other": ["comparing"],
    "compress style other -o out --rank 1": ["compressing"],
    "compress other --into small --overwrite": ["compressing"],
    "expand small style -o out": ["expanding"],
    "rescale style -o out --scale 2": [],
    "reproduce merged -o out": ["merging"],
    "reproduce small -o out": ["compressing"],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Eager(tqdm.tqdm):  # type: ignore[type-arg,misc,unused-ignore]
    """A bar that is drawn at each step."""

    def __init__(self, **looks: Any) -> None:
        super().__init__(**{**looks, "mininterval": 0, "miniters": 1})


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("here")
    write_base(home / "base")
    write_adapter(home / "style")
    write_adapter(home / "other", lora_alpha=2)
    loratool.merge(home / "base", home / "style", home / "merged", device="cpu")
    loratool.compress([home / "style"], home / "small", rank=1)
    return home


@pytest.mark.parametrize("words", BARS)
def test_a_bar_ends_at_all_of_the_work_and_leaves_no_line(
    words: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shutil.copytree(here, tmp_path / "here"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal := Terminal())
        patch.setattr(tqdm, "tqdm", Eager)
        assert cli.run([*shlex.split(words)]) == 0, terminal.getvalue()
    drawn = terminal.getvalue().split("\r")
    assert {found[1] for line in drawn if (found := re.match(r"([a-z][a-z /0-9]*): 100%", line))} == set(BARS[words])
    assert drawn[-1].strip() == ""
