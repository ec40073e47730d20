"""`loratool merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli.publishing import asked_repo, check_access, keep_excluded, pushing_options, selecting
from loratool.cli.words import (
    MAPS,
    OPERAND,
    ORIENTATION,
    PATH,
    PUSH,
    Size,
    output_options,
    progress_bar,
    reading_options,
    show,
)


@click.command()
@click.argument("base", type=OPERAND)
@click.argument("adapters", type=OPERAND, nargs=-1, metavar="ADAPTER...")
@click.option("-o", "--output", "out", type=PATH, metavar="OUT", help="Folder to make.")
@click.option(
    "--base",
    "named_base",
    type=OPERAND,
    metavar="BASE",
    help="BASE as an option, then every operand is an ADAPTER; auto is the base that the adapters name.",
)
@click.option(
    "-w", "--weight", "weights", type=float, multiple=True, help="Strength, once per adapter in order [default: 1]."
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Dtype of every float tensor written.",
)
@MAPS
@ORIENTATION
@reading_options
@click.option(
    "--shard-size", type=Size(), help="Tensor bytes per output file, such as 5GB [default: the base's shards]."
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Threads [default: two more than cores, at most 16].")
@click.option("--max-memory", type=Size(), help="Resident memory to stay under, such as 400MB.")
@click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it holds a model and nothing else.")
@click.option("--allow-new-tensors", is_flag=True, help="Add heads that an adapter saved and BASE has not.")
@click.option(
    "--also-load",
    multiple=True,
    metavar="FILE",
    help="Merge the tensors of this safetensors file in an ADAPTER's folder too; may be repeated.",
)
@click.option(
    "--ignore-files",
    multiple=True,
    metavar="NAME",
    help="Leave out trained weights in an ADAPTER's folder that are not merged; may be repeated.",
)
@pushing_options
@click.option(
    "--stream",
    "streamed",
    is_flag=True,
    help="Without OUT: fetch, merge and upload file by file, two on the disk at most.",
)
@click.option("--card", is_flag=True, help="With --stream: write a README.md though BASE brings one.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    expose_value=False,
    callback=keep_excluded,
    help="With --push-to-hub: leave these files out; may be repeated.",
)
@output_options
def merge(
    base: Path,
    adapters: tuple[Path, ...],
    out: Path | None,
    named_base: Path | None,
    weights: tuple[float, ...],
    device: str,
    dtype: str,
    maps: tuple[str, ...],
    fan_in_fan_out: bool | None,
    expert_layout: tuple[str, ...],
    adapter_name: tuple[str, ...],
    input_alpha: tuple[float, ...],
    shard_size: int | None,
    workers: int | None,
    max_memory: int | None,
    dry_run: bool,
    overwrite: bool,
    allow_new_tensors: bool,
    also_load: tuple[str, ...],
    ignore_files: tuple[str, ...],
    streamed: bool,
    card: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fold adapters into a base model, shard by shard.

    BASE is a model folder or one .safetensors file, ADAPTER a folder as PEFT saves it; either may be org/name[@revision]
    of the Hub, and BASE auto. An ADAPTER alone is merged into the base that it names, and a model that was saved with its
    adapter unmerged is folded without one. OUT becomes a complete model folder: weights, index, config, tokenizer. Nothing of it
    exists under its name until everything does; the same command after an interruption continues.

    \b
    Examples:
      loratool merge ./Llama-3.2-1B ./my-adapter -o ./merged
      loratool merge ./base ./style ./facts -w 0.7 -w 1.2 -o ./merged --shard-size 5GB
      loratool merge ./merged ./my-adapter -w -1 -o ./base-again
      loratool merge ./base ./my-adapter -o ./merged --map '^model[.]text[.]=model.'
      loratool merge ./saved-unmerged -o ./merged --input-alpha 16
      loratool merge auto me/my-adapter -o ./merged --push-to-hub me/merged
      loratool merge meta-llama/Llama-3.1-70B me/my-adapter --stream --push-to-hub me/merged
    """
    base, adapters = operands(base, adapters, named_base)
    if streamed:
        stream_to_hub(
            base,
            adapters,
            out,
            shard_size,
            as_json,
            quiet,
            weights=weights,
            device=device,
            dtype=dtype,
            maps=maps,
            fan_in_fan_out=fan_in_fan_out,
            workers=workers,
            max_memory=max_memory,
            expert_layout=expert_layout,
            adapter_name=adapter_name,
            input_alpha=input_alpha,
            allow_new_tensors=allow_new_tensors,
            also_load=also_load,
            ignore_files=ignore_files,
            overwrite=overwrite,
            card=card,
            dry_run=dry_run,
        )
        return
    if out is None:
        raise missing("out")
    if card:
        raise click.UsageError("--card goes with --stream; `loratool push --card` has it too")
    from loratool.merging import merge, outlook

    if dry_run:
        from loratool.report import plan_text

        with outlook(
            base,
            adapters,
            out,
            weights=weights,
            dtype=dtype,
            maps=maps,
            fan_in_fan_out=fan_in_fan_out,
            shard_size=shard_size,
            overwrite=overwrite,
            expert_layout=expert_layout,
            adapter_name=adapter_name,
            input_alpha=input_alpha,
            allow_new_tensors=allow_new_tensors,
            also_load=also_load,
            ignore_files=ignore_files,
        ) as planned:
            table = planned.to_dict(device, workers, max_memory)
            show(table, lambda: plan_text(planned, table["peak_memory"]), as_json, quiet)
        return
    check_access()
    with progress_bar(quiet) as progress:
        report = merge(
            base,
            adapters,
            out,
            weights=weights,
            device=device,
            dtype=dtype,
            maps=maps,
            fan_in_fan_out=fan_in_fan_out,
            shard_size=shard_size,
            workers=workers,
            max_memory=max_memory,
            overwrite=overwrite,
            expert_layout=expert_layout,
            adapter_name=adapter_name,
            input_alpha=input_alpha,
            allow_new_tensors=allow_new_tensors,
            also_load=also_load,
            ignore_files=ignore_files,
            progress=progress,
        )
    show(report, lambda: str(report), as_json, quiet)


def operands(base: Path, adapters: tuple[Path, ...], named: Path | None) -> tuple[Path, tuple[Path, ...]]:
    """BASE and the ADAPTERs; with `--base` every operand is one of the latter, and BASE alone may hold its adapter."""
    return (base, adapters) if named is None else (named, (base, *adapters))


def missing(name: str) -> click.MissingParameter:
    """The error for a parameter that only some ways of calling can do without."""
    context = click.get_current_context()
    return click.MissingParameter(ctx=context, param=next(p for p in context.command.params if p.name == name))


def stream_to_hub(
    base: Path,
    adapters: tuple[Path, ...],
    out: Path | None,
    shard_size: int | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """`--stream`: no folder is made, and the files keep the base's sizes."""
    repo, public = asked_repo()
    if out is not None or shard_size is not None:
        raise click.UsageError("--stream makes no folder and keeps the base's files: leave -o and --shard-size out")
    if repo is None:
        raise click.UsageError("--stream needs --push-to-hub REPO, where the files go")
    del click.get_current_context().meta[PUSH]  # there is no folder to push
    from loratool.hub import stream

    with progress_bar(quiet) as progress:
        report = stream(base, adapters, repo, public=public, **selecting(), progress=progress, **settings)
    show(report, lambda: str(report), as_json, quiet)
