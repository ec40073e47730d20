"""Options of merging that `verify` has too; they are known without anything that merges."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.adapters.reading import ReadingOptions
from loratool.layouts.ggml import ENCODED
from loratool.options.described import (
    FLAG,
    NUMBER,
    SIZE,
    Choice,
    Number,
    Options,
    Pairs,
    PathKind,
    Size,
    dtypes,
    option,
)
from loratool.options.shared import BlockOption, DeviceOption, NamingOptions, OrientationOption

ROUNDINGS = ("nearest", "compensated", "stochastic")
DTYPES = ("keep", "float32", "bfloat16", "float16")
GGUF_FLOATS = ("f32", "f16", "bf16")
GGUF_TYPES = (*GGUF_FLOATS, *sorted(map(str.lower, ENCODED), reverse=True))


@dataclass(frozen=True, kw_only=True)
class ChangeOptions(BlockOption, NamingOptions, OrientationOption, ReadingOptions):
    """What is merged."""

    weights: tuple[float, ...] = option(
        "-w",
        "--weight",
        help="Weight, once per adapter in order, or as a comma-separated list; a negative weight removes an adapter "
        "that was merged earlier [default: 1].",
        default=(),
        kind=NUMBER,
        many=True,
        commas=True,
    )
    only: tuple[str, ...] = option(
        help="Merge only what an ADAPTER changes in this component of an image model, such as unet or text_encoder; may "
        "be repeated.",
        default=(),
        many=True,
        metavar="COMPONENT",
    )
    component_weights: tuple[str, ...] = option(
        "--component-weight",
        help="Multiply the weights of all ADAPTERs within a component of an image model, as in unet=0.8; may be "
        "repeated.",
        default=(),
        kind=Pairs("COMPONENT", "unet=0.8"),
        many=True,
    )
    dtype: str = option(help="Dtype of all float tensors in the output.", default="keep", kind=dtypes(*DTYPES))
    gguf_type: str | None = option(
        help="Type of the matrices of a GGUF BASE that change [default: F32 or F16 where they are, else BF16].",
        kind=Choice(lambda: GGUF_TYPES),
    )
    rounding: str = option(
        help="How elements of an output narrower than float32 are rounded: to the nearest value; compensated, so that "
        "the rounded weight holds the whole update; or up and down at random, unbiased.",
        default="nearest",
        kind=Choice(lambda: ROUNDINGS),
    )
    dequantize: bool = option(
        help="Write all of a quantised BASE as plain weights, not only those that an adapter changes; with no ADAPTER "
        "too.",
        default=False,
        kind=FLAG,
    )
    allow_new_tensors: bool = option(
        help="Add tensors that an adapter saved but BASE lacks, such as a new head.", default=False, kind=FLAG
    )
    also_load: tuple[str, ...] = option(
        help="Also merge the tensors of this safetensors file in an ADAPTER's folder; may be repeated.",
        default=(),
        kind=PathKind("FILE", beside=True),
        many=True,
    )
    ignore_files: tuple[str, ...] = option(
        help="Ignore this file in an ADAPTER's folder, even if it contains trained weights; may be repeated.",
        default=(),
        many=True,
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class LayoutOption(Options):
    """How what is merged is laid out."""

    shard_size: int | None = option(
        help="Largest size of an output shard, such as 5GB [default: the shards of BASE].", kind=SIZE
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ChangeOptions, LayoutOption):
    """What is merged, and how it is laid out."""

    requantize: bool = option(
        help="Write edited weights of a quantised BASE in its own format again, each value rounded to the nearest one.",
        default=False,
        kind=FLAG,
    )
    accept_loss: bool = option(
        help="With --requantize or --gguf-type: write the output even if most of the update is lost.",
        default=False,
        kind=FLAG,
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(DeviceOption):
    """Of a merge: what it may use."""

    workers: int | None = option(
        help="Number of worker threads [default: the number of cores plus two, at most 16; on GPUs one per core, at most 16 for each].",
        kind=Number(whole=True, low=1, high=1024),
        recorded=False,
    )
    max_memory: int | None = option(help="Limit on resident memory, such as 400MB.", kind=Size("MB"), recorded=False)
