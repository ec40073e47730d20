"""Commands that make adapters, and that relate them: `rescale`, `combine`, `resize`, `extract`, `compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import OPERAND, OUT, click_options, output_options
from loratool.commands.combine import CombineAndPushOptions
from loratool.commands.extract import ExtractAndPushOptions
from loratool.commands.publish import with_push
from loratool.commands.rescale import RescaleAndPushOptions
from loratool.commands.resize import ResizeAndPushOptions
from loratool.reworking.compare import CompareOptions

if TYPE_CHECKING:
    from pathlib import Path

    from loratool.cli.screen import Screen


@click.command()
@click.argument("adapter", type=OPERAND)
@OUT
@click_options(RescaleAndPushOptions)
@output_options
def rescale(adapter: Path, out: Path, options: RescaleAndPushOptions, screen: Screen) -> None:
    """Change the strength of an adapter.

    Without --bake only alpha changes and the tensors stay the same. With --bake the scaling is multiplied into the
    factors, for servers that read only alpha and r.

    \b
    Examples:
      loratool rescale ./my-adapter -o ./weaker --scale 0.5
      loratool rescale ./my-adapter -o ./even --spectral 1 --each
      loratool rescale ./my-adapter -o ./plain --bake --match 'mlp=0.8'
    """
    from loratool.reworking.rescale import rescale

    with screen.layers("measuring") as progress, screen.bytes("pushing") as push_progress:
        report = with_push(rescale, (adapter, out), options, progress, push_progress)
    screen.show(report)


@click.command()
@click.argument("adapters", type=OPERAND, nargs=-1, required=True, metavar="ADAPTER...")
@OUT
@click_options(CombineAndPushOptions)
@output_options
def combine(adapters: tuple[Path, ...], out: Path, options: CombineAndPushOptions, screen: Screen) -> None:
    """Combine several adapters of one base into one.

    METHOD is linear (exact: ranks add up), cat, svd, slerp, nuslerp, karcher, model_stock, ties, dare_linear,
    dare_ties, della, breadcrumbs, sce, magnitude_prune, tsv, iso_c, iso_cts, or one of PEFT's methods on factors:
    linear-factors, ties-factors, dare_linear-factors, dare_ties-factors, magnitude_prune-factors.

    \b
    Examples:
      loratool combine ./style ./facts -o ./both -w 0.7 -w 1.2
      loratool combine ./a ./b ./c -o ./small --rank 32
      loratool combine ./a ./b ./c -o ./ties --method ties --density 0.3 --space core
    """
    from loratool.reworking.combine import combine

    with screen.layers("combining") as progress, screen.bytes("pushing") as push_progress:
        report = with_push(combine, (adapters, out), options, progress, push_progress)
    screen.show(report)


@click.command()
@click.argument("adapter", type=OPERAND)
@OUT
@click_options(ResizeAndPushOptions)
@output_options
def resize(adapter: Path, out: Path, options: ResizeAndPushOptions, screen: Screen) -> None:
    """Change the ranks of an adapter by SVD: each layer gets the best approximation at its new rank.

    \b
    Examples:
      loratool resize ./my-adapter -o ./small --rank 8
      loratool resize ./my-adapter -o ./small --energy 0.99 --uniform
      loratool resize ./my-adapter -o ./small --budget 16MB
    """
    from loratool.reworking.resize import resize

    with screen.layers("resizing") as progress, screen.bytes("pushing") as push_progress:
        report = with_push(resize, (adapter, out), options, progress, push_progress)
    screen.show(report)


@click.command()
@click.argument("base", type=OPERAND)
@click.argument("tuned", type=OPERAND)
@OUT
@click_options(ExtractAndPushOptions)
@output_options
def extract(base: Path, tuned: Path, out: Path, options: ExtractAndPushOptions, screen: Screen) -> None:
    """Extract an adapter from a full fine-tune: the difference TUNED − BASE, as closely as the ranks allow.

    \b
    Examples:
      loratool extract ./base ./fine-tuned -o ./adapter
      loratool extract ./base ./fine-tuned -o ./adapter --rank 64 --exclude embed
    """
    from loratool.reworking.extracting.extract import extract

    with screen.layers("extracting") as progress, screen.bytes("pushing") as push_progress:
        report = with_push(extract, (base, tuned, out), options, progress, push_progress)
    screen.show(report)


@click.command()
@click.argument("adapters", type=OPERAND, nargs=-1, required=True, metavar="ADAPTER ADAPTER...")
@click_options(CompareOptions)
@output_options
def compare(adapters: tuple[Path, ...], options: CompareOptions, screen: Screen) -> None:
    """Measure how similar adapters are and how much they interfere.

    \b
    Example: loratool compare ./style ./facts
    """
    from loratool.reworking.compare import compare

    with screen.layers("comparing") as progress:
        report = compare(adapters, options, progress)
    screen.show(report)
