"""`merge()`: plan → stage → stream → finish."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loratool.adapters.formats import replaceable
from loratool.arguments import PathLike, Progress, several
from loratool.bases.extra_weights import name_beside
from loratool.devices import Runtime, kind_of
from loratool.errors import FitError, LoratoolError, printable
from loratool.files import stopwatch
from loratool.files.journal import Journal
from loratool.files.known_digests import KnownDigests
from loratool.files.outputs import check_stage, stage_of
from loratool.files.shard_writer import LocalFolder
from loratool.files.staging import clearing_spent, staged
from loratool.files.stopwatch import lap
from loratool.merging.engine import Engine
from loratool.merging.fingerprints import content_fingerprint, local_state
from loratool.merging.inputs import check_all_there, opened_inputs, planned
from loratool.merging.merge_options import MergeOptions
from loratool.merging.one_file import as_one_file, is_file, target_of
from loratool.merging.reporting import cost, describe, make_report
from loratool.merging.resources import check_limit, runtime_for
from loratool.merging.small_files import output_names, read_again, write_small_files
from loratool.merging.tasks import Job
from loratool.provenance.inputs import ModelDigests, told_model
from loratool.provenance.invocations import invocation
from loratool.results.merge import MergeReport
from loratool.results.profile import Profile

if TYPE_CHECKING:
    from concurrent.futures import Future
    from contextlib import ExitStack

    from loratool.merging.plan import Plan

NOTHING = "because every weight rounds back to its old value; the updates are zero or too small for the dtype"


def merge(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    progress: Progress | None = None,
) -> MergeReport:
    """Write W' = W + Σ weight · ΔW as a complete model folder `out`; `loratool.commands.merge` says all of it."""
    started = time.monotonic()
    with stopwatch.timed("main"):
        with clearing_spent(out):
            prepared = prepare(base, adapters, out, options)
        lap("plan")
        runtime = runtime_for(prepared[0].spans, options)
        return make_one(making(prepared, out, options, runtime, started), options, runtime, progress)


def making(
    prepared: tuple[Plan, Path, list[Path]],
    out: PathLike,
    options: MergeOptions,
    runtime: Future[Runtime],
    started: float,
) -> Making[MergeReport]:
    """Make one output, as a generator: it gives its job, and is to be sent the engine that has run it."""
    plan, target, paths = prepared
    check_values(plan)
    plan = dataclasses.replace(plan, notes=(*plan.notes, *plan.check_packed(plan.spans)))
    digests = [adapter.digests() for adapter in plan.adapters]
    lap("adapters")
    known, full = KnownDigests(plan.base.root), options.digests == "full"
    state = {**local_state(plan, options.device), "digests": options.digests}
    wanted = Journal(content_fingerprint(plan, digests), state, output_names(plan))
    # refused before anything is touched
    if options.max_memory is not None or check_stage(stage_of(target)) is not None:
        check_limit(plan.spans, runtime.result(), options)
    single = target.name if is_file(target) else ""
    with staged(target, wanted, plan.bytes_written, replaceable(options.overwrite), known.find, single) as stage:
        if stage.finished:
            stage.keep_only(kind_of(runtime.result().devices))
            stage.keep_sha256(options.sha256)
        resumed = tuple(stage.finished)
        invoked = repeated(plan, paths, options)
        of_base = ModelDigests.of(plan.base, compute=full)
        job = Job(plan, LocalFolder(stage, options.sha256), None if full else known, of_base.seen)
        engine = yield job
        if job.failure is not None:
            raise job.failure
        unchanged = f"{printable(out)}: not written, {NOTHING}"
        merged = describe(plan, stage.finished, digests, invoked, unchanged)
        merged.table["base"] |= told_model(plan.base, of_base)
        write_small_files(stage, plan, () if single else plan.side_files, merged.table, card=not single)
        if options.verify:
            read_again(stage)
    lap("publish")
    return dataclasses.replace(
        make_report(merged, stage, cost(runtime, started)),
        workers=engine.resources().workers,
        gpu_memory=engine.gpu_memory,
        resumed=resumed,
        verified=len(stage.files) if options.verify else 0,
        profile=Profile(stopwatch.together(engine.watches)),
    )


Report = TypeVar("Report")
Making = Generator["Job", "Engine", Report]


def make_one(
    making: Making[Report],
    options: MergeOptions,
    runtime: Future[Runtime],
    progress: Progress | None,
    sent: int = 0,
) -> Report:
    """Make one output, as `make_all` makes several; raises what went wrong."""
    (report,) = make_all([making], options, runtime, progress, sent)
    if isinstance(report, Exception):
        raise report
    return report


def make_all(
    makings: Sequence[Making[Report]],
    options: MergeOptions,
    runtime: Future[Runtime],
    progress: Progress | None,
    sent: int = 0,
) -> list[Report | Exception]:
    """Make several outputs at one reading of their base: of each the report, or what went wrong with it alone.

    `sent` are bytes that a worker may hold of what it sends elsewhere. After an interrupt, each of the outputs keeps the
    files that it has finished.
    """
    results: dict[int, Report | Exception] = {}
    jobs: dict[int, Job] = {}
    try:
        for number, each in enumerate(makings):
            try:
                jobs[number] = next(each)
            except StopIteration as done:  # there was nothing to do
                results[number] = done.value
            except Exception as error:
                results[number] = error
        seen = [job.seen for job in jobs.values() if job.seen is not None]
        for other in seen[1:]:  # what one of them reads, all have read
            other.share(seen[0])
        engine = Engine([*jobs.values()], runtime, options.threads, options.max_memory, progress, sent)
        engine.watches.extend(stopwatch.running())
        lap("stage")
        try:
            if jobs:
                engine.run()
            engine.watches.append(runtime.result().watch)
        except Exception as error:
            for job in jobs.values():
                job.failure = job.failure or error
        lap("wait")
        for number in jobs:
            try:
                makings[number].send(engine)
            except StopIteration as done:
                results[number] = done.value
            except Exception as error:
                results[number] = error
    except BaseException as error:
        for each in makings:
            with suppress(BaseException):
                each.throw(error)
        raise
    if any(isinstance(result, LoratoolError) for result in results.values()):
        runtime.exception()  # wait for the import: a process that ends in the middle of it may crash
    return [results[number] for number in range(len(makings))]


def prepare(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    stack: ExitStack | None = None,
) -> tuple[Plan, Path, list[Path]]:
    """The plan, the real path of the output and the adapters' places, after every check that headers and `stat` allow.

    With a `stack` no weights of a base on the Hub are downloaded, and the plan holds until the stack is closed.
    """
    words = several(adapters)
    check_all_there(base, words)
    replaced = replaceable(options.overwrite)
    target_of(Path(out), [Path(base), *map(Path, words)], replaced)  # before anything is downloaded
    model, read, paths = opened_inputs(base, words, options, stack)
    target = target_of(Path(out), [model.root, *paths], replaced)
    return as_one_file(planned(model, read, options), target), target, paths


def repeated(plan: Plan, paths: Sequence[Path], options: MergeOptions, stream: str = "") -> dict[str, Any]:
    """What repeats a merge, whose adapters are at `paths`; `stream` are the words that send it elsewhere than to OUT."""
    also_load = tuple(name_beside(plan.adapters, each) for each in options.also_load)
    options = dataclasses.replace(options, also_load=also_load)
    found = invocation("merge", [plan.base.root, *paths], options, out=not stream)
    return {**found, "command": found["command"] + stream}


def check_values(plan: Plan) -> None:
    """No NaN or inf in any adapter, and not all of them without effect."""
    effective = [
        adapter.check_values() and bool(weight) for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
    ]
    if plan.adapters and not any(effective):
        raise FitError("nothing to merge: every update is zero (an untrained adapter has B = 0) or has the weight 0")
