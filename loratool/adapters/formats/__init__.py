"""Files ⇄ `Adapter`: one package a format, and the choice between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Format
from loratool.adapters.formats.litgpt import LITGPT
from loratool.adapters.formats.mlx import MLX
from loratool.adapters.formats.peft import PEFT
from loratool.adapters.formats.torchtune import TORCHTUNE
from loratool.adapters.formats.trainer import MODEL_CONFIG
from loratool.adapters.reading import AS_STORED, Reading
from loratool.errors import InputError, LoratoolError, printable
from loratool.files.containers import foreign_file, instead_of_weights
from loratool.files.inputs import read_json, unreadable
from loratool.files.model_files import MODEL_FILES, FileNames
from loratool.files.safefile import SafeFile, read_safefile
from loratool.provenance.cards import Subject

# Of several that may be meant, the first that claims a tensor is: PEFT claims `.lora_A` whatever the module.
FORMATS: tuple[Format, ...] = (LITGPT, PEFT, MLX, TORCHTUNE)
WRITTEN = PEFT  # what is made here is written in
DIALECTS = {word: form for form in FORMATS for word in form.dialects}  # what adapters are converted into → its format
OUTPUT_FILES = reduce(or_, (form.file_names for form in FORMATS), MODEL_FILES)  # what `--overwrite` may replace
CONFIGS = tuple(dict.fromkeys(form.config_name for form in FORMATS))  # what their configs are called
# How tensors of formats that are not read are spelled, so that a refusal can name the format.
FOREIGN = (
    (re.compile(r"\.(lokr|hada|glora|oft|boft)_\w+"), "LyCORIS"),
    (re.compile(r"^lora_(unet|te\d?|transformer)_"), "kohya"),
    (
        re.compile(r"\.processor\.|\.lora_linear_layer\.|\.lora\.(up|down)\.|^(unet|text_encoder|transformer)\."),
        "diffusers",
    ),
)


def read_adapter(path: str | Path, reading: Reading = AS_STORED) -> Adapter:
    """Read the adapter at `path`: a folder, or a `.safetensors` file with its config in the same folder.

    Reads headers and configs only; `reading` supplies what these do not record. Raises `InputError` if the path
    contains no adapter, a malformed one, or one in a format that is not supported.
    """
    location = Path(path)
    if foreign := find_foreign(location):
        raise InputError(f"{printable(foreign.file.path)}: {foreign.reason}")
    if not any(form.recognises(location) for form in FORMATS):
        raise not_an_adapter(location)
    return format_at(location).read(location, reading)


def format_at(location: Path) -> Format:
    """The format of the adapter at a place, by the names of its files, then by the heads of those; else PEFT's."""
    found = [form for form in FORMATS if form.recognises(location)]
    if len(found) > 1:
        heads = list(heads_at(location))  # none on the Hub, where names alone decide
        claiming = [form for form in found if any(map(form.claims, heads))]
        found = claiming or [form for form in found if form is WRITTEN] or found
    return found[0] if found else WRITTEN


def heads_at(location: Path) -> Iterator[SafeFile]:
    """The heads of the safetensors files at a place, as far as they can be read."""
    for path in sorted(location.glob("*.safetensors")) if location.is_dir() else [location]:
        with suppress(LoratoolError):
            yield read_safefile(path)


def format_of(adapter: Adapter) -> Format:
    """The format that an adapter was read from."""
    return next((form for form in FORMATS if form.name == adapter.format), WRITTEN)


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter, and no model with one beside it."""
    if path.is_dir():
        return any(form.recognises(path) for form in FORMATS) and not holds_model(path)
    if not (path.is_file() and path.suffix == ".safetensors"):
        return False
    beside = any((path.parent / form.config_name).is_file() for form in FORMATS)
    return beside or any(form.claims(head) for head in heads_at(path) for form in FORMATS if form is not WRITTEN)


def holds_model(folder: Path) -> bool:
    """Whether a folder is a model's: with a config, which trainers also put beside an adapter, and with weights of one."""
    if not (folder / MODEL_CONFIG).exists():
        return False
    own = [form for form in FORMATS if form is not WRITTEN and form.recognises(folder)]
    heads = list(heads_at(folder)) if own else []
    return not heads or not all(any(form.claims(head) for form in own) for head in heads)


def has_adapter(folder: Path) -> bool:
    """Whether a file of an adapter is in a folder, under the name that its format gives it."""
    return any((folder / name).exists() for form in FORMATS for name in (form.config_name, form.weights_name))


def replaceable(overwrite: bool) -> FileNames | None:
    """The files of a model or an adapter that an output may replace, by name; None where it replaces nothing."""
    return OUTPUT_FILES if overwrite else None


def subject_at(folder: Path) -> Subject | None:
    """What a card says of the adapter in a folder; None where no config says that there is one."""
    form = format_at(folder)
    path = folder / form.config_name
    return form.subject(read_json(path, repeated=True, lenient=True)) if path.is_file() else None


def not_an_adapter(path: Path) -> LoratoolError:
    """The error for a path that no format recognises."""
    try:
        path.stat()
    except OSError as error:
        return unreadable(path, error)
    if told := foreign_file(path):
        return InputError(f"{printable(path)}: {told}")
    if told := instead_of_weights(path):
        return InputError(f"{printable(path)}: not an adapter; {told}")
    if not path.is_dir():
        return InputError(f"{printable(path)}: not an adapter; expected its folder or its .safetensors file")
    return InputError(
        f"{printable(path)}: not an adapter: it contains neither {WRITTEN.config_name} nor {WRITTEN.weights_name}"
    )


@dataclass(frozen=True)
class Foreign:
    """An adapter whose tensors are spelled as a format that is not read."""

    file: SafeFile
    form: str
    tensor: str  # that is spelled so

    @property
    def reason(self) -> str:
        return (
            f"this looks like a {self.form} adapter (tensor {printable(self.tensor)}); this version reads PEFT's "
            f"layout, {WRITTEN.config_name} with {WRITTEN.weights_name}"
        )


ADAPTER_TENSOR = re.compile(r"lora|\.(hada|lokr|glora|oft|boft)_")


def looks_foreign(file: SafeFile) -> bool:
    """Whether the tensors of a file are those of an adapter; a model's may be spelled `transformer.` too."""
    return any(map(ADAPTER_TENSOR.search, file.tensors))


def find_foreign(location: Path) -> Foreign | None:
    """The adapter at `location` where its format is one that is known and not read."""
    if location.is_dir():
        files = [] if (location / WRITTEN.weights_name).exists() else sorted(location.glob("*.safetensors"))[:1]
    else:
        files = [location] if location.suffix == ".safetensors" and location.name != WRITTEN.weights_name else []
    for path in filter(Path.is_file, files):
        file = read_safefile(path)
        others = frozenset[str]().union(*(form.claims(file) for form in FORMATS if form is not WRITTEN))
        for pattern, form in FOREIGN:
            for name in file.tensors:
                if name not in others and pattern.search(name):
                    return Foreign(file, form, name)
    return None
