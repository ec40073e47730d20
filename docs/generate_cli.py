"""Write docs/cli.md from the command line's own help, so that the two cannot disagree.

python docs/generate_cli.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import COMMANDS, cli, command
from loratool.errors import LoratoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# The command line

*This page is written by `make docs` from the help that `loratool COMMAND --help` prints.*

Reports go to stdout, errors and progress to stderr. A progress bar is shown only where stderr is a terminal.
"""

OTHER_CODES = {
    0: "Done.",
    1: "A bug in loratool; `-v` shows the traceback.",
    130: "Interrupted by Ctrl-C; the same command continues.",
    141: "Whoever read stdout has gone away.",
    143: "Ended by SIGTERM; the same command continues.",
}


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD, *(section(name, command(name)) for name in sorted(COMMANDS)), exit_codes()]
    return "\n".join(parts)


def section(name: str, described: click.Command) -> str:
    """One command: what it does, an example, and a table of its words."""
    context = cli.make_context("loratool", [name], resilient_parsing=True)
    context = click.Context(described, info_name=name, parent=context)
    usage = " ".join(["loratool", name, *described.collect_usage_pieces(context)])
    text, examples = split_help(described)
    lines = [f"## loratool {name}", "", text, "", f"Usage: `{usage}`", "", "```console"]
    lines += [f"$ {example}" for example in examples]
    lines += ["```", "", "| option | what it does |", "|---|---|"]
    for parameter in described.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record is not None:
            words, meaning = (cell.replace("|", "\\|") for cell in record)
            lines.append(f"| `{words}` | {meaning} |")
    return "\n".join(lines) + "\n"


def split_help(command: click.Command) -> tuple[str, list[str]]:
    """The paragraphs of a command's help, and the commands of its examples."""
    text, _, tail = inspect.cleandoc(command.help or "").partition("\b\n")
    _, _, examples = tail.partition(":")
    return text.strip(), [line.strip() for line in examples.splitlines() if line.strip()]


def exit_codes() -> str:
    """The table of exit codes, from the classes of error."""
    return "\n".join(["## Exit codes", "", "| code | meaning |", "|---|---|", *rows()]) + "\n"


def rows() -> Iterator[str]:
    codes = OTHER_CODES | {kind.exit_code: inspect.getdoc(kind) or "" for kind in LoratoolError.__subclasses__()}
    for code, meaning in sorted(codes.items()):
        yield f"| {code} | {meaning} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
