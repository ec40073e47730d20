"""`reproduce()`: the run that made an output is done again, and its bytes are compared."""

from __future__ import annotations

import filecmp
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.arguments import PathLike, Progress
from loratool.errors import InputError, UsageError, escaped, printable
from loratool.files.digests import read_recorded
from loratool.files.names import is_plain
from loratool.lineage.locating import Found, Search, Wanted, here, why_unlike_facts
from loratool.lineage.makers import Maker, Makers
from loratool.notes import Note
from loratool.options.described import PathKind, option
from loratool.options.writing import OverwriteOption
from loratool.provenance import record as records
from loratool.provenance.recorded import inputs_of, models_of, record_at
from loratool.results.base import Cost
from loratool.results.reproduce import Difference, FoundInput, ReproduceReport
from loratool.stores.names import is_in_store

# Keys of a record that are compared otherwise, or tell how the work was done: by which device, in which parts.
APART = {"files", "plan", "device"}


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(OverwriteOption):
    """Of `reproduce`."""

    folders: tuple[str, ...] = option(
        "--from",
        help="Also look in FOLDER for inputs, by their digests; may be repeated.",
        default=(),
        many=True,
        kind=PathKind("FOLDER"),
    )


def command_of(made: Path) -> str:
    """The command that made an output, as its record has it. Raises `InputError` where there is none."""
    return maker_in(record_at(here(made)))


def maker_in(record: Mapping[str, Any]) -> str:
    """The command that a record tells of."""
    return str(record.get("made_by", "")).removeprefix("loratool ")


@dataclass(frozen=True)
class Run:
    """A run that a record holds."""

    maker: Maker
    command: str
    operands: tuple[str, ...]
    inputs: tuple[Wanted, ...]  # those of the operands that are some
    models: tuple[Wanted, ...]  # that options name, whose keywords are their roles
    keywords: Mapping[str, Any]

    @classmethod
    def of(cls, record: Mapping[str, Any], shown: str, makers: Makers) -> Run:
        """Raises `InputError` where the record does not hold what a run needs."""
        name = maker_in(record)
        words, keywords = record.get("operands"), record.get("options")
        command = escaped(str(record.get("command", "")))
        if name not in makers:
            raise InputError(f"{shown}: its record is of {printable(name) or 'no command'}, which cannot be repeated")
        if not isinstance(words, list) or not isinstance(keywords, dict) or not all(isinstance(w, str) for w in words):
            raise InputError(
                f"{shown}: its record has no operands and options, as those of loratool 0.2.0 and earlier", hint=command
            )
        maker = makers[name]
        if strange := sorted(keywords.keys() - maker.recorded):
            raise InputError(
                f"{shown}: its record has options that this release does not know: {', '.join(map(printable, strange))}"
            )
        for value in keywords.get("also_load", ()):  # a name in an adapter's folder, as every record has it
            if not is_plain(value):
                raise InputError(f"{shown}: its record names {printable(value)}, which is outside the inputs")
        entries, places = [*inputs_of(record)], maker.places(words)
        if len(places) > len(entries):
            raise InputError(f"{shown}: its record has {len(places)} operands, but {len(entries)} inputs")
        wanted = tuple(Wanted(word, role, entry) for word, (role, entry) in zip(places, entries, strict=False))
        models = tuple(
            Wanted(keywords[name], name, entry)
            for name, entry in models_of(record)
            if name in maker.models and isinstance(keywords.get(name), str)
        )
        return cls(maker, command, tuple(words), wanted, models, keywords)

    @property
    def sought(self) -> tuple[Wanted, ...]:
        """Everything that has to be found."""
        return (*self.inputs, *self.models)


def reproduce(
    out: PathLike, again: PathLike, options: ReproduceOptions, makers: Makers, progress: Progress | None = None
) -> ReproduceReport:
    """Repeat the run that made `out`; `loratool.commands.reproduce` says all of it."""
    started = time.monotonic()
    if away := [folder for folder in options.folders if is_in_store(folder)]:
        raise UsageError(f"--from must be a local folder (got {printable(away[0])})")
    place, target = here(Path(out)), Path(again)
    table = record_at(place)
    if missing := [folder for folder in options.folders if not os.path.isdir(folder)]:
        raise InputError(f"--from {printable(missing[0])}: no such folder")
    run = Run.of(table, printable(place), makers)
    home = Path(os.path.abspath(place)).parent
    with tempfile.TemporaryDirectory(prefix="loratool-") as scratch:
        search = Search([*dict.fromkeys([Path(), home])], [*map(Path, options.folders)], Path(scratch))
        found = located(run, search)
        paths = iter([each.path for _, each in found])
        operands = [word if run.maker.is_word(n) else next(paths) for n, word in enumerate(run.operands)]
        keywords = {
            **with_files(run, search),
            **{each.role: path for each, path in zip(run.models, paths, strict=True)},
        }
        arguments = run.maker.arguments(operands)
        run.maker.function(**arguments, out=target, overwrite=options.overwrite, progress=progress, **keywords)
    return ReproduceReport(
        out=target,
        command=run.command,
        inputs=tuple(FoundInput(each.role, printable(each.name), at.path, at.how) for each, at in found),
        files=len(read_recorded(table)) + 1,
        differences=tuple(compared(place, here(target), table)),
        notes=tuple(remarks(run)),
        cost=Cost.since(started),
    )


def located(run: Run, search: Search) -> list[tuple[Wanted, Found]]:
    """All inputs of a run. Raises `InputError` with all that are not found as they were."""
    found: list[tuple[Wanted, Found]] = []
    problems: list[str] = []
    for each in run.sought:
        try:
            found.append((each, search.find(each)))
        except InputError as error:
            problems += [f"{error.message}{f' ({problem})' if problem else ''}" for problem in error.problems or ("",)]
    if problems:
        raise InputError("the inputs of the record were not found:", problems, hint="--from FOLDER")
    return found


def with_files(run: Run, search: Search) -> dict[str, Any]:
    """The options of a run, with the places of files that they name: where they are beside its inputs."""
    found = dict(run.keywords)
    for name in (run.maker.paths & found.keys()) - {each.role for each in run.models}:
        word = str(found[name]).removeprefix("./").rpartition("/")[2]
        places = [folder / word for folder in (*search.near, *search.folders)]
        path = next((place for place in places if word and place.exists()), None)
        if path is None:
            raise InputError(
                f"--{name.replace('_', '-')}: {printable(found[name])} was not found", hint="--from FOLDER"
            )
        found[name] = path
    return found


def compared(place: Path, target: Path, table: Mapping[str, Any]) -> Iterator[Difference]:
    """What differs between an output and the new one, whose record is `table` of the first."""
    single = place.is_file()
    for problem in records.compare(place).problems:
        yield Difference(printable(place), f"no longer matches its record: {problem}")
    listed = read_recorded(table)
    for name, digest in sorted(listed.items()):
        path = target if single else target / name
        if reason := why_unlike_facts(path, digest.record()):
            yield Difference(printable(name), reason)
    if single and not listed and not filecmp.cmp(place, target, shallow=False):
        yield Difference(printable(place.name), "differs")
    again = record_at(target)
    for name in sorted(read_recorded(again).keys() - listed.keys()):
        if not single:
            yield Difference(printable(name), "was not written before")
    if keys := sorted({key for key in {*table, *again} - APART if table.get(key) != again.get(key)}):
        yield Difference("loratool.json", f"differs in {', '.join(map(printable, keys))}")


def remarks(run: Run) -> Iterator[Note]:
    """What a reader of the result should know of the inputs."""
    for each in run.sought:
        if weak := [name for name, facts in each.files.items() if not {"sha256", "root"} & facts.keys()]:
            yield Note(
                "input-known-by-header",
                f"{printable(each.name)}: of {len(weak)} files the record has the digest of the header only, so they "
                "were compared by size and header; `merge --digests full` records more",
            )
