"""Factors of one module that several processes held a part of each (tensor parallel), put together again.

NeMo 1 saves a folder for each rank. Of a layer whose rows are divided (queries, keys and values, the first of an MLP),
every rank has some rows of A and those rows of B that belong to its rows of the layer. Of a layer whose columns are
divided (the output of attention, the second of an MLP), every rank has the columns of A for its inputs and some rows of B.
With a pipeline the layers are divided among stages as well, and each stage numbers its own from 0.
Facts: NeMo 1.23, `merge_lora_weights/merge.py` and `parallel_adapters.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Derived, StoredTensor
from loratool.adapters.formats.known import RANK
from loratool.algebra.updates import formulas
from loratool.errors import InputError, printable
from loratool.files.safefile import SafeFile, read_safefile
from loratool.files.views import SafeFiles, Selection

LAYER = re.compile(r"(\blayers\.)(\d{1,6})\.")
DIVIDER = "/"  # between the folder of a rank and a tensor's name


@dataclass(frozen=True)
class Rank:
    """One process of a run, by the name of its folder."""

    folder: str
    tensor: int
    stage: int  # of the pipeline; 0 where there is one

    @classmethod
    def of(cls, folder: str) -> Rank | None:
        match = RANK.fullmatch(folder)
        return Rank(folder, int(match[1]), int(match[2] or 0)) if match else None


def read_ranks(folder: Path, paths: Sequence[Path], layers: int | None = None) -> SafeFile:
    """The files of all ranks as one, each tensor behind the name of its rank's folder in the first stage.

    The layers of every stage are numbered from 0; here they have their number in the model, of which each stage has an
    equal share of the `layers`. Raises `InputError` where a rank is missing, has several files, or where the number of
    layers is not known.
    """
    ranks = [rank for path in paths if (rank := Rank.of(path.parent.name))]
    stages, count = 1 + max(rank.stage for rank in ranks), 1 + max(rank.tensor for rank in ranks)
    if [rank.stage * count + rank.tensor for rank in ranks] != [*range(len(ranks))] or len(ranks) != stages * count:
        shown = ", ".join(printable(rank.folder) for rank in ranks)
        raise InputError(
            f"{printable(folder)}: expected one file in a folder for every rank, numbered from 0 (found {shown})"
        )
    files = [read_safefile(path) for path in paths]
    each = share_of(folder, stages, layers, files) if stages > 1 else 0
    parts = [
        Selection.of(file, {placed(name, ranks[rank.tensor].folder, rank.stage * each): name for name in file.tensors})
        for rank, file in zip(ranks, files, strict=True)
    ]
    return SafeFiles.of(paths[0], parts)


def placed(name: str, folder: str, before: int) -> str:
    """The name of a tensor of a rank in the model, `before` the layers of whose stage there are so many."""
    return f"{folder}{DIVIDER}{LAYER.sub(lambda match: f'{match[1]}{int(match[2]) + before}.', name, count=1)}"


def share_of(folder: Path, stages: int, layers: int | None, files: Sequence[SafeFile]) -> int:
    """How many layers each of several stages has."""
    highest = max(
        (int(match[2]) for file in files for name in file.tensors if (match := LAYER.search(name))), default=0
    )
    if layers is None:
        raise InputError(
            f"{printable(folder)}: its layers are divided among {stages} pipeline stages, each of which numbers its own "
            "from 0; expected the number of all as num_layers in model_config.yaml"
        )
    if layers % stages or highest >= layers // stages:
        raise InputError(
            f"{printable(folder)}: a stage has a layer of number {highest}, but {layers} layers (num_layers) are divided "
            f"among {stages} pipeline stages"
        )
    return layers // stages


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
        Derived(whole_a, tuple(a), partial(formulas.of_ranks, 0 if by_rows else 1, 1)),
        Derived((rows * count, rank), tuple(b), partial(formulas.of_ranks, 0, parts)),
    )
