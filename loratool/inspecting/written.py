"""Whether the files of what is inspected are still those that loratool wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratool.files.folders import INDEX_SUFFIX
from loratool.provenance import record
from loratool.results.facts import OneFacts
from loratool.results.findings import NOT_AS_WRITTEN, Finding


def with_record(facts: OneFacts, location: Path) -> OneFacts:
    """What a check found, and whether the files are still those that loratool wrote, where it did."""
    whole = location.is_dir() or location.name.endswith(INDEX_SUFFIX)
    found = record.compare(location if location.is_dir() else location.parent, "" if whole else location.name)
    problems = [Finding("problem", NOT_AS_WRITTEN, text, record.WAY_OUT) for text in found.problems]
    notes = [Finding("note", note.code, note.text) for note in found.notes]
    return replace(facts, findings=(*problems, *(facts.findings or ()), *notes))
