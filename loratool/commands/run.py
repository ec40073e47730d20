"""`loratool run`: the steps of a manifest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loratool.commands.library import library_function
from loratool.commands.makers import MAKERS
from loratool.lineage import running
from loratool.lineage.running import ManifestOptions
from loratool.options.described import made_of
from loratool.results.run import RunReport, StepReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.arguments import PathLike
    from loratool.commands.keywords import ManifestKeywords


@library_function(ManifestOptions)
def run(
    manifest: PathLike, *, progress: Callable[[StepReport], None] | None = None, **keywords: Unpack[ManifestKeywords]
) -> RunReport:
    """Run the steps of a manifest, a YAML file, whose outputs are not up to date.

    A step is up to date if its output has the digests of its record, and the record has the options of the step and the
    digests of its inputs. After an interruption, the same call continues.

    Args:
        manifest: the file; paths in it start from its folder. `-` is stdin, and paths start from the working folder.
        progress: called with the report of each step when it is done.

    Raises:
        UsageError: an output exists that loratool did not make.
        InputError: the manifest is malformed; the message names line and step.
        LoratoolError: as the command of a step.
    """
    return running.run(manifest, made_of(ManifestOptions, keywords, "run"), MAKERS, progress)
