"""`loratool help TOPIC` and `loratool completion SHELL`: what they say is true of the commands, and shells take it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
from malformed import write_base

import loratool
from loratool import cli
from loratool.adapters.formats import DIALECTS
from loratool.algebra.methods.table import METHODS
from loratool.cli.topics import TOPICS
from loratool.reworking.converting.servers import SERVERS


def shown(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(shlex.split(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_is_a_screenful_whose_commands_click_takes(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(f"help {topic}", capsys)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    commands = [shlex.split(line.strip().partition("   ")[0]) for line in lines if line.startswith("  loratool ")]
    assert commands
    for _, name, *rest in commands:
        if not name.startswith("-"):
            cli.command(name).make_context(name, rest, parent=click.Context(cli.cli, info_name="loratool"))


def test_the_list_of_topics_and_that_of_the_help_are_the_topics(capsys: pytest.CaptureFixture[str]) -> None:
    """The list says in a few words what each is about."""
    _, *lines = shown("help", capsys).splitlines()
    assert [line.split()[0] for line in lines] == [*TOPICS]
    assert all(len(line.split()) > 2 and len(line) <= 80 for line in lines)
    assert f"TOPIC is {', '.join(TOPICS)}, or a command" in " ".join(shown("help --help", capsys).split())


def test_topics_name_every_dialect_server_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    words = shown("help dialects", capsys).replace(",", "").split()
    assert set(DIALECTS) <= set(words)
    assert set(SERVERS) <= set(shown("help servers", capsys).replace(",", "").split())
    codes = shown("help exit-codes", capsys)
    assert all(f"\n  {kind.exit_code} " in codes for kind in loratool.LoratoolError.__subclasses__())


def test_the_help_of_a_command_is_that_of_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("help resize", capsys) == shown("resize --help", capsys)


def test_an_unknown_topic_ends_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["help", "operandz", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == "loratool help operands"


COMPLETED = {
    "loratool conv": ["convert"],
    "loratool help ro": ["rounding"],
    "loratool completion ": ["bash", "zsh", "fish"],
    "loratool merge base --rounding s": ["stochastic"],
    "loratool convert adapter --to ": [*DIALECTS],
    "loratool convert adapter --for ": [*SERVERS],
    "loratool combine a b --method ": [*METHODS],
    "loratool estimate base --rank 8 --target q": ["q_proj"],
    "loratool estimate base --rank 8 --target k_proj,q": ["k_proj,q_proj"],
    "loratool estimate base --rank 8 --target all": ["all-linear"],
    "loratool merge base --dry": ["--dry-run"],
}


@pytest.mark.parametrize("line", COMPLETED)
def test_a_shell_is_told_the_words_that_fit(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Click's script for bash asks, a reply on each line: the kind of the word, and the word."""
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    words = line.split(" ")
    monkeypatch.setenv("_LORATOOL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    cli.run([])
    found = [reply.partition(",")[2] for reply in capsys.readouterr().out.splitlines()]
    assert found == COMPLETED[line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_that_its_shell_reads_and_asks_loratool(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = shown(f"completion {shell}", capsys)
    assert f"_LORATOOL_COMPLETE={shell}_complete" in script
    assert f"loratool completion {shell}" in script.splitlines()[0]
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
