"""`run()`: the steps of a manifest, of which only those are done whose output is not what it would be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.arguments import PathLike
from loratool.errors import InputError, LoratoolError, UsageError, printable
from loratool.fetching import local
from loratool.fetching.bases import AUTO
from loratool.files.digests import read_recorded
from loratool.lineage.locating import Wanted, here, is_there, why_unlike_facts
from loratool.lineage.makers import Makers
from loratool.lineage.manifest import Step, is_within, read_manifest
from loratool.options.described import FLAG, Options, option, place_word
from loratool.provenance import record as records
from loratool.provenance.invocations import invocation
from loratool.provenance.recorded import inputs_of, models_of, record_at
from loratool.results.base import Cost
from loratool.results.run import MADE, TO_MAKE, TO_SEE, UP_TO_DATE, RunReport, StepReport


@dataclass(frozen=True, kw_only=True)
class ManifestOptions(Options):
    """Of `run`."""

    dry_run: bool = option(
        help="Show which steps would run, and why; write nothing.", default=False, kind=FLAG, recorded=False
    )


def run(
    manifest: PathLike,
    options: ManifestOptions,
    makers: Makers,
    told: Callable[[StepReport], None] | None = None,
) -> RunReport:
    """Do what is stale of a manifest; `loratool.commands.run` says all of it. `told` is called after each step."""
    started = time.monotonic()
    path = Path(manifest)
    steps = read_manifest(path, makers)
    check_outputs(steps)
    done: list[StepReport] = []
    for step in steps:
        pending = {each.out for each in done if each.status in (TO_MAKE, TO_SEE)}
        done.append(looked_at(step, pending) if options.dry_run else seen_to(step))
        if told is not None:
            told(done[-1])
    return RunReport(manifest=path, steps=tuple(done), dry_run=options.dry_run, cost=Cost.since(started))


def check_outputs(steps: Collection[Step]) -> None:
    """Raise `UsageError` where outputs are there that no step may replace, before anything is done."""
    foreign = [step for step in steps if is_there(step.out) and not made_here(step.out)]
    if foreign:
        raise UsageError(
            "these outputs exist and were not made by loratool, so no step replaces them:",
            (f"{step.where}: {printable(step.out)}" for step in foreign),
        )


def made_here(out: Path) -> bool:
    try:
        return isinstance(record_at(here(out)).get("made_by"), str)
    except LoratoolError:
        return False


def looked_at(step: Step, pending: Collection[Path]) -> StepReport:
    """What would be done of a step; `pending` are outputs of earlier steps that may come out different."""
    waits = [each for each in step.inputs if any(is_within(out, each) for out in pending)]
    reason = "" if waits and is_there(step.out) else "no output yet" if waits else why_stale(step)
    status = TO_MAKE if reason else TO_SEE if waits else UP_TO_DATE
    return report(step, status, reason)


def seen_to(step: Step) -> StepReport:
    """A step, done where it is stale."""
    reason = why_stale(step)
    if reason:
        try:
            step.make(overwrite=is_there(step.out))
        except LoratoolError as error:
            raise type(error)(f"{step.where}: {error.message}", error.problems, error.own_hint) from None
    return report(step, MADE if reason else UP_TO_DATE, reason)


def report(step: Step, status: str, reason: str) -> StepReport:
    try:
        digests = {printable(name): str(digest) for name, digest in read_recorded(record_at(here(step.out))).items()}
    except LoratoolError:
        digests = {}
    return StepReport(step.number, step.command, step.out, status, reason, digests)


def why_stale(step: Step) -> str:
    """Empty where the output of a step is what the step would make of its inputs as they are; else what is not."""
    try:
        made = here(step.out)
        record = record_at(made)
    except InputError:
        return "no output yet"
    operands, models = resolved(step)
    wanted = invocation(step.command, operands, replace(step.options, **models))
    if record.get("made_by") != f"loratool {step.command}":
        return f"its output was made by {printable(record.get('made_by'))}"
    before, now = record.get("options"), wanted["options"]
    if not isinstance(before, dict):
        return "its record has no options"
    if keys := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        return f"changed: {', '.join(map(printable, keys))}"
    if AUTO not in step.operands and record.get("operands") != wanted["operands"]:
        return "it has other inputs"
    inputs = zip(step.maker.places(operands), inputs_of(record), strict=False)
    named = ((Path(models[name]), (name, entry)) for name, entry in models_of(record) if name in models)
    for place, (role, entry) in (*inputs, *named):
        if os.fspath(place) == AUTO:
            continue  # which the adapters name
        home = place if place.is_dir() else place.parent
        for name, facts in Wanted(os.fspath(place), role, entry).files.items():
            if reason := why_unlike_facts(home / name, facts):
                return f"{printable(place_word(place))}: {printable(name)} {reason}"
    if problems := records.compare(made).problems:
        return f"its output was changed: {problems[0]}"
    return ""


def resolved(step: Step) -> tuple[list[Any], dict[str, str]]:
    """The operands as a record has them, places on this disk, and the models that options name, by keyword."""
    maker = step.maker
    given: list[Any] = [
        word if maker.is_word(number) else on_disk(word, "base" in maker.operands and not number)
        for number, word in enumerate(step.operands)
    ]
    options = {name: getattr(step.options, name) for name in maker.models}
    models = {name: os.fspath(on_disk(word, True)) for name, word in options.items() if word is not None}
    return list(maker.listed(given)), models


def on_disk(word: str, is_model: bool) -> Path:
    """An input's place on this disk."""
    if word == AUTO or os.path.lexists(word):
        return Path(word)
    return local(word, "model" if is_model else "any")
