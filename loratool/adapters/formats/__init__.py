"""Spelling ⇄ `Adapter`: one module a format, and the choice between them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.formats import peft
from loratool.adapters.reading import AS_STORED, Reading
from loratool.errors import InputError, printable
from loratool.files.safefile import SafeFile, read_safefile

if TYPE_CHECKING:
    from loratool.adapters.adapter import Adapter

FORMATS = (peft,)
# How tensors of formats that are not read are spelled, so that a refusal can name the format.
FOREIGN = (
    (re.compile(r"\.(lokr|hada|glora|oft|boft)_\w+"), "LyCORIS"),
    (re.compile(r"^lora_(unet|te\d?|transformer)_"), "kohya"),
    (
        re.compile(r"\.processor\.|\.lora_linear_layer\.|\.lora\.(up|down)\.|^(unet|text_encoder|transformer)\."),
        "diffusers",
    ),
    (re.compile(r"\.lora_[ab]$"), "mlx"),
)


def read_adapter(path: str | Path, reading: Reading = AS_STORED) -> Adapter:
    """The adapter at `path`: a folder, or a `.safetensors` file with its config beside it.

    Reads headers and configs only; `reading` is what the caller says that these do not. Raises `InputError` when the path holds no adapter, a malformed
    one, or one of a format that is not read.
    """
    location = Path(path)
    refuse_foreign(location)
    for form in FORMATS:
        if form.recognises(location):
            adapter: Adapter = form.read(location, reading)
            return adapter
    raise peft.not_an_adapter(location)


def refuse_foreign(location: Path) -> None:
    """Raise `InputError` naming the format, where tensors are spelled as a format that is not read."""
    if found := find_foreign(location):
        raise InputError(f"{printable(found.file.path)}: {found.reason}")


@dataclass(frozen=True)
class Foreign:
    """An adapter whose tensors are spelled as a format that is not read."""

    file: SafeFile
    form: str
    tensor: str  # that is spelled so

    @property
    def reason(self) -> str:
        return (
            f"spelled as a {self.form} adapter (tensor {printable(self.tensor)}); this version reads PEFT's layout, "
            f"{peft.CONFIG} beside {peft.WEIGHTS}"
        )


ADAPTER_TENSOR = re.compile(r"lora|\.(hada|lokr|glora|oft|boft)_")


def looks_foreign(file: SafeFile) -> bool:
    """Whether the tensors of a file are those of an adapter; a model's may be spelled `transformer.` too."""
    return any(map(ADAPTER_TENSOR.search, file.tensors))


def find_foreign(location: Path) -> Foreign | None:
    """The adapter at `location` where its format is one that is known and not read."""
    if location.is_dir():
        files = [] if (location / peft.WEIGHTS).exists() else sorted(location.glob("*.safetensors"))[:1]
    else:
        files = [location] if location.suffix == ".safetensors" and location.name != peft.WEIGHTS else []
    for path in filter(Path.is_file, files):
        file = read_safefile(path)
        for pattern, form in FOREIGN:
            for name in file.tensors:
                if pattern.search(name):
                    return Foreign(file, form, name)
    return None
