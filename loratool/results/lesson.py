"""What `demo --learn` teaches: six steps, each with the commands that ran and what they printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loratool.errors import printable
from loratool.results.base import Result

STEPS = 6


@dataclass(frozen=True)
class Played:
    """A command and what it printed."""

    command: str
    output: str

    def __str__(self) -> str:
        return f"$ {self.command}\n{self.output}"


@dataclass(frozen=True)
class Step:
    """One step of the lesson."""

    number: int
    title: str
    before: str  # what is done and why
    played: tuple[Played, ...]
    after: str  # what to see in it

    def __str__(self) -> str:
        head = f"Step {self.number} of {STEPS}: {self.title}"
        parts = [f"{head}\n{'=' * len(head)}", self.before, *map(str, self.played), self.after]
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Latency:
    """Seconds of one pass through all adapted layers."""

    median: float
    low: float  # a quarter of the rounds took less
    high: float  # a quarter took more
    ratio: float  # to the base in the same round, the median


@dataclass(frozen=True)
class Nearness:
    """How the edited weights of a model that was merged and unmerged compare with those of the base."""

    weights: int
    equal: int  # that have the base's bits
    one_step: int  # that are a neighbour: the next number that the dtype holds
    further: int
    largest: float  # difference


@dataclass(frozen=True, repr=False)
class Lesson(Result):
    """The whole lesson."""

    kind: Literal["lesson"] = field(default="lesson", init=False)
    folder: Path
    steps: tuple[Step, ...]
    latency: Mapping[str, Latency]  # base, base + adapter, merged
    nearness: Nearness

    def __str__(self) -> str:
        return "\n\n\n".join([*map(str, self.steps), self.farewell])

    @property
    def farewell(self) -> str:
        """Where to read on."""
        return f"Every file is still in {printable(self.folder)}: run the commands again, and change them."


def latency_text(latency: Mapping[str, Latency]) -> str:
    """One line for each way to run the layers: the median, the middle half of the rounds, and the ratio to the base."""
    return "\n".join(
        f"{name:<15} {1e6 * each.median:8.1f} µs  ({1e6 * each.low:.1f} to {1e6 * each.high:.1f})  {each.ratio:.2f} × base"
        for name, each in latency.items()
    )


def nearness_text(near: Nearness) -> str:
    """How many weights came back, and how far the others are off."""
    parts = {
        "equal to the base": near.equal,
        "off by one step of the dtype": near.one_step,
        "further off": near.further,
    }
    rows = [f"{name:<29} {count:>9,}  {100 * count / near.weights:6.2f} %" for name, count in parts.items()]
    return "\n".join([*rows, f"{'largest difference':<29} {near.largest:>9.2g}"])
