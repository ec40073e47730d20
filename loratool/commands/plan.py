"""`loratool plan`: what a merge would do, of paths or of what is open already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter
from loratool.arguments import PathLike
from loratool.commands.library import library_function
from loratool.files.checkpoint import Checkpoint
from loratool.merging import planning
from loratool.merging.describing import described
from loratool.merging.dry_run import DryRunOptions, dry_run
from loratool.merging.merge_options import MergeOptions, PlanOptions
from loratool.options.described import made_of
from loratool.results.plan import MergePlan

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import DryRunKeywords, PlanKeywords


@library_function(DryRunOptions, "merge")
def plan(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike = (),
    out: PathLike | None = None,
    **keywords: Unpack[DryRunKeywords],
) -> MergePlan:
    """What `merge` with the same arguments would do, and the gain to be expected; nothing is written.

    With `simulate`, how long the merge would take with some numbers of workers, from headers alone; then no gain is
    forecast.

    Args:
        base: as for `merge`; of one on the Hub only headers are read.
        adapters: as for `merge`.
        out: as for `merge`; None for a folder that is chosen later.

    Raises:
        LoratoolError: as `merge` does.
    """
    return dry_run(base, adapters, out, made_of(DryRunOptions, keywords, "plan"))


@library_function(PlanOptions, "merge")
def plan_merge(base: Checkpoint, adapters: Sequence[Adapter], **keywords: Unpack[PlanKeywords]) -> MergePlan:
    """Plan `base` + Σ weight · adapter for a checkpoint and adapters that are already open.

    Args:
        base: the model to merge into, from `open_checkpoint`.
        adapters: one or more adapters trained on it, from `read_adapter`.

    Raises:
        UsageError: the options contradict each other.
        InputError: an adapter uses a feature, or the base a dtype, that is not supported.
        FitError: an adapter tensor matches no weight of the base, or two match the same one.
    """
    plan = planning.plan_merge(base, adapters, made_of(PlanOptions, keywords, "plan_merge"))
    return described(plan, MergeOptions())
