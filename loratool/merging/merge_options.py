"""Options of a merge: what is merged, how it is laid out, and the tasks of a cluster that do it."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.merging.options import RunOptions
from loratool.merging.plan_options import PlanOptions, ProofOptions
from loratool.options.described import Number, Options, option
from loratool.options.writing import OverwriteOption


@dataclass(frozen=True, kw_only=True)
class MergeOptions(ProofOptions, PlanOptions, RunOptions, OverwriteOption):
    """All that a merge is told besides its operands."""


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
