"""The tables of the pages, from results: each has a name, by which the marks of a page ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from figures import COPY, merges
from findings import megabytes, verdict

UNMEASURED = "Not measured yet with the current code."
Result = Mapping[str, Any]


def machine_of(result: Result) -> str:
    facts = result["machine"]
    return f"{facts['processor']}{'' if facts['GPU'] == 'none' else ', ' + facts['GPU']}"


def middle(runs: Sequence[Mapping[str, float]], what: str) -> float:
    return median(one[what] for one in runs)


def most_memory(runs: Sequence[Mapping[str, float]]) -> str:
    return megabytes(max(one["peak_memory"] for one in runs))


def with_note(found: Mapping[str, Any]) -> str:
    return f"{found['measured']} ({found['note']})" if found["note"] else found["measured"]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def merging_table(results: Sequence[Result]) -> str:
    """How long a merge takes, next to `cp` and PEFT."""
    rows = []
    for result in results:
        measured = result.get("rows", {})
        row, peft = measured.get("merge", {}), measured.get("peft", {}).get("runs", {}).get("PEFT")
        for name, runs in merges(row) if "runs" in row else ():
            cpu = name == "merge cpu"
            theirs = peft if cpu and measured.get("peft", {}).get("shape") == row["shape"] else None
            rows.append(
                (
                    machine_of(result),
                    f"{row['shape']}, {row['bytes'] / 1e9:.2f} GB",
                    f"{middle(row['runs'][COPY], 'wall'):.1f} s",
                    f"{middle(runs, 'wall'):.1f} s on {name.removeprefix('merge ')}, "
                    f"of which {middle(runs, 'startup'):.1f} s start-up",
                    f"{middle(theirs, 'wall'):.1f} s" if theirs else "",
                    most_memory(runs) + (f" / {most_memory(theirs)}" if theirs else ""),
                )
            )
    heads = ("machine", "shape of", "`cp -r` + `sync`", "`loratool merge`", "PEFT", "peak memory (PEFT's)")
    return table(heads, rows) if rows else UNMEASURED


def memory_table(results: Sequence[Result]) -> str:
    """The peak memory of merges, by the size of the base."""
    rows = [
        (
            f"{row['shape']}, {row['bytes'] / 1e9:.2f} GB",
            result["machine"]["processor"],
            name.removeprefix("merge ").partition(":")[0],
            most_memory(runs),
        )
        for result in results
        if "runs" in (row := result.get("rows", {}).get("merge", {}))
        for name, runs in merges(row)
    ]
    return table(("shape of the base", "machine", "device", "peak memory"), rows) if rows else UNMEASURED


def commands_table(results: Sequence[Result]) -> str:
    """How long other commands take."""
    rows = [
        (machine_of(result), each["what"].strip(), with_note(each))
        for result in results
        if result["benchmark"] in ("algebra", "inspecting")
        for each in result["findings"]
        if not each["what"].startswith(" ")
    ]
    return f"Other commands:\n\n{table(('machine', 'what', 'measured'), rows)}" if rows else ""


def people_table(results: Sequence[Result]) -> str:
    """What it costs to look after many adapters, next to what was promised."""
    rows = [
        (machine_of(result), each["what"].strip(), each["target"], with_note(each), verdict(each["met"], each["aimed"]))
        for result in results
        if result["benchmark"] == "people"
        for each in result["findings"]
        if each["target"]
    ]
    heads = ("machine", "what", "target", "measured", "")
    return f"Many adapters, and the pages of results:\n\n{table(heads, rows)}" if rows else ""


def rounding_table(results: Sequence[Result]) -> str:
    """Gain and outputs of a small real model after each kind of rounding, of the first result that has them."""
    for result in results:
        rows = result.get("rows", {}).get("rounding", {}).get("table")
        if rows:
            return markdown_of_rounding(rows)
    return ""


def markdown_of_rounding(rows: Sequence[Mapping[str, Any]]) -> str:
    ways = list(dict.fromkeys(row["rounding"] for row in rows))
    found = {(row["strength"], row["dtype"], row["rounding"]): row for row in rows}
    heads = ["‖ΔW‖/‖W‖", "dtype", *(f"{way}: {what}" for way in ways for what in ("gain", "outputs"))]
    lines = [
        (
            f"{strength:g}",
            dtype,
            *(f"{found[strength, dtype, way][what]:.3f}" for way in ways for what in ("gain", "outputs")),
        )
        for strength, dtype in dict.fromkeys((row["strength"], row["dtype"]) for row in rows)
    ]
    return table(heads, lines)


def aspects(results: Sequence[Result], benchmark: str, heads: Mapping[str, str]) -> str:
    """A row for each thing that a script measured in several ways, under its command.

    `heads` maps the ways, which stand after the colon in the names of findings, to the heads of columns.
    """
    return (
        "\n\n".join(part for each in results if each["benchmark"] == benchmark for part in of_one(each, heads))
        or UNMEASURED
    )


def of_one(result: Result, heads: Mapping[str, str]) -> Iterator[str]:
    rows: dict[str, dict[str, str]] = {}
    for found in result["findings"]:
        what, _, way = found["what"].rpartition(": ")
        if way in heads:
            rows.setdefault(what, {})[way] = found["measured"]
    if rows:
        yield f"`{result['command']}` on {machine_of(result)}:"
        yield table(
            ("", *heads.values()), [(what, *(cells.get(way, "") for way in heads)) for what, cells in rows.items()]
        )
