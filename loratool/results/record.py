"""A bill of materials as `record` gives it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.notes import Note
from loratool.results.base import Result


@dataclass(frozen=True, repr=False)
class Record(Result):
    """What an output was made of, and how, as a document of a standard."""

    format: str  # json, spdx or cyclonedx
    document: Mapping[str, Any]
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        """The document."""
        return json.dumps(self.document, indent=2)
