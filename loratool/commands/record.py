"""`loratool record`: a bill of materials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.commands.library import library_function
from loratool.lineage import recording
from loratool.lineage.recording import RecordOptions
from loratool.options.described import made_of
from loratool.results.record import Record

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.arguments import PathLike
    from loratool.commands.keywords import RecordKeywords


@library_function(RecordOptions)
def record(out: PathLike, **keywords: Unpack[RecordKeywords]) -> Record:
    """The bill of materials of an output: its files, what it was made of, and how.

    All files of the output are compared with its `loratool.json` first, and those without a SHA-256 are read once more.

    Args:
        out: a folder that loratool made, or a file.

    Raises:
        UsageError: the library of the standard is not installed.
        InputError: loratool did not make it.
        VerificationError: its files are not those that loratool wrote.
    """
    return recording.record(out, made_of(RecordOptions, keywords, "record"))
