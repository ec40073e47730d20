"""What the files in a model's folder are called, and which of them belong to the model; nothing is read.

The weights themselves are opened by `checkpoint`.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from loratool.errors import InputError, printable
from loratool.files.untrusted import LARGEST_CONFIG, LARGEST_INDEX, LARGEST_RECORD, special_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Set

INDEX_SUFFIX = ".safetensors.index.json"
SINGLE = "model.safetensors"
MODEL_INDEX = "model_index.json"  # of a pipeline
NUMBERED = re.compile(r"^(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors$")

# Weights in another form than the shards that are merged: stale after a merge, so left out of it.
TWIN_FOLDERS = ("original", "onnx", "openvino", "coreml", "gguf", "mlx", "metal", "tflite", "flax")
TWIN_ENDS = (
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".ot", ".tflite"),
    *(".mlmodel", ".mlpackage", ".pkl", ".pickle", ".npz", ".nemo", ".bin.index.json"),
)
TWIN_STARTS = ("consolidated", "flax_model", "tf_model", "rust_model")
# What training and tools leave beside a model, never part of it.
TRAINING_FOLDERS = ("checkpoint-*", "global_step*", "runs", "wandb", "logs", "__pycache__")
TRAINING_STATES = (
    *("optimizer*", "scheduler.pt", "rng_state*", "random_states*", "scaler.pt", "trainer_state.json"),
    "training_args.*",
)
TRAINING_FILES = (*TRAINING_STATES, "*.pyc", "adapter_*")
PROVENANCE = "loratool.json"
REMOTE_JOURNAL = "loratool-stream.json"  # of a repository, for as long as a streaming merge into it is not complete
CARD = "README.md"
WEIGHT_FILES = (".safetensors", ".gguf")  # the ends of their names


def largest_of(name: str) -> int:
    """Bytes that a file which is parsed may have, by its name without folders."""
    if name.endswith(PROVENANCE) or name == REMOTE_JOURNAL:
        return LARGEST_RECORD
    return LARGEST_INDEX if name.endswith(INDEX_SUFFIX) else LARGEST_CONFIG


def sidecar_of(path: Path) -> Path:
    """The record of a weight file that stands alone, as an output of one file does."""
    return path.with_name(f"{path.name}.{PROVENANCE}")


def folder_and_name(place: Path) -> tuple[Path, str]:
    """A folder and no name, or the folder and the name of one file."""
    return (place, "") if place.is_dir() else (place.parent, place.name)


def record_for(place: Path) -> Path:
    """The record of a folder, or of one file, which may have its own."""
    folder, only = folder_and_name(place)
    if only and (sidecar := sidecar_of(place)).is_file():
        return sidecar
    return folder / PROVENANCE


class LeftOut(NamedTuple):
    """A file or a folder, which ends in a slash, that is not carried over."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.name)} ({self.reason})"


def told_links(root: Path, names: list[str]) -> str:
    """Where weight files are links out of the folder, the sentence that says where they lead; else nothing."""
    away = [name for name in names if leaves(root, name)]
    if not away:
        return ""
    more = f" (and {len(away) - 1} more)" if len(away) > 1 else ""
    return (
        f"weights are links to files outside the folder, which were followed: {printable(away[0])} → "
        f"{printable(os.path.realpath(root / away[0]))}{more}"
    )


def leaves(root: Path, name: str) -> bool:
    """Whether the file `name` of `root` really lies elsewhere."""
    if "/" not in name and not os.path.islink(os.path.join(root, name)):
        return False
    home, target = root.resolve(), Path(os.path.realpath(root / name))
    if target.is_relative_to(home):
        return False
    for folder in (home, *home.parents):
        if folder.name == "snapshots":  # models--org--name/snapshots/COMMIT/… → models--org--name/blobs/…
            return not target.is_relative_to(folder.parent / "blobs")
    return True


def sort_side_files(root: Path, weights: set[str]) -> tuple[list[str], list[LeftOut]]:
    """Files to carry over, and files to leave out; hidden ones are in neither.

    A link out of the folder is followed only to where the weights of the same model really lie. Raises `InputError`
    naming every pipe, socket and device that stands where a file does.
    """
    left_out: list[LeftOut] = []
    homes = {os.path.dirname(os.path.realpath(root / name)) for name in weights if name and leaves(root, name)}
    names = list(walk(root, left_out))
    if odd := special_files(root, names):
        raise InputError(f"{printable(root)}: contains something that is not a regular file; remove it:", odd)
    reasons = {name: why_left_out(root, PurePosixPath(name), homes) for name in names if name not in weights}
    left_out += [LeftOut(name, reason) for name, reason in reasons.items() if reason]
    return sorted(name for name, reason in reasons.items() if not reason), sorted(left_out, key=str)


def walk(root: Path, left_out: list[LeftOut], inside: str = "") -> Iterator[str]:
    """Relative paths of all files below `root`, hidden and training folders passed over."""
    for entry in os.scandir(root / inside):
        name = f"{inside}{entry.name}"
        if entry.name.startswith("."):
            continue
        if not is_folder(entry):
            yield name
        elif any(fnmatch(entry.name, pattern) for pattern in TRAINING_FOLDERS):
            left_out.append(LeftOut(f"{name}/", "left by training"))
        elif not inside and entry.name in TWIN_FOLDERS:
            left_out.append(LeftOut(f"{name}/", "the unmerged weights in another form"))
        elif entry.is_symlink() and leaves(root, name):
            left_out.append(LeftOut(f"{name}/", "a link out of the folder"))
        else:
            yield from walk(root, left_out, f"{name}/")


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder; a link that leads to itself or nowhere is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def why_left_out(root: Path, path: PurePosixPath, homes: Set[str] = frozenset()) -> str:
    """Empty for a file that belongs into a merged model; else the reason it is left out.

    `homes` are the folders outside `root` in which weights of the model lie.
    """
    name = path.name
    at_top = len(path.parts) == 1
    if name == PROVENANCE:
        return "made by an earlier merge"
    if not os.path.isfile(root / path):
        return "a link to nothing"
    if leaves(root, str(path)) and os.path.dirname(os.path.realpath(root / path)) not in homes:
        return "a link out of the folder"
    if any(fnmatch(name, pattern) for pattern in TRAINING_FILES):
        return "left by training"
    if at_top and (name.endswith((".safetensors", INDEX_SUFFIX)) or is_twin(name)):
        return "the unmerged weights in another form"
    # a module of its own in a subfolder, such as 2_Dense/, is part of the model: only its twins go
    if not at_top and is_twin(name) and any((root / path).parent.glob("*.safetensors")):
        return "the unmerged weights in another form"
    return ""


def is_twin(name: str) -> bool:
    return name.endswith(TWIN_ENDS) or name.startswith(TWIN_STARTS) or name == "params.json"


def holds_weights(path: Path) -> bool:
    """Whether a base is more than a config."""
    if path.suffix == ".json" and not path.name.endswith(INDEX_SUFFIX):
        return False
    weights = (found for end in WEIGHT_FILES for found in path.glob(f"*{end}"))
    return not (path.is_dir() and (path / "config.json").is_file() and not any(weights))
