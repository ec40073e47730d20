"""A file of weights, in whichever format it is."""

from __future__ import annotations

from pathlib import Path

from loratool.files.safefile import SafeFile, read_safefile


def is_own_file(file: SafeFile) -> bool:
    """Whether a file is all of one file that is here, as `read_weight_file` gives it."""
    if type(file) is SafeFile or file.path.suffix != ".gguf":
        return type(file) is SafeFile
    from loratool.files.gguf import GgufFile

    return type(file) is GgufFile


def read_weight_file(path: Path) -> SafeFile:
    """The header of a safetensors or a GGUF file, as its name tells; no tensor data is touched.

    Raises `InputError` where the file breaks a rule of its format.
    """
    if path.suffix == ".gguf":
        from loratool.files.gguf import read_gguf  # with tables that no other file needs

        return read_gguf(path)
    return read_safefile(path)
