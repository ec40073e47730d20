"""`loratool merge`: a merge, then a push where one is asked for; several at one reading; what is left of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function, step_after
from loratool.commands.publish import with_push
from loratool.errors import LoratoolError, UsageError
from loratool.merging import merge as merging
from loratool.merging.merge_options import ClusterOptions, MergeOptions
from loratool.options.described import made_of, option
from loratool.options.writing import PublishOptions
from loratool.results.merge import MergeReport
from loratool.stores.names import is_in_store

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import MergeKeywords, WholePlanKeywords
    from loratool.merging.merge_many import Outputs
    from loratool.results.abort import AbortReport
    from loratool.results.merge_many import MergeManyReport


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
    return with_push(merge_anywhere, (base, adapters, out), options, progress, push_progress, is_merge=True)


def abort_merge(out: PathLike) -> AbortReport:
    """Remove what an unfinished output of any command left in a store, or a merge in parts of a local output.

    In a store those are its uploads, the files that it has given names already, and what it keeps below `.loratool/`;
    nothing else is touched. Of an output that is complete only the last of these goes. Locally it is `OUT.partial`.

    Args:
        out: the output as it was given to the command.

    Raises:
        UsageError: there is no unfinished output, or workers are running.
        StorageError: `OUT.partial` contains files that loratool did not write.
        StoreError: the store refuses, or is out of reach.
    """
    from loratool.merging.in_parts import abort

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
        from loratool.merging.in_store import merge_into_store

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
    from loratool.merging import merge_many as many

    options = made_of(MergeOptions, keywords, "merge_many")
    wanted = many.wanted_outputs(outputs, options)

    def lead_on(error: LoratoolError, each: many.Wanted) -> None:
        """Give an error the command that makes one output alone."""
        given = dict(keywords, weights=each.options.weights, base=base, adapters=each.adapters)
        error.hint = step_after(error, "merge", MergeOptions, given, ["-o", each.key])

    try:
        report = many.merge_many(base, outputs, options, progress)
    except LoratoolError as error:
        lead_on(error, wanted[0])
        raise
    for each in wanted:
        if each.key in report.errors:
            lead_on(report.errors[each.key], each)
    return report
