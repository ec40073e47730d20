"""Options of a merge: what is merged, how it is laid out, what makes sure of it, and the tasks of a cluster that do it."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.merging.options import ChangeOptions, RunOptions
from loratool.options.described import FLAG, SIZE, Choice, Number, Options, option
from loratool.options.writing import OverwriteOption


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
        help="Write edited weights back in the format of the quantised BASE, each value rounded to the nearest one.",
        default=False,
        kind=FLAG,
    )
    accept_loss: bool = option(
        help="With --requantize or --gguf-type: write the output even if most of the update is lost.",
        default=False,
        kind=FLAG,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_needed("accept_loss", "requantize", "gguf_type")


@dataclass(frozen=True, kw_only=True)
class ProofOptions(Options):
    """Of a merge: what is known of its output for sure."""

    sha256: bool = option(
        help="Also record the SHA-256 of each whole weight file, which means reading it again.",
        default=False,
        kind=FLAG,
    )
    digests: str = option(
        help="Which digests to compute: new skips BASE, and tensors copied from it if their digests "
        "are known from its loratool.json or the Hub's cache; full computes them all.",
        default="new",
        kind=Choice(lambda: ("new", "full")),
    )
    verify: bool = option(
        help="Read every file of the output again before publishing it, and compare it with its digest.",
        default=False,
        kind=FLAG,
        recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class MergeOptions(ProofOptions, PlanOptions, RunOptions, OverwriteOption):
    """All that a merge is told besides its operands."""


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Options):
    """Of a merge by the tasks of a cluster."""

    num_cpus: int | None = option(
        help="With --workers ray: cores per task [default: 4, or those of the smallest node; with GPUs a node's "
        "cores divided by its GPUs, at most 12 each].",
        kind=Number(whole=True, low=1, high=1024),
        recorded=False,
    )
    num_gpus: int | None = option(
        help="With --workers ray: GPUs per task [default: one if the cluster has any, none with --device cpu].",
        kind=Number(whole=True, low=0, high=64),
        recorded=False,
    )
