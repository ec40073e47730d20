"""`loratool verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli.options import A_MODEL, AN_ADAPTER, BYTES, click_options, output_options, with_pictures
from loratool.cli.partial import PartialWords, is_shared
from loratool.cli.pictures import Pictures
from loratool.cli.screen import Screen, end_with
from loratool.verifying.options import VerifyOptions

if TYPE_CHECKING:
    from loratool.results.verify import Verification


@dataclass(frozen=True, kw_only=True)
class VerifyWords(VerifyOptions, PartialWords):
    """Of the command, whose ways are functions of their own in the library."""


@click.command()
@click.argument("merged", type=A_MODEL)
@click.option(
    "--base", type=A_MODEL, metavar="BASE", help="The model that MERGED was made of [default: the adapter names it]."
)
@click.option(
    "--adapter",
    "adapters",
    type=AN_ADAPTER,
    multiple=True,
    metavar="ADAPTER",
    help="An adapter that was merged into it; may be repeated.",
)
@click_options(VerifyWords)
@with_pictures(VerifyOptions)
@output_options
def verify(
    merged: Path,
    base: Path | None,
    adapters: tuple[Path, ...],
    options: VerifyWords,
    screen: Screen,
    pictures: Pictures,
) -> None:
    """Prove a merged model, whoever made it, and explain what is wrong.

    With MERGED alone, every file is compared with its loratool.json. With BASE and ADAPTER, every tensor is compared
    with the formula, in ulp; nothing is written. Exit code 0 means proven, 5 that the model is something else.

    \b
    Examples:
      loratool verify ./merged
      loratool verify ./merged --base ./Llama-3.2-1B --adapter ./my-adapter
      loratool verify ./merged --base ./base --adapter ./my-adapter --html verified.html
      loratool verify me/merged --adapter ./style -w 0.7 --adapter ./facts -w 1.2
    """
    if is_shared(options):
        result = shared(merged, base, adapters, options, screen)
        if result is None:
            return
    else:
        from loratool.verifying.verify import verify

        with screen.bar("verifying", **BYTES) as progress:
            result = verify(merged, base, adapters, options, progress)
    screen.show(result)
    pictures.write(result)
    end_with(merged, result)


def shared(
    merged: Path, base: Path | None, adapters: tuple[Path, ...], options: VerifyWords, screen: Screen
) -> Verification | None:
    """`--part`, after which there is nothing more to say, and `--finish`."""
    from loratool.verifying.in_parts import finish_verify, verify_part

    into = options.into or ""
    if options.part is None:
        with screen.bar("verifying", **BYTES) as progress:
            return finish_verify(merged, base, adapters, options, into, progress)
    with screen.bar(f"verifying {options.part}", unit=" units") as progress:
        screen.show(verify_part(merged, base, adapters, options, options.part, into, progress))
    return None
