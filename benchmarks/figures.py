"""What is promised of a merge, and what the runs of `engine.py` say of it.

A ratio is the median of those of the turns, in each of which all contenders ran one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from findings import Finding, at_least, at_most, megabytes, multiple, rate, ratio

Row = Mapping[str, Any]  # what `engine.py` measured: shape, bytes, runs (contender → one a turn), …
COPY, COPY_FILE, BATCH, SINGLES = "cp -r", "cp", "batch", "single merges"
STRENGTH = 1e-3  # ‖ΔW‖/‖W‖ at which compensated rounding is measured
EXPERT_MEMORY = 450e6  # bytes


class Measured:
    """All rows of one run of `engine.py`, and which promises hold on its machine."""

    def __init__(self, rows: Mapping[str, Row], startup: Mapping[str, Row], cores: int, has_gpu: bool) -> None:
        """`startup` has seconds of processor time by program."""
        self.rows, self.startup = rows, startup
        self.large, self.small = has_gpu and cores >= 8, cores <= 4

    def findings(self) -> list[Finding]:
        """Of every row that was measured."""
        every: dict[str, Callable[[Row], Iterator[Finding]]] = {
            "merge": self.of_merge,
            "peft": self.of_peft,
            "cold": self.of_cold,
            "layer": self.of_layer,
            "single": self.of_single,
            "large": self.of_large,
            "batch": self.of_batch,
            "bytes": self.of_bytes,
            "exact": self.of_exact,
            "compensated": self.of_compensated,
            "rounding": self.of_rounding,
            "experts": self.of_experts,
        }
        return [found for name, row in self.rows.items() if "skipped" not in row for found in every[name](row)]

    def of_merge(self, row: Row) -> Iterator[Finding]:
        large, small = self.large and row["shape"] == "llama-3-8b", self.small and row["shape"] == "llama-3.2-1b"
        copies = row["runs"][COPY]
        for name, runs in merges(row):
            cpu = name == "merge cpu"
            limits = ((1.6, 2.0) if cpu else (2.2, 2.8)) if large else (None, None)
            what, speeds = said(row, name), ratios(copies, runs, "wall", "work")
            yield at_least(
                f"{what}: rate over that of `cp -r`, after start-up", *first(speeds, limits), note=spread(speeds)
            )
            speeds = ratios(runs, copies, "wall", "wall")
            limits = (2.0, 1.5) if small and cpu else (None, None)
            yield at_most(f"{what}: whole process over `cp -r` + `sync`", *first(speeds, limits), note=spread(speeds))
            yield Finding(f"{what}: rate after start-up", rate(value := speed(runs)), value)
            effort = self.effort(runs)
            yield Finding(f"{what}: CPU seconds a GB, without start-up", ratio(effort), effort)
            if (older := row["runs"].get("older cpu")) and cpu:
                efforts = [self.effort([one]) / self.effort([old]) for one, old in both(runs, older)]
                limits = (0.75, 0.6) if large else (None, None)
                yield at_most(
                    f"{what}: CPU seconds a GB over those of {row['older']}",
                    *first(efforts, limits),
                    note=spread(efforts),
                )
                speeds = ratios(older, runs, "work", "work")
                yield at_least(f"{what}: rate over that of {row['older']}", *first(speeds), note=spread(speeds))
            peak = max(one["peak_memory"] for one in runs)
            yield at_most(f"{what}: peak memory", peak, 350e6 if cpu else None, megabytes, 300e6)
            if memory := max(one["gpu_memory"] for one in runs):
                yield Finding(f"{what}: GPU memory", megabytes(memory), memory)

    def of_peft(self, row: Row) -> Iterator[Finding]:
        theirs = row["runs"]["PEFT"]
        speeds = ratios(theirs, row["runs"]["merge cpu"], "wall", "wall")
        limits = (6.0, 10.0) if self.small and row["shape"] == "llama-3.2-1b" else (None, None)
        what = f"{row['shape']}: PEFT's load, merge and save"
        yield at_least(f"{what}, over `loratool merge`", speeds[len(speeds) // 2], limits[0], multiple, limits[1])
        peak = max(one["peak_memory"] for one in theirs)
        yield Finding(f"{what}: peak memory", megabytes(peak), peak)

    def of_cold(self, row: Row) -> Iterator[Finding]:
        yield from self.over_copy(row, "inputs not in the page cache", 1.0 if self.small else None)

    def of_layer(self, row: Row) -> Iterator[Finding]:
        yield from self.over_copy(row, "adapter on one layer", 1.0 if self.small else None)

    def over_copy(self, row: Row, how: str, limit: float | None) -> Iterator[Finding]:
        for name, runs in merges(row):
            speeds = ratios(runs, row["runs"][COPY], "wall", "wall")
            what = f"{said(row, name)}, {how}: whole process over `cp -r` + `sync`"
            yield at_most(what, *first(speeds, (limit, None)), note=spread(speeds))

    def of_single(self, row: Row) -> Iterator[Finding]:
        for name, runs in merges(row):
            speeds = ratios(row["runs"][COPY_FILE], runs, "wall", "work")
            limits = (0.8, 1.2) if self.large else (None, None)
            what = f"{said(row, name)}, one file: rate over that of `cp`, after start-up"
            yield at_least(what, *first(speeds, limits), note=spread(speeds))

    def of_large(self, row: Row) -> Iterator[Finding]:
        for name, runs in merges(row):
            what = f"{said(row, name)}, {row['bytes'] / 1e9:.0f} GB of it: rate after start-up"
            yield Finding(what, rate(value := speed(runs)), value)
            other = self.rows.get("merge", {})
            if name in other.get("runs", {}):
                over = value / speed(other["runs"][name])
                yield at_least(f"{what}, over that of {other['shape']}", over, 1.0, ratio)

    def of_batch(self, row: Row) -> Iterator[Finding]:
        over = ratios(row["runs"][BATCH], row["runs"][SINGLES], "wall", "wall")
        what = f"{row['shape']}, {row['device']}: four outputs with `--also`, over four single merges"
        yield at_most(what, *first(over, (0.6, 0.45)), note=spread(over))

    def of_bytes(self, row: Row) -> Iterator[Finding]:
        roots = row["roots"]
        equal = sum(root == next(iter(roots.values())) for root in roots.values())
        what = f"{row['shape']}: same digests with other workers, blocks and devices"
        yield Finding(what, f"{equal} of {len(roots)}", equal, "all", equal == len(roots), "; ".join(roots))
        found = row["exact"]
        right = found["elements"] - found["different"]
        what = f"{row['shape']}: elements that are the exact value, rounded once, by rational arithmetic"
        yield Finding(what, f"{right:,} of {found['elements']:,}", right, "all", not found["different"])

    def of_exact(self, row: Row) -> Iterator[Finding]:
        for name, runs in row["runs"].items():
            if name.startswith("exact"):
                plain = row["runs"][name.replace("exact", "float32")]
                over = [self.effort([one]) / self.effort([other]) for one, other in both(runs, plain)]
                what = f"{row['shape']}, cpu, {name.removeprefix('exact, ')}: CPU seconds over the engine's in float32"
                yield at_most(what, *first(over, (1.35, 1.2)), note=spread(over))

    def of_compensated(self, row: Row) -> Iterator[Finding]:
        nearest, ours = row["kept"]["nearest"], row["kept"]["compensated"]
        what, gains = f"{row['shape']}, ‖ΔW‖/‖W‖ = {STRENGTH:g}, bf16, compensated", ours["gains"].values()
        yield Finding(f"{what}: gain with `nearest`", f"{nearest['gain']:.3f}", nearest["gain"])
        yield at_least(f"{what}: gain", ours["gain"], 0.99, "{:.4f}".format, 0.999)
        yield at_least(f"{what}: least gain of a module", min(gains), 0.97, "{:.3f}".format)
        yield at_most(f"{what}: largest gain of a module", max(gains), 1.03, "{:.3f}".format)
        yield at_most(f"{what}: ‖W' − W − ΔW‖ over that of `nearest`", ours["error"] / nearest["error"], 1.2, ratio)
        runs = row["runs"]
        over = ratios(runs["merge cpu, compensated"], runs["merge cpu, nearest"], "wall", "wall")
        yield at_most(
            f"{what}: time over that of `nearest`, disk included", *first(over, (2.5, 1.7)), note=spread(over)
        )

    def of_rounding(self, row: Row) -> Iterator[Finding]:
        found = {
            one["rounding"]: one for one in row["table"] if (one["dtype"], one["strength"]) == ("bfloat16", STRENGTH)
        }
        other = min(found["nearest"]["outputs"], found["stochastic"]["outputs"])
        what = "a small real model: error of outputs, compensated over the better of nearest and stochastic"
        yield at_most(what, found["compensated"]["outputs"] / other, 1.0, ratio)

    def of_experts(self, row: Row) -> Iterator[Finding]:
        for name, runs in merges(row):
            peak = max(one["peak_memory"] for one in runs)
            what = f"one tensor of {row['bytes'] / 1e9:.2f} GB with all experts, {name.removeprefix('merge ')}: peak memory"
            yield at_most(what, peak, EXPERT_MEMORY, megabytes)

    def effort(self, runs: Sequence[Row]) -> float:
        """Median of CPU seconds a GB of output, without those that starting takes."""
        idle = {one["program"]: self.startup.get(one["program"], {}).get("processor", 0.0) for one in runs}
        return float(median((one["processor"] - idle[one["program"]]) / (one["bytes"] / 1e9) for one in runs))


def merges(row: Row) -> Iterator[tuple[str, list[Row]]]:
    """Runs of the engine as it is, by the contender's name."""
    return ((name, runs) for name, runs in row["runs"].items() if name.startswith("merge "))


def said(row: Row, name: str) -> str:
    return f"{row['shape']}, {name.removeprefix('merge ')}"


def both(one: Sequence[Row], other: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """The runs of each turn."""
    return zip(one, other, strict=True)


def ratios(one: Sequence[Row], other: Sequence[Row], first: str, second: str) -> list[float]:
    """The ratio of each turn, in order of size."""
    return sorted(this[first] / that[second] for this, that in both(one, other))


def first(
    values: Sequence[float], limits: tuple[float | None, float | None] = (None, None)
) -> tuple[float, float | None, Callable[[float], str], float | None]:
    """The median, and what is promised of it."""
    return median(values), limits[0], ratio, limits[1]


def spread(values: Sequence[float]) -> str:
    return f"turns {', '.join(map(ratio, sorted(values)))}" if len(values) > 1 else ""


def speed(runs: Sequence[Row]) -> float:
    """Bytes a second after start-up."""
    return float(median(one["bytes"] / one["work"] for one in runs))
