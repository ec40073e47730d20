"""A merge whose output is one file, as BASE is, and not a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratool.errors import UsageError, printable
from loratool.files.folders import WEIGHT_FILES
from loratool.files.model_files import FileNames
from loratool.files.outputs import check_target
from loratool.merging.plan import Plan


def is_file(out: Path) -> bool:
    """Whether an output is one file, by its name."""
    return out.suffix in WEIGHT_FILES


def target_of(out: Path, inputs: Sequence[Path], replaced: FileNames | None) -> Path:
    """`out` as it will be written; raises as `check_target` does."""
    return check_target(out, inputs, replaced, single=is_file(out))


def as_one_file(plan: Plan, target: Path) -> Plan:
    """The plan of an output in a folder; or of one file, which has the name of the output.

    Raises `UsageError` where BASE is not one file of that format.
    """
    if not is_file(target):
        return plan
    shown, folder = printable(target), printable(target.with_suffix(""))
    if plan.base.root.is_dir() or len(plan.shards) > 1:
        raise UsageError(f"{shown}: OUT must be a folder, such as {folder}, because BASE is not a single file")
    (shard,) = plan.shards
    if (wanted := Path(shard.name).suffix) != target.suffix:
        raise UsageError(f"{shown}: OUT must end in {wanted}, as BASE does, or be a folder, such as {folder}")
    return replace(plan, shards=(replace(shard, name=target.name),))
