"""What a merge into a quantised base costs, next to the same merge into a plain one; with `verify` next to `cat`.

    python benchmarks/quantised.py                            1B shape: nf4, GPTQ, AWQ, FP8
    python benchmarks/quantised.py --families nf4 --rows merge,decode --json result.json

Where bitsandbytes, peft and transformers are installed, as in the environment of `make acceptance`, PEFT's merge into the
nf4 base runs too. It packs what it merges anew, as `--requantize` does. On a GPU, decoding is measured next to copying.

Bases, and an adapter on all of their linear layers, are made in a real model's shape, outside the repository. All
contenders run turn by turn as whole processes that end in `sync`. All that was made is removed, after Ctrl-C too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

from decoding import times_of
from findings import Finding, aligned, at_most, finding_table, megabytes, ratio, seconds, write_result
from machine import describe, filesystem, gpus
from packed_shapes import FAMILIES, make_packed
from running import HERE, Run, apart, loratool_run, say, scratch, set_cache
from shapes import SHAPES, Shape, make

PLAIN, PEFT = "bf16", "nf4, PEFT"
MORE_MEMORY = 60e6  # bytes
LIMITS = {"nf4": (1.3, 2.0)}  # of touched-only and of --dequantize, over the merge into a plain base
OTHERS = (1.5, 2.2)
CAT = 2.5  # of verify, over reading the same files
ROWS = ("merge", "verify", "decode")


def command(folder: Path, family: str, *options: str) -> list[str]:
    words = ["merge", str(folder / family), str(folder / PLAIN / "adapter"), "-o", str(folder / "out"), *options]
    return [sys.executable, "-m", "loratool", *words, "--device", "cpu", "-q", "--json"]


def prepare(folder: Path, shape: Shape, families: Sequence[str]) -> dict[str, list[str]]:
    """Make all models; the command of each contender."""
    say(f"making {shape.name} …")
    apart(make, shape, folder / PLAIN)
    contenders = {PLAIN: command(folder, f"{PLAIN}/base")}
    for family in families:
        say(f"making {shape.name} in {family} …")
        apart(make_packed, shape, family, folder / family)
        contenders[f"{family}, touched only"] = command(folder, family)
        contenders[f"{family}, --dequantize"] = command(folder, family, "--dequantize")
    if "nf4" in families and all(find_spec(name) for name in ("bitsandbytes", "peft", "transformers")):
        contenders["nf4, --requantize"] = command(folder, "nf4", "--requantize", "--accept-loss")
        places = (folder / "nf4", folder / PLAIN / "adapter", folder / "out")
        contenders[PEFT] = [sys.executable, str(HERE / "programs.py"), "peft-merge-packed", *map(str, places)]
    return contenders


def shown(one: Run, size: int) -> dict[str, float]:
    """What the pages show of a run that writes so many bytes."""
    own = {"wall": one.wall, "work": one.work, "startup": one.startup, "processor": one.processor}
    return {**own, "peak_memory": one.peak_memory, "bytes": size}


def take_turns(folder: Path, contenders: dict[str, list[str]], turns: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for turn in range(turns):
        names = list(contenders) if turn % 2 == 0 else list(reversed(contenders))
        for name in names:
            os.sync()
            one = loratool_run(contenders[name])
            runs[name].append(one)
            shutil.rmtree(folder / "out")
            say(f"turn {turn + 1}: {name} {one.wall:.2f} s, CPU {one.processor:.1f} s, {one.peak_memory / 1e6:.0f} MB")
    return runs


def verified(folder: Path, shape: str, turns: int) -> list[Finding]:
    """`verify` over `cat` of the files that it reads: all of them in the page cache before each run, or none.

    Files in memory are always in the cache.
    """
    caches = (True,) if filesystem(folder) == "tmpfs" else (True, False)
    merged, base, adapter = folder / "out", folder / PLAIN / "base", folder / PLAIN / "adapter"
    loratool_run(command(folder, f"{PLAIN}/base"))
    check = [sys.executable, "-m", "loratool", "verify", str(merged), "-q"]
    ways = {
        "verify with base and adapter": ((merged, base, adapter), ["--base", str(base), "--adapter", str(adapter)]),
        "verify by the record": ((merged,), []),
    }
    found: list[Finding] = []
    for (name, (places, words)), warm in product(ways.items(), caches):
        files = [str(path) for place in places for path in sorted(place.glob("*.safetensors"))]
        contenders = {"cat": ["sh", "-c", 'cat "$@" > /dev/null', "cat", *files], name: [*check, *words]}
        cache = "warm cache" if warm else "cold cache"
        wall: dict[str, list[float]] = {each: [] for each in contenders}
        for turn, (each, command_line) in product(range(turns), contenders.items()):
            for place in (folder, folder / PLAIN):
                set_cache(place, warm)
            wall[each].append(loratool_run(command_line).wall)
            say(f"turn {turn + 1}: {each}, {cache} {wall[each][-1]:.2f} s")
        reading, taken = (median(wall[each]) for each in contenders)
        row = f"{shape}: {name}, {cache}"
        found.append(Finding(f"{row}: cat of the files read", seconds(reading), reading))
        found.append(at_most(f"{row}: over cat", taken / reading, CAT, ratio))
    shutil.rmtree(merged)
    return found


def decoded_on(device: str, folder: Path, families: Sequence[str]) -> list[Finding]:
    """Weights that are decoded on a device, over plain ones that are read and copied there."""
    places = {PLAIN: folder / PLAIN / "base", **{family: folder / family for family in families}}
    taken = apart(times_of, places, device)
    plain = taken.pop(PLAIN)
    found = [Finding(f"weights of a block to {device}: read and copied", f"{1000 * plain:.1f} ms", plain)]
    for family, time in taken.items():
        found.append(
            at_most(
                f"weights of a block to {device}: {family}, read and decoded there, over it", time / plain, 1.0, ratio
            )
        )
    return found


def judge(runs: dict[str, list[Run]]) -> list[Finding]:
    """Times and memory over those of the merge into a plain base."""

    def wall(name: str) -> float:
        return median(one.wall for one in runs[name])

    def peak(name: str) -> int:
        return max(one.peak_memory for one in runs[name])

    found = [Finding("merge into the plain base", seconds(wall(PLAIN)), wall(PLAIN))]
    for name in runs:
        if name.endswith(("PEFT", "--requantize")):
            found.append(Finding(f"{name}: time over it", ratio(wall(name) / wall(PLAIN)), wall(name) / wall(PLAIN)))
            found.append(Finding(f"{name}: peak memory", megabytes(peak(name)), peak(name)))
        elif name != PLAIN:
            family, _, way = name.partition(", ")
            limit = LIMITS.get(family, OTHERS)[way == "--dequantize"]
            found.append(at_most(f"{name}: time over it", wall(name) / wall(PLAIN), limit, ratio))
            found.append(at_most(f"{name}: memory above it", peak(name) - peak(PLAIN), MORE_MEMORY, megabytes))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="llama-3.2-1b", help="[default: llama-3.2-1b]")
    add("--families", default=",".join(FAMILIES), help=f"comma-separated [default: {','.join(FAMILIES)}]")
    add("--turns", type=int, default=3, help="runs of each contender; medians count [default: 3]")
    add("--rows", default=",".join(ROWS), help=f"comma-separated [default: {','.join(ROWS)}]")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to make models [default: the system's]")
    add("--json", type=Path, metavar="FILE", help="write all that was measured there too")
    options = parser.parse_args(arguments)
    chosen = {name: getattr(options, name).split(",") for name in ("families", "rows")}
    for name, known in (("families", FAMILIES), ("rows", ROWS)):
        if unknown := sorted({*chosen[name]} - {*known}):
            parser.error(f"--{name}: {', '.join(unknown)}: unknown; there are {', '.join(known)}")
    families, wanted = chosen["families"], chosen["rows"]
    with scratch(options.folder, "quantised") as folder:
        facts = describe(folder, os.getloadavg()[0])
        contenders = prepare(folder, SHAPES[options.shape], [] if wanted == ["verify"] else families)
        findings, rows = [], {}
        if "merge" in wanted:
            runs = take_turns(folder, contenders, options.turns)
            findings += judge(runs)
            size = SHAPES[options.shape].base_bytes
            every = {name: [shown(one, size) for one in each] for name, each in runs.items()}
            rows["merge into"] = {"shape": options.shape, "bytes": size, "runs": every}
        if "verify" in wanted:
            findings += verified(folder, options.shape, options.turns)
        if "decode" in wanted and gpus():
            findings += decoded_on("cuda:0", folder, families)
        write_result(options.json, facts, findings, turns=options.turns, rows=rows)
    print("\n\n".join([aligned(list(facts.items())), finding_table(findings)]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
