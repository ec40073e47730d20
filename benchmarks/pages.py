"""The tables of the pages, and README's, from results; and the search for numbers that stand outside of them."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from figures import COPY, merges, speed
from findings import megabytes, rate, verdict
from reasons import reasons

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
PERFORMANCE, README, ROUNDING = "docs/performance.md", "README.md", "docs/rounding.md"
GUARDED = (PERFORMANCE, README)  # pages in which no other number may stand
BLOCK = re.compile(r"(?P<begin><!-- numbers: (?P<name>\w+) -->\n).*?(?P<end><!-- end of numbers -->)", re.DOTALL)
TITLES = {
    "engine": "Merging",
    "inspecting": "Inspecting",
    "algebra": "Adapter algebra",
    "binding": "Finding the weights of an adapter",
    "quantised": "Quantised bases",
    "dialects": "Other dialects",
    "inference": "One layer at inference",
    "people": "Many adapters, and pages",
    "distributed": "Many processes, simulated and measured",
    "several_gpus": "Several GPUs",
}
WITHOUT = re.compile(  # what is not measured: code, links' targets, names (bf16, 16-bit, Llama-3.2-1B), requirements
    r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->|\b[A-Za-z][\w.-]*\d[\w.-]*|Python \d+\.\d+|Apache \d\.\d|\b\d+-bit\b",
    re.DOTALL,
)
UNMEASURED = "Not measured yet with the current code."
Result = Mapping[str, Any]


class MixedResultsError(Exception):
    """Results that do not belong together."""


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Results, in the order of their names; those of a machine are of one commit, or `MixedResultsError` says which are not.

    A machine that is not at hand keeps the results of the last commit that was measured there.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]
    kinds = {(machine_of(one), one["commit"], one["code"]) for one in results}
    if len(kinds) > len({machine for machine, *_ in kinds}):
        lines = [f"  {p.name}: {r['commit']}, code {r['code']}" for p, r in zip(sorted(paths), results, strict=True)]
        raise MixedResultsError("\n".join(["these results of one machine are of more than one commit:", *lines]))
    for _, name, _ in kinds:
        if not re.fullmatch(r"[0-9a-f]{7,40}", name):
            raise MixedResultsError(f"the code that was measured is not a commit ({name}): commit it and measure again")
    return results


def blocks(results: Sequence[Result]) -> dict[str, str]:
    """The text of each block by its name."""
    return {
        "performance": "\n\n".join([intro(results), *sections(results)]),
        "merging": merging_table(results),
        "commands": commands_table(results),
        "people": people_table(results),
        "rounding": rounding_table(results),
        "reasons": reasons(results) or UNMEASURED,
    }


def intro(results: Sequence[Result]) -> str:
    if not results:
        return UNMEASURED
    commits = {machine_of(each): each["commit"] for each in results}
    if len({*commits.values()}) == 1:
        return f"All numbers were measured at commit `{results[0]['commit']}`."
    places = "; ".join(f"{machine}: `{commit}`" for machine, commit in commits.items())
    return f"All numbers of a machine were measured at one commit. {places}."


def sections(results: Sequence[Result]) -> Iterator[str]:
    """A section for each machine, with one for each script that ran on it."""
    by_machine: dict[str, list[Result]] = {}
    for each in results:
        by_machine.setdefault(machine_of(each), []).append(each)
    for name, group in by_machine.items():
        facts = group[0]["machine"]
        kept = ("file system", "Python", "numpy", "torch", "peft", "load before")
        others = [f"{key} {facts[key]}" for key in kept if key in facts]
        yield f"## {name}"
        yield ", ".join([f"{facts['memory']} of memory", *others]) + "."
        for benchmark in dict.fromkeys(each["benchmark"] for each in group):
            yield f"### {TITLES.get(benchmark, benchmark)}"
            for each in group:
                if each["benchmark"] == benchmark:
                    yield from section(each)


def section(result: Result) -> Iterator[str]:
    """The command, the findings, and the runs that they are of."""
    yield f"```console\n$ {result['command']}\n```"
    rows = [
        (each["what"].strip(), each["target"], with_note(each), verdict(each["met"], each["aimed"]))
        for each in result["findings"]
    ]
    if rows:
        yield table(("what", "target", "measured", ""), rows)
    if runs := list(run_rows(result)):
        yield "The runs, each the median of its turns:"
        yield table(("row", "contender", "wall time", "start-up", "rate", "CPU time", "peak memory"), runs)
    profiles = profiles_of(result)
    if profiles:
        yield (
            "Where the time of the merges went, for each the run with the median wall time: seconds of processor time / "
            "seconds by the clock of all threads together."
        )
        for at in range(0, len(profiles), COLUMNS):
            yield profile_table(dict([*profiles.items()][at : at + COLUMNS]))
    if left_out := [f"`{name}`: {row['skipped']}" for name, row in result.get("rows", {}).items() if "skipped" in row]:
        yield f"Not measured on this machine: {'; '.join(left_out)}."


def with_note(found: Mapping[str, Any]) -> str:
    return f"{found['measured']} ({found['note']})" if found["note"] else found["measured"]


def run_rows(result: Result) -> Iterator[tuple[str, ...]]:
    for name, row in result.get("rows", {}).items():
        for contender, runs in row.get("runs", {}).items():
            yield (
                f"`{name}`",
                contender,
                f"{middle(runs, 'wall'):.2f} s",
                f"{middle(runs, 'startup'):.2f} s" if middle(runs, "startup") else "",
                rate(speed(runs)) if runs[0]["bytes"] else "",
                f"{middle(runs, 'processor'):.2f} s",
                megabytes(peak) if (peak := max(one["peak_memory"] for one in runs)) else "",
            )


PROFILED = (
    "merge",
    "layer",
    "cold",
    "batch",
    "exact",
    "single",
    "large",
    "dequantize",
    "parts",
)  # rows whose stages are shown
COLUMNS = 4  # merges in one table of stages


def profile_table(profiles: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A column for each merge."""
    stages = dict.fromkeys(stage for profile in profiles.values() for stage in profile)
    rows = [(stage, *(spent(profile.get(stage)) for profile in profiles.values())) for stage in stages]
    return table(("stage", *profiles), rows)


def profiles_of(result: Result) -> dict[str, Mapping[str, Mapping[str, float]]]:
    """Row and contender → stage → what it took in the run with the median wall time."""
    found = {}
    for name in PROFILED:
        for contender, runs in result.get("rows", {}).get(name, {}).get("runs", {}).items():
            one = sorted(runs, key=lambda each: each["wall"])[len(runs) // 2]
            if one.get("stages"):
                found[f"`{name}`, {contender}"] = one["stages"]
    return found


def spent(stage: Mapping[str, float] | None) -> str:
    return f"{stage['processor']:.2f} / {stage['wall']:.2f}" if stage else ""


def middle(runs: Sequence[Mapping[str, float]], what: str) -> float:
    return median(one[what] for one in runs)


def merging_table(results: Sequence[Result]) -> str:
    """How long a merge takes, next to `cp` and PEFT."""
    rows = []
    for result in results:
        measured = result.get("rows", {})
        row, peft = measured.get("merge", {}), measured.get("peft", {}).get("runs", {}).get("PEFT")
        for name, runs in merges(row) if "runs" in row else ():
            cpu = name == "merge cpu"
            theirs = peft if cpu and measured.get("peft", {}).get("shape") == row["shape"] else None
            memory = megabytes(max(one["peak_memory"] for one in runs))
            rows.append(
                (
                    machine_of(result),
                    f"{row['shape']}, {row['bytes'] / 1e9:.2f} GB",
                    f"{middle(row['runs'][COPY], 'wall'):.1f} s",
                    f"{middle(runs, 'wall'):.1f} s on {name.removeprefix('merge ')}, "
                    f"of which {middle(runs, 'startup'):.1f} s start-up",
                    f"{middle(theirs, 'wall'):.1f} s" if theirs else "",
                    memory + (f" / {megabytes(max(one['peak_memory'] for one in theirs))}" if theirs else ""),
                )
            )
    heads = ("machine", "shape of", "`cp -r` + `sync`", "`loratool merge`", "PEFT", "peak memory (PEFT's)")
    return table(heads, rows) if rows else UNMEASURED


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


def machine_of(result: Result) -> str:
    facts = result["machine"]
    return f"{facts['processor']}{'' if facts['GPU'] == 'none' else ', ' + facts['GPU']}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def written(page: str, texts: Mapping[str, str]) -> str:
    """A page with its blocks as they are to be."""

    def filled(found: re.Match[str]) -> str:
        text = texts[found["name"]]
        return f"{found['begin']}\n{text}\n\n{found['end']}" if text else f"{found['begin']}{found['end']}"

    return BLOCK.sub(filled, page)


def stray_numbers(page: str) -> list[str]:
    """Lines with numbers that stand outside of blocks and are not in code or names."""
    rest = WITHOUT.sub("", BLOCK.sub("", page))
    return [line.strip() for line in rest.splitlines() if re.search(r"\d", line)]


def problems(root: Path) -> list[str]:
    """What is not as the kept results say."""
    texts = blocks(read_results(list((root / RESULTS).glob("*.json"))))
    found = []
    for name in (PERFORMANCE, README, ROUNDING):
        page = (root / name).read_text(encoding="utf-8")
        if written(page, texts) != page:
            found.append(f"{name}: its tables are not those of {RESULTS}; run python benchmarks/numbers.py")
        if name in GUARDED:
            found += [
                f"{name}: a number that benchmarks/numbers.py did not write: {line}" for line in stray_numbers(page)
            ]
    return found


def main(arguments: Sequence[str] | None = None, root: Path = REPOSITORY) -> None:
    parser = argparse.ArgumentParser(prog="numbers.py", description="Write the numbers of the pages, or check them.")
    parser.add_argument("results", nargs="*", type=Path, help="results to keep in place of those kept before")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail where a page is not as it should be"
    )
    options = parser.parse_args(arguments)
    kept = root / RESULTS
    try:
        if options.check:
            found = problems(root)
            print("\n".join(found) or "every number is one of benchmarks/results")
            sys.exit(bool(found))
        if options.results:
            read_results(options.results)
            if kept.exists():
                for path in {*kept.glob("*.json")} - {path.resolve() for path in options.results}:
                    path.unlink()
            kept.mkdir(parents=True, exist_ok=True)
            for path in options.results:
                if path.resolve().parent != kept.resolve():
                    shutil.copyfile(path, kept / path.name)
        texts = blocks(read_results(list(kept.glob("*.json"))))
    except MixedResultsError as error:
        sys.exit(str(error))
    for name in (PERFORMANCE, README, ROUNDING):
        path = root / name
        path.write_text(written(path.read_text(encoding="utf-8"), texts), encoding="utf-8")
