"""Options of merging that `verify` has too; they are known without anything that merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratool.adapters.reading import ReadingOptions
from loratool.errors import UsageError, printable
from loratool.layouts.ggml import ENCODED
from loratool.options.described import (
    FLAG,
    NUMBER,
    Choice,
    Number,
    Pairs,
    PathKind,
    Size,
    dtypes,
    option,
)
from loratool.options.shared import BlockOption, DeviceOption, NamingOptions, OrientationOption

RAY = "ray"
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
        help="Multiply the weights of all ADAPTERs in one component of an image model, such as unet=0.8; may be "
        "repeated.",
        default=(),
        kind=Pairs("COMPONENT", "unet=0.8"),
        many=True,
    )
    dtype: str = option(help="Dtype of all float tensors in the output.", default="keep", kind=dtypes(*DTYPES))
    gguf_type: str | None = option(
        help="Type of the matrices of a GGUF BASE that change [default: F32 and F16 stay, others become BF16].",
        kind=Choice(lambda: GGUF_TYPES),
    )
    rounding: str = option(
        help="How elements of an output narrower than float32 are rounded: to the nearest value; compensated, so that "
        "the rounded weight holds the whole update; or up and down at random, unbiased.",
        default="nearest",
        kind=Choice(lambda: ROUNDINGS),
    )
    dequantize: bool = option(
        help="Write all of a quantised BASE as plain weights, not only those that an adapter changes; also without "
        "an ADAPTER.",
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


@dataclass(frozen=True)
class Workers(Number):
    """A number of threads, or a Ray cluster."""

    metavar = "INTEGER|ray"
    annotation = "int | str"

    def taken(self, value: Any, flag: str) -> Any:
        if isinstance(value, str) and (value == RAY or value.startswith(f"{RAY}://")):
            return value
        if isinstance(value, str) and self.number(value) is None:
            raise UsageError(f"{flag} must be {self.wanted}, {RAY}, or {RAY}://HOST:PORT (got {printable(value)})")
        return super().taken(value, flag)

    def word(self, value: Any) -> str:
        return str(value)


@dataclass(frozen=True, kw_only=True)
class RunOptions(DeviceOption):
    """Of a merge: what it may use."""

    workers: int | str | None = option(
        help="Number of worker threads [default: the number of cores plus two, at most 16, or 6 if numpy computes; on GPUs one per core, at most 12 per GPU]; for merge also ray or ray://HOST:PORT, to run as tasks on a Ray cluster.",
        kind=Workers(whole=True, low=1, high=1024),
        recorded=False,
    )
    max_memory: int | None = option(help="Limit on resident memory, such as 400MB.", kind=Size("MB"), recorded=False)

    @property
    def threads(self) -> int | None:
        """The number of worker threads of one process. Raises `UsageError` where a cluster was asked for."""
        if isinstance(self.workers, str):
            raise UsageError(
                f"--workers {self.workers} is for `loratool merge` into a folder; pass a number of threads"
            )
        return self.workers
