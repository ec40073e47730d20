"""`loratool verify`: a merged model against its record, or against the formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.commands.library import library_function
from loratool.options.described import made_of
from loratool.results.verify import Verification
from loratool.verifying import verify as verifying
from loratool.verifying.options import VerifyOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.arguments import PathLike, Progress
    from loratool.commands.keywords import VerifyKeywords


@library_function(VerifyOptions)
def verify(
    merged: PathLike,
    base: PathLike | None = None,
    adapters: Sequence[PathLike] | PathLike = (),
    *,
    progress: Progress | None = None,
    **keywords: Unpack[VerifyKeywords],
) -> Verification:
    """Verify a merged model, whichever tool made it.

    Without `base` and `adapters`, every file of `merged` is compared with the digests in its `loratool.json`. With
    them, tensors that no adapter changes must be the base's byte for byte, and all others what the formula
    W + Σ weight · ΔW gives, within 1 ulp. What differs is explained by `diagnoses`; `passes` and `exit_code` say
    whether the model is what it should be.

    Args:
        merged: the model to prove, a folder or a file.
        base: the model that it was made of; "auto", or None with adapters, for the one that the adapters name.
        adapters: the adapters that were merged into it, one or more.
        progress: called with (bytes done, total bytes), from any thread, one call at a time.

    Raises:
        UsageError: the arguments contradict each other, or there is nothing to compare `merged` with.
        InputError: a file is malformed, is not supported, or changed meanwhile.
        FitError: the adapter is of another model, or `merged` is.
        HubError: a repository cannot be read.
    """
    return verifying.verify(merged, base, adapters, made_of(VerifyOptions, keywords, "verify"), progress)
