"""`merge_many()`: several outputs at one reading of their base, each as its own merge would make it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from loratool.adapters.formats import replaceable
from loratool.arguments import PathLike, Progress
from loratool.bases.opening import open_checkpoint
from loratool.errors import LoratoolError, StorageError, UsageError, about, printable
from loratool.fetching import local
from loratool.fetching.bases import chosen_base, told_choice
from loratool.files import stopwatch
from loratool.files.outputs import check_stage, stage_of
from loratool.files.staging import clear_spent
from loratool.files.stopwatch import lap
from loratool.files.system import free_space
from loratool.merging.describing import described
from loratool.merging.forecasting import with_forecast
from loratool.merging.in_store import making_in_store
from loratool.merging.inputs import check_all_there, planned, read_all
from loratool.merging.merge import make_all, making
from loratool.merging.merge_options import MergeOptions
from loratool.merging.one_file import as_one_file, target_of
from loratool.merging.parted_merge import PartedMerge, apart_from_inputs, checked_place, stored
from loratool.merging.plan import Plan
from loratool.merging.reporting import cost
from loratool.merging.resources import runtime_for
from loratool.results.base import Cost
from loratool.results.merge import MergeReport
from loratool.results.merge_many import MergeManyReport, ResultsOfOutputs
from loratool.results.plan import MergePlan
from loratool.results.profile import Profile
from loratool.shown import size
from loratool.stores.names import is_in_store

Weighted = tuple[PathLike, float]  # an adapter with its weight
Adapters = PathLike | Weighted | Sequence[PathLike | Weighted]  # of one output
Outputs = Mapping[str, Adapters] | Mapping[Path, Adapters]


@dataclass(frozen=True)
class Wanted:
    """One output that is to be made."""

    out: PathLike
    adapters: tuple[PathLike, ...]
    options: MergeOptions  # with the weights of its adapters

    @property
    def key(self) -> str:
        return os.fspath(self.out)

    @property
    def stored(self) -> bool:
        """Whether it is in a store."""
        return is_in_store(self.out)

    @property
    def place(self) -> Path:
        return Path(str(checked_place(self.out))) if self.stored else Path(os.path.realpath(self.out))


@dataclass(frozen=True)
class Prepared:
    """One output whose plan is made."""

    wanted: Wanted
    plan: Plan
    target: Path
    paths: list[Path]  # of its adapters


def merge_many(
    base: PathLike, outputs: Outputs, options: MergeOptions, progress: Progress | None = None
) -> MergeManyReport:
    """Merge adapters into a base for several outputs; `loratool.commands.merge_many` says all of it."""
    started = time.monotonic()
    wanted = wanted_outputs(outputs, options)
    reports: dict[str, MergeReport] = {}
    errors: dict[str, LoratoolError] = {}
    with stopwatch.timed("main") as watch:
        ready = prepare_many(base, wanted, errors)
        for output in wanted:
            if not output.stored and isinstance(errors.get(output.key), UsageError):
                clear_spent(output.place)
        check_space(ready, errors)
        into_stores = opened_in_stores(ready, errors, started)
        ready = [each for each in ready if each.wanted.key not in errors]
        lap("plan")
        runtime = runtime_for([span for each in ready for span in each.plan.spans], options)
        makings = [
            making_in_store(into_stores[each.wanted.key], runtime)
            if each.wanted.stored
            else making((each.plan, each.target, each.paths), each.wanted.out, each.wanted.options, runtime, started)
            for each in ready
        ]
        sent = max((merge.output.held(merge.parts) for merge in into_stores.values()), default=0)
        results = make_all(makings, options, runtime, progress, sent)
    for each, result in zip(ready, results, strict=True):
        if isinstance(result, LoratoolError):
            errors[each.wanted.key] = result
        elif isinstance(result, Exception):
            raise result  # out of memory, or a bug; the others are complete by now
        else:
            reports[each.wanted.key] = result
    return MergeManyReport(
        reports=reports,
        errors={each.key: errors[each.key] for each in wanted if each.key in errors},
        profile=Profile(stopwatch.together([watch])) if not reports else next(iter(reports.values())).profile,
        cost=cost(runtime, started) if reports else Cost(),
    )


def opened_in_stores(
    ready: Iterable[Prepared], errors: dict[str, LoratoolError], started: float
) -> dict[str, PartedMerge]:
    """The merges of those outputs that are in a store; what is wrong with one goes to `errors`."""
    found: dict[str, PartedMerge] = {}
    for each in ready:
        if each.wanted.stored:
            with attempt(each.wanted, errors):
                out, options = each.wanted.out, each.wanted.options
                found[each.wanted.key] = stored(each.plan, each.paths, out, options, False, started)
    return found


def plan_many(base: PathLike, outputs: Outputs, options: MergeOptions) -> ResultsOfOutputs[MergePlan]:
    """The plans of several outputs, and what is wrong with those that have none; nothing is written."""
    started = time.monotonic()
    errors: dict[str, LoratoolError] = {}
    ready = prepare_many(base, wanted_outputs(outputs, options), errors)
    plans = {each.wanted.key: with_forecast(described(each.plan, each.wanted.options), each.plan) for each in ready}
    return ResultsOfOutputs(plans, errors, cost=Cost.since(started))


def wanted_outputs(outputs: Outputs, options: MergeOptions) -> list[Wanted]:
    """What each output is to be made of. Raises `UsageError` where outputs cannot be made together."""
    if not outputs:
        raise UsageError("merge_many needs at least one output")
    if options.weights:
        raise UsageError(
            "weights are given with the adapters of each output, as (adapter, weight); weights= is for loratool.merge"
        )
    wanted = [wanted_output(out, adapters, options) for out, adapters in outputs.items()]
    for one, other in permutations(wanted, 2):
        if one.place == other.place:
            raise UsageError(f"{printable(one.key)} and {printable(other.key)} are the same folder")
        if any(one.place.is_relative_to(folder) for folder in (other.place, stage_of(other.place))):
            raise UsageError(f"{printable(one.key)} is inside {printable(other.key)}, which is another output")
    return wanted


def wanted_output(out: PathLike, adapters: Adapters, options: MergeOptions) -> Wanted:
    """One output, whose adapters may be given with weights."""
    pairs = [*weighted(adapters)]
    if not pairs:
        raise UsageError(f"{printable(out)}: an output needs at least one adapter")
    weights = tuple(weight for _, weight in pairs)
    given = any(weight is not None for weight in weights)
    own = tuple(1.0 if weight is None else float(weight) for weight in weights) if given else ()
    return Wanted(out, tuple(adapter for adapter, _ in pairs), dataclasses.replace(options, weights=own))


def weighted(adapters: Adapters) -> Iterator[tuple[PathLike, float | None]]:
    """Adapters with their weights, where those are given."""
    if isinstance(adapters, (str, os.PathLike)):
        yield adapters, None
    elif isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], (int, float)):
        yield adapters
    else:
        for each in adapters:
            yield from weighted(each)


def prepare_many(base: PathLike, wanted: Sequence[Wanted], errors: dict[str, LoratoolError]) -> list[Prepared]:
    """The plans of outputs for one base, which is opened once; what is wrong with an output goes to `errors`."""
    inputs = [Path(base), *(Path(adapter) for each in wanted for adapter in each.adapters)]
    places: dict[str, list[Path]] = {}
    check_all_there(base, [])
    for each in wanted:
        with attempt(each, errors):
            with about(each.key):
                real_target(each, inputs)  # before anything is downloaded
            places[each.key] = [local(adapter, "adapter") for adapter in each.adapters]
    if not places:
        return []
    every = [path for paths in places.values() for path in paths]
    chosen = chosen_base(base, every)
    model = told_choice(open_checkpoint(local(chosen, "model")), base, chosen)
    ready: list[Prepared] = []
    for each in wanted:
        if each.key in places:
            with attempt(each, errors):
                paths = places[each.key]
                target = real_target(each, [model.root, *every])
                adapters = read_all(paths, each.options.readings(len(paths)))
                plan = as_one_file(planned(model, adapters, each.options), target)
                ready.append(Prepared(each, plan, target, paths))
    return ready


def real_target(wanted: Wanted, inputs: Sequence[Path]) -> Path:
    """An output as it will be written; raises `UsageError` where it is an input, or may not be replaced."""
    if not wanted.stored:
        return target_of(Path(wanted.out), inputs, replaceable(wanted.options.overwrite))
    apart_from_inputs(checked_place(wanted.out), inputs)
    return wanted.place


@contextmanager
def attempt(wanted: Wanted, errors: dict[str, LoratoolError]) -> Iterator[None]:
    """Keep an error that concerns one output alone."""
    try:
        yield
    except LoratoolError as error:
        errors[wanted.key] = error
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        errors[wanted.key] = StorageError(f"{where}{error.strerror or error}")


def check_space(ready: Iterable[Prepared], errors: dict[str, LoratoolError]) -> None:
    """Put an error where the disk has room for an output, but not for those before it as well."""
    promised: Counter[int] = Counter()
    for each in ready:
        if each.wanted.stored:
            continue
        with attempt(each.wanted, errors), about(each.wanted.key):
            disk, free = each.target.parent.stat().st_dev, free_space(each.target.parent)
            found = check_stage(stage_of(each.target))
            kept = sum(shard.size for shard in found.finished.values()) if found else 0
            needed = max(0, each.plan.bytes_written - kept)
            if free is not None and promised[disk] and free < promised[disk] + needed:
                raise StorageError(
                    f"{printable(each.wanted.key)}: the output needs {size(needed)} of disk, but only {size(free)} "
                    f"is free, of which {size(promised[disk])} is for other outputs"
                )
            promised[disk] += needed
