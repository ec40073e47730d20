"""How long a merge would take with some number of workers, and what it would move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loratool.results.text import in_columns
from loratool.shown import size

Limit = Literal["start-up", "reading", "writing", "computing", "requests", "largest part", "finishing"]


@dataclass(frozen=True)
class Simulation:
    """A merge as it would run on some number of workers. Times are seconds, sizes are bytes."""

    workers: int
    seconds: float  # from the start of the workers until the output is published
    limit: Limit  # what most of that time is due to
    startup_seconds: float  # until the workers have started and read the headers
    work_seconds: float  # from then on until the last worker is done
    even_seconds: float  # the same if every worker had as much to do as the others
    finish_seconds: float  # for checking, the small files and publishing
    parts: int
    busy: int  # workers that have any part at all
    largest_part: float  # seconds of the part that takes longest
    bytes_read: int  # by workers: inputs that come from the disk or the store
    bytes_computed: int  # of the output: what edits change
    bytes_copied: int  # of the output: what passes through a worker as it is
    bytes_copied_in_store: int  # of the output: what the object store copies by itself
    bytes_written: int  # by workers
    requests: Mapping[str, int]  # to an object store, by the name of the call
    dollars: float  # that they cost


def simulation_text(simulations: Sequence[Simulation]) -> str:
    """One column for each number of workers."""
    rows = [
        ["workers", *(f"{each.workers:,}" for each in simulations)],
        ["time", *(duration(each.seconds) for each in simulations)],
        ["limited by", *(each.limit for each in simulations)],
        ["  start-up", *(duration(each.startup_seconds) for each in simulations)],
        ["  work", *(duration(each.work_seconds) for each in simulations)],
        ["  balanced", *(duration(each.even_seconds) for each in simulations)],
        ["  finishing", *(duration(each.finish_seconds) for each in simulations)],
        ["parts", *(f"{each.parts:,}" for each in simulations)],
        ["read", *(size(each.bytes_read) for each in simulations)],
        ["computed", *(size(each.bytes_computed) for each in simulations)],
        ["copied", *(size(each.bytes_copied) for each in simulations)],
        ["written", *(size(each.bytes_written) for each in simulations)],
    ]
    if any(each.requests for each in simulations):
        rows += [
            ["copied in store", *(size(each.bytes_copied_in_store) for each in simulations)],
            ["requests", *(f"{sum(each.requests.values()):,}" for each in simulations)],
            ["their cost", *(f"${each.dollars:,.2f}" for each in simulations)],
        ]
    return in_columns(rows)


def duration(seconds: float) -> str:
    """`5.2 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
