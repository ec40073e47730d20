"""Files ⇄ `Adapter`: one package a format, and the choice between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Format, FormatFiles
from loratool.adapters.formats.known import (
    GgufFiles,
    LitgptFiles,
    LoralibFiles,
    MegatronFiles,
    MlxFiles,
    TorchtuneFiles,
)
from loratool.adapters.formats.named import Named
from loratool.adapters.formats.peft import PEFT
from loratool.adapters.reading import AS_STORED, Reading
from loratool.adapters.weight_files import MODEL_CONFIG, without_config
from loratool.errors import InputError, LoratoolError, about, printable
from loratool.files.containers import foreign_file, instead_of_weights, refuse_compressed
from loratool.files.folders import MODEL_INDEX, WEIGHT_FILES
from loratool.files.heads import Head, read_head
from loratool.files.model_files import MODEL_FILES, FileNames
from loratool.files.process import without_collections
from loratool.files.untrusted import unreadable

if TYPE_CHECKING:
    from loratool.provenance.cards import Subject

# Of several that may be meant, the first that claims a tensor is: PEFT claims `.lora_A` whatever the module.
NAMED = Named(PEFT)
GGUF = GgufFiles()
FORMATS: tuple[FormatFiles, ...] = (
    *(NAMED, LitgptFiles(), LoralibFiles(), PEFT),
    *(MlxFiles(), TorchtuneFiles(), MegatronFiles(), GGUF),
)
WRITTEN = PEFT  # what is made here is written in, and what a file counts as that none of them claims
DIALECTS = {word: form for form in FORMATS for word in form.dialects}  # what adapters are converted into → its format
OUTPUT_FILES = reduce(or_, (form.file_names for form in FORMATS), MODEL_FILES)  # what `--overwrite` may replace
CONFIGS = tuple(dict.fromkeys(name for form in FORMATS for name in form.config_names))  # what their configs are called


def read_adapter(path: str | Path, reading: Reading = AS_STORED) -> Adapter:
    """Read the adapter at `path`: a folder, or a `.safetensors` file with its config in the same folder.

    Reads headers and configs only; `reading` supplies what these do not record. Raises `InputError` if the path
    contains no adapter, a malformed one, or one in a format that is not supported.
    """
    location = Path(path)
    with about(path), without_collections():
        if not any(form.recognises(location) for form in FORMATS):
            raise not_an_adapter(location)
        return format_at(location).read(location, reading)


def format_at(location: Path) -> Format:
    """The format of the adapter at a place, by the names of its files, then by the heads of those; else PEFT's.

    Raises `InputError` where several adapters are compressed together there.
    """
    refuse_compressed(location)
    found = [form for form in FORMATS if form.recognises(location)]
    if len(found) > 1:
        heads = list(heads_at(location))  # none on the Hub, where names alone decide
        claiming = next((form for form in found if any(map(form.format.claims, heads))), None)
        return (claiming or next((form for form in found if form is WRITTEN), found[0])).format
    return found[0].format if found else WRITTEN


def heads_at(location: Path) -> Iterator[Head]:
    """The heads of the files of weights at a place, as far as they can be read."""
    inside = (path for end in WEIGHT_FILES for path in sorted(location.glob(f"*{end}")))
    for path in inside if location.is_dir() else [location]:
        with suppress(LoratoolError):
            yield read_head(path)


def format_of(adapter: Adapter) -> Format:
    """The format that an adapter was read from."""
    return next((form.format for form in FORMATS if form.name == adapter.format), WRITTEN)


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter, and no model with one beside it."""
    if path.is_dir():
        return any(form.recognises(path) for form in FORMATS) and not holds_model(path)
    if not (path.is_file() and path.suffix in WEIGHT_FILES):
        return False
    if path.suffix == ".gguf":
        return any(map(GGUF.format.claims, heads_at(path)))
    beside = (path.parent / WRITTEN.config_name).is_file()
    return beside or any(form.format.claims(head) for head in heads_at(path) for form in FORMATS if form is not WRITTEN)


def holds_model(folder: Path) -> bool:
    """Whether a folder is a model's: with a config, which trainers also put beside an adapter, and with weights of one."""
    if not (folder / MODEL_CONFIG).exists():
        return False
    own = [form for form in FORMATS if form is not WRITTEN and form.recognises(folder)]
    heads = list(heads_at(folder)) if own else []
    return not heads or not all(any(form.format.claims(head) for form in own) for head in heads)


def has_adapter(folder: Path) -> bool:
    """Whether a file of an adapter is in a folder, under the name that its format gives it."""
    return any((folder / name).exists() for name in (*CONFIGS, *(form.weights_name for form in FORMATS)))


def replaceable(overwrite: bool) -> FileNames | None:
    """The files of a model or an adapter that an output may replace, by name; None where it replaces nothing."""
    return OUTPUT_FILES if overwrite else None


def subject_at(folder: Path) -> Subject | None:
    """What a card says of the adapter in a folder; None where no config says that there is one."""
    form = format_at(folder)
    config = form.card_config(folder)
    return None if config is None else form.subject(config)


def not_an_adapter(path: Path) -> LoratoolError:
    """The error for a path that no format recognises."""
    try:
        path.stat()
    except OSError as error:
        return unreadable(path, error)
    refuse_compressed(path)
    if told := foreign_file(path):
        return InputError(f"{printable(path)}: {told}")
    if told := instead_of_weights(path):
        return InputError(f"{printable(path)}: not an adapter; {told}")
    if not path.is_dir():
        return InputError(f"{printable(path)}: not an adapter; expected its folder, or its .safetensors or .gguf file")
    if any((path / name).is_file() for name in (MODEL_CONFIG, MODEL_INDEX)):
        return InputError(f"{printable(path)}: this is a model; an adapter is expected here")
    if any(WRITTEN.claims(head) for head in heads_at(path)):
        return without_config(path / WRITTEN.config_name)
    return InputError(
        f"{printable(path)}: not an adapter: it contains neither {WRITTEN.config_name} nor {WRITTEN.weights_name}"
    )
