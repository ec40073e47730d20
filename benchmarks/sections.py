"""The sections of docs/performance.md: for each machine, what every script found there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from figures import speed
from findings import megabytes, rate, verdict
from tables import UNMEASURED, Result, machine_of, middle, table, with_note

TITLES = {  # qlora.py measures no cost, and has a page of its own
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
)  # whose stages are shown
COLUMNS = 4  # merges in one table of stages


def performance(results: Sequence[Result]) -> str:
    """The whole of them."""
    return "\n\n".join(sections(results)) if results else UNMEASURED


def sections(results: Sequence[Result]) -> Iterator[str]:
    """A section for each machine, with one for each script that ran on it."""
    by_machine: dict[str, list[Result]] = {}
    for each in results:
        if each["benchmark"] in TITLES:
            by_machine.setdefault(machine_of(each), []).append(each)
    for name, group in by_machine.items():
        facts = group[0]["machine"]
        kept = ("file system", "Python", "numpy", "torch", "peft")
        others = [f"{key} {facts[key]}" for key in kept if key in facts]
        yield f"## {name}"
        yield ", ".join([f"{facts['memory']} of memory", *others]) + "."
        for benchmark in dict.fromkeys(each["benchmark"] for each in group):
            yield f"### {TITLES[benchmark]}"
            for each in group:
                if each["benchmark"] == benchmark:
                    yield from section(each)


def section(result: Result) -> Iterator[str]:
    """The command, the findings, and the runs that they are of."""
    yield f"```console\n$ {result['command']}\n```"
    load = result["machine"].get("load before")
    yield f"Measured at commit `{result['commit']}`{f'; load of the machine before it began: {load}' if load else ''}."
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
