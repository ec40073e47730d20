"""`loratool rebase`: an adapter for a sibling of its base, then a push where one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function
from loratool.commands.publish import with_push
from loratool.options.described import made_of
from loratool.results.rebase import RebaseReport
from loratool.reworking.rebasing import rebase as rebasing
from loratool.reworking.rebasing.rebase import RebaseOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import RebaseKeywords


@library_function(RebaseOptions)
def rebase(
    adapter: PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[RebaseKeywords],
) -> RebaseReport:
    """Transfer an adapter from the base that it was trained on to another base of the same shapes.

    Where the weights that it changes are equal, it stays as it is. Else its update is multiplied by 1 − c, where c =
    ⟨ΔW, W₂ − W₁⟩ / ‖ΔW‖² is the part of it that the new base holds already, if that is more than chance. Its tensors are
    the same bytes in either case; what changes is α, and the name of the base.

    Args:
        adapter: a folder, or a `.safetensors` file with its config in the same folder.
        out: the output folder.
        progress: called with (modules done, total modules).
        push_progress: called with (bytes done, total bytes) of the upload.

    Raises:
        UsageError: a base is missing.
        InputError: a malformed adapter or base, or an adapter that depends on its base, such as PiSSA.
        FitError: the bases have other shapes, are not siblings, or the new one holds most of the update.
        StorageError: a disk or file-system error.
        HubError: the output is complete, but the Hub refused the push.
    """
    options = made_of(RebaseOptions, keywords, "rebase")
    return with_push(rebasing.rebase, (adapter, out), options, progress, push_progress)
