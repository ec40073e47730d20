"""A model folder or a single file: its shards, and its index."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from loratool.errors import InputError, printable
from loratool.files.containers import PICKLES, foreign_file, is_pointer, sharded_folder
from loratool.files.folders import (
    INDEX_SUFFIX,
    MODEL_INDEX,
    NUMBERED,
    SINGLE,
    TRAINING_STATES,
    LeftOut,
    is_folder,
    sort_side_files,
    told_links,
)
from loratool.files.gguf_splits import gguf_in, read_splits
from loratool.files.hub_cache import name_of
from loratool.files.names import has_other_parts
from loratool.files.safefile import FLOAT_NAMES, SafeFile, TensorInfo, read_safefile
from loratool.files.untrusted import LARGEST_INDEX, read_json, reading
from loratool.grouping import by_key
from loratool.notes import Note
from loratool.shown import Shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

View = TypeVar("View", bound="Checkpoint")


@dataclass(frozen=True, repr=False)
class Checkpoint(Shown):
    """A model on disk. Headers are read, tensors are not."""

    is_linear: ClassVar[bool] = False  # all of its matrices are (out, in), whatever the class of the model does

    root: Path
    shards: tuple[SafeFile, ...]  # in file order
    index: Path | None = None
    index_metadata: Mapping[str, Any] | None = None
    side_files: tuple[str, ...] = ()  # carried into a merged model; paths relative to `root`
    left_out: tuple[LeftOut, ...] = ()  # seen and not carried over
    notes: tuple[Note, ...] = ()
    # of a pipeline: folder → the checkpoint in it; `tensors` have the names in these, each behind its folder and a dot
    components: Mapping[str, Checkpoint] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return name_of(self.root)

    def seen_as(self, view: type[View], **more: Any) -> View:
        """The same files as a view that has `more` fields, or other values of these."""
        return view(**{each.name: getattr(self, each.name) for each in fields(Checkpoint)} | more)

    @property
    def is_gguf(self) -> bool:
        """Whether it is a model of llama.cpp."""
        return bool(self.shards) and self.shards[0].path.suffix == ".gguf"

    @cached_property
    def stored(self) -> Mapping[str, TensorInfo]:
        """Every tensor on disk by name, shard after shard."""
        return {name: info for shard in self.shards for name, info in shard.tensors.items()}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, as it is seen: packed ones that can be decoded are seen as plain."""
        return self.stored

    @cached_property
    def homes(self) -> Mapping[str, SafeFile]:
        """The file of every tensor."""
        return {name: shard for shard in self.shards for name in shard.tensors}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.json`, a pipeline's index, or what the weights' own file says, or an empty mapping where there is nothing that can be read."""
        if self.components:
            return read_json(self.root / MODEL_INDEX)
        if "config.json" not in self.side_files:
            return self.shards[0].config if self.shards else {}
        return read_json(self.root / "config.json", repeated=True, lenient=True)

    @property
    def model_type(self) -> str:
        """The family that `config.json` names, such as "llama"; empty where it names none."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else ""

    @cached_property
    def usual_dtype(self) -> str:
        """The dtype of floats that most values of weights and biases have; empty where none have any."""
        values: Counter[str] = Counter()
        for name, info in self.stored.items():
            if info.dtype in FLOAT_NAMES and name.endswith((".weight", ".bias")):
                values[info.dtype] += info.elements
        return values.most_common(1)[0][0] if values else ""

    @property
    def architectures(self) -> tuple[str, ...]:
        """The model classes that `config.json` names."""
        value = self.config.get("architectures")
        return tuple(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str))


def open_files(root: Path, is_adapter: Callable[[Path], bool]) -> Checkpoint:
    """Open a folder of shards with or without an index, or one `.safetensors` file, whatever model they hold.

    `is_adapter` tells whether a folder without a model's weights is one.

    Raises `InputError` when there are no weights, when a shard is malformed or missing, or when the index and the shards
    disagree: all faulty shards at once.
    """
    with reading(root):
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    if not is_folder:
        if root.name.endswith(INDEX_SUFFIX):
            return open_folder(root.parent, root, is_adapter)
        refuse_pickle(root)
        if root.suffix == ".gguf":
            return Checkpoint(root, read_splits(root))
        return Checkpoint(
            root,
            (read_safefile(root),),
            notes=(Note("single-file", "BASE is a single file, so only weights are written"),),
        )
    if (inside := gguf_alone(root)) is not None:
        return open_files(inside, is_adapter)
    return open_folder(root, None, is_adapter)


def gguf_alone(folder: Path) -> Path | None:
    """The GGUF model in a folder that holds weights in no other format; None where there is none."""
    with reading(folder):
        names = os.listdir(folder)
    return None if any(name.endswith(".safetensors") for name in names) else gguf_in(folder)


def open_folder(
    root: Path, index: Path | None, is_adapter: Callable[[Path], bool], ignored: Collection[str] = ()
) -> Checkpoint:
    notes: list[Note] = []
    with reading(root):
        names = sorted(entry.name for entry in os.scandir(root) if not is_folder(entry) and entry.name not in ignored)
    if index is None:
        index = choose_index(root, names, notes)
    metadata: Mapping[str, Any] | None = None
    if index is not None:
        weight_map, metadata = read_index(index)
        shard_names = list(dict.fromkeys(weight_map.values()))
        check_any(index, root, shard_names)
        shards = order_shards(read_shards(root, shard_names))
        check_index(index, weight_map, root, shards)
    else:
        shard_names = choose_shards(root, names, notes, is_adapter)
        shards = order_shards(read_shards(root, shard_names))
        check_unique(root, shards)
    if index is not None and (stray := [n for n in names if n.endswith(".safetensors") and n not in shard_names]):
        notes.append(Note("stray-weights", f"not in the index, so ignored: {', '.join(map(printable, stray))}"))
    weights = [*shard_names, *([index.name] if index else [])]
    if links := told_links(root, weights):
        notes.append(Note("links-followed", links))
    side_files, left_out = sort_side_files(root, set(weights))
    return Checkpoint(root, tuple(shards), index, metadata, tuple(side_files), tuple(left_out), tuple(notes))


def choose_index(root: Path, names: list[str], notes: list[Note]) -> Path | None:
    """The index to go by, or None where a single file or bare shards are the model."""
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if not indexes:
        return None
    if len(indexes) > 1 and SINGLE + ".index.json" in indexes:
        indexes = [SINGLE + ".index.json"]
    if len(indexes) > 1:
        raise InputError(
            f"{printable(root)}: several indexes ({', '.join(map(printable, indexes))}); pass the path of one as BASE"
        )
    index = root / indexes[0]
    if SINGLE in names and SINGLE not in read_index(index)[0].values():
        notes.append(
            Note(
                "index-unused",
                f"found both {SINGLE} and {printable(index.name)}; {SINGLE} is used, as in transformers",
            )
        )
        return None
    return index


def choose_shards(root: Path, names: list[str], notes: list[Note], is_adapter: Callable[[Path], bool]) -> list[str]:
    """The weight files of a folder without an index."""
    found = [n for n in names if n.endswith(".safetensors")]
    if SINGLE in found:
        if len(found) > 1:
            others = ", ".join(printable(n) for n in found if n != SINGLE)
            notes.append(Note("stray-weights", f"{SINGLE} is the model; ignored: {others}"))
        return [SINGLE]
    shards = [n for n in found if not n.startswith(("adapter_", "consolidated"))] or [
        n for n in found if n.startswith("consolidated")
    ]
    if not shards:
        if is_adapter(root):
            raise InputError(f"{printable(root)}: this is an adapter; BASE must be the model it was trained on")
        if told := sharded_folder(root):
            raise InputError(f"{printable(root)}: contains no .safetensors file; {told}")
        left = [name for name in names if any(fnmatch(name, pattern) for pattern in TRAINING_STATES)]
        for name in names:
            if name not in left:
                refuse_pickle(root / name)
        only = f", only files of a training run ({', '.join(map(printable, left))})" if left else ""
        raise InputError(f"{printable(root)}: contains no .safetensors file{only}")
    check_numbering(root, shards)
    if len(shards) > 1:
        notes.append(
            Note("no-index", f"no index; all {len(shards)} .safetensors files are read as shards of one model")
        )
    return shards


def check_numbering(root: Path, shards: list[str]) -> None:
    """Shards that say `-00001-of-00003` must all be there."""
    matches = filter(None, map(NUMBERED.match, shards))
    series = by_key(((match["stem"], int(match["count"])), int(match["number"])) for match in matches)
    if len(series) > 1:
        raise InputError(
            f"{printable(root)}: shards of several models but no index; pass the path of one file, or add the index"
        )
    for (stem, count), numbers in series.items():
        if count <= 100_000 and (missing := sorted({*range(1, count + 1)} - {*numbers})):
            raise InputError(
                f"{printable(root)}: shards {missing[:20]} of the {count} of {printable(stem)} are missing"
            )


def refuse_pickle(path: Path) -> None:
    """Raise `InputError` for a file of weights in a form that is not read, with the way to safetensors."""
    if path.suffix not in (*PICKLES, ".npz"):
        return
    if is_pointer(path) or path.suffix == ".npz" or not (path.parent / "config.json").is_file():
        raise InputError(f"{printable(path)}: {foreign_file(path)}")
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        "M.from_pretrained('.', dtype='auto').save_pretrained('converted')"
    )
    raise InputError(
        f"{printable(path)}: loratool never loads pickled weights; if you trust them, convert the model in its folder "
        f'with: python -c "{code}" (or the Auto class of its task)'
    )


def read_index(path: Path) -> tuple[dict[str, str], Mapping[str, Any] | None]:
    """`weight_map` and `metadata` of an index whose every shard name is a plain path inside the folder."""
    shown = printable(path)
    table = read_json(path, LARGEST_INDEX)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{shown}: weight_map is missing, empty or not an object")
    named = {repr(name): name for name in weight_map.values()}  # far fewer than tensors
    wrong = {text: reason for text, name in named.items() if (reason := why_no_shard_name(name))}
    if wrong:
        raise InputError(
            f"{shown}: weight_map names files that cannot be shards of this model:",
            (f"{printable(name)}: {reason}" for name, reason in wrong.items()),
        )
    metadata = table.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else None


def why_no_shard_name(name: object) -> str:
    """Empty where `name` is a plain relative path to a .safetensors file; else what is wrong with it."""
    if not isinstance(name, str):
        return "not text"
    if "\0" in name or "\\" in name or "://" in name:
        return "not a plain path"
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "." in parts or "" in parts or has_other_parts(name):
        return "leaves the folder or is not a plain relative path"
    if not name.endswith(".safetensors"):
        return "not a .safetensors file"
    return ""


def check_any(index: Path, root: Path, names: Sequence[str]) -> None:
    """Raise `InputError` where an index is all that is there of a model."""
    if names and not any(os.path.lexists(root / name) for name in names):
        few = ", ".join(map(printable, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InputError(
            f"{printable(index)}: found the index but not its weight files (no such file: {few}); download or copy "
            "them into this folder"
        )


def read_shards(root: Path, names: list[str]) -> list[SafeFile]:
    """The headers of all shards; every faulty one is told at once."""
    shards: list[SafeFile] = []
    errors: list[InputError] = []
    for name in names:
        try:
            shards.append(read_safefile(root / name))
        except InputError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputError(
            f"{printable(root)}: {len(errors)} of {len(names)} shards cannot be read:", (str(error) for error in errors)
        )
    return shards


def order_shards(shards: list[SafeFile]) -> list[SafeFile]:
    return sorted(shards, key=lambda shard: str(shard.path))


def check_index(index: Path, weight_map: Mapping[str, str], root: Path, shards: list[SafeFile]) -> None:
    """The index and the headers must say the same about which tensor lies where."""
    by_name = {shard.path.relative_to(root).as_posix(): shard for shard in shards}
    problems: list[str] = []
    for tensor, name in weight_map.items():
        if tensor not in by_name[name].tensors:
            actual = [other for other, shard in by_name.items() if tensor in shard.tensors]
            where = f"it is in {printable(actual[0])}" if actual else "no shard contains it"
            problems.append(f"{printable(tensor)}: the index says it is in {printable(name)}, but {where}")
    for name, shard in by_name.items():
        for tensor in shard.tensors:
            if tensor not in weight_map:
                problems.append(f"{printable(tensor)}: in {printable(name)}, but not in the index")
            elif weight_map[tensor] != name and tensor in by_name[weight_map[tensor]].tensors:
                problems.append(f"{printable(tensor)}: in {printable(name)} and in {printable(weight_map[tensor])}")
    if problems:
        raise InputError(f"{printable(index)}: the index and the shards disagree:", problems)


def check_unique(root: Path, shards: list[SafeFile]) -> None:
    homes = by_key((tensor, shard.path.name) for shard in shards for tensor in shard.tensors)
    problems = [
        f"{printable(tensor)}: in {printable(one)} and in {printable(other)}"
        for tensor, names in homes.items()
        for one, other in pairwise(names)
    ]
    if problems:
        raise InputError(
            f"{printable(root)}: tensors are duplicated, and there is no index to say which ones to use; if each file is a "
            "model of its own, pass one of the files:",
            problems,
        )


def index_text(weight_map: Mapping[str, str], total_size: int, metadata: Mapping[str, Any] | None) -> bytes:
    """An index as transformers writes it: `total_size` in bytes of tensor data, names sorted."""
    table = {"metadata": {**(metadata or {}), "total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(table, indent=2) + "\n").encode()
