"""Options of a plan: what is merged, and how it is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.merging.options import ChangeOptions
from loratool.options.described import FLAG, SIZE, Options, option


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
