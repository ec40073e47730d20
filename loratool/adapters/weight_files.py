"""Files of weights in an adapter's folder besides the adapter itself: what each is, and what it holds.

A safetensors file is told by its header, a pickle of torch by the listing of its zip archive. Nothing is unpickled,
and nothing but heads and listings is read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from loratool.errors import InputError, LoratoolError, printable
from loratool.files.safefile import SafeFile, read_safefile
from loratool.files.untrusted import json_object, open_regular, read_bounded
from loratool.notes import Note
from loratool.templates import first_few

Kind = Literal["trained", "module", "training state", "twin", "adapter", "model"]

# What files of weights end with, whatever wrote them.
ENDS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".h5", ".msgpack", ".gguf"),
    *(".ggml", ".onnx", ".onnx_data", ".ot", ".tflite", ".nemo", ".distcp", ".joblib"),
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What only training reads: states of optimizers, schedulers, random numbers and data loaders, of any framework.
STATES = (
    *("optimizer*", "scheduler*", "rng_state*", "random_states*", "scaler*", "training_args*", "sampler*", "*.distcp"),
    *("dataloader*", "dl_state_dict*", "*optim_states*", "*model_states.pt", "custom_checkpoint*", "trainer_state*"),
)
STATE_FOLDERS = ("checkpoint-*", "global_step*", "*fsdp*", "optimizer_*", "zero_checkpoint*")
# The adapter's own weights once more, in another form or by another tool.
TWINS = ("adapter_model*", "ggml-adapter-model*", "*lora*.gguf", "*adapter*.gguf", "adapters.npz")
# A whole model in the adapter's folder, with its config: the base, or one that the adapter is merged into.
MODEL = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
MODULES = "modules.json"  # of sentence-transformers: the modules after the model, each in a folder of its own
MODULE_CONFIGS = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
DEEPEST = 3  # folders below an adapter's own in which files of weights are looked for
LARGEST_LISTING = 16 << 20  # bytes of the listing of a zip archive
MOST_NAMED = 3  # tensors that a description names


@dataclass(frozen=True)
class WeightFile:
    """One file, or a folder of training states whose name ends with a slash."""

    name: str  # its path in the adapter's folder
    kind: Kind
    holds: str  # in words
    tensors: tuple[str, ...] = ()  # of a safetensors file

    @property
    def counts(self) -> bool:
        """Whether it holds something that was trained and that the adapter does not hold."""
        return self.kind in ("trained", "module")

    @property
    def is_safetensors(self) -> bool:
        return self.name.endswith(".safetensors")

    def __str__(self) -> str:
        return f"{printable(self.name)} ({self.holds})"


def weight_files(folder: Path, own: SafeFile | None, names: Collection[str]) -> tuple[WeightFile, ...]:
    """Every file of weights below `folder` but those called `names`, which are the adapter's.

    `own` is the adapter's file, so that a copy of its tensors is known as one; without it only names are looked at.
    """
    modules = module_folders(folder)
    return tuple(look_at(folder, name, own, modules) for name in walk(folder) if name not in names)


def fates(
    files: Collection[WeightFile],
    *,
    merged: Collection[str] = (),
    carried: Collection[str] = (),
    ignored: Collection[str] = (),
    otherwise: str = "not used",
) -> Iterator[Note]:
    """A note for each file, that says what it holds and what became of it; those of training states are one."""
    states = [printable(file.name) for file in files if file.kind == "training state"]
    for file in files:
        if file.name in merged:
            yield Note("file-merged", f"{file}: merged")
        elif file.name in carried:
            yield Note("file-carried-over", f"{file}: copied unchanged")
        elif file.name in ignored:
            yield Note("file-ignored", f"{file}: ignored, as requested")
        elif file.counts:
            yield Note("file-not-used", f"{file}: {otherwise}; it was trained along with the adapter")
        elif file.kind != "training state":
            yield Note("file-passed-over", f"{file}: not used")
    if states:
        yield Note("training-state", f"left over from training and ignored: {', '.join(states)}")


def look_at(folder: Path, name: str, own: SafeFile | None, modules: Collection[str]) -> WeightFile:
    """What one file is, by its name first, then by its head."""
    if name.endswith("/"):
        return WeightFile(name, "training state", "a folder of training states")
    last, head = name.rpartition("/")[2].lower(), name.partition("/")[0]
    if any(fnmatch(last, pattern) for pattern in STATES):
        return WeightFile(name, "training state", "training state")
    if head != name and (folder / head / ADAPTER_CONFIG).is_file():
        return WeightFile(name, "adapter", "of another adapter")
    if head == name and any(fnmatch(last, pattern) for pattern in TWINS):
        return WeightFile(name, "twin", "the adapter's own weights in another form")
    if head == name and (folder / MODEL_CONFIG).is_file() and any(fnmatch(last, pattern) for pattern in MODEL):
        return WeightFile(name, "model", "of the model in the same folder")
    kind: Kind = "module" if head != name and head in modules else "trained"
    if last.endswith(".safetensors"):
        return look_inside(folder / name, name, kind, own)
    return WeightFile(name, kind, listing(folder / name) if last.endswith(PICKLES) else told_size(folder / name))


def look_inside(path: Path, name: str, kind: Kind, own: SafeFile | None) -> WeightFile:
    """What the header of a safetensors file tells."""
    try:
        file = read_safefile(path)
    except LoratoolError as error:
        return WeightFile(name, kind, str(error).removeprefix(f"{printable(path)}: "))
    shapes = sorted(info.shape for info in file.tensors.values())
    if own is not None and shapes == sorted(info.shape for info in own.tensors.values()):
        return WeightFile(name, "twin", "tensors of the same shapes as the adapter's own")
    count = len(file.tensors)
    elements = sum(info.elements for info in file.tensors.values())
    holds = f"{count} tensor{'s' * (count != 1)} of {elements:,} parameters: {first_few([*file.tensors], MOST_NAMED)}"
    return WeightFile(name, kind, holds, tuple(file.tensors))


def listing(path: Path) -> str:
    """What the listing of torch's zip archive tells of a pickle; nothing of it is loaded."""
    import zipfile

    try:
        with open(open_regular(path), "rb") as stream:
            start = stream.read(64)
            if start.startswith(b"version https://git-lfs"):
                return "a Git LFS pointer to a pickle; run `git lfs pull` to get the file"
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - (1 << 16)))
            end = stream.read()
            at = end.rfind(b"PK\x05\x06")
            if not start.startswith(b"PK") or at < 0 or len(end) < at + 22:
                return f"a pickle, {told_size(path)}"
            if struct.unpack_from("<I", end, at + 12)[0] > LARGEST_LISTING:
                return f"a pickle, {told_size(path)}"
            with zipfile.ZipFile(stream) as archive:
                parts = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    except (LoratoolError, OSError, zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return "a pickle that cannot be listed"
    count = len(parts)
    return f"a pickle of {count} tensor{'s' * (count != 1)}, {sum(entry.file_size for entry in parts):,} bytes"


def told_size(path: Path) -> str:
    try:
        return f"{os.stat(path).st_size:,} bytes"
    except OSError:
        return "cannot be read"


def walk(folder: Path, inside: str = "") -> Iterator[str]:
    """The paths of weight files below a folder, sorted, and of folders of training states; hidden ones are passed over."""
    try:
        entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        name = f"{inside}{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if any(fnmatch(entry.name.lower(), pattern) for pattern in STATE_FOLDERS):
                yield f"{name}/"
            elif inside.count("/") < DEEPEST:
                yield from walk(folder, f"{name}/")
        elif entry.name.lower().endswith(ENDS):
            yield name


def module_folders(folder: Path) -> tuple[str, ...]:
    """The folders of the modules that sentence-transformers puts after the model; none for any other folder."""
    path = folder / MODULES
    if not path.is_file():
        return ()
    try:
        listed = json_object(b'{"modules": ' + read_bounded(path) + b"}").get("modules")
    except (LoratoolError, ValueError):
        return ()
    paths = [entry.get("path") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    plain = [p for p in paths if isinstance(p, str) and p not in ("", ".", "..") and not {"/", "\\", "\0"} & set(p)]
    return tuple(p for p in plain if (folder / p).is_dir() and not (folder / p).is_symlink())


def module_files(folder: Path) -> dict[str, Path]:
    """What sentence-transformers reads besides the model, by name: its configs, and every file of its modules."""
    folders = module_folders(folder)
    if not folders:
        return {}
    names = [name for name in MODULE_CONFIGS if (folder / name).is_file()]
    for inside in folders:
        for where, below, files in os.walk(folder / inside):
            below[:] = [name for name in below if not name.startswith(".")]
            here = [Path(where, name).relative_to(folder) for name in files if not name.startswith(".")]
            names += [path.as_posix() for path in here if not any(fnmatch(path.name, state) for state in STATES)]
    return {name: folder / name for name in sorted(names)}


def without_config(path: Path) -> InputError:
    """The error for weights whose config is not where it should be."""
    return InputError(
        f"{printable(path)} is missing, so the rank and alpha are unknown; copy it from the training output"
    )
