"""A model without its values: the shape of every weight, from headers, or from a config alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loratool.adapters.formats import FORMATS
from loratool.bases.codecs import as_decoded
from loratool.bases.decoders import SHAPES
from loratool.bases.siblings import served_with
from loratool.bases.tied_weights import find_ties, tie_flag
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import DTYPE_BITS, FLOAT_NAMES
from loratool.files.untrusted import read_json
from loratool.layouts.architectures import PACKED_WEIGHTS
from loratool.layouts.ties import TIED_BY_DEFAULT
from loratool.notes import Note
from loratool.templates import first_few

Shape = tuple[int, ...]
DTYPES = {name: dtype for dtype, name in FLOAT_NAMES.items()}  # float32 → F32
BUFFERS = re.compile(  # kept in checkpoints, and no parameters
    r"(?:.*\.)?(?:inv_freq|masked_bias|position_ids|token_type_ids|running_mean|running_var|num_batches_tracked|[kv]_scale)"
)
CAUSAL_MASK = re.compile(r"(?:.*\.)?attn\.bias")  # of four dimensions, in old checkpoints of GPT-2
FACTORS = re.compile(r".*\.lora_(?:[AB]|embedding_[AB]|down|up|a|b)(?:\.|$)")
CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Base:
    """A model without its values: what is trained, and what it is trained beside."""

    path: str
    architecture: str
    source: Literal["headers", "config"]
    weights: Mapping[str, Shape]  # every parameter by its tensor's name
    dtypes: Mapping[str, str]  # and its dtype
    shared: frozenset[str] = frozenset()  # those that are another one in memory, and counted there
    stored_bytes: int = 0  # of all tensors that files hold
    packed: Mapping[str, int] = field(default_factory=dict)  # packed weight → bytes of the tensors that it is made of
    packing: str = ""  # how those are packed, for a person
    notes: tuple[Note, ...] = ()

    @property
    def counted(self) -> dict[str, Shape]:
        return {name: shape for name, shape in self.weights.items() if name not in self.shared}

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.counted.values()))

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of weights as plain ones."""
        return sum(math.prod(self.weights[name]) * DTYPE_BITS[self.dtypes[name]] // 8 for name in names)

    def merged_bytes(self, edited: Iterable[str]) -> int:
        """Tensor data of a merged model: packed weights that are edited become plain."""
        plain = served_with(self.packed.keys() & set(edited), self.packed)
        return self.stored_bytes - sum(self.packed[name] for name in plain) + self.bytes_of(plain)


def read_base(path: Path, checkpoint: Checkpoint | None) -> Base:
    """The base at `path`: from the headers of its `checkpoint`, whose packed weights are decoded; else from its config."""
    if checkpoint is not None:
        return base_of_headers(checkpoint, path)
    return base_of_config(path / "config.json" if path.is_dir() else path)


def base_of_headers(checkpoint: Checkpoint, path: Path) -> Base:
    held = checkpoint.tensors
    if any(FACTORS.match(name) for name in held):
        raise InputError(f"{printable(path)}: this is an adapter; BASE must be the model it was trained on")
    seen = as_decoded(checkpoint)
    unread = seen.unread if seen else {}
    packed = [
        name
        for name, info in held.items()
        if name in unread
        or name.rpartition(".")[2] in PACKED_WEIGHTS
        or (is_matrix(name, info.shape) and info.dtype not in FLOAT_NAMES)
    ]
    if packed:
        raise InputError(
            f"{printable(path)}: quantised in a format that loratool does not read ({printable(packed[0])} is "
            f"{held[packed[0]].dtype}), so the stored shapes are not those of the weights; pass the unquantised model, "
            "or its config.json"
        )
    tensors = {name: t for name, t in held.items() if t.dtype in FLOAT_NAMES and not is_buffer(name, t.shape)}
    shapes = {name: info.shape for name, info in tensors.items()}
    dtypes = {name: info.dtype for name, info in tensors.items()}
    ties = find_ties(checkpoint, ())
    tied = ties.flag if ties.flag is not None else checkpoint.model_type in TIED_BY_DEFAULT
    shared: set[str] = set()
    for group in ties.groups:
        first, *others = group.names
        for name in others:
            if (name in group.missing and ties.flag is not False) or (name in shapes and tied):
                shapes.setdefault(name, shapes[first])
                dtypes.setdefault(name, dtypes[first])
                shared.add(name)
    return Base(
        printable(path),
        named(checkpoint.architectures, checkpoint.model_type),
        "headers",
        shapes,
        dtypes,
        frozenset(shared),
        sum(info.nbytes for shard in checkpoint.shards for info in shard.tensors.values()),
        *packed_in(checkpoint),
        checkpoint.notes,
    )


def packed_in(checkpoint: Checkpoint) -> tuple[Mapping[str, int], str]:
    """The bytes of each packed weight, and how they are packed."""
    if (seen := as_decoded(checkpoint)) is None:
        return {}, ""
    schemes = dict.fromkeys(weight.scheme for weight in seen.weights.values())
    sizes = {name: seen.bytes_of(name) for name in seen.weights}
    return sizes, f"{seen.title}: {'; '.join(schemes)}"


def is_buffer(name: str, shape: Shape) -> bool:
    return BUFFERS.fullmatch(name) is not None or (len(shape) == 4 and CAUSAL_MASK.fullmatch(name) is not None)


def named(architectures: Iterable[str], model_type: str) -> str:
    return ", ".join(map(printable, architectures)) or printable(model_type)


def base_of_config(path: Path) -> Base:
    """The shapes that a config of a known family stands for; raises `InputError` for any other."""
    shown = printable(path)
    config = read_json(path)
    if any(form.format.is_config(config) for form in FORMATS):
        raise InputError(f"{shown}: this is an adapter's config; BASE must be the model it was trained on")
    return base_of_sizes(shown, config, Note("config-alone", "from the config alone"))


def base_of_sizes(shown: str, config: Mapping[str, Any], note: Note) -> Base:
    """The shapes that the fields of a config stand for; `note` says where they are from."""
    model_type = config.get("model_type")
    way_out = "pass the folder with the weights (only their headers are read)"
    if not isinstance(model_type, str) or model_type not in SHAPES:
        raise InputError(
            f"{shown}: cannot derive shapes for model type {printable(repr(model_type))}, only for "
            f"{', '.join(sorted(SHAPES))}; {way_out}"
        )
    named_classes = config.get("architectures")
    listed = named_classes if isinstance(named_classes, list) else [named_classes]
    classes = [name for name in listed if isinstance(name, str)]
    if classes and not any(name.endswith(CAUSAL) for name in classes):
        raise InputError(
            f"{shown}: can derive shapes for causal language models only, not for {first_few(classes, 12)}; {way_out}"
        )
    shapes, tied = shapes_of(shown, model_type, config)
    dtype, notes = config.get("dtype") or config.get("torch_dtype"), [note]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        dtype = "bfloat16"
        notes.append(Note("dtype-assumed", "the config names no float dtype; bfloat16 is assumed"))
    *_, head = shapes
    shared = frozenset([head] if tied else [])
    stored = sum(math.prod(shape) for name, shape in shapes.items() if name not in shared)
    return Base(
        shown,
        named(classes, model_type),
        "config",
        shapes,
        dict.fromkeys(shapes, DTYPES[dtype]),
        shared,
        stored * DTYPE_BITS[DTYPES[dtype]] // 8,
        notes=tuple(notes),
    )


def shapes_of(shown: str, model_type: str, config: Mapping[str, Any]) -> tuple[dict[str, Shape], bool]:
    """Name → shape of every parameter, the head last, and whether the head is the embedding."""
    try:
        shapes, tied = SHAPES[model_type](config)
        sound = all(type(size) is int and size > 0 for shape in shapes.values() for size in shape)
    except KeyError as error:
        raise InputError(f"{shown}: {error.args[0]} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError):
        sound = False
    if not sound:
        raise InputError(f"{shown}: its sizes must be whole numbers of at least 1, and plausible for a model")
    flag = tie_flag(config)
    return shapes, tied if flag is None else flag


def is_matrix(name: str, shape: Shape) -> bool:
    return name.endswith(".weight") and len(shape) == 2
