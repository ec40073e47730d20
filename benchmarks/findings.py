"""What is wanted of a merge, and each measured number beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from running import Run
    from shapes import Shape


@dataclass(frozen=True)
class Limits:
    """Upper limits of one shape on one kind of machine; None where nothing is promised."""

    whole: float | None = None  # wall time of the whole process over cp
    whole_aim: float | None = None
    work: float | None = None  # the same without start-up
    peft: float | None = None  # wall time over PEFT's
    peft_aim: float | None = None
    memory_above_adapter: float | None = None  # bytes resident, less the adapter's file
    memory: float | None = None  # bytes resident
    gpu_memory: float | None = None  # bytes


LIMITS = {  # (shape, on a machine with a GPU)
    ("llama-3.2-1b", False): Limits(2.5, None, 1.5, 1 / 5, 1 / 8, memory_above_adapter=350e6),
    ("llama-3-8b", False): Limits(1.5, 1.1, memory_above_adapter=350e6),
    ("llama-3.2-1b", True): Limits(2.5, None, 1.5, 1 / 5, 1 / 8, memory=1.2e9, gpu_memory=1e9),
    ("llama-3-8b", True): Limits(1.0, None, 1.0, memory=1.2e9, gpu_memory=1e9),
}
SAME_MEMORY = 1.15  # the larger over the smaller of two shapes' peaks
EQUAL_SHARE = 0.9999
HELP_SECONDS, INSPECT_SECONDS = 0.3, 0.5


@dataclass(frozen=True)
class Finding:
    """One line of the result: what was wanted and what was measured, in words and as a number."""

    what: str
    measured: str
    value: float
    target: str = ""
    met: bool | None = None  # None where nothing was promised
    note: str = ""


def at_most(
    what: str,
    value: float,
    limit: float | None,
    show: Callable[[float], str],
    aim: float | None = None,
    note: str = "",
) -> Finding:
    if limit is None:
        return Finding(what, show(value), value, note=note)
    target = f"≤ {show(limit)}" + (f", aim {show(aim)}" if aim else "")
    return Finding(what, show(value), value, target, value <= limit, note)


def ratio(value: float) -> str:
    return f"{value:.2f}"


def fraction(value: float) -> str:
    return f"1/{1 / value:.1f}" if value else "0"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.0f} MB"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def judge_accuracy(name: str, counts: dict[str, Any]) -> list[Finding]:
    elements = counts["equal"] + counts["one_ulp"] + counts["worse"]
    share = counts["equal"] / elements
    return [
        Finding(
            f"{name}: equal to float64 rounded once",
            f"{100 * share:.4f} %",
            share,
            f"≥ {100 * EQUAL_SHARE:.2f} %",
            share >= EQUAL_SHARE,
            f"{counts['one_ulp']} of {elements:,} elements by 1 ulp",
        ),
        Finding(
            f"{name}: largest difference",
            f"{counts['largest']} ulp",
            counts["largest"],
            "≤ 1 ulp",
            counts["largest"] <= 1,
            f"{counts['worse']} elements by more, where W and ΔW cancel to {counts['cancelled']:.0e} |W| or less; "
            f"off by {counts['absolute']:.0e} |W| at most"
            if counts["worse"]
            else "",
        ),
        Finding(
            f"{name}: untouched tensors, same bytes",
            f"{counts['copied']} of {counts['copied'] + counts['damaged']}",
            counts["copied"],
            "all",
            not counts["damaged"],
        ),
    ]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def run_table(shape: Shape, runs: dict[str, list[Run]]) -> str:
    """Every run of one shape, and each contender's medians."""
    rows = [("contender", "runs [s]", "median", "of it sync", "start-up", "CPU time", "peak memory")]
    for name, measured in runs.items():
        rows.append(
            (
                name,
                " ".join(f"{one.wall:.2f}" for one in measured),
                seconds(median(one.wall for one in measured)),
                seconds(median(one.sync for one in measured)),
                seconds(median(one.startup for one in measured)) if measured[0].report else "–",
                seconds(median(one.processor for one in measured)),
                megabytes(peak) if (peak := max(one.peak_memory for one in measured)) else "–",
            )
        )
    size = f"{shape.base_bytes / 1e9:.2f} GB, adapter {shape.adapter_bytes / 1e6:.1f} MB"
    return f"{shape.name} ({size})\n{aligned(rows)}"


def finding_table(findings: Sequence[Finding]) -> str:
    words = {True: "met", False: "MISSED", None: ""}
    rows = [("what", "target", "measured", "", "")]
    rows += [(found.what, found.target, found.measured, words[found.met], found.note) for found in findings]
    return aligned(rows)
