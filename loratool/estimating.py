"""What an adapter would have and what training it would take, before there is one: from headers or a config alone."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from loratool.checkpoint import Checkpoint, holds_weights, open_checkpoint
from loratool.decoders import SHAPES
from loratool.errors import FitError, InputError, UsageError, printable
from loratool.fetching import headers
from loratool.inputs import read_json
from loratool.layouts.architectures import OUTPUT_HEADS, PACKED_WEIGHTS
from loratool.layouts.ties import TIED_BY_DEFAULT
from loratool.notes import Note
from loratool.options import Number, Options, dtypes, option
from loratool.results.estimate import ADAM_BYTES, QUANTISED_BITS, Estimate, Memory, RankEstimate, TargetEstimate
from loratool.safefile import DTYPE_BITS, FLOAT_NAMES, Layout
from loratool.tying import find_ties, tie_flag

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

Shape = tuple[int, ...]

ALL_LINEAR = "all-linear"
DTYPES = {name: dtype for dtype, name in FLOAT_NAMES.items()}  # float32 → F32
# NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314, section 3): 4 bits a weight, 8 bits for each
# block of 64, and 32 bits for each 256 of those.

EMBEDDINGS = re.compile(r".*embed.*|wte|wpe|shared|relative_attention_bias|position_embeddings")
HEADS = re.compile(rf"(?:.*\.)?(?:{'|'.join(sorted(OUTPUT_HEADS))}|(?:cls\.predictions|lm_head|predictions)\.decoder)")
BUFFERS = re.compile(  # kept in checkpoints, and no parameters
    r"(?:.*\.)?(?:inv_freq|masked_bias|position_ids|token_type_ids|running_mean|running_var|num_batches_tracked)"
)
CAUSAL_MASK = re.compile(r"(?:.*\.)?attn\.bias")  # of four dimensions, in old checkpoints of GPT-2
FACTORS = re.compile(r".*\.lora_(?:[AB]|embedding_[AB]|down|up|a|b)(?:\.|$)")
EXPERT = re.compile(r"(?:.*\.)?experts\.\d+\.")
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
    notes: tuple[Note, ...] = ()

    @property
    def counted(self) -> dict[str, Shape]:
        return {name: shape for name, shape in self.weights.items() if name not in self.shared}

    @property
    def parameters(self) -> int:
        return sum(map(elements, self.counted.values()))

    def bytes_of(self, names: Iterable[str]) -> int:
        return sum(elements(self.weights[name]) * DTYPE_BITS[self.dtypes[name]] // 8 for name in names)


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(Options):
    """Of `estimate`."""

    ranks: tuple[int, ...] = option(
        "--rank",
        help="Rank; may be repeated, or a comma list.",
        default=(),
        kind=Number(whole=True, low=1),
        many=True,
        commas=True,
        metavar="R",
        required=True,
    )
    targets: tuple[str, ...] = option(
        "--target",
        help="Layers to adapt: q_proj,v_proj or all-linear; may be repeated.",
        default=(),
        many=True,
        metavar="NAME",
        required=True,
    )
    dtype: str = option(
        help="Dtype of the adapter's parameters.", default="float32", kind=dtypes("float32", "bfloat16", "float16")
    )


def estimate(base: str | os.PathLike[str], options: EstimateOptions) -> Estimate:
    """What LoRA of some ranks on some targets of `base` has and takes; `loratool.commands.estimate` says all of it."""
    ranks = tuple(dict.fromkeys(options.ranks))
    targets = tuple(dict.fromkeys(name for part in options.targets for name in part.replace(",", " ").split()))
    if not ranks or not targets:
        raise UsageError("pass at least one rank and one target, such as --rank 8 --target q_proj,v_proj")
    with headers(base) as location:
        found = estimate_base(read_base(location), ranks, targets, options.dtype)
    return replace(found, path=found.path.replace(printable(location), printable(base)))


def estimate_base(base: Base, ranks: Sequence[int], targets: Sequence[str], dtype: str) -> Estimate:
    chosen = choose(base, targets)
    linear = [name for name in base.counted if is_linear(name, base.weights[name])]
    plain = base.counted.keys() - set(linear)
    weights, per_rank = base.bytes_of(base.counted), sum(map(rank_one, chosen.values()))
    quantisable = sum(elements(base.weights[name]) for name in linear)
    quantised = round(quantisable * QUANTISED_BITS / 8) + base.bytes_of(plain)
    size = DTYPE_BITS[DTYPES[dtype]] // 8

    def at(rank: int) -> RankEstimate:
        trainable = rank * per_rank
        everything = base.parameters + trainable
        percent = 100 * trainable / everything
        return RankEstimate(
            rank,
            trainable,
            everything,
            percent,
            f"trainable params: {trainable:,} || all params: {everything:,} || trainable%: {percent:.4f}",
            adapter_layout(chosen, rank, DTYPES[dtype]).size,
            memory(weights, trainable, size),
            memory(quantised, trainable, size),
        )

    groups: dict[tuple[str, Shape], list[Shape]] = {}
    for name, shape in chosen.items():
        groups.setdefault((leaf(name), shape), []).append(shape)
    dtypes: Counter[str] = Counter()
    for name, shape in base.counted.items():
        dtypes[base.dtypes[name]] += elements(shape)
    return Estimate(
        path=base.path,
        architecture=base.architecture,
        source=base.source,
        parameters=base.parameters,
        bytes=weights,
        dtypes=dict(dtypes.most_common()),
        quantisable=quantisable,
        merged_bytes=base.stored_bytes,
        dtype=dtype,
        targets=tuple(
            TargetEstimate(printable(name), shape, len(members), sum(map(rank_one, members)))
            for (name, shape), members in groups.items()
        ),
        per_rank=per_rank,
        ranks=tuple(map(at, ranks)),
        full=full_memory(base.parameters, weights),
        notes=(*base.notes, *remarks(base, chosen)),
    )


def full_memory(parameters: int, weights: int) -> Memory:
    """Bytes of training all `parameters`, whose weights take `weights` bytes: as much again for gradients."""
    states = ADAM_BYTES * parameters
    return Memory(weights, weights, states, 2 * weights + states)


def memory(frozen: int, trainable: int, size: int) -> Memory:
    """Bytes of training `trainable` parameters of `size` bytes each beside `frozen` bytes of weights."""
    adapter, states = trainable * size, ADAM_BYTES * trainable
    return Memory(frozen + adapter, adapter, states, frozen + 2 * adapter + states)


def elements(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def rank_one(shape: Shape) -> int:
    """Parameters of A (1, in) and B (out, 1); the same for an embedding, and for a weight stored (in, out)."""
    return sum(shape)


def adapter_layout(chosen: Mapping[str, Shape], rank: int, dtype: str) -> Layout:
    """The head of the file that PEFT would save."""
    factors: list[tuple[str, str, Shape]] = []
    for name, (rows, columns) in sorted(chosen.items()):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if is_embedding(name):
            factors.append((f"{module}.lora_embedding_A", dtype, (rank, rows)))
            factors.append((f"{module}.lora_embedding_B", dtype, (columns, rank)))
        else:
            factors.append((f"{module}.lora_A.weight", dtype, (rank, columns)))
            factors.append((f"{module}.lora_B.weight", dtype, (rows, rank)))
    return Layout.of(factors, {"format": "pt"})


# Which weight is what


def leaf(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` → `q_proj`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def is_matrix(name: str, shape: Shape) -> bool:
    return name.endswith(".weight") and len(shape) == 2


def is_embedding(name: str) -> bool:
    return EMBEDDINGS.fullmatch(leaf(name)) is not None


def is_linear(name: str, shape: Shape) -> bool:
    """Whether PEFT's `all-linear` means it: a linear layer that is not the output head."""
    return is_matrix(name, shape) and not is_embedding(name) and not HEADS.fullmatch(name.removesuffix(".weight"))


def choose(base: Base, targets: Sequence[str]) -> dict[str, Shape]:
    """The weights that `targets` name, in the base's order; raises `FitError` telling every one that names none."""
    found: set[str] = set()
    problems: list[str] = []
    matrices = {name: shape for name, shape in base.weights.items() if is_matrix(name, shape)}
    for target in targets:
        if target == ALL_LINEAR:
            named = [name for name, shape in matrices.items() if is_linear(name, shape)]
        else:
            named = [name for name in base.weights if f".{name}".endswith(f".{target}.weight")]
        if odd := [name for name in named if name not in matrices]:
            problems.append(
                f"{printable(target)}: {printable(odd[0])} {list(base.weights[odd[0]])} is neither a linear layer nor "
                "an embedding"
            )
        elif not named:
            names = list(dict.fromkeys(map(leaf, matrices)))
            near = difflib.get_close_matches(target, names, n=3, cutoff=0.5)
            told = f"nearest is {', '.join(map(printable, near))}" if near else f"there are {some(names)}"
            problems.append(f"{printable(target)}: the base has no such weight; {told}")
        found.update(named)
    if problems:
        raise FitError(f"{base.path}: not every target is there:", problems)
    return {name: shape for name, shape in matrices.items() if name in found}


def some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:12])) + (", …" if len(names) > 12 else "")


def remarks(base: Base, chosen: Mapping[str, Shape]) -> list[Note]:
    """What a count from names on disk cannot show."""
    told: list[Note] = []
    if saved := {leaf(name) for name in chosen} & {"embed_tokens", "lm_head"}:
        names = [name for name in chosen if leaf(name) in saved]
        told.append(
            Note(
                "saved-embeddings",
                f"PEFT saves all of {' and '.join(sorted(saved))} beside the adapter, "
                f"{sum(elements(base.weights[name]) for name in names):,} parameters more; save_embedding_layers=False does not",
            )
        )
    if any(name in base.shared for name in chosen):
        told.append(Note("tied-head", "the head is the embedding: LoRA on one of them is not on the other"))
    if any(EXPERT.match(name) for name in chosen):
        told.append(
            Note(
                "experts-split",
                "experts are counted as layers of their own, as the files hold them; transformers 5 joins them",
            )
        )
    return told


# Where the shapes come from


def read_base(path: Path) -> Base:
    """The base at `path`, from the headers of its files or from its config alone."""
    if holds_weights(path):
        return base_of_headers(open_checkpoint(path), path)
    return base_of_config(path / "config.json" if path.is_dir() else path)


def base_of_headers(checkpoint: Checkpoint, path: Path) -> Base:
    held = checkpoint.tensors
    if any(FACTORS.match(name) for name in held):
        raise InputError(f"{printable(path)}: this is an adapter; BASE is the model that one is trained on")
    packed = [
        name
        for name, info in held.items()
        if name.rpartition(".")[2] in PACKED_WEIGHTS or (is_matrix(name, info.shape) and info.dtype not in FLOAT_NAMES)
    ]
    if packed:
        raise InputError(
            f"{printable(path)}: quantised ({printable(packed[0])} is {held[packed[0]].dtype}), so its shapes are not "
            "those of its weights; give the model that it was made from, or its config.json"
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
        sum(info.nbytes for info in checkpoint.tensors.values()),
        checkpoint.notes,
    )


def is_buffer(name: str, shape: Shape) -> bool:
    return BUFFERS.fullmatch(name) is not None or (len(shape) == 4 and CAUSAL_MASK.fullmatch(name) is not None)


def named(architectures: Iterable[str], model_type: str) -> str:
    return ", ".join(map(printable, architectures)) or printable(model_type)


def base_of_config(path: Path) -> Base:
    """The shapes that a config of a known family stands for; raises `InputError` for any other."""
    shown = printable(path)
    config = read_json(path)
    if {"peft_type", "lora_alpha"} & config.keys():
        raise InputError(f"{shown}: this is an adapter's config; BASE is the model that one is trained on")
    model_type = config.get("model_type")
    way_out = "give the folder with the weights, of which only the headers are read"
    if not isinstance(model_type, str) or model_type not in SHAPES:
        raise InputError(
            f"{shown}: shapes are not worked out for model type {printable(repr(model_type))}, only for "
            f"{', '.join(sorted(SHAPES))}; {way_out}"
        )
    named_classes = config.get("architectures")
    listed = named_classes if isinstance(named_classes, list) else [named_classes]
    classes = [name for name in listed if isinstance(name, str)]
    if classes and not any(name.endswith(CAUSAL) for name in classes):
        raise InputError(
            f"{shown}: shapes are worked out for causal language models, not for {some(classes)}; {way_out}"
        )
    shapes, tied = shapes_of(shown, model_type, config)
    dtype, notes = config.get("dtype") or config.get("torch_dtype"), [Note("config-alone", "from the config alone")]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        dtype = "bfloat16"
        notes.append(Note("dtype-assumed", "the config names no float dtype; bfloat16 is taken"))
    *_, head = shapes
    shared = frozenset([head] if tied else [])
    stored = sum(elements(shape) for name, shape in shapes.items() if name not in shared)
    return Base(
        shown,
        named(classes, model_type),
        "config",
        shapes,
        dict.fromkeys(shapes, DTYPES[dtype]),
        shared,
        stored * DTYPE_BITS[DTYPES[dtype]] // 8,
        tuple(notes),
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
        raise InputError(f"{shown}: its sizes are no whole numbers from 1 on, or no model's")
    flag = tie_flag(config)
    return shapes, tied if flag is None else flag
