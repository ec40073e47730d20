"""`loratool demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from loratool.cli.options import PATH, click_options, output_options
from loratool.cli.screen import Screen
from loratool.options.described import FLAG, Options, option


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Of `demo`."""

    learn: bool = option(
        help="Teach LoRA in six steps, with commands that run on files in DIR.", default=False, kind=FLAG
    )
    overwrite: bool = option(help="Replace the output of an earlier demo in DIR.", default=False, kind=FLAG)


@click.command()
@click.argument("folder", type=PATH, default=Path("loratool-demo"), metavar="[DIR]")
@click_options(DemoOptions)
@output_options
def demo(folder: Path, options: DemoOptions, screen: Screen) -> None:
    """Build a small base and an adapter, merge them, and check the result against the formula.

    With --learn, they are used for a lesson instead: what is trained, ΔW by hand, which rank, α, merging and
    unmerging. All files stay in DIR.

    \b
    Examples:
      loratool demo ./loratool-demo
      loratool demo ./lesson --learn
    """
    if not options.learn:
        from loratool.demo import demo as build

        screen.show(build(folder, overwrite=options.overwrite))
        return
    from loratool.cli.lesson import play

    text = None if screen.as_json else Screen(as_json=False, quiet=screen.quiet)
    lesson = play(folder, options.overwrite, lambda step: text.show(step, f"{step}\n\n") if text else None)
    screen.show(lesson, lesson.farewell)
