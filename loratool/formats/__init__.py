"""Spelling ⇄ `Adapter`: one module a format, and the choice between them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import InputError, printable
from loratool.formats import peft
from loratool.safefile import read_safefile

if TYPE_CHECKING:
    from loratool.adapter import Adapter

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


def read_adapter(path: str | Path) -> Adapter:
    """The adapter at `path`: a folder, or a `.safetensors` file with its config beside it.

    Reads headers and configs only. Raises `InputError` when the path holds no adapter, a malformed
    one, or one of a format that is not read.
    """
    location = Path(path)
    refuse_foreign(location)
    for form in FORMATS:
        if form.recognises(location):
            adapter: Adapter = form.read(location)
            return adapter
    raise peft.not_an_adapter(location)


def refuse_foreign(location: Path) -> None:
    """Raise `InputError` naming the format, where tensors are spelled as a format that is not read."""
    if location.is_dir():
        files = [] if (location / peft.WEIGHTS).exists() else sorted(location.glob("*.safetensors"))[:1]
    else:
        files = [location] if location.suffix == ".safetensors" and location.name != peft.WEIGHTS else []
    for file in filter(Path.is_file, files):
        names = list(read_safefile(file).tensors)
        for pattern, form in FOREIGN:
            for name in names:
                if pattern.search(name):
                    raise InputError(
                        f"{printable(file)}: spelled as a {form} adapter (tensor {printable(name)}); this version reads "
                        f"PEFT's layout, {peft.CONFIG} beside {peft.WEIGHTS}"
                    )
