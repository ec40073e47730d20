"""Commands that look at what is there: `loratool inspect` and `loratool demo`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.words import MAPS, OPERAND, ORIENTATION, PATH, counter, output_options, reading_options, show
from loratool.reading import readings


@click.command()
@click.argument("paths", type=OPERAND, nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--base", type=OPERAND, metavar="BASE", help="Model that the adapters are for: parameters, places, sizes."
)
@click.option(
    "--base-config",
    type=PATH,
    metavar="FILE",
    help="Its config.json alone: parameters in all, where the family is known.",
)
@MAPS
@ORIENTATION
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--values", is_flag=True, help="Measure every module of an adapter: norms, ranks, spectra.")
@click.option("--check", is_flag=True, help="Look for what is wrong; exit code 3 or 5 where something is.")
@click.option("--html", type=PATH, metavar="FILE", help="Write one page with figures; measures as --values does.")
@click.option("--overwrite", is_flag=True, help="Replace FILE where it is a page made by inspect.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to measure.")
@reading_options
@output_options
def inspect(
    paths: tuple[Path, ...],
    base: Path | None,
    base_config: Path | None,
    maps: tuple[str, ...],
    fan_in_fan_out: bool | None,
    tensors: bool,
    values: bool,
    check: bool,
    html: Path | None,
    overwrite: bool,
    device: str,
    expert_layout: tuple[str, ...],
    adapter_name: tuple[str, ...],
    input_alpha: tuple[float, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Tell what is in adapters and checkpoints, by default from headers alone.

    \b
    Examples:
      loratool inspect ./my-adapter ./Llama-3.2-1B
      loratool inspect ./my-adapter --base ./Llama-3.2-1B --values --check
      loratool inspect ./my-adapter --html my-adapter.html
    """
    from loratool.inspecting import exit_code_of, inspect

    if html is not None:
        from loratool.report.page import check_page

        check_page(html, overwrite)
    facts = []
    for path, way in zip(paths, readings(len(paths), expert_layout, adapter_name, input_alpha), strict=True):
        with counter(quiet, "measuring") as progress:
            facts.append(
                inspect(
                    path,
                    base=base,
                    base_config=base_config,
                    tensors=tensors,
                    values=values or html is not None,
                    check=check,
                    maps=maps,
                    fan_in_fan_out=fan_in_fan_out,
                    device=device,
                    expert_layout=way.expert_layout,
                    adapter_name=way.adapter_name,
                    input_alpha=way.input_alpha,
                    progress=progress,
                )
            )
    if html is not None:
        from loratool.report.page import write_page

        write_page(facts, html, overwrite)
    show({"results": facts}, lambda: "\n\n".join(map(str, facts)), as_json, quiet)
    if codes := [code for code in map(exit_code_of, facts) if code]:
        raise click.exceptions.Exit(min(codes))


@click.command(short_help="Make, merge and check a small model from nothing.")
@click.argument("folder", type=PATH, default=Path("loratool-demo"), metavar="[DIR]")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier demo left in DIR.")
@output_options
def demo(folder: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Build a small base and an adapter, merge them, and check the result against the formula.

    \b
    Example: loratool demo ./loratool-demo
    """
    from loratool.demo import demo

    result = demo(folder, overwrite=overwrite)
    show(result, lambda: str(result), as_json, quiet)
