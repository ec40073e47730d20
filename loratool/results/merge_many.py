"""What `merge_many` did, or would do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypedDict, TypeVar

from loratool.arguments import PathLike
from loratool.errors import LoratoolError, printable
from loratool.notes import Note
from loratool.results.base import SCHEMA, Cost, Result, plain
from loratool.results.failure import ErrorData, error_data
from loratool.results.merge import MergeReport
from loratool.results.plan import PlanTable
from loratool.results.profile import Profile

Each = TypeVar("Each", bound=Result)


@dataclass(frozen=True, repr=False)
class ResultsOfOutputs(Result, Generic[Each]):
    """The results of several outputs, and the errors of those that failed, by the names of the outputs."""

    reports: Mapping[str, Each]
    errors: Mapping[str, LoratoolError]  # an output with an error is as it was before

    def __getitem__(self, out: PathLike) -> Each:
        """The result of one output; raises its error if it failed."""
        if os.fspath(out) in self.errors:
            raise self.errors[os.fspath(out)]
        return self.reports[os.fspath(out)]

    @property
    def exit_code(self) -> int:
        """The worst exit code of the errors, which is the smallest; 0 if there are none."""
        return min((error.exit_code for error in self.errors.values()), default=0)

    @property
    def notes(self) -> tuple[Note, ...]:
        """Those of all outputs."""
        found = ((out, note) for out, report in self.reports.items() for note in getattr(report, "notes", ()))
        return tuple(note.under(printable(out)) for out, note in found)

    def to_dict(self) -> dict[str, Any]:
        """What the command prints with `--json`: `outputs` has a report or an error for each output."""
        made = [(out, report.to_dict()) for out, report in self.reports.items()]
        failed = [(out, {"error": error_data(error, error.hint)}) for out, error in self.errors.items()]
        outputs = [{"out": os.path.realpath(out), **entry} for out, entry in (*made, *failed)]
        for entry in outputs:
            entry.pop("schema", None)
        return {"schema": SCHEMA, "outputs": outputs, "cost": plain(self.cost)}

    def __str__(self) -> str:
        """The text of each result, and the errors; a plan does not say which output it is of."""
        made = (
            str(each) if isinstance(each, MergeReport) else f"{printable(out)}:\n{each}"
            for out, each in self.reports.items()
        )
        return "\n\n".join([*made, *(f"{printable(out)}: failed: {error}" for out, error in self.errors.items())])


@dataclass(frozen=True, kw_only=True)
class PlannedOutput(PlanTable):
    """What one of several merges would do."""

    out: str


class FailedOutput(TypedDict):
    """An output that could not be made."""

    out: str
    error: ErrorData


class OutputsTable(TypedDict):
    """What several merges did, or would do."""

    outputs: list[MergeReport | PlannedOutput | FailedOutput]
    cost: Cost


@dataclass(frozen=True, repr=False)
class MergeManyReport(ResultsOfOutputs[MergeReport]):
    """The reports of several merges, and the errors of those that failed, by the names of the outputs."""

    profile: Profile = field(default=Profile({}), compare=False)  # where the time of all of them went
