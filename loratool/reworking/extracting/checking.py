"""Two models that are to be compared, and what is refused of them before any layer is looked at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loratool.adapters.formats import FORMATS
from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded
from loratool.bases.opening import open_checkpoint
from loratool.errors import FitError, InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.gguf import GgufFile
from loratool.layouts.gguf import ARCHITECTURES
from loratool.notes import Note
from loratool.reworking.extracting.differences import is_finite
from loratool.reworking.extracting.pairing import Pairing


def open_model(path: Path, role: str) -> Checkpoint:
    """The checkpoint at `path`; raises `InputError` where that is an adapter, or a model of llama.cpp's."""
    here = [form for form in FORMATS if path.is_dir() and (path / form.config_name).is_file()]
    if here:
        own = {form.weights_name for form in here}
        others = {entry.name for entry in os.scandir(path) if entry.name.endswith(".safetensors")} - own
        if not others:
            raise InputError(
                f"{printable(path)}: this is an adapter, but {role} must be a model; merge it into its base first"
            )
    opened = open_checkpoint(path)
    first = opened.shards[0]
    if isinstance(first, GgufFile) and first.values.get("general.architecture") in ARCHITECTURES:
        raise InputError(
            f"{printable(path)}: a GGUF model has names and an order of rows that are llama.cpp's own, so no adapter of "
            "it would be one for another tool; extract from the models before they were converted to GGUF"
        )
    return decoded(opened)


def check_packed(models: Sequence[Checkpoint]) -> list[Note]:
    """Notes on packed weights of some models. Raises `InputError` naming those that cannot be decoded."""
    return [note for model in models if isinstance(model, Decoded) for note in model.check(model.weights)]


def check_saved(found: Pairing) -> None:
    """Raise `InputError` naming what is to be saved whole and contains NaN or infinite values."""
    broken = [name for name, tensor in (found.whole | found.biases | found.same_biases).items() if not tensor.finite()]
    if broken:
        raise InputError(
            f"{found.tuned.name}: cannot make an adapter from these tensors:",
            (f"{printable(name)} contains NaN or infinite values" for name in broken),
        )


def broken_tensors(found: Pairing) -> list[str]:
    """Every tensor that was to be subtracted and holds what is no number."""
    return [
        f"{printable(change.target)} of {role} contains NaN or infinite values"
        for change in found.changes.values()
        for role, tensor in (("BASE", change.base), ("TUNED", change.tuned))
        if not is_finite(tensor)
    ]


def refuse_nothing(found: Pairing) -> None:
    """Raise `FitError` where there is no difference that a low-rank update can be made of."""
    if found.changes:
        return
    if not (found.whole or found.left_out or found.excluded):
        raise FitError(f"{found.base.name} and {found.tuned.name} are identical, so there is nothing to extract")
    reasons = [f"{printable(name)}: {reason}" for name, reason in found.left_out.items()]
    reasons += [
        f"{printable(name)}: {'its module is saved whole' if len(tensor.shape) > 1 else 'not a matrix'}"
        for name, tensor in found.whole.items()
    ]
    reasons += [f"{found.excluded} tensors that differ are excluded"] if found.excluded else []
    raise FitError("no matrix differs, so there is nothing to extract:", reasons)
