"""Commands that make adapters, and that relate them: `rescale`, `combine`, `resize`, `extract`, `compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from loratool.cli.publishing import check_access, pushing_options
from loratool.cli.words import OPERAND, ORIENTATION, PATH, counter, one, output_options, reading_options, show
from loratool.errors import InputError, UsageError, printable
from loratool.methods.table import METHODS

Command = TypeVar("Command", bound=Callable[..., None])
OUT = click.option("-o", "--output", "out", type=PATH, required=True, metavar="OUT", help="Folder to make.")
DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to compute."
)
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Dtype of the factors.",
)


def writing_options(command: Command) -> Command:
    """`--dry-run`, `--overwrite` and `--push-to-hub`."""
    command = pushing_options(command)
    command = click.option("--overwrite", is_flag=True, help="Replace OUT where it holds an adapter and nothing else.")(
        command
    )
    return click.option("--dry-run", is_flag=True, help="Compute and report, but write nothing.")(command)


def read_json(path: Path | None, option: str, kind: type) -> Any:
    """A JSON file that an option names."""
    if path is None:
        return None
    from loratool.inputs import json_value, read_bounded

    try:
        found = json_value(read_bounded(path))
    except ValueError as error:
        raise InputError(f"{printable(path)}: {error}") from None
    if not isinstance(found, kind):
        wanted = "a list" if kind is list else "an object"
        raise InputError(f"{printable(path)}: {option} takes {wanted}, found {type(found).__name__}")
    return found


@click.command()
@click.argument("adapter", type=OPERAND)
@OUT
@click.option("--scale", type=float, help="Factor for every update.")
@click.option("--alpha", type=float, help="α of every module.")
@click.option("--frobenius", type=float, metavar="NORM", help="Frobenius norm of all updates together.")
@click.option("--spectral", type=float, metavar="NORM", help="Largest singular value of any update.")
@click.option("--each", is_flag=True, help="Give each module that norm.")
@click.option(
    "--match",
    "matches",
    multiple=True,
    metavar="REGEX=FACTOR",
    help="Factor of the modules in whose name REGEX is found; may be repeated, the first that is found counts.",
)
@click.option("--bake", is_flag=True, help="Put the strength into the factors: α = r, no rsLoRA, no α patterns.")
@DTYPE
@reading_options
@writing_options
@output_options
def rescale(
    adapter: Path,
    out: Path,
    scale: float | None,
    alpha: float | None,
    frobenius: float | None,
    spectral: float | None,
    each: bool,
    matches: tuple[str, ...],
    bake: bool,
    dtype: str,
    expert_layout: tuple[str, ...],
    adapter_name: tuple[str, ...],
    input_alpha: tuple[float, ...],
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Change the strength of an adapter.

    Without --bake no tensor changes, only α does. With it the factors take the strength, for servers that read only
    α and r.

    \b
    Examples:
      loratool rescale ./my-adapter -o ./weaker --scale 0.5
      loratool rescale ./my-adapter -o ./even --spectral 1 --each
      loratool rescale ./my-adapter -o ./plain --bake --match 'mlp=0.8'
    """
    from loratool.rescaling import rescale

    check_access()
    with counter(quiet, "measuring") as progress:
        report = rescale(
            adapter,
            out,
            scale=scale,
            alpha=alpha,
            frobenius=frobenius,
            spectral=spectral,
            each=each,
            match=matches,
            bake=bake,
            dtype=dtype,
            expert_layout=one(expert_layout, "--expert-layout"),
            adapter_name=one(adapter_name, "--adapter-name"),
            input_alpha=one(input_alpha, "--input-alpha"),
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, lambda: str(report), as_json, quiet)


@click.command()
@click.argument("adapters", type=OPERAND, nargs=-1, required=True, metavar="ADAPTER...")
@OUT
@click.option(
    "-w", "--weight", "weights", type=float, multiple=True, help="Weight, once per adapter in order [default: 1]."
)
@click.option(
    "--weights",
    "weights_file",
    type=PATH,
    metavar="FILE.json",
    help='A list with an entry per adapter: a number, or numbers by pattern and "default".',
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="linear",
    show_default=True,
    metavar="METHOD",
    help="How: see below.",
)
@click.option(
    "--space", type=click.Choice(["dense", "core", "knots"]), help="Where entries are looked at [default: dense]."
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Rank of the result, cut to what a layer's shape allows [default: what the method gives].",
)
@click.option(
    "--rank-policy",
    type=click.Choice(["truncate", "ctm"]),
    default="truncate",
    show_default=True,
    help="Cut the result to --rank, or choose directions first that keep a part of every adapter.",
)
@click.option("--density", type=float, help="Part of the entries that is kept, in (0, 1] [default: the method's].")
@click.option("--window", type=float, default=0.15, show_default=True, help="della: spread of chances round --density.")
@click.option(
    "--outliers",
    type=float,
    default=0.01,
    show_default=True,
    help="breadcrumbs: part of the entries, the largest, to drop.",
)
@click.option("--lambda", "factor", type=float, default=1.0, show_default=True, help="Factor of the result.")
@click.option(
    "--match-norm",
    type=click.Choice(["none", "mean", "max", "sum"]),
    default="none",
    show_default=True,
    help="Give each layer that of the weighted updates' norms.",
)
@click.option(
    "--sign",
    type=click.Choice(["total", "frequency"]),
    default="total",
    show_default=True,
    help="A majority of sizes or of adapters.",
)
@click.option("--normalize/--no-normalize", default=None, help="Divide by the weights [default: the method's].")
@click.option(
    "--iso-beta", type=float, default=1.0, show_default=True, help="iso_c: 0 is the sum, 1 equal singular values."
)
@click.option("--row-wise", is_flag=True, help="nuslerp: an angle for each row.")
@click.option("--svc", is_flag=True, help="Calibrate singular values afterwards, so that shared directions count once.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random numbers, which depend on nothing else.")
@click.option(
    "--saved",
    type=click.Choice(["refuse", "first", "mean"]),
    default="refuse",
    show_default=True,
    help="Where adapters saved different values for one tensor.",
)
@DEVICE
@DTYPE
@reading_options
@writing_options
@output_options
def combine(
    adapters: tuple[Path, ...],
    out: Path,
    weights: tuple[float, ...],
    weights_file: Path | None,
    method: str,
    space: str | None,
    rank: int | None,
    rank_policy: str,
    density: float | None,
    window: float,
    outliers: float,
    factor: float,
    match_norm: str,
    sign: str,
    normalize: bool | None,
    iso_beta: float,
    row_wise: bool,
    svc: bool,
    seed: int,
    saved: str,
    device: str,
    dtype: str,
    expert_layout: tuple[str, ...],
    adapter_name: tuple[str, ...],
    input_alpha: tuple[float, ...],
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Several adapters of one base into one adapter.

    METHOD is linear (exact: ranks add up), cat, svd, slerp, nuslerp, karcher, model_stock, ties, dare_linear,
    dare_ties, della, breadcrumbs, sce, magnitude_prune, tsv, iso_c, iso_cts, or one of PEFT's on factors: linear-factors,
    ties-factors, dare_linear-factors, dare_ties-factors, magnitude_prune-factors.

    \b
    Examples:
      loratool combine ./style ./facts -o ./both -w 0.7 -w 1.2
      loratool combine ./a ./b ./c -o ./small --rank 32
      loratool combine ./a ./b ./c -o ./ties --method ties --density 0.3 --space core
    """
    from loratool.combining import combine

    if weights and weights_file:
        raise UsageError("-w and --weights are mutually exclusive")
    check_access()
    with counter(quiet, "combining") as progress:
        report = combine(
            adapters,
            out,
            method=method,
            weights=read_json(weights_file, "--weights", list) if weights_file else list(weights) or None,
            space=space,
            rank=rank,
            rank_policy=rank_policy,
            density=density,
            window=window,
            outliers=outliers,
            factor=factor,
            match_norm=match_norm,
            sign=sign,
            normalize=normalize,
            iso_beta=iso_beta,
            row_wise=row_wise,
            svc=svc,
            seed=seed,
            saved=saved,
            dtype=dtype,
            device=device,
            expert_layout=expert_layout,
            adapter_name=adapter_name,
            input_alpha=input_alpha,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, lambda: str(report), as_json, quiet)


@click.command()
@click.argument("adapter", type=OPERAND)
@OUT
@click.option(
    "--rank",
    type=int,
    help="Rank of every layer, cut to what its shape allows; above its own it is filled up with zeros.",
)
@click.option("--energy", type=float, help="Part of ‖ΔW‖² that each layer keeps, such as 0.99.")
@click.option("--error", type=float, help="Relative error that each layer may have, such as 0.05.")
@click.option("--ratio", type=float, help="Keep singular values above the largest over this number.")
@click.option("--budget", metavar="SIZE", help="Parameters of all factors together (4M), or bytes (16MB).")
@click.option(
    "--layer-weights",
    type=PATH,
    metavar="FILE.json",
    help="For --budget: how much the error of a layer counts, by pattern.",
)
@click.option(
    "--calibration",
    type=PATH,
    metavar="FILE",
    help="E[zzᵀ] of z = A·x for each module, a .safetensors file; what counts is then the error of ΔW·x.",
)
@click.option("--uniform", is_flag=True, help="Fill all layers up to the largest rank, for servers that know one.")
@DEVICE
@DTYPE
@reading_options
@writing_options
@output_options
def resize(
    adapter: Path,
    out: Path,
    rank: int | None,
    energy: float | None,
    error: float | None,
    ratio: float | None,
    budget: str | None,
    layer_weights: Path | None,
    calibration: Path | None,
    uniform: bool,
    device: str,
    dtype: str,
    expert_layout: tuple[str, ...],
    adapter_name: tuple[str, ...],
    input_alpha: tuple[float, ...],
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Give an adapter other ranks, by SVD: each layer the nearest update of its new rank.

    \b
    Examples:
      loratool resize ./my-adapter -o ./small --rank 8
      loratool resize ./my-adapter -o ./small --energy 0.99 --uniform
      loratool resize ./my-adapter -o ./small --budget 16MB
    """
    from loratool.resizing import resize

    check_access()
    with counter(quiet, "resizing") as progress:
        report = resize(
            adapter,
            out,
            rank=rank,
            energy=energy,
            error=error,
            ratio=ratio,
            budget=budget,
            layer_weights=read_json(layer_weights, "--layer-weights", dict),
            calibration=calibration,
            uniform=uniform,
            dtype=dtype,
            device=device,
            expert_layout=one(expert_layout, "--expert-layout"),
            adapter_name=one(adapter_name, "--adapter-name"),
            input_alpha=one(input_alpha, "--input-alpha"),
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, lambda: str(report), as_json, quiet)


class Rank(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A whole number, or auto."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        try:
            return "auto" if value == "auto" else int(value)
        except ValueError:
            self.fail(f"{printable(repr(value))} is neither a whole number nor auto", param, ctx)


@click.command()
@click.argument("base", type=OPERAND)
@click.argument("tuned", type=OPERAND)
@OUT
@click.option(
    "--rank",
    type=Rank(),
    metavar="N|auto",
    help="Rank of every layer, or what rounding cannot explain [default: auto].",
)
@click.option(
    "--energy", type=float, help="Part of ‖W_tuned − W_base‖² that each layer keeps; with --rank the smaller counts."
)
@click.option(
    "--max-rank", type=click.IntRange(min=1), default=32, show_default=True, help="Of a layer, with auto or --energy."
)
@click.option("--exact", is_flag=True, help="Decompose every matrix in full.")
@click.option(
    "--include", multiple=True, metavar="REGEX", help="Only modules in whose name it is found; may be repeated."
)
@click.option(
    "--exclude", multiple=True, metavar="REGEX", help="No modules in whose name it is found; may be repeated."
)
@ORIENTATION
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sketch.")
@DEVICE
@DTYPE
@writing_options
@output_options
def extract(
    base: Path,
    tuned: Path,
    out: Path,
    rank: int | Literal["auto"] | None,
    energy: float | None,
    max_rank: int,
    exact: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    fan_in_fan_out: bool | None,
    seed: int,
    device: str,
    dtype: str,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """An adapter out of a full fine-tune: what makes TUNED of BASE, as nearly as its ranks allow.

    \b
    Examples:
      loratool extract ./base ./fine-tuned -o ./adapter
      loratool extract ./base ./fine-tuned -o ./adapter --rank 64 --exclude embed
    """
    from loratool.extracting import extract

    check_access()
    with counter(quiet, "extracting") as progress:
        report = extract(
            base,
            tuned,
            out,
            rank=rank,
            energy=energy,
            max_rank=max_rank,
            exact=exact,
            include=include,
            exclude=exclude,
            fan_in_fan_out=fan_in_fan_out,
            dtype=dtype,
            device=device,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, lambda: str(report), as_json, quiet)


@click.command()
@click.argument("adapters", type=OPERAND, nargs=-1, required=True, metavar="ADAPTER ADAPTER...")
@DEVICE
@reading_options
@output_options
def compare(
    adapters: tuple[Path, ...],
    device: str,
    expert_layout: tuple[str, ...],
    adapter_name: tuple[str, ...],
    input_alpha: tuple[float, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """How alike adapters are, and how much in each other's way.

    \b
    Example: loratool compare ./style ./facts
    """
    from loratool.comparing import compare

    with counter(quiet, "comparing") as progress:
        report = compare(
            adapters,
            device=device,
            expert_layout=expert_layout,
            adapter_name=adapter_name,
            input_alpha=input_alpha,
            progress=progress,
        )
    show(report, lambda: str(report), as_json, quiet)
