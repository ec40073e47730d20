"""Options that a command does not have: what is proposed is a command that Click takes, with the value that was typed."""

from __future__ import annotations

import shlex

import click
import pytest

from loratool import cli
from loratool.cli.unknown_options import COMMANDS_KNOWN_AS, KNOWN_AS

MEANT = {  # what is typed → what is proposed
    "rescale a -o x -w 0.5": "rescale a -o x --scale 0.5",
    "rescale a -o x --weight=0.5": "rescale a -o x --scale=0.5",
    "merge base a -o x --scale 0.5": "merge base a -o x --weight 0.5",
    "combine a b -o x --multiplier 2": "combine a b -o x --weight 2",
    "merge base a --out x": "merge base a --output x",
    "merge base a --output-dir=x": "merge base a --output=x",
    "merge base --lora a -o x": "merge base a -o x",
    "merge base --adapter=a -o x": "merge base a -o x",
    "merge --base-model base a -o x": "merge --base base a -o x",
    "verify merged --base base --lora a": "verify merged --base base --adapter a",
    "resize a -r 4 -o x": "resize a --rank 4 -o x",
    "extract base tuned --lora_rank 4 -o x": "extract base tuned --rank 4 -o x",
    "convert a -o x --format mlx": "convert a -o x --to mlx",
    "merge base a -o x --torch_dtype bfloat16": "merge base a -o x --dtype bfloat16",
    "merge base a -o x --max_shard_size 5GB": "merge base a -o x --shard-size 5GB",
    "merge base a -o x --shard_size 5GB": "merge base a -o x --shard-size 5GB",
    "merge base a -o x --alpha 8": "merge base a -o x --input-alpha 8",
    "merge base a -o x --force": "merge base a -o x --overwrite",
    "merge base a -o x -y": "merge base a -o x --overwrite",
    "merge base a -o x --cpu": "merge base a -o x --device cpu",
    "merge base a -o x --gpu": "merge base a -o x --device cuda",
    "merge base a -o x --num-workers 3": "merge base a -o x --workers 3",
    "merge base a -o x --overwrit": "merge base a -o x --overwrite",
    "merge base a -o x --nonsense": "merge --help",
    "rebase a --base b --onto c -o x": "rebase a --from b --onto c -o x",
    "push a me/a --private": "push --help",
    "inspect a -o x": "inspect --help",
}


@pytest.mark.parametrize("typed", MEANT)
def test_the_command_that_was_meant_is_proposed_and_click_takes_it(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is proposed for a word that resembles no option of the command."""
    assert cli.run(shlex.split(typed)) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1] == f"hint: loratool {MEANT[typed]}"
    assert "Error: No such option '-" in told
    name, *words = shlex.split(MEANT[typed])
    if words != ["--help"]:
        assert ("did you mean" in told) == ("pass the adapter alone" not in told)
        cli.command(name).make_context(name, words)


def test_every_option_that_may_be_meant_is_one_of_a_command() -> None:
    """A word is in the table for an option that exists, so that the table follows the commands."""
    commands = [cli.command(name) for name in cli.COMMANDS]
    flags = {flag for each in commands for option in each.params if isinstance(option, click.Option) for flag in option.opts}  # fmt: skip
    assert {option for options in KNOWN_AS.values() for option in options} <= flags


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("fuse base a -o x", "merge base a -o x"),
        ("check a", "inspect --check a"),
        ("lesson", "demo --learn"),
        ("dequantize base -o x", "merge --dequantize base -o x"),
        ("Upload a me/a", "push a me/a"),
        ("mrege base a -o x", "merge base a -o x"),
    ],
)
def test_a_command_of_another_tool_leads_to_ours(typed: str, proposed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is proposed is a command that Click takes, with the words that were typed."""
    assert cli.run(shlex.split(typed)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"hint: loratool {proposed}"
    name, *words = shlex.split(proposed)
    cli.command(name).make_context(name, words)


def test_no_word_for_a_command_is_one_of_ours() -> None:
    """A command is never taken for another."""
    assert not {word for words in COMMANDS_KNOWN_AS for word in words} & cli.COMMANDS.keys()
    assert {meant.split()[0] for meant in COMMANDS_KNOWN_AS.values()} <= cli.COMMANDS.keys()
