"""`loratool compress`: many adapters of one base in little room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function
from loratool.options.described import made_of
from loratool.results.compress import CompressReport
from loratool.reworking.compressing import adding, compress as compressing
from loratool.reworking.compressing.options import CompressOptions
from loratool.stores.names import is_in_store

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import CompressKeywords


@library_function(CompressOptions)
def compress(
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike | None = None,
    *,
    progress: Progress | None = None,
    **keywords: Unpack[CompressKeywords],
) -> CompressReport:
    """Compress many adapters of one base together: they share directions of each module, and keep a small core each.

    ΔWᵢ ≈ U Mᵢ V (arXiv:2407.00066), with U and V in `shared.safetensors` and Mᵢ in a file for each adapter. Truncation
    of each adapter alone is among the candidates of every module, so the error is never larger than that of truncation
    at the same bytes, except for the rounding of what is stored. Pass one of `rank`, `energy` and `budget`, or
    `into`, which adds adapters to a folder made before. `expand` gives a plain adapter back.

    Args:
        adapters: a folder of adapters, or adapters, each a folder or a `.safetensors` file.
        out: the output folder, or a prefix in a store, `s3://bucket/prefix`; none with `into`.
        progress: called with (layers done, total layers).

    Raises:
        UsageError: options are out of range or at odds, or the budget is too small.
        InputError: a malformed adapter, or one that is not low-rank.
        FitError: the adapters do not have the same base, or every update is zero.
        StorageError: a disk or file-system error.
    """
    options = made_of(CompressOptions, keywords, "compress")
    if options.into is not None or out is None:
        return adding.add_to(adapters, out, options, progress)
    if is_in_store(out):
        from loratool.publishing.storing import made_in_store

        return made_in_store(compressing.compress, (adapters, out), options, progress)
    return compressing.compress(adapters, out, options, progress)
