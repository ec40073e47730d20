"""The files of an adapter as PEFT saves it, and its config as a checked dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratool.errors import InputError, LoratoolError, printable
from loratool.inputs import read_json, unreadable
from loratool.notes import Note

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt")


def recognises(path: Path) -> bool:
    """Whether `path` looks like a PEFT adapter, its format's faults included."""
    if path.suffix == ".safetensors":
        return path.is_file() or path.is_symlink()
    return any((path / name).is_symlink() or (path / name).exists() for name in (CONFIG, WEIGHTS, *PICKLED)) or bool(
        nested(path)
    )


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter, and no model with one beside it."""
    if path.is_dir():
        return recognises(path) and not (path / "config.json").exists()
    return path.is_file() and path.suffix == ".safetensors" and (path.parent / CONFIG).is_file()


def nested(path: Path) -> list[Path]:
    """Direct subfolders that hold an adapter, as PEFT writes them for adapters with a name."""
    try:
        return sorted(folder for folder in path.iterdir() if (folder / CONFIG).is_file())
    except OSError:
        return []


def not_an_adapter(path: Path) -> LoratoolError:
    """The error for a path that no format recognises."""
    try:
        path.stat()
    except OSError as error:
        return unreadable(path, error)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return InputError(f"{printable(path)}: pickled weights are never loaded here; {conversion(path)}")
    return InputError(f"{printable(path)}: no adapter: neither {CONFIG} nor {WEIGHTS} is there")


def conversion(path: Path) -> str:
    """The command that turns a pickled state dict into safetensors, loading tensors only."""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"d = torch.load({path.name!r}, map_location='cpu', weights_only=True); "
        f"save_file({{k: v.clone().contiguous() for k, v in d.items()}}, {path.stem + '.safetensors'!r})"
    )
    return f'if you trust it, convert it where it lies with: python -c "{printable_code(code)}"'


def printable_code(code: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in code)


def locate(path: Path, notes: list[Note]) -> tuple[Path, Path]:
    """The folder and the weights file of the adapter at `path`."""
    if path.suffix == ".safetensors":
        return path.parent, path
    folder = path
    if not any((folder / name).exists() for name in (CONFIG, WEIGHTS)):
        inside = nested(folder)
        if len(inside) > 1:
            names = ", ".join(printable(f.name) for f in inside)
            raise InputError(f"{printable(path)}: holds several adapters ({names}); name the subfolder of one")
        if inside:
            folder = inside[0]
            notes.append(Note("subfolder", f"read from the subfolder {printable(folder.name)}"))
    weights = folder / WEIGHTS
    if not weights.exists() and not weights.is_symlink():
        for name in PICKLED:
            if (folder / name).exists():
                raise InputError(
                    f"{printable(folder / name)}: pickled weights are never loaded here; {conversion(folder / name)}"
                )
        raise InputError(f"{printable(folder)}: {WEIGHTS} is missing")
    return folder, weights


def read_config(path: Path) -> dict[str, Any]:
    """`adapter_config.json` as a dict. Problems are told without repeating the file's text."""
    config = read_json(path, lenient=True)
    if not {"peft_type", "r", "lora_alpha"} & set(config):
        raise InputError(f"{printable(path)}: no adapter config: neither peft_type nor r nor lora_alpha is in it")
    return config
