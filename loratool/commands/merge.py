"""`loratool merge`: a merge, then a push where one is asked for; a plan alone; a merge that streams to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import Adapter
from loratool.commands.library import library_function
from loratool.commands.publish import with_push
from loratool.data import dataclass
from loratool.errors import UsageError
from loratool.files.checkpoint import Checkpoint
from loratool.merging import merge as merging, merge_many as many, planning
from loratool.merging.dry_run import DryRunOptions, dry_run
from loratool.merging.in_parts import abort
from loratool.merging.in_store import merge_into_store
from loratool.merging.merge import MergeOptions, PathLike, Progress
from loratool.merging.merge_many import Outputs
from loratool.merging.options import ClusterOptions, PlanOptions
from loratool.merging.plan import MergePlan
from loratool.options.described import made_of, option
from loratool.options.shared import PublishOptions
from loratool.publishing import streaming
from loratool.publishing.streaming import StreamOptions
from loratool.results.abort import AbortReport
from loratool.results.merge import MergeReport
from loratool.results.merge_many import MergeManyReport
from loratool.results.stream import StreamReport
from loratool.stores.names import is_in_store

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import (
        DryRunKeywords,
        MergeKeywords,
        PlanKeywords,
        StreamKeywords,
        WholePlanKeywords,
    )


@dataclass(frozen=True, kw_only=True)
class PublishModelOptions(PublishOptions):
    """Of a command that writes a model."""

    exclude: tuple[str, ...] = option(
        help="With --push-to-hub: do not upload these files; may be repeated.",
        default=(),
        many=True,
        metavar="PATTERN",
        recorded=False,
    )

    def for_push(self) -> dict[str, Any]:
        return {**super().for_push(), "exclude": self.exclude}


@dataclass(frozen=True, kw_only=True)
class MergeAndPushOptions(MergeOptions, ClusterOptions, PublishModelOptions):
    """Of `merge`."""

    def check_cluster(self) -> None:
        """Raise `UsageError` for options of a cluster where none was asked for."""
        for flag, value in (("--num-cpus", self.num_cpus), ("--num-gpus", self.num_gpus)):
            if value is not None and not isinstance(self.workers, str):
                raise UsageError(f"{flag} needs --workers ray")


@library_function(MergeAndPushOptions)
def merge(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[MergeKeywords],
) -> MergeReport:
    """Write W' = W + Σ weight · ΔW as a complete model folder `out`, shard by shard.

    Each tensor is accumulated in float32 (a float64 base in float64) and rounded once to its own dtype. To continue an
    interrupted merge, make the same call again.

    Args:
        base: a model folder or one `.safetensors` file.
        adapters: one or more adapter folders. Pass none if `base` is an adapter, which names its base, or a model saved
            with its adapter unmerged.
        out: the output folder, or a prefix in a store, `s3://bucket/prefix`; for a base of one file also a file or an
            object, whose record is written next to it.
        progress: called with (bytes done, total bytes), from any thread, one call at a time.
        push_progress: the same for the upload.

    Raises:
        UsageError: the arguments contradict each other, or `out` exists or is inside an input.
        InputError: a file is malformed, is not supported, or changed during the merge.
        FitError: an adapter does not fit, cannot be merged completely, overflows the dtype or changes nothing.
        StorageError: a disk or file-system error.
        HubError: the output is complete, but the Hub refused the push.
    """
    options = made_of(MergeAndPushOptions, keywords, "merge")
    return with_push(merge_anywhere, (base, adapters, out), options, progress, push_progress, merge_anywhere)


def abort_merge(out: PathLike) -> AbortReport:
    """Remove what an unfinished merge left in a store, or one in parts of a local output.

    In a store those are its uploads, the files that it has given names already, and what it keeps below `.loratool/`;
    nothing else is touched. Of a merge that is complete only the last of these goes. Locally it is `OUT.partial`.

    Args:
        out: the output as it was given to `merge`.

    Raises:
        UsageError: there is no unfinished merge, or workers are running.
        StorageError: `OUT.partial` contains files that loratool did not write.
        StoreError: the store refuses, or is out of reach.
    """
    return abort(out)


def merge_anywhere(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeAndPushOptions,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge in this process, into a folder or a store, or by tasks of a cluster."""
    options.check_cluster()
    if isinstance(options.workers, str):
        from loratool.merging.on_ray import merge_on_ray

        return merge_on_ray(base, adapters, out, options, options, progress)
    if is_in_store(out):
        return merge_into_store(base, adapters, out, options, progress)
    return merging.merge(base, adapters, out, options, progress)


@library_function(MergeOptions, "merge")
def merge_many(
    base: PathLike,
    outputs: Outputs,
    *,
    progress: Progress | None = None,
    **keywords: Unpack[WholePlanKeywords],
) -> MergeManyReport:
    """Merge adapters into one base for several outputs, and read the base once for all of them.

    Each output is what `merge` makes of the same adapters and options, byte for byte, and is continued like it after an
    interruption. An output that fails is left as it was, and the others are completed: its error is in `errors` of the
    result, and is raised by `result[out]`.

    Args:
        base: as for `merge`; "auto" for the base that all adapters name.
        outputs: for each output, which is as for `merge`, its adapter, or a sequence of adapters, any of which may be a
            pair (adapter, weight).
        progress: called with (bytes done, total bytes) of all outputs, from any thread, one call at a time.

    Raises:
        UsageError: `weights` is given, there are no outputs, or one of them is another or inside another.
        LoratoolError: the base cannot be merged into.
    """
    return many.merge_many(base, outputs, made_of(MergeOptions, keywords, "merge_many"), progress)


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
    return planning.plan_merge(base, adapters, made_of(PlanOptions, keywords, "plan_merge"))


@library_function(StreamOptions, "merge")
def stream(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    repo: str,
    *,
    progress: Progress | None = None,
    **keywords: Unpack[StreamKeywords],
) -> StreamReport:
    """Merge as `merge` does, and upload each output file before the next is made.

    At most two weight files are on this disk at a time, in a folder of the working directory that goes when all is
    done. The same call after an interruption continues with the files that the repository has not.

    Args:
        base: a model on the Hub, or a local one; "auto" for the one that the adapters name.
        adapters: one adapter or several.
        repo: `org/name` of the repository to make, or `name` for the account of the token.
        progress: called with (bytes done, total bytes).

    Raises:
        UsageError: the arguments contradict each other, or the repository holds a model.
        InputError, FitError: as for `merge`.
        StorageError: there is no room for two files.
        HubError: no token, no right, missing, gated or out of reach.
        VerificationError: what arrived is not what was sent.
    """
    return streaming.stream(base, adapters, repo, made_of(StreamOptions, keywords, "stream"), progress)
