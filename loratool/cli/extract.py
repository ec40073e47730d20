"""`loratool extract`."""

from typing import Any

import click

from loratool.cli.options import A_MODEL, BASE, LAYERS, OUT, PUSHING, library_command
from loratool.cli.partial import PartialWords
from loratool.commands.extract import extract as function
from loratool.errors import UsageError
from loratool.reworking.extracting.options import ExtractOptions


def shared(words: PartialWords, push_progress: Any = None, **given: Any) -> Any:
    """`--part` and `--finish`."""
    from loratool.commands.partial import extract_part, finish_extract

    if words.part is None:
        return finish_extract(**given, into=words.into or "", push_progress=push_progress)
    if "push_to_hub" in given:
        raise UsageError("--part and --push-to-hub are mutually exclusive; pass --push-to-hub with --finish")
    return extract_part(**given, part=words.part, into=words.into or "")


extract = library_command(
    function,
    ExtractOptions,
    BASE,
    click.argument("tuned", type=A_MODEL),
    OUT,
    help="""Extract an adapter from a full fine-tune: the difference TUNED − BASE, as closely as the ranks allow.

    \b
    Examples:
      loratool extract ./base ./fine-tuned -o ./adapter
      loratool extract ./base ./fine-tuned -o ./adapter --rank 64 --exclude embed
    """,
    pictures=True,
    shared=shared,
    progress=("extracting", LAYERS),
    push_progress=PUSHING,
)
