"""Two models that are to be compared, and what is refused of them before any layer is looked at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loratool.adapters.formats import FORMATS
from loratool.bases.binding.named import Named
from loratool.bases.binding.unlike import kinds_of_base
from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded
from loratool.bases.opening import open_checkpoint
from loratool.bases.renamed import renamed
from loratool.errors import FitError, InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.notes import Note
from loratool.results.text import one_of
from loratool.reworking.extracting.differences import is_finite
from loratool.reworking.extracting.pairing import Pairing


def open_model(path: Path, role: str) -> Checkpoint:
    """The checkpoint at `path`; a GGUF model as transformers has it. Raises `InputError` for an adapter."""
    names = {entry.name for entry in os.scandir(path)} if path.is_dir() else set[str]()
    own = {form.weights_name for form in FORMATS if form.config_name in names and (path / form.config_name).is_file()}
    if own and not any(name.endswith(".safetensors") for name in names - own):
        raise InputError(
            f"{printable(path)}: this is an adapter, but {role} must be a model; merge it into its base first"
        )
    return renamed(decoded(open_checkpoint(path)))


def check_alike(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise `FitError` for models of different kinds, or where one is llama.cpp's, which holds some weights otherwise."""
    if isinstance(base, Named) != isinstance(tuned, Named):
        gguf, other = (base, tuned) if isinstance(base, Named) else (tuned, base)
        raise FitError(
            f"{gguf.name} is a GGUF model and {other.name} is not; pass both models as GGUF, or both as they were before "
            "they were converted"
        )
    kinds = [kinds_of_base(model) for model in (base, tuned)]
    if all(kinds) and not kinds[0] & kinds[1]:
        own, theirs = (one_of(sorted(each)) for each in kinds)
        raise FitError(
            f"{base.name} is {own}, and {tuned.name} is {theirs}; pass the model that the fine-tune was made from as BASE"
        )


def check_packed(models: Sequence[Checkpoint]) -> list[Note]:
    """Notes on packed weights of some models. Raises `InputError` naming those that cannot be decoded."""
    every = [model.held if isinstance(model, Named) else model for model in models]
    return [note for model in every if isinstance(model, Decoded) for note in model.check(model.weights)]


def check_saved(found: Pairing) -> None:
    """Raise `InputError` naming what is to be saved whole and contains NaN or infinite values."""
    every = found.whole | found.biases | found.same_biases
    if broken := [name for name, tensor in every.items() if not tensor.finite()]:
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
