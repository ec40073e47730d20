"""Factors of one module that several processes held a part of each (tensor parallel), put together again.

NeMo 1 saves a folder for each rank. Of a layer whose rows are divided (queries, keys and values, the first of an MLP),
every rank has some rows of A and those rows of B that belong to its rows of the layer. Of a layer whose columns are
divided (the output of attention, the second of an MLP), every rank has the columns of A for its inputs and some rows of B.
Facts: NeMo 1.23, `merge_lora_weights/merge.py` and `parallel_adapters.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Derived, StoredTensor
from loratool.algebra.updates import formulas
from loratool.errors import InputError, printable
from loratool.files.safefile import SafeFile, SafeFiles, Selection, read_safefile

FOLDER = re.compile(r"(?:mp_rank|tp_rank)_(\d{1,4})(?:_pp_rank_(\d{1,4}))?")
DIVIDER = "/"  # between the folder of a rank and a tensor's name


def paths_of_ranks(folder: Path) -> list[Path]:
    """The file of every rank, in their order; none in a folder without such folders."""
    found = sorted((int(match[1]), path) for path in folder.iterdir() if (match := FOLDER.fullmatch(path.name)))
    return [file for _, path in found for file in sorted(path.glob("*.safetensors"))]


def read_ranks(folder: Path, paths: Sequence[Path]) -> SafeFile:
    """The files of all ranks as one, each tensor behind the name of its rank's folder.

    Raises `InputError` where a rank is missing, has several files, or holds some of the layers only.
    """
    names = [path.parent.name for path in paths]
    numbers = [match.groups() for name in names if (match := FOLDER.fullmatch(name))]
    if any(stage and int(stage) for _, stage in numbers):
        raise InputError(
            f"{printable(folder)}: layers are divided among pipeline ranks; save it with a pipeline of 1 rank first"
        )
    if [int(rank) for rank, _ in numbers] != list(range(len(numbers))):
        raise InputError(
            f"{printable(folder)}: expected one file in a folder for every rank, numbered from 0 (found "
            f"{', '.join(map(printable, names))})"
        )
    parts = [
        Selection.of(file, {f"{name}{DIVIDER}{tensor}": tensor for tensor in file.tensors})
        for name, file in zip(names, map(read_safefile, paths), strict=True)
    ]
    return SafeFiles.of(paths[0], parts)


def gathered(a: Sequence[StoredTensor], b: Sequence[StoredTensor], by_rows: bool, parts: int) -> tuple[Any, Any] | None:
    """(A, B) of a module from those of all ranks; None where they do not go together.

    Args:
        a: (rank / n, in) each where the layer's rows are divided among n ranks, else (rank, in / n).
        b: (out / n, rank) each.
        by_rows: whether the layer's rows are divided.
        parts: of the layer, which every rank has its own rows of, one part after the other.
    """
    shapes = {(*first.shape, *last.shape) for first, last in zip(a, b, strict=True)}
    if len(shapes) != 1 or len(sizes := shapes.pop()) != 4:
        return None
    count = len(a)
    inner, columns, rows, rank = sizes
    if rank != (inner * count if by_rows else inner) or rows % parts:
        return None
    whole_a = (rank, columns) if by_rows else (rank, columns * count)
    return (
        Derived(whole_a, tuple(a), formulas.of_ranks(0 if by_rows else 1)),
        Derived((rows * count, rank), tuple(b), formulas.of_ranks(0, parts)),
    )
