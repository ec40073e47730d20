"""What is wrong with an adapter, and what others would make of it: findings, each with what repairs it.

`findings` says what one is; `servers` knows what vLLM, SGLang and llama.cpp read; `scanning` looks at the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import format_at, format_of
from loratool.adapters.formats.format import Format
from loratool.errors import LoratoolError, code_of, folded, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.folders import INDEX_SUFFIX
from loratool.notes import Note
from loratool.results.findings import NOT_AS_WRITTEN, Finding, command, quoted
from loratool.templates import some

if TYPE_CHECKING:
    from loratool.bases.adapter_fit import Fit


UNMERGED = "unmerged-model"  # the code of a model that was saved with its adapter unmerged

__all__ = ["Finding", "examine", "examine_model", "tell_unreadable", "with_record"]

TOLD = ("ambiguous-alpha", "prefix-doubled", "adapter-name-in-names")  # codes of notes that are findings of their own


def examine(
    adapter: Adapter, problems: Sequence[str], path: Path, fit: Fit | None, notes: Sequence[Note]
) -> tuple[Finding, ...]:
    """Everything that is found, problems first.

    Args:
        adapter: what could be read of it.
        problems: what could not, in sentences.
        path: what commands are told with.
        fit: the adapter held against its base, where that is known.
        notes: on reading, on the base and on other files of the folder.
    """
    from loratool.inspecting.health.scanning import look_at_values
    from loratool.inspecting.health.servers import look_at_servers

    found = [
        *as_findings(problems, format_of(adapter)),
        *format_of(adapter).findings(adapter, path),
        *(look_at_fit(fit, path) if fit else ()),
        *look_at_values(adapter, path),
        *look_at_servers(adapter, path, fit),
        *(Finding("note", note.code, note.text) for note in notes if note.code not in TOLD),
    ]
    return tuple(sorted(found, key=is_note))


def examine_model(checkpoint: Checkpoint, path: Path) -> tuple[Finding, ...]:
    """Everything that is found in a checkpoint, problems first; `path` is what commands are told with."""
    from loratool.inspecting.health.scanning import look_at_model, look_at_packing

    unmerged = [
        Finding("problem", UNMERGED, note.text, command("merge", path))
        for note in checkpoint.notes
        if note.code == UNMERGED
    ]
    found = sorted([*unmerged, *look_at_model(checkpoint), *look_at_packing(checkpoint)], key=is_note)
    return (*found, *(Finding("note", note.code, note.text) for note in checkpoint.notes if note.code != UNMERGED))


def is_note(finding: Finding) -> bool:
    return finding.level != "problem"


def as_findings(problems: Sequence[str], form: Format) -> Iterator[Finding]:
    """Problems of reading an adapter of a format; those that are alike are one."""
    for text, names in folded(problems):
        code = code_of(text)
        yield Finding("problem", code, text, form.repairs.get(code, ""), names)


def tell_unreadable(error: LoratoolError, path: Path) -> tuple[Finding, ...]:
    """What is wrong with a path of which nothing can be read."""
    found = [Finding("problem", "unreadable", error.message)]
    form = format_at(path)
    found += as_findings(error.problems, form)
    if path.is_dir() and (path / form.config_name).is_file():
        try:
            form.training_at(path)
        except LoratoolError as other:  # it may be what was told already
            found.append(Finding("problem", "unreadable", other.message))
    return tuple(dict.fromkeys(found))


def look_at_fit(fit: Fit, path: Path) -> Iterator[Finding]:
    """What the base says: targets that have no place, and tensors that are one."""
    for problem in fit.base.problems:
        yield Finding(
            "problem",
            "does-not-fit",
            problem,
            f"loratool merge {quoted(Path(fit.base.path))} {quoted(path)} -o OUT --map REGEX=TEMPLATE",
        )
    for names in fit.tied():
        changed = sorted(
            target for target, places in fit.places.items() if any(place.tensor in names for place in places)
        )
        yield Finding(
            "note",
            "tied-embeddings",
            f"the base ties {', '.join(map(printable, names))}, and the adapter changes one of them "
            f"({some(changed)}). Tools that keep them tied change the other too; loratool writes them as separate "
            "tensors",
            f"loratool merge {quoted(Path(fit.base.path))} {quoted(path)} -o OUT",
            tuple(map(printable, changed)),
        )


def with_record(findings: Sequence[Finding], location: Path) -> tuple[Finding, ...]:
    """What a check found, and whether the files are still those that loratool wrote, where it did."""
    from loratool.provenance import record  # with all that hashes files

    is_index = location.name.endswith(INDEX_SUFFIX) and not location.is_dir()
    found = record.compare(location.parent if is_index else location)
    problems = [Finding("problem", NOT_AS_WRITTEN, text, record.WAY_OUT) for text in found.problems]
    return (*problems, *findings, *[Finding("note", note.code, note.text) for note in found.notes])
