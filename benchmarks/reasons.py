"""README's five lines: why people choose loratool, each from kept results; a line without its results is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from figures import COPY
from tables import UNMEASURED, Result, middle, most_memory


def reasons(results: Sequence[Result]) -> str:
    """The lines, as a list."""
    lines = (*against_peft(results), *near_a_copy(results), *quantised(results), *resized(results))
    return "\n".join(f"- {line}" for line in lines) or UNMEASURED


def against_peft(results: Sequence[Result]) -> Iterator[str]:
    """Memory and time of a merge, and of PEFT's load, merge and save."""
    for result in results:
        row, peft = result.get("rows", {}).get("merge", {}), result.get("rows", {}).get("peft", {})
        ours, theirs = row.get("runs", {}).get("merge cpu"), peft.get("runs", {}).get("PEFT")
        if ours and theirs and peft.get("shape") == row["shape"]:
            sizes = f"{row['shape']} ({row['bytes'] / 1e9:.2f} GB)"
            yield f"**Little memory.** Merging into {sizes} takes {most_memory(ours)}; PEFT takes {most_memory(theirs)}."
            yield f"**Less time.** It takes {middle(ours, 'wall'):.1f} s on {machine(result)}; PEFT takes {middle(theirs, 'wall'):.1f} s."
            return


def near_a_copy(results: Sequence[Result]) -> Iterator[str]:
    """A merge with a GPU, next to a copy."""
    for result in results:
        row = result.get("rows", {}).get("merge", {})
        runs = row.get("runs", {}).get("merge cuda:0")
        if runs:
            copy = f"`cp -r` and `sync` take {middle(row['runs'][COPY], 'wall'):.1f} s"
            yield (
                f"**Near a plain copy.** With {result['machine']['GPU'].partition(' × ')[2] or result['machine']['GPU']}, "
                f"{row['shape']} ({row['bytes'] / 1e9:.2f} GB) takes {middle(runs, 'wall'):.1f} s, where {copy}."
            )
            return


def quantised(results: Sequence[Result]) -> Iterator[str]:
    """Time of merges into quantised bases over that into the plain one."""
    ratios: dict[str, list[float]] = {}
    for result in results:
        for each in result["findings"]:
            format_name, _, way = each["what"].partition(", ")
            if result["benchmark"] == "quantised" and way == "touched only: time over it":
                ratios.setdefault(format_name, []).append(each["value"])
    if ratios:
        every = [ratio for each in ratios.values() for ratio in each]
        yield (
            f"**Quantised bases, merged directly.** Merging into {', '.join(ratios)} takes {min(every):.2f} to "
            f"{max(every):.2f} times as long as into the plain base."
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
