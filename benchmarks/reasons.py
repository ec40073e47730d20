"""README's five lines: why people choose loratool, each from kept results; a line without its results is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from figures import COPY
from findings import megabytes

Result = Mapping[str, Any]


def reasons(results: Sequence[Result]) -> str:
    """The lines, as a list."""
    return "\n".join(
        f"- {line}" for line in (*against_peft(results), *near_a_copy(results), *quantised(results), *resized(results))
    )


def wall(runs: Sequence[Mapping[str, float]]) -> float:
    return float(median(one["wall"] for one in runs))


def most_memory(runs: Sequence[Mapping[str, float]]) -> str:
    return megabytes(max(one["peak_memory"] for one in runs))


def against_peft(results: Sequence[Result]) -> Iterator[str]:
    """Memory and time of a merge, and of PEFT's load, merge and save."""
    for result in results:
        row, peft = result.get("rows", {}).get("merge", {}), result.get("rows", {}).get("peft", {})
        ours, theirs = row.get("runs", {}).get("merge cpu"), peft.get("runs", {}).get("PEFT")
        if ours and theirs and peft.get("shape") == row["shape"]:
            sizes = f"{row['shape']} ({row['bytes'] / 1e9:.2f} GB)"
            yield f"**Little memory.** Merging into {sizes} takes {most_memory(ours)}, with PEFT {most_memory(theirs)}."
            yield f"**Less time.** It takes {wall(ours):.1f} s on {machine(result)}, with PEFT {wall(theirs):.1f} s."
            return


def near_a_copy(results: Sequence[Result]) -> Iterator[str]:
    """A merge with a GPU, next to a copy."""
    for result in results:
        row = result.get("rows", {}).get("merge", {})
        runs = row.get("runs", {}).get("merge cuda:0")
        if runs:
            copy = f"`cp -r` and `sync` take {wall(row['runs'][COPY]):.1f} s"
            yield (
                f"**Near a plain copy.** With {result['machine']['GPU'].partition(' × ')[2] or result['machine']['GPU']}, "
                f"{row['shape']} ({row['bytes'] / 1e9:.2f} GB) takes {wall(runs):.1f} s, where {copy}."
            )
            return


def quantised(results: Sequence[Result]) -> Iterator[str]:
    """Time of merges into quantised bases over that into the plain one."""
    ratios = {
        each["what"].partition(",")[0]: float(each["measured"])
        for result in results
        if result["benchmark"] == "quantised"
        for each in result["findings"]
        if each["what"].endswith("touched only: time over it")
    }
    if ratios:
        low, high = min(ratios.values()), max(ratios.values())
        yield (
            f"**Quantised bases as they are.** Merging into {', '.join(ratios)} takes {low:.2f} to {high:.2f} times as "
            "long as into the plain base."
        )


def resized(results: Sequence[Result]) -> Iterator[str]:
    """A resize, and the full SVDs that it does without."""
    found = {each["what"]: each["measured"] for result in results for each in result["findings"]}
    took = next((found[what] for what in found if what.startswith("resize of a Flux adapter")), None)
    saved = found.get("resize: full SVDs over the whole process")
    if took and saved:
        yield f"**Algebra on factors.** Resizing a Flux adapter takes {took}; full SVDs of its updates take {saved} as long."


def machine(result: Result) -> str:
    return str(result["machine"]["processor"])
