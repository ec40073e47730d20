"""A pipeline as diffusers lays it out: `model_index.json`, and a folder for each component with weights of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint, choose_index, choose_shards, open_folder, read_index
from loratool.files.folders import INDEX_SUFFIX, MODEL_INDEX, LeftOut, sort_side_files
from loratool.files.safefile import SafeFile
from loratool.files.untrusted import read_json
from loratool.files.views import Selection
from loratool.grouping import by_key
from loratool.notes import Note

WEIGHTS = re.compile(r".+\.safetensors(?:\.index(?:\.[A-Za-z0-9_]+)?\.json)?")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors
VARIANT = re.compile(r"[^.]+\.(?P<name>[A-Za-z0-9_]+)(?:-\d+-of-\d+)?\.safetensors")
INDEX_OF_VARIANT = re.compile(r".+\.safetensors\.index\.(?P<name>[A-Za-z0-9_]+)\.json")


@dataclass(frozen=True)
class Member(Selection):
    """A file of one component of a model: its tensors have their own names behind `prefix`."""

    prefix: str

    @classmethod
    def of(cls, original: SafeFile, prefix: str) -> Member:  # type: ignore[override]
        """All tensors of a component's file."""
        names = {prefix + name: name for name in original.tensors}
        plain = Selection.of(original, names)
        return cls(plain.path, plain.layout, plain.identity, original, names, prefix)


def itself(file: SafeFile) -> SafeFile:
    """The file as it is on disk, of one that is seen under a component's names."""
    return file.original if isinstance(file, Member) else file


def identities(files: Iterable[SafeFile]) -> frozenset[int]:
    """What tells whether a file is one of these, under whatever names its tensors are seen: `id(itself(file))`."""
    return frozenset(id(itself(file)) for file in files)


def is_index(name: str) -> bool:
    """Whether a file is the index of some shards, perhaps of a variant."""
    return name.endswith(INDEX_SUFFIX) or INDEX_OF_VARIANT.fullmatch(name) is not None


def is_pipeline(root: Path) -> bool:
    """Whether a folder is a pipeline, or what should be one."""
    return (root / MODEL_INDEX).is_file()


def open_pipeline(root: Path, is_adapter: Callable[[Path], bool]) -> Checkpoint:
    """A pipeline as one checkpoint: the tensors of its components, each named behind its folder's name and a dot.

    Raises `InputError` where no component has weights that are read, or one cannot be told.
    """
    components: dict[str, Checkpoint] = {}
    left_out: list[LeftOut] = []
    notes: list[Note] = []
    for name in component_names(root):
        index, others = chosen_files(root, name, notes)
        component = open_folder(root / name, index, is_adapter, others)
        components[name] = component
        left_out += [LeftOut(f"{name}/{other}", "another variant of the same weights") for other in sorted(others)]
        notes += [note.under(printable(name)) for note in component.notes]
    if not components:
        raise InputError(f"{printable(root)}: no component of this pipeline has .safetensors files")
    shards = [Member.of(shard, f"{name}.") for name, model in components.items() for shard in model.shards]
    weights = {shard.path.relative_to(root).as_posix() for shard in shards}
    weights |= {model.index.relative_to(root).as_posix() for model in components.values() if model.index}
    side_files, dropped = sort_side_files(root, weights)
    unused = {str(other.name) for other in left_out}
    return Checkpoint(
        root,
        tuple(shards),
        side_files=tuple(name for name in side_files if name not in unused),
        left_out=tuple(sorted({*dropped, *left_out}, key=str)),
        notes=tuple(notes),
        components=components,
    )


def files_of(root: Path, is_adapter: Callable[[Path], bool]) -> tuple[list[str], list[str]]:
    """The weight files of a pipeline and its other files, as paths in it; only names and indexes are looked at."""
    weights: list[str] = []
    indexes: list[str] = []
    unused: set[str] = set()
    for name in component_names(root):
        folder = root / name
        index, others = chosen_files(root, name, [])
        names = [each for each in names_in(folder) if each not in others and (folder / each).is_file()]
        index = index or choose_index(folder, names, [])
        own = list(dict.fromkeys(read_index(index)[0].values())) if index else []
        weights += [f"{name}/{each}" for each in own or choose_shards(folder, names, [], is_adapter)]
        indexes += [f"{name}/{index.name}"] if index else []
        unused |= {f"{name}/{other}" for other in others}
    rest = sort_side_files(root, {*weights, *indexes})[0]
    return weights, [*indexes, *(name for name in rest if name not in unused)]


def component_names(root: Path) -> list[str]:
    """The folders of a pipeline's components that hold weights to read, in the order of its index."""
    named = [
        name for name, value in read_json(root / MODEL_INDEX).items() if isinstance(value, list) and name.isidentifier()
    ]
    return [name for name in named if any(n.endswith(".safetensors") for n in names_in(root / name))]


def names_in(folder: Path) -> list[str]:
    """The names of a folder's files; none where there is no folder."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def chosen_files(root: Path, component: str, notes: list[Note]) -> tuple[Path | None, frozenset[str]]:
    """The index of the weights that are read, where they have one of a variant, and the files of other variants.

    Without a variant is what diffusers loads by default; the only one that is there is taken otherwise.
    """
    named = (name for name in names_in(root / component) if WEIGHTS.fullmatch(name))
    variants = ((INDEX_OF_VARIANT.fullmatch(name) or VARIANT.fullmatch(name), name) for name in named)
    found = by_key((variant["name"] if variant else "", name) for variant, name in variants)
    weights = [variant for variant, names in found.items() if any(n.endswith(".safetensors") for n in names)]
    if "" in weights:
        chosen = ""
    elif len(weights) == 1:
        (chosen,) = weights
        notes.append(
            Note(
                "variant-used", f"{printable(component)}: no weights without a variant, so {printable(chosen)} is used"
            )
        )
    else:
        raise InputError(
            f"{printable(root / component)}: holds the variants {', '.join(map(printable, sorted(weights)))} and no "
            "weights without one; keep those that are to be merged in a copy of the pipeline"
        )
    index = next((name for name in found[chosen] if chosen and INDEX_OF_VARIANT.fullmatch(name)), None)
    others = frozenset(name for variant, names in found.items() if variant != chosen for name in names)
    return root / component / index if index else None, others
