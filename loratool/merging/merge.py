"""`merge()`: plan → stage → stream → finish."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loratool.adapters.formats import replaceable
from loratool.adapters.told import as_input
from loratool.arguments import PathLike, Progress
from loratool.bases.extra_weights import name_beside
from loratool.devices import Runtime, kind_of
from loratool.errors import FitError, LoratoolError, VerificationError, printable
from loratool.files import stopwatch
from loratool.files.digests import recorded
from loratool.files.folders import PROVENANCE
from loratool.files.hub_cache import is_hub_id
from loratool.files.journal import FinishedShard, Journal
from loratool.files.known_digests import KnownDigests
from loratool.files.outputs import as_json, check_stage, stage_of
from loratool.files.seen import Seen, together
from loratool.files.shard_writer import LocalFolder
from loratool.files.staging import Stage, clearing_spent, staged
from loratool.files.stopwatch import lap
from loratool.files.system import forget_cached
from loratool.merging.effects import effect_notes, effects_of, size_notes
from loratool.merging.engine import Engine
from loratool.merging.fingerprints import content_fingerprint, local_state
from loratool.merging.gain import Errors, Gains, check_loss, gain_notes, gains_of
from loratool.merging.inputs import check_all_there, opened_inputs, planned, several
from loratool.merging.one_file import as_one_file, is_file, target_of
from loratool.merging.options import RunOptions
from loratool.merging.plan_options import PlanOptions
from loratool.merging.resources import check_limit, runtime_for
from loratool.merging.tasks import Job
from loratool.notes import Note, as_records
from loratool.options.described import FLAG, Choice, option
from loratool.options.writing import OverwriteOption
from loratool.provenance import record
from loratool.provenance.cards import CARD, card, is_nobodys, terms_of
from loratool.provenance.inputs import ModelDigests, told_input, told_model
from loratool.provenance.invocations import invocation
from loratool.results.base import Cost
from loratool.results.merge import AdapterEffect, MergeReport
from loratool.results.profile import Profile

if TYPE_CHECKING:
    from concurrent.futures import Future
    from contextlib import ExitStack

    from loratool.bases.side_files import OutputFile
    from loratool.merging.plan import MergePlan

GAIN_DIGITS = 3  # of it in a record: it is measured on a sample, and threads add in any order
NOTHING = "because every weight rounds back to its old value; the updates are zero or smaller than its steps"


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
    prepared: tuple[MergePlan, Path, list[Path]],
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
    if (
        options.max_memory is not None or check_stage(stage_of(target)) is not None
    ):  # refused before anything is touched
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
        for job in jobs.values():
            job.share_seen(next(iter(jobs.values())))
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


@dataclass(frozen=True)
class Merged:
    """The weights of a merge are made; this is what is to be said of them."""

    plan: MergePlan
    seen: Seen
    effects: tuple[AdapterEffect, ...]
    gains: Gains
    errors: Errors
    notes: tuple[Note, ...]  # besides those of the plan
    table: dict[str, Any]  # `loratool.json`, but for "files"

    @property
    def device(self) -> str:
        """The kind that edited weights were computed on."""
        return self.seen.device or "cpu"


def describe(
    plan: MergePlan,
    finished: Mapping[str, FinishedShard],
    digests: Sequence[Mapping[str, str]],
    invoked: Mapping[str, Any],
    unchanged: str,
) -> Merged:
    """What is to be said of weight files that are all made.

    Args:
        plan: of the merge.
        finished: its weight files, by name.
        digests: of each adapter's files, for the record.
        invoked: what repeats the merge, for the record.
        unchanged: the text of the `FitError` that is raised where no weight differs from the base's.
    """
    seen = together(finished[shard.name].seen for shard in plan.shards)
    if plan.adapters and not (plan.replaces or seen.changed):
        raise FitError(unchanged)
    effects, gains, errors = effects_of(plan, seen), gains_of(plan, seen), Errors.of(seen.lost)
    check_loss(plan, gains, errors)
    notes = (*effect_notes(effects), *gain_notes(plan, gains))
    told = dataclasses.replace(plan, notes=(*plan.notes, *notes))
    table = provenance(told, digests, effects, seen.device or "cpu", invoked)
    table |= {"gain": round(gains.total, GAIN_DIGITS)} if gains.total is not None else {}
    return Merged(plan, seen, effects, gains, errors, (*notes, *size_notes(plan, seen.ratios)), table)


def prepare(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    stack: ExitStack | None = None,
) -> tuple[MergePlan, Path, list[Path]]:
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


def repeated(plan: MergePlan, paths: Sequence[Path], options: MergeOptions, stream: str = "") -> dict[str, Any]:
    """What repeats a merge, whose adapters are at `paths`; `stream` are the words that send it elsewhere than to OUT."""
    also_load = tuple(name_beside(plan.adapters, each) for each in options.also_load)
    options = dataclasses.replace(options, also_load=also_load)
    found = invocation("merge", [plan.base.root, *paths], options, out=not stream)
    return {**found, "command": found["command"] + stream}


def check_values(plan: MergePlan) -> None:
    """No NaN or inf in any adapter, and not all of them without effect."""
    effective = [
        adapter.check_values() and bool(weight) for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
    ]
    if plan.adapters and not any(effective):
        raise FitError("nothing to merge: every update is zero (an untrained adapter has B = 0) or has the weight 0")


def output_names(plan: MergePlan) -> set[str]:
    """Every file that the output may have."""
    return {PROVENANCE, CARD, *(shard.name for shard in plan.shards), *(file.name for file in plan.side_files)}


def write_small_files(
    stage: Stage,
    plan: MergePlan,
    files: Sequence[OutputFile],
    table: Mapping[str, Any],
    place: str = ".",
    card: bool = True,
) -> None:
    """Everything but the weights: some of the plan's side files, a card where nobody wrote one, and the record of it all."""
    for file in files:
        if file.source is not None:
            stage.copy(file.name, file.source)
        else:
            stage.write(file.name, file.content or b"")
    if card and all(file.name != CARD or is_nobodys(file.source) for file in files):
        stage.write(CARD, merged_card(plan, table, place))
    write_record(stage, table)


def write_record(stage: Stage, table: Mapping[str, Any]) -> None:
    """The record of all other files of a stage, in place of one that was written before."""
    files = {name: digest for name, digest in stage.files.items() if name != PROVENANCE}
    stage.write(PROVENANCE, as_json({**table, "files": recorded(files)}))


def read_again(stage: Stage) -> None:
    """Read every file of a stage from the disk, and compare it with what its record says was written.

    Raises `VerificationError` naming every file and tensor that differs.
    """
    for name in stage.files:
        forget_cached(stage.folder / name)
    if problems := record.compare(stage.folder).problems:
        raise VerificationError(
            f"{printable(stage.out)}: not written, because what was read back is not what was written; the disk or the "
            "memory of this machine may be faulty:",
            problems,
        )
    lap("verify")


def provenance(
    plan: MergePlan,
    digests: Sequence[Mapping[str, str]],
    effects: Sequence[AdapterEffect],
    device: str,
    invoked: Mapping[str, Any],
) -> dict[str, Any]:
    """`loratool.json`, but for "files": what made this model. The same inputs and settings give the same bytes."""
    trained_on = {adapter.training.base for adapter in plan.adapters}
    named = {"id": name} if len(trained_on) == 1 and is_hub_id(name := trained_on.pop()) else {}
    return {
        "made_by": "loratool merge",
        **invoked,
        "versions": record.versions(),
        "base": {"name": plan.base.name, **told_input(plan.base.root), **named},
        "adapters": [
            {
                **as_input(adapter, adapter.name, files),
                "weight": weight,
                "rank": adapter.training.rank,
                "modules": effect.modules,
                "unchanged": len(effect.unchanged),
            }
            for adapter, weight, files, effect in zip(plan.adapters, plan.weights, digests, effects, strict=True)
        ],
        "dtype": plan.dtype,
        "dtypes": dict(Counter(span.placed.dtype for span in plan.spans)),
        "device": device,
        "tensors": {"edited": len(plan.edited), "copied": plan.copied, "all": len(plan.spans)},
        "notes": as_records(plan.notes),
    }


def merged_card(plan: MergePlan, table: Mapping[str, Any], place: str) -> bytes:
    """README.md of the merged model; licence and task are those of the cards of base and adapters."""
    terms = terms_of(plan.base.root, *(adapter.folder for adapter in plan.adapters))
    edited = next((file.content for file in plan.side_files if file.name == "config.json" and file.content), None)
    return card(table, json.loads(edited) if edited else plan.base.config, terms, place)


def of_resuming(stage: Stage) -> Iterator[Note]:
    """What became of files that an interrupted run had finished. It is in the report only: the output is the same."""
    for name, reason in sorted(stage.redone.items()):
        yield Note("written-again", f"{printable(name)}: finished by an interrupted run, but {reason}; written again")


def cost(runtime: Future[Runtime], started: float) -> Cost:
    """What a merge that began at that second has cost so far."""
    ready = runtime.result()
    return Cost.since(started, ", ".join(ready.devices), ready.seconds)


def make_report(merged: Merged, stage: Stage, cost: Cost) -> MergeReport:
    """What is to be said of a merge that is published, but for how it was run."""
    plan = merged.plan
    return MergeReport(
        out=stage.out,
        edited=len(plan.edited),
        adapters=merged.effects,
        copied=plan.copied,
        converted=plan.converted,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        workers=0,
        relative_norms=merged.seen.ratios,
        gain=merged.gains.total,
        gains=merged.gains.modules,
        error_added=merged.errors.total,
        errors_added=merged.errors.tensors,
        nonfinite={**merged.seen.nonfinite},
        left_out=plan.left_out,
        notes=(*plan.notes, *merged.notes, *of_resuming(stage)),
        digests={s.name: str(s.digest) for _, s in sorted(stage.finished.items())},
        cost=cost,
    )
