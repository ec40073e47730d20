"""What a merge is made of, opened and planned: nothing is written, and nothing read but headers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import WRITTEN, is_adapter, read_adapter
from loratool.adapters.reading import Reading, ReadingOptions
from loratool.arguments import PathLike
from loratool.bases.opening import open_checkpoint
from loratool.bases.same_base import unlike_bases
from loratool.fetching import check_there, local
from loratool.fetching.bases import AUTO, chosen_base, told_choice
from loratool.files.checkpoint import Checkpoint
from loratool.merging.merge_options import PlanOptions
from loratool.merging.plan import Plan
from loratool.merging.planning import plan_merge


def opened_inputs(
    base: PathLike, adapters: Sequence[PathLike], options: ReadingOptions, stack: ExitStack | None = None
) -> tuple[Checkpoint, list[Adapter], list[Path]]:
    """The base, the adapters, and where those are on this disk; `stack` is that of `prepare`."""
    ways = options.readings(max(1, len(adapters)))
    given = base
    base, paths = located(base, adapters)
    if not paths or stack is None:
        there = local(base, "model")
        model, read = (open_checkpoint(there), read_all(paths, ways)) if paths else alone(there, ways[0])
        return told_choice(model, given, base), read, paths
    import tempfile

    from loratool.fetching.pieces import opened

    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loratool-")))
    model = stack.enter_context(opened(base, lambda _name: home)).checkpoint
    return told_choice(model, given, base), read_all(paths, ways), paths


def check_all_there(base: PathLike, adapters: Sequence[PathLike]) -> None:
    """Raise `InputError` for the first of the inputs that is not there; a base that the adapters name is none of them."""
    check_there(*([] if os.fspath(base) == AUTO else [base]), *adapters)


def located(base: PathLike, adapters: Sequence[PathLike]) -> tuple[PathLike, list[Path]]:
    """The base, and the places of the adapters on this disk; an adapter alone is merged into the base that it names."""
    check_all_there(base, adapters)
    if not adapters and is_adapter(local(base, "any")):
        base, adapters = AUTO, [base]
    paths = [local(adapter, "adapter") for adapter in adapters]
    return chosen_base(base, paths), paths


def read_all(paths: Sequence[Path], ways: Sequence[Reading]) -> list[Adapter]:
    return [read_adapter(path, way) for path, way in zip(paths, ways, strict=True)]


def alone(path: Path, reading: Reading) -> tuple[Checkpoint, list[Adapter]]:
    """A model by itself: the base and the adapter in one that was saved unmerged, or a base without any adapter."""
    model = open_checkpoint(path, unmerged=True)
    if not WRITTEN.unmerged_in(model.tensors):
        return model, []
    base, adapter = WRITTEN.taken_apart(model, reading)
    return base, [adapter]


def planned(base: Checkpoint, adapters: Sequence[Adapter], options: PlanOptions) -> Plan:
    """The plan, with what is to be said of the base that it has."""
    plan = plan_merge(base, adapters, options)
    return dataclasses.replace(plan, notes=(*plan.notes, *unlike_bases(plan.base, plan.adapters)))
