"""Spelling ⇄ `Adapter`: one module a format, and the choice between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratool.formats import peft

if TYPE_CHECKING:
    from loratool.adapter import Adapter

FORMATS = (peft,)


def read_adapter(path: str | Path) -> Adapter:
    """The adapter at `path`: a folder, or a `.safetensors` file with its config beside it.

    Reads headers and configs only. Raises `InputError` when the path holds no adapter or a malformed one.
    """
    location = Path(path)
    for form in FORMATS:
        if form.recognises(location):
            adapter: Adapter = form.read(location)
            return adapter
    raise peft.not_an_adapter(location)
