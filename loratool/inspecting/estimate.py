"""What an adapter would have and what training it would take, before there is one: from headers or a config alone."""

from __future__ import annotations

import difflib
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from loratool.arguments import PathLike
from loratool.bases.codecs import decoded
from loratool.bases.opening import open_checkpoint
from loratool.bases.shapes import DTYPES, Base, Shape, base_of_sizes, is_matrix, read_base
from loratool.errors import FitError, LoratoolError, UsageError, printable
from loratool.fetching import headers
from loratool.files.folders import holds_weights
from loratool.files.safefile import DTYPE_BITS, Layout
from loratool.grouping import by_key
from loratool.layouts.architectures import OUTPUT_HEADS
from loratool.layouts.presets import PRESETS
from loratool.notes import Note
from loratool.options.described import Choice, Number, Options, dtypes, option
from loratool.results.base import Cost
from loratool.results.estimate import ADAM_BYTES, QUANTISED_BITS, Estimate, Memory, RankEstimate, TargetEstimate
from loratool.templates import first_few

ALL_LINEAR = "all-linear"


REPOSITORIES = {word: name for name, p in PRESETS.items() for word in (p.source, p.source.partition("/")[2])}
EMBEDDINGS = re.compile(r".*embed.*|wte|wpe|shared|relative_attention_bias|position_embeddings")
HEADS = re.compile(rf"(?:.*\.)?(?:{'|'.join(sorted(OUTPUT_HEADS))}|(?:cls\.predictions|lm_head|predictions)\.decoder)")
EXPERT = re.compile(r"(?:.*\.)?experts\.\d+\.")


def target_names(operands: Mapping[str, Any]) -> list[str]:
    """What `--target` may be for a base on this disk: the last names of its matrices, by their headers."""
    found: dict[str, None] = {}
    with suppress(LoratoolError, OSError):
        for name, info in open_checkpoint(operands["base"]).tensors.items() if operands.get("base") else ():
            if name.endswith(".weight") and len(info.shape) == 2:
                found[name.removesuffix(".weight").rpartition(".")[2]] = None
    return [ALL_LINEAR, *found]


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(Options):
    """Of `estimate`."""

    ranks: tuple[int, ...] = option(
        "--rank",
        help="Rank; may be repeated, or a comma-separated list.",
        default=(),
        kind=Number(whole=True, low=1),
        many=True,
        commas=True,
        metavar="R",
        required=True,
    )
    targets: tuple[str, ...] = option(
        "--target",
        help="Target modules, such as q_proj,v_proj or all-linear; may be repeated.",
        default=(),
        many=True,
        commas=True,
        metavar="NAME",
        required=True,
        values=target_names,
    )
    preset: str | None = option(
        help=f"Take the sizes of a known model instead of BASE: {', '.join(PRESETS)}.",
        kind=Choice(lambda: tuple(PRESETS), REPOSITORIES),
        metavar="NAME",
    )
    dtype: str = option(
        help="Dtype of the adapter's parameters.", default="float32", kind=dtypes("float32", "bfloat16", "float16")
    )


def estimate(base: PathLike | None, options: EstimateOptions) -> Estimate:
    """What LoRA of some ranks on some targets of `base` has and takes; `loratool.commands.estimate` says all of it."""
    started = time.monotonic()
    ranks = tuple(dict.fromkeys(options.ranks))
    targets = tuple(dict.fromkeys(name for part in options.targets for name in part.replace(",", " ").split()))
    if not ranks or not targets:
        raise UsageError("pass at least one rank and one target, such as --rank 8 --target q_proj,v_proj")
    if (base is None) == (options.preset is None):
        raise UsageError("pass either BASE or --preset NAME, such as --preset llama-2-7b")
    shapes = base_of_preset(options.preset) if options.preset else base_at(base)
    return replace(estimate_base(shapes, ranks, targets, options.dtype), cost=Cost.since(started))


def base_of_preset(name: str) -> Base:
    """The shapes of a model in the table of known ones."""
    preset = PRESETS[name]
    return base_of_sizes(name, preset.config, Note("preset", f"sizes as in the config.json of {preset.source}"))


def base_at(base: Any) -> Base:
    """The shapes of the weights at a path or on the Hub, under the name that was passed."""
    if os.fspath(base) in PRESETS and not os.path.lexists(base):
        raise UsageError(f"{printable(base)}: no such file or folder; for the known model, pass --preset {base}")
    with headers(base) as location:
        found = read_base(location, decoded(open_checkpoint(location)) if holds_weights(location) else None)
    return replace(found, path=found.path.replace(printable(location), printable(base)))


def estimate_base(base: Base, ranks: Sequence[int], targets: Sequence[str], dtype: str) -> Estimate:
    chosen = choose(base, targets)
    linear = [name for name in base.counted if is_linear(name, base.weights[name])]
    weights, per_rank = base.bytes_of(base.counted), sum(map(rank_one, chosen.values()))
    small = [name for name in base.counted if name in base.packed] or linear  # what QLoRA holds in a few bits
    quantisable = sum(math.prod(base.weights[name]) for name in small)
    stored = sum(base.packed.get(name, 0) for name in small)
    bits = 8 * stored / quantisable if stored else QUANTISED_BITS
    quantised = round(quantisable * bits / 8) + base.bytes_of(base.counted.keys() - set(small))
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

    groups = by_key(((leaf(name), shape), shape) for name, shape in chosen.items())
    dtypes: Counter[str] = Counter()
    for name, shape in base.counted.items():
        dtypes[base.dtypes[name]] += math.prod(shape)
    return Estimate(
        path=base.path,
        architecture=base.architecture,
        source=base.source,
        parameters=base.parameters,
        bytes=weights,
        dtypes=dict(dtypes.most_common()),
        quantisation=base.packing,
        quantisable=quantisable,
        quantised_bits=bits,
        merged_bytes=base.merged_bytes(chosen),
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


def rank_one(shape: Shape) -> int:
    """Parameters of A (1, in) and B (out, 1); the same for an embedding, and for a weight stored (in, out)."""
    return sum(shape)


def adapter_layout(chosen: Mapping[str, Shape], rank: int, dtype: str) -> Layout:
    """The head of the file that PEFT would save."""
    factors: list[tuple[str, str, Shape]] = []
    for name, (rows, columns) in sorted(chosen.items()):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors += (
            [
                (f"{module}.lora_embedding_A", dtype, (rank, rows)),
                (f"{module}.lora_embedding_B", dtype, (columns, rank)),
            ]
            if is_embedding(name)
            else [(f"{module}.lora_A.weight", dtype, (rank, columns)), (f"{module}.lora_B.weight", dtype, (rows, rank))]
        )
    return Layout.of(factors, {"format": "pt"})


# Which weight is what


def leaf(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` → `q_proj`."""
    return name.removesuffix(".weight").rpartition(".")[2]


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
            told = (
                f"the closest name{'s are' if len(near) > 1 else ' is'} {', '.join(map(printable, near))}"
                if near
                else f"the base has {first_few(names, 12)}"
            )
            problems.append(f"{printable(target)}: the base has no such weight; {told}")
        found.update(named)
    if problems:
        raise FitError(f"{base.path}: some targets cannot be adapted:", problems)
    return {name: shape for name, shape in matrices.items() if name in found}


def remarks(base: Base, chosen: Mapping[str, Shape]) -> Iterator[Note]:
    """What a count from names on disk cannot show."""
    if saved := {leaf(name) for name in chosen} & {"embed_tokens", "lm_head"}:
        names = [name for name in chosen if leaf(name) in saved]
        yield Note(
            "saved-embeddings",
            f"PEFT saves all of {' and '.join(sorted(saved))} with the adapter, "
            f"{sum(math.prod(base.weights[name]) for name in names):,} parameters more; pass "
            "save_embedding_layers=False to save_pretrained to avoid that",
        )
    if any(name in base.shared for name in chosen):
        yield Note("tied-head", "the head is tied to the embedding, but LoRA on one of them does not affect the other")
    if any(EXPERT.match(name) for name in chosen):
        yield Note("experts-split", "each expert counts as a layer, as in the files; transformers 5 fuses them")
