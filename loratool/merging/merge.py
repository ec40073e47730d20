"""`merge()`: plan → stage → stream → finish."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.adapters.formats import WRITTEN, is_adapter, read_adapter
from loratool.bases.same_base import unlike_bases
from loratool.devices import Runtime, kind_of, resident_memory, start_torch
from loratool.errors import FitError, LoratoolError, UsageError, printable
from loratool.fetching import local
from loratool.fetching.bases import AUTO, chosen_base
from loratool.files.checkpoint import PROVENANCE, open_checkpoint, wrapped_modules
from loratool.files.digests import recorded
from loratool.files.hub_cache import is_hub_id, told_origin
from loratool.files.journal import Journal
from loratool.files.outputs import check_stage, check_target, stage_of
from loratool.files.process import peak_memory
from loratool.files.shard_writer import LocalFolder
from loratool.files.staging import Stage, staged
from loratool.merging.effects import effect_notes, effects_of, size_notes
from loratool.merging.engine import Engine
from loratool.merging.fingerprints import content_fingerprint, local_state
from loratool.merging.planning import PlanOptions, plan_merge
from loratool.merging.resources import Resources, RunOptions, choose_resources
from loratool.notes import Note, as_records
from loratool.options.shared import OverwriteOption
from loratool.provenance.cards import CARD, card, command, is_nobodys, terms_of
from loratool.results.base import Cost
from loratool.results.merge import AdapterEffect, MergeReport

if TYPE_CHECKING:
    from concurrent.futures import Future

    from loratool.adapters.adapter import Adapter
    from loratool.adapters.reading import Reading
    from loratool.files.checkpoint import Checkpoint
    from loratool.merging.plan import MergePlan
    from loratool.merging.row_blocks import Totals

PathLike = str | os.PathLike[str]  # what every path argument takes
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class MergeOptions(PlanOptions, RunOptions, OverwriteOption):
    """All that a merge is told besides its operands."""


def merge(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    progress: Progress | None = None,
) -> MergeReport:
    """Write W' = W + Σ weight · ΔW as a complete model folder `out`; `loratool.commands.merge` says all of it."""
    started = time.monotonic()
    plan, target, paths = prepare(base, adapters, out, options)
    runtime = start_torch(options.device)
    try:
        check_values(plan)
        digests = [adapter.digests() for adapter in plan.adapters]
        wanted = Journal(content_fingerprint(plan, digests), local_state(plan, options.device), output_names(plan))
        workers, max_memory = options.workers, options.max_memory
        if max_memory is not None or check_stage(stage_of(target)) is not None:  # refused before anything is touched
            choose_resources(plan.spans, runtime.result().devices, workers, max_memory, resident_memory())
        with staged(target, wanted, plan.bytes_written, options.overwrite) as stage:
            if stage.finished:
                stage.keep_only(kind_of(runtime.result().devices))
            resumed = tuple(stage.finished)
            engine = Engine(plan, LocalFolder(stage), runtime, workers, max_memory, progress)
            totals = engine.run()
            if not (plan.replaces or any(shard.changed for shard in stage.finished.values())):
                raise FitError(
                    f"{printable(out)}: not written, for every weight rounds to what it was: nothing changes"
                )
            write_side_files(stage, plan)
            words = command("merge", [plan.base.root, *paths], options)
            effects = effects_of(plan, totals)
            plan = dataclasses.replace(plan, notes=(*plan.notes, *effect_notes(effects)))
            table = provenance(plan, digests, effects, engine.resources().on_gpu, words)
            if all(file.name != CARD or is_nobodys(file.source) for file in plan.side_files):
                stage.write(CARD, merged_card(plan, table))
            stage.write(PROVENANCE, as_text({**table, "files": recorded(stage.files)}))
    except LoratoolError:
        runtime.exception()  # wait for the import: a process that ends in the middle of it may crash
        raise
    return make_report(plan, stage, resumed, totals, effects, engine.resources(), runtime, started)


def prepare(
    base: PathLike, adapters: Sequence[PathLike] | PathLike, out: PathLike, options: MergeOptions
) -> tuple[MergePlan, Path, list[Path]]:
    """The plan, the real path of the output and the adapters' places, after every check that headers and `stat` allow."""
    words = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
    check_target(Path(out), [Path(base), *map(Path, words)], options.overwrite)  # before anything is downloaded
    base, words = as_base(base, words)
    ways = options.readings(max(1, len(words)))
    paths, base = inputs_of(base, words)
    target = check_target(Path(out), [base, *paths], options.overwrite)
    if words:
        model, read = open_checkpoint(base), [read_adapter(path, way) for path, way in zip(paths, ways, strict=True)]
    else:
        model, read = unmerged(base, ways[0])
    return noted(plan_merge(model, read, options)), target, paths


def as_base(base: PathLike, words: Sequence[PathLike]) -> tuple[PathLike, Sequence[PathLike]]:
    """The base and the adapters that operands mean: of an adapter alone the base is the one that it names."""
    return (AUTO, [base]) if not words and is_adapter(local(base, "any")) else (base, words)


def unmerged(path: Path, reading: Reading) -> tuple[Checkpoint, list[Adapter]]:
    """The base and the adapter in a model that was saved unmerged; raises `UsageError` for any other model."""
    model = open_checkpoint(path, unmerged=True)
    if not wrapped_modules(model.tensors):
        shown = printable(path)
        raise UsageError(f"{shown}: a merge needs an ADAPTER besides its BASE: loratool merge {shown} ADAPTER -o OUT")
    base, adapter = WRITTEN.taken_apart(model, reading)
    return base, [adapter]


def noted(planned: MergePlan) -> MergePlan:
    """The plan, with what is to be said of the base that it has."""
    return dataclasses.replace(planned, notes=(*planned.notes, *unlike_bases(planned.base, planned.adapters)))


@contextmanager
def outlook(base: PathLike, adapters: Sequence[PathLike], out: PathLike, options: MergeOptions) -> Iterator[MergePlan]:
    """The plan of a merge, for as long as the block runs: of a base on the Hub no weights are downloaded for it."""
    from loratool.fetching.pieces import opened

    check_target(Path(out), [Path(base), *map(Path, adapters)], options.overwrite)
    base, adapters = as_base(base, adapters)
    ways = options.readings(max(1, len(adapters)))
    paths = [local(adapter, "adapter") for adapter in adapters]
    if not paths:
        yield noted(plan_merge(*unmerged(local(base, "model"), ways[0]), options))
        return
    with (
        tempfile.TemporaryDirectory(prefix="loratool-") as home,
        opened(chosen_base(base, paths), lambda _name: Path(home)) as source,
    ):
        check_target(Path(out), [source.checkpoint.root, *paths], options.overwrite)
        read = [read_adapter(path, way) for path, way in zip(paths, ways, strict=True)]
        yield noted(plan_merge(source.checkpoint, read, options))


def inputs_of(base: PathLike, adapters: Sequence[PathLike]) -> tuple[list[Path], Path]:
    """The adapters and the base as local paths; the base "auto" is the one that the adapters name."""
    paths = [local(adapter, "adapter") for adapter in adapters]
    return paths, local(chosen_base(base, paths), "model")


def check_values(plan: MergePlan) -> None:
    """No NaN or inf in any adapter, and not all of them without effect."""
    effective = [
        adapter.check_values() and bool(weight) for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
    ]
    if not any(effective):
        raise FitError("nothing to merge: every update is zero (an untrained adapter has B = 0) or has the weight 0")


def output_names(plan: MergePlan) -> set[str]:
    """Every file that the output may have."""
    return {PROVENANCE, CARD, *(shard.name for shard in plan.shards), *(file.name for file in plan.side_files)}


def write_side_files(stage: Stage, plan: MergePlan) -> None:
    for file in plan.side_files:
        if file.source is not None:
            stage.copy(file.name, file.source)
        else:
            stage.write(file.name, file.content or b"")


def provenance(
    plan: MergePlan,
    digests: Sequence[Mapping[str, str]],
    effects: Sequence[AdapterEffect],
    on_gpu: bool,
    words: str,
) -> dict[str, Any]:
    """`loratool.json`, but for "files": what made this model. The same inputs and settings give the same bytes."""
    import torch

    trained_on = {adapter.training.base for adapter in plan.adapters}
    named = {"id": name} if len(trained_on) == 1 and is_hub_id(name := trained_on.pop()) else {}
    return {
        "made_by": "loratool merge",
        "command": words,
        "versions": {"loratool": __version__, "torch": str(torch.__version__)},
        "base": {
            "name": plan.base.name,
            **told_origin(plan.base.root),
            **named,
            "files": {s.path.name: s.layout.size for s in plan.base.shards},
        },
        "adapters": [
            {
                "name": adapter.name,
                **told_origin(adapter.folder),
                "format": adapter.format,
                "weight": weight,
                "rank": adapter.training.rank,
                "modules": effect.modules,
                "unchanged": len(effect.unchanged),
                "sha256": files,
            }
            for adapter, weight, files, effect in zip(plan.adapters, plan.weights, digests, effects, strict=True)
        ],
        "dtype": plan.dtype,
        "dtypes": dict(Counter(span.placed.dtype for span in plan.spans)),
        "device": "cuda" if on_gpu else "cpu",
        "tensors": {"edited": len(plan.edited), "copied": plan.copied, "all": len(plan.spans)},
        "notes": as_records(plan.notes),
    }


def as_text(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2) + "\n").encode()


def merged_card(plan: MergePlan, table: Mapping[str, Any], place: str = ".") -> bytes:
    """README.md of the merged model; licence and task are those of the cards of base and adapters."""
    terms = terms_of(plan.base.root, *(adapter.folder for adapter in plan.adapters))
    edited = next((file.content for file in plan.side_files if file.name == "config.json" and file.content), None)
    return card(table, json.loads(edited) if edited else plan.base.config, terms, place)


def of_resuming(stage: Stage) -> Iterator[Note]:
    """What became of files that an interrupted run had finished. It is in the report only: the output is the same."""
    for name, reason in sorted(stage.redone.items()):
        yield Note(
            "written-again", f"{printable(name)}: finished by an interrupted run, but {reason}; it is written again"
        )


def make_report(
    plan: MergePlan,
    stage: Stage,
    resumed: tuple[str, ...],
    totals: Totals,
    effects: tuple[AdapterEffect, ...],
    resources: Resources,
    runtime: Future[Runtime],
    started: float,
) -> MergeReport:
    finished = [stage.finished[shard.name] for shard in plan.shards]
    ratios = {name: ratio for shard in finished for name, ratio in shard.ratios.items()}
    return MergeReport(
        out=stage.out,
        edited=len(plan.edited),
        adapters=effects,
        copied=plan.copied,
        converted=sum(not span.edits and not span.untouched for span in plan.spans),
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        workers=resources.workers,
        gpu_memory=totals.gpu_memory,
        resumed=resumed,
        relative_norms=ratios,
        nonfinite={name: count for shard in finished for name, count in shard.nonfinite.items()},
        left_out=plan.left_out,
        notes=(*plan.notes, *size_notes(plan, ratios), *of_resuming(stage)),
        digests={s.name: str(s.digest) for _, s in sorted(stage.finished.items())},
        cost=Cost(", ".join(resources.devices), time.monotonic() - started, runtime.result().seconds, peak_memory()),
    )
