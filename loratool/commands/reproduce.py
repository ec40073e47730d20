"""`loratool reproduce`: the run that made an output, once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.commands.library import library_function
from loratool.commands.makers import MAKERS
from loratool.lineage import reproducing
from loratool.lineage.reproducing import ReproduceOptions
from loratool.options.described import made_of
from loratool.results.reproduce import ReproduceReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.arguments import PathLike, Progress
    from loratool.commands.keywords import ReproduceKeywords


@library_function(ReproduceOptions)
def reproduce(
    made: PathLike, out: PathLike, *, progress: Progress | None = None, **keywords: Unpack[ReproduceKeywords]
) -> ReproduceReport:
    """Repeat the run that made `made`, and compare the bytes of all files.

    The inputs are looked for by their names in the working directory and next to `made`, on the Hub, and by their
    digests in `folders`. An input with other digests than the record has is never used.

    Args:
        made: what loratool made, a folder or a file.
        out: the new output.
        progress: that of the command that is repeated: called with what is done and the total, in bytes of a merge and
            in layers of any other.

    Raises:
        InputError: the record does not hold what is needed, or an input was not found with the recorded digests.
        LoratoolError: as the command that is repeated.
    """
    return reproducing.reproduce(made, out, made_of(ReproduceOptions, keywords, "reproduce"), MAKERS, progress)
