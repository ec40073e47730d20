"""A folder held to its own record: every file that `loratool.json` lists is read and compared."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from loratool.arguments import PathLike, Progress
from loratool.errors import InputError, UsageError, printable
from loratool.files.digests import read_recorded
from loratool.files.folders import PROVENANCE, folder_and_name, record_for
from loratool.files.process import peak_memory
from loratool.files.system import shell_word
from loratool.files.untrusted import LARGEST_RECORD, read_json
from loratool.provenance import record
from loratool.results.base import Cost
from loratool.results.verify import AS_RECORDED, NOT_PROVEN, Diagnosis, Verification


def verify_record(
    merged: PathLike, reasons: Mapping[str, str] | None = None, progress: Progress | None = None
) -> Verification:
    """Every file of a folder, or one file of it, against the digests that were recorded when it was written.

    `reasons` tell what is wrong with each file, where that is known already; `progress` is called after each.
    """
    started = time.monotonic()
    path = Path(merged) if os.path.lexists(merged) else fetched(merged)
    if not path.exists():
        raise InputError(f"{printable(path)}: no such file or folder")
    if not record_for(path).is_file():
        shown = printable(path)
        raise UsageError(
            f"{shown}: has no {PROVENANCE}, so there is nothing to compare it with; name what was merged",
            hint=f"loratool verify {shell_word(shown)} --base BASE --adapter ADAPTER",
        )
    found = record.compare(path, reasons, progress=progress)
    files, size = listed_in(path)
    return Verification(
        merged=path,
        verdict=NOT_PROVEN if found.problems else AS_RECORDED,
        diagnoses=tuple(Diagnosis("file-differs", problem) for problem in found.problems),
        notes=found.notes,
        files=files,
        bytes_read=size,
        cost=Cost("cpu", time.monotonic() - started, 0.0, peak_memory()),
    )


def fetched(merged: PathLike) -> Path:
    """What is not here, from the Hub: no local folder waits for the import of what fetches."""
    from loratool.fetching import local

    return local(merged, "any")


def listed_in(place: Path) -> tuple[int, int]:
    """How many files the record of a folder or of one file lists that are there, and their bytes."""
    try:
        names = read_recorded(read_json(record_for(place), LARGEST_RECORD))
    except InputError:
        return 0, 0
    folder, only = folder_and_name(place)
    there = [path for name in names if (not only or name == only) and (path := folder / name).is_file()]
    return len(there), sum(path.stat().st_size for path in there)
