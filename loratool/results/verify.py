"""What `verify` found out about a merged model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from loratool.errors import VerificationError, printable
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.text import MOST_LAYERS, aligned, cost_rows, figure, row_if, table
from loratool.shown import size

AS_RECORDED, PROVEN, ROUNDED_TWICE, NOT_PROVEN = "as-recorded", "proven", "rounded-twice", "not-proven"
SENTENCES = {
    AS_RECORDED: "every file is what loratool.json says was written",
    PROVEN: "proven: every tensor is what the formula gives, within 1 ulp",
    ROUNDED_TWICE: "proven within 2 ulp, or half a step of a quantised format: weights were rounded twice",
    NOT_PROVEN: "not what the formula gives",
}
NOT_AS_RECORDED = "not what loratool.json says was written"


@dataclass(frozen=True)
class TensorProof:
    """What one tensor of a merged model was found to be."""

    status: str  # identical, proven, rounded-twice, different, missing or unknown
    ulp: float | None = None  # largest distance from the formula, in ulp at the size of the operands
    equal: float | None = None  # share of elements that are the formula's once rounded, bit for bit
    factor: tuple[float | None, ...] = ()  # how much of each adapter is in it, in order; none if it has no part in it


@dataclass(frozen=True)
class Diagnosis:
    """Why a merged model is not, or not quite, what the formula gives."""

    code: str  # a constant in kebab-case, never derived from the text
    text: str  # one sentence
    modules: tuple[str, ...] = ()  # that it is about
    numbers: Mapping[str, Any] = field(default_factory=dict)  # of the sentence, for programs
    passes: bool = False  # whether the model computes what was merged in spite of it

    def __str__(self) -> str:
        return self.text


class Verdict(TypedDict):
    """What `--json` has besides the fields."""

    passes: bool
    counts: dict[str, int]  # how many tensors have each status


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """What a merged model was found to be. Sizes are bytes, times seconds."""

    merged: Path
    verdict: str  # as-recorded, proven, rounded-twice or not-proven
    diagnoses: tuple[Diagnosis, ...]
    notes: tuple[Note, ...]
    base: str = ""  # its name; empty where only the record was checked
    adapters: tuple[str, ...] = ()
    rounding: str = ""  # how edited tensors are rounded; empty where none of the known ways gives them
    tensors: Mapping[str, TensorProof] | None = None  # by name
    files: int = 0  # that a record lists and that were compared with it
    bytes_read: int = 0

    @property
    def passes(self) -> bool:
        """Whether the merged model is what it should be."""
        return self.verdict != NOT_PROVEN

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return 0 if self.passes else VerificationError.exit_code

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        return SENTENCES[self.verdict] if self.tensors is not None or self.passes else NOT_AS_RECORDED

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        return tuple(each.text for each in self.diagnoses if not each.passes)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each status."""
        return dict(Counter(proof.status for proof in (self.tensors or {}).values()))

    Besides = Verdict

    def to_dict(self) -> dict[str, Any]:
        verdict: Verdict = {"passes": self.passes, "counts": self.counts}
        return {**super().to_dict(), **verdict}

    def __str__(self) -> str:
        rows: list[tuple[str, object]] = [
            (printable(self.merged), self.sentence),
            *row_if(self.base, "formula", " + ".join(map(printable, (self.base, *self.adapters)))),
            *row_if(self.base, "tensors", ", ".join(f"{count} {status}" for status, count in self.counts.items())),
            *row_if(self.rounding, "rounding", self.rounding),
            *row_if(self.files, "files", f"{self.files} compared with loratool.json"),
            *(("found" if not each.passes else "note", each) for each in self.diagnoses),
            *(("note", note) for note in self.notes),
            *([("read", size(self.bytes_read)), *cost_rows(self.cost)] if self.bytes_read else []),
        ]
        far = far_tensors(self.tensors) if self.tensors and not self.passes else ""
        return "\n".join(filter(None, [aligned(rows), far]))


def far_tensors(proofs: Mapping[str, TensorProof]) -> str:
    """A table of the tensors that are farthest from the formula; empty where no distance is known."""
    off = {name: proof for name, proof in proofs.items() if proof.status == "different" and proof.ulp is not None}
    if not off:
        return ""
    order = sorted(off, key=lambda name: -(off[name].ulp or 0.0))
    rows = [
        (
            figure(off[name].ulp),
            "–" if off[name].equal is None else f"{100 * (off[name].equal or 0):.1f} %",
            ", ".join(figure(factor) for factor in off[name].factor),
            name,
        )
        for name in order[:MOST_LAYERS]
    ]
    return table(("ulp", "equal", "factor", "tensor"), rows, len(order) - len(rows))
