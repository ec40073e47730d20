"""`loratool estimate`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.words import OPERAND, output_options, show


@click.command()
@click.argument("base", type=OPERAND)
@click.option("--rank", "ranks", type=int, multiple=True, required=True, metavar="R", help="Rank; may be repeated.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Layers to adapt: q_proj,v_proj or all-linear; may be repeated.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Dtype of the adapter's parameters.",
)
@output_options
def estimate(
    base: Path, ranks: tuple[int, ...], targets: tuple[str, ...], dtype: str, as_json: bool, quiet: bool
) -> None:
    """Tell what an adapter would have and what training it would take, before there is one.

    BASE is a model folder or file or a place on the Hub, of which only headers are read, or the config.json of a decoder.

    \b
    Examples:
      loratool estimate ./Llama-3.2-1B --rank 8 --target q_proj,v_proj
      loratool estimate ./Llama-3.2-1B/config.json --rank 8 --rank 64 --target all-linear
    """
    from loratool.estimating import estimate

    result = estimate(base, ranks, targets, dtype=dtype)
    show(result, lambda: str(result), as_json, quiet)
