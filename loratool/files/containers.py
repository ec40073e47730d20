"""Weights in a form that is not read: what it is, and the command that turns it into safetensors.

Pickles are told by their name and their first bytes; none is ever loaded here. Folders of torch's distributed
checkpoints (FSDP) and of DeepSpeed hold a model in pieces, which the tool that wrote them puts together.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from loratool.errors import InputError, LoratoolError, printable
from loratool.files.foreign_starts import archive
from loratool.files.safefile import read_safefile
from loratool.files.system import shell_line, shell_word
from loratool.files.untrusted import open_regular
from loratool.templates import some

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".lora")
ARCHIVE = ".nemo"
# Files that are told where safetensors are looked for: what only some tools write.
TOLD = (".npz", ".lora", ARCHIVE)
UNPACKED = "model_weights.ckpt"  # what is in such an archive
SHARED, ENDING = "shared.safetensors", ".safetensors"  # of adapters that are compressed together
COMPRESSED = "loratool_compressed"  # in the metadata of each of their files
POINTER = b"version https://git-lfs"


def foreign_file(path: Path) -> str:
    """What a file of weights is, and how it becomes safetensors; empty for one that is no such file."""
    if told := archive(path):
        return told
    if path.suffix not in (*PICKLES, ".npz", ARCHIVE):
        return ""
    if is_pointer(path):
        return "a Git LFS pointer, not the file it points to; run `git lfs pull`"
    if path.suffix == ".npz":
        return f"numpy arrays, as old MLX releases saved them; {npz_conversion(path)}"
    if path.suffix == ARCHIVE:
        return f"a NeMo archive, which holds pickled weights; {unpacking(path)}"
    return f"loratool never loads pickled weights; {conversion(path)}"


def is_pointer(path: Path) -> bool:
    """Whether a file is what git-lfs leaves in the place of one that was not fetched."""
    try:
        with open(open_regular(path), "rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except LoratoolError:
        return False


def conversion(path: Path) -> str:
    """The command that turns a pickled state dict into safetensors, loading tensors only.

    The first trainer for Stable Diffusion pickles a list of factors instead, whose places in it become names as in its
    own safetensors.
    """
    component = "text_encoder" if path.stem.endswith(".text_encoder") else "unet"
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"d = torch.load({path.name!r}, map_location='cpu', weights_only=True); "
        f"d = {{'{component}:' + str(i // 2) + ':' + ('up', 'down')[i % 2]: v for i, v in enumerate(d)}} "
        "if isinstance(d, list) else d; "
        "d = next((v for v in d.values() if isinstance(v, dict)), d); "
        "save_file({k: v.detach().clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
        f"{path.stem + '.safetensors'!r})"
    )
    return f'if you trust the file, convert it in its folder with: python -c "{printable_code(code)}"'


def npz_conversion(path: Path) -> str:
    """The command that turns arrays of numpy into safetensors; it loads arrays only."""
    code = (
        "import numpy; from safetensors.numpy import save_file; "
        f"save_file(dict(numpy.load({path.name!r})), {path.stem + '.safetensors'!r})"
    )
    return f'convert them in their folder with: python -c "{printable_code(code)}"'


def taken_apart(path: Path, names: Sequence[str]) -> str:
    """The command that saves tensors of a file each in one of its own, and all others with the metadata in another."""
    stem = path.stem
    code = (
        "from safetensors import safe_open; from safetensors.torch import load_file, save_file; "
        f"d = load_file({path.name!r}); m = safe_open({path.name!r}, 'pt').metadata(); names = {[*names]!r}; "
        f"[save_file({{k: d.pop(k)}}, {stem + '-'!r} + str(i) + '.safetensors') for i, k in enumerate(names)]; "
        f"save_file(d, {stem + '-lora.safetensors'!r}, {{k: v for k, v in (m or {{}}).items() if k not in names}})"
    )
    return f'save them separately in its folder with: python -c "{printable_code(code)}"'


def unpacking(path: Path) -> str:
    """The commands that unpack an archive of NeMo next to it, and turn the state dict in it into safetensors."""
    inside = path.parent / path.stem / UNPACKED
    archive, folder = (shell_word(printable(name)) for name in (path.name, path.stem))
    return f"unpack it in its folder with: mkdir {folder} && tar -xf {archive} -C {folder}. Then, {conversion(inside)}"


def printable_code(code: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in code)


def compressed_in(folder: Path) -> list[str]:
    """The names of the adapters that `compress` has put into a folder; none in any other."""
    if not (folder / SHARED).is_file():
        return []
    try:
        metadata = read_safefile(folder / SHARED).metadata
    except LoratoolError:
        return []
    names = sorted(path.name.removesuffix(ENDING) for path in folder.glob(f"*{ENDING}") if path.name != SHARED)
    return names if COMPRESSED in metadata else []


def refuse_compressed(path: Path) -> None:
    """Raise `InputError` where a path is a folder of compressed adapters, or one of its files."""
    folder = path if path.is_dir() else path.parent
    if not (names := compressed_in(folder)):
        return
    name = path.stem if path.stem in names else names[0]
    raise InputError(
        f"{printable(path)}: contains compressed adapters ({some(names)}); `loratool expand` writes one as an "
        "ordinary adapter",
        hint=shell_line(["loratool", "expand", os.fspath(folder), name, "-o", f"./{name}"]),
    )


def sharded_folder(folder: Path, config: str = "") -> str:
    """What a folder is that holds a model in pieces, or a folder directly in it, and how they are gathered; else empty.

    `config` is the file of it without which the gathered weights cannot be read.
    """
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return ""
    for place in (folder, *inside):
        if any(place.glob("*.distcp")):
            return of_torch(place, config)
    if any(folder.glob("global_step*")) or any(folder.glob("*_optim_states.pt")):
        return of_deepspeed(folder, config)
    return ""


def of_torch(place: Path, config: str) -> str:
    shown = shell_word(printable(place))
    if "fsdp" in place.name:
        return (
            f"{printable(place)} is a sharded FSDP checkpoint; gather it with: accelerate merge-weights {shown} OUT"
            f"{copying(config)}"
        )
    return (
        f"{printable(place)} is a distributed torch checkpoint; gather it with: python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch {shown} weights.pt"
    )


def of_deepspeed(folder: Path, config: str) -> str:
    shown = shell_word(printable(folder))
    script = "zero_to_fp32.py" if (folder / "zero_to_fp32.py").is_file() else ""
    tool = f"python {shell_word(printable(folder / script))}" if script else "python -m deepspeed.utils.zero_to_fp32"
    return (
        f"{printable(folder)} is a DeepSpeed checkpoint with a file per process; gather it with: {tool} {shown} OUT "
        f"--safe_serialization{copying(config)}"
    )


def copying(config: str) -> str:
    """The step after gathering weights into OUT, where these need a config."""
    return f". Then copy {config} into OUT" if config else ""


def instead_of_weights(folder: Path, config: str = "") -> str:
    """What a folder holds where safetensors are looked for, and how it becomes that; empty for nothing that is known.

    `config` as for `sharded_folder`.
    """
    if told := sharded_folder(folder, config if (folder / config).is_file() else ""):
        return told
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in TOLD or path.name == UNPACKED:
            return f"{printable(path)}: {foreign_file(path)}"
    return ""
