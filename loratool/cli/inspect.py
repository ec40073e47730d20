"""`loratool inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli.operands import complain_of
from loratool.cli.options import LAYERS, OPERAND, PATH, click_options, output_options, with_pictures
from loratool.cli.partial import PartialWords, is_shared
from loratool.cli.pictures import Pictures
from loratool.cli.screen import Screen
from loratool.commands.inspect import is_table
from loratool.errors import LoratoolError, UsageError, printable
from loratool.files.system import shell_line
from loratool.inspecting.options import InspectOptions
from loratool.results.facts import OneFacts, UnreadableFacts

if TYPE_CHECKING:
    from loratool.results.fleet import FleetRow

MOST_IN_FULL = 3  # paths that are described one by one; more of them are a table


@dataclass(frozen=True, kw_only=True)
class InspectWords(InspectOptions, PartialWords):
    """Of the command, whose ways are functions of their own in the library."""


@click.command()
@click.argument("paths", type=OPERAND, nargs=-1, metavar="PATH...")
@click.option("--from-file", type=PATH, metavar="LIST", help="Also the paths in a file, one per line; - is stdin.")
@click_options(InspectWords)
@with_pictures(InspectOptions)
@click.option("--csv", "as_csv", is_flag=True, help="Of several adapters, print the table as CSV.")
@click.option(
    "--jsonl", "as_lines", is_flag=True, help="Of several adapters, print one JSON object per line, as they are read."
)
@output_options
def inspect(
    paths: tuple[Path, ...],
    from_file: Path | None,
    as_csv: bool,
    as_lines: bool,
    options: InspectWords,
    screen: Screen,
    pictures: Pictures,
) -> None:
    """Show what adapters and checkpoints contain, by default from their headers only.

    A folder of adapters, or more than three paths, are shown as a table.

    \b
    Examples:
      loratool inspect ./my-adapter ./Llama-3.2-1B
      loratool inspect ./my-adapter --base ./Llama-3.2-1B --values --check
      loratool inspect ./adapters --where "rank>16 and base~llama" --sort -bytes
      loratool inspect ./my-adapter --html my-adapter.html
      loratool inspect ./adapters --html adapters.html
    """
    if sum((as_csv, as_lines, screen.as_json)) > 1:
        raise UsageError("--json, --jsonl and --csv are mutually exclusive")
    every = [*paths]
    if from_file is not None:
        from loratool.inspecting.fleet.members import listed

        every += map(Path, listed(str(from_file)))
    if not every:
        raise UsageError("nothing to inspect; pass a path, or --from-file LIST")
    if is_shared(options):
        inspect_shared(every, options, screen, pictures)
        return
    if as_csv or as_lines or from_file is not None or shown_as_table(every, options, screen, pictures):
        if as_lines and pictures:
            raise UsageError(
                "--jsonl prints rows as they are read; --html and --svg need all of them: use --csv or --json"
            )
        code = show_lines(every, options, screen) if as_lines else show_table(every, options, screen, as_csv, pictures)
    else:
        code = show_in_full(every, options, screen, pictures)
    if code:
        raise click.exceptions.Exit(code)


def inspect_shared(paths: Sequence[Path], options: InspectWords, screen: Screen, pictures: Pictures) -> None:
    """`--part` and `--finish`, of one adapter."""
    from loratool.inspecting.in_parts import finish_inspect, inspect_part
    from loratool.inspecting.inspect import exit_code_of

    if len(paths) != 1:
        raise UsageError("--part and --finish take one adapter")
    into = options.into or ""
    if options.part is not None:
        with screen.bar(f"measuring {options.part}", unit=" units") as progress:
            screen.show(inspect_part(paths[0], options, options.part, into, progress))
        return
    facts = finish_inspect(paths[0], options, into)
    screen.show({"results": [facts]}, facts)
    pictures.write([facts])
    if code := exit_code_of(facts.findings or ()):
        tell_problems(paths[0], facts, screen)
        raise click.exceptions.Exit(code)


def tell_problems(path: Path, facts: OneFacts, screen: Screen) -> None:
    """Say on stderr why a check fails; where the report is not shown, also what shows it."""
    problems = [finding.message for finding in facts.findings or () if finding.level == "problem"]
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    whose = "" if problems[0].startswith(printable(path)) else f"{printable(path)}: "
    click.echo(f"Error: {whose}{problems[0]}{more}", err=True)
    if screen.quiet and not screen.as_json:
        click.echo(f"hint: {shell_line(['loratool', 'inspect', str(path), '--check'])}", err=True)


def shown_as_table(paths: Sequence[Path], options: InspectOptions, screen: Screen, pictures: Pictures) -> bool:
    """Whether paths are a table: several adapters are meant by one of them, or they are too many to be read in full."""
    apart = any(len(values) > 1 for values in (options.expert_layout, options.adapter_name, options.input_alpha))
    in_full = screen.as_json or pictures or options.tensors or options.metadata or apart
    return is_table(paths, options) or (len(paths) > MOST_IN_FULL and not in_full)


def show_table(paths: Sequence[Path], options: InspectOptions, screen: Screen, as_csv: bool, pictures: Pictures) -> int:
    """Print a table of adapters; the exit code is the worst of them."""
    from loratool.inspecting.fleet.table import table_of
    from loratool.results.fleet import csv_lines

    with screen.bar("reading", unit=" adapters") as progress:
        found = table_of(paths, options, progress)
    if as_csv:
        for line in csv_lines(found.adapters):
            click.echo(line)
    else:
        screen.show({"results": [found]}, found)
    pictures.write(found)
    tell_bad(
        [row for row in found.adapters if row.exit_code],
        len(found.adapters),
        "in the table" if as_csv else "" if screen.quiet and not screen.as_json else "below the table",
    )
    return found.exit_code


def show_lines(paths: Sequence[Path], options: InspectOptions, screen: Screen) -> int:
    """Print an object for each adapter as soon as it is read."""
    import json

    from loratool.inspecting.fleet.table import rows_of
    from loratool.results.base import plain
    from loratool.results.findings import worst

    codes: list[int] = []
    bad: list[FleetRow] = []
    with screen.bar("reading", unit=" adapters") as progress:
        for row in rows_of(paths, options, progress):
            codes.append(row.exit_code)
            bad += [row] if row.exit_code else []
            click.echo(json.dumps(plain(row), allow_nan=False))
    tell_bad(bad, len(codes), "in the lines")
    return worst(codes)


def tell_bad(bad: Sequence[FleetRow], count: int, where: str) -> None:
    """Say on stderr why the command fails, and where the reasons are; the reasons themselves where they are nowhere."""
    from loratool.results.fleet import counted_health

    if bad:
        what = counted_health(row.health for row in bad)
        step = shell_line(["loratool", "inspect", bad[0].path, "--check"])
        failed = f"{len(bad)} of {count} adapters failed ({what})"
        reasons = [f"; the reasons are {where}"] if where else [":", *(f"\n  {row.name}: {row.reason}" for row in bad)]
        click.echo(f"Error: {failed}{''.join(reasons)}\nhint: {step}", err=True)


def show_in_full(paths: Sequence[Path], options: InspectOptions, screen: Screen, pictures: Pictures) -> int:
    """Print all about each path. One of several that cannot be read is told on stderr, and the others are shown."""
    from loratool.inspecting.inspect import exit_code_of, inspect
    from loratool.results.findings import worst

    if pictures:
        options = replace(options, values=True)
    facts: list[OneFacts] = []
    codes: list[int] = []
    checked: list[tuple[Path, OneFacts]] = []  # those with problems
    for path, way in zip(paths, options.readings(len(paths)), strict=True):
        try:
            with screen.bar("measuring", **LAYERS) as progress:
                found = inspect(path, options, progress, way)
            codes.append(exit_code_of(found.findings or ()))
            checked += [(path, found)] if codes[-1] else []
        except LoratoolError as error:
            if len(paths) == 1:
                raise
            from loratool.inspecting.health import tell_unreadable

            complain_of(error)
            found = UnreadableFacts("unreadable", printable(path), tell_unreadable(error, path))
            codes.append(error.exit_code)
        facts.append(found)
    told = [each for each in facts if options.check or not isinstance(each, UnreadableFacts)]
    screen.show({"results": facts}, *(told or ("",)))
    pictures.write(facts)
    for path, found in checked:
        tell_problems(path, found, screen)
    return worst(codes)
