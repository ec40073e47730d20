"""A file of weights, in whichever format it is."""

from __future__ import annotations

from pathlib import Path

from loratool.files.gguf import read_gguf
from loratool.files.safefile import SafeFile, read_safefile


def read_weight_file(path: Path) -> SafeFile:
    """The header of a safetensors or a GGUF file, as its name tells; no tensor data is touched.

    Raises `InputError` where the file breaks a rule of its format.
    """
    return read_gguf(path) if path.suffix == ".gguf" else read_safefile(path)
