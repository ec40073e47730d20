"""`loratool estimate`: what training an adapter would take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from loratool.commands.library import with_next_step
from loratool.inspecting import estimate as estimating
from loratool.inspecting.estimate import EstimateOptions
from loratool.options.described import made_of
from loratool.results.estimate import Estimate

if TYPE_CHECKING:
    from loratool.arguments import PathLike


@with_next_step(EstimateOptions)
def estimate(
    base: PathLike | None = None,
    ranks: int | Sequence[int] = (),
    targets: str | Iterable[str] = (),
    *,
    preset: str | None = None,
    dtype: str = "float32",
) -> Estimate:
    """Estimate the size and training memory of LoRA with each of `ranks` on `targets` of `base`. No tensor is read.

    Memory is, for P parameters of b bytes, P·b for the weights, P·b for the gradients and P·8 for AdamW.

    Args:
        base: a model's folder or file, or a config.json (or a folder with nothing but one) of a family in
            `loratool.bases.decoders`. None with `preset`.
        ranks: one rank or several.
        targets: names as PEFT's `target_modules` takes them, each the end of a module's path, separated by commas
            where they are one text; `all-linear` for every linear layer except the output head.
        preset: a known model, such as "llama-2-7b", whose sizes are taken instead of those of `base`.
        dtype: of the adapter's parameters, "float32" (as PEFT trains and saves them), "bfloat16" or "float16".

    Raises:
        UsageError: a rank below 1, no targets, both a base and a preset or neither, an unknown preset or dtype.
        InputError: the base is malformed, quantised, an adapter, or a config of an unknown family.
        FitError: a target names no weight, or one that is neither a linear layer nor an embedding.
    """
    options = made_of(
        EstimateOptions, {"ranks": ranks, "targets": targets, "preset": preset, "dtype": dtype}, "estimate"
    )
    return estimating.estimate(base, options)
