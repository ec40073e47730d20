"""A model's checkpoint, opened for use as a base: no adapter, and no adapter left unmerged in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratool.adapters.formats import WRITTEN, has_adapter
from loratool.errors import InputError, about, printable
from loratool.files.checkpoint import Checkpoint, open_files
from loratool.files.containers import refuse_compressed
from loratool.files.pipelines import is_pipeline, open_pipeline
from loratool.files.system import shell_word
from loratool.notes import Note


def open_checkpoint(path: str | Path, unmerged: bool = False) -> Checkpoint:
    """Open a folder of shards with or without an index, a pipeline of diffusers, or one `.safetensors` file.

    `unmerged` takes a model that was saved with its adapter unmerged too, with a note that it is one.

    Raises `InputError` when there are no weights, when a shard is malformed or missing, when the index and the shards
    disagree, or where an adapter is not merged: all faulty shards at once.
    """
    root = Path(path)
    with about(path):
        if root.is_dir():
            refuse_compressed(root)
        checkpoint = open_pipeline(root, has_adapter) if is_pipeline(root) else open_files(root, has_adapter)
    if not (inside := WRITTEN.unmerged_in(checkpoint.tensors)):
        return checkpoint
    what = f"a model saved with its adapter unmerged: {inside}"
    if not unmerged:
        shown = printable(path)
        raise InputError(
            f"{shown}: {what}; merge it first, with --input-alpha ALPHA if no config in its folder records its alpha",
            hint=f"loratool merge {shell_word(shown)} -o OUT",
        )
    return replace(checkpoint, notes=(*checkpoint.notes, Note("unmerged-model", what)))
