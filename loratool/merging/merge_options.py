"""Options of a merge: what is merged, how it is laid out, and the tasks of a cluster that do it."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.merging.options import RunOptions
from loratool.merging.plan_options import PlanOptions
from loratool.options.described import FLAG, Choice, Number, Options, option
from loratool.options.writing import OverwriteOption


@dataclass(frozen=True, kw_only=True)
class MergeOptions(PlanOptions, RunOptions, OverwriteOption):
    """All that a merge is told besides its operands."""

    sha256: bool = option(
        help="Also record the SHA-256 of each whole weight file, which takes one more reading of it.",
        default=False,
        kind=FLAG,
    )
    digests: str = option(
        help="Which digests are computed: new leaves out BASE, and tensors that are copied from it if their digests "
        "are known from its loratool.json or the Hub's cache; full computes them all.",
        default="new",
        kind=Choice(lambda: ("new", "full")),
    )
    verify: bool = option(
        help="Read every file of the output again before it gets its name, and compare it with its digest.",
        default=False,
        kind=FLAG,
        recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Options):
    """Of a merge by the tasks of a cluster."""

    num_cpus: int | None = option(
        help="With --workers ray: cores of a task [default: 4, or those of the smallest node; with GPUs those of a node divided by its GPUs, at most 12 for each].",
        kind=Number(whole=True, low=1, high=1024),
        recorded=False,
    )
    num_gpus: int | None = option(
        help="With --workers ray: GPUs of a task [default: one where the cluster has any, none with --device cpu].",
        kind=Number(whole=True, low=0, high=64),
        recorded=False,
    )
