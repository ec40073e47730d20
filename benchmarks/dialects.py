"""What adapters of other dialects cost: resizing, merging into one file, converting, GGUF, and telling them apart.

    python benchmarks/dialects.py                          all rows; 6 GB of a Flux model
    python benchmarks/dialects.py --whole                  all of it: 24 GB, and as much for the output
    python benchmarks/dialects.py --rows resize,convert --json result.json

Models and adapters are made in real shapes, outside the repository, and removed afterwards, after Ctrl-C too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

from algebra_inputs import linear_layers, write_adapter
from dialect_shapes import DOUBLE, SINGLE, flux_modules, make_flux, make_gguf, make_kohya, make_mixture
from findings import (
    Finding,
    at_least,
    at_most,
    megabytes,
    multiple,
    ratio,
    seconds,
)
from rows import measure, parser_of
from running import Run, apart, loratool_run, run, say
from shapes import SHAPES

RANK, NEW_RANK = 64, 16
PART = (5, 9)  # blocks of a Flux of 6 GB
SVD_AT_MOST = 3072 * 9216  # elements of the largest matrix whose SVD is timed
ADAPTERS = 500
COPY = 'import sys; data = open(sys.argv[1], "rb").read(); open(sys.argv[2], "wb").write(data)'


def loratool(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "loratool", *map(str, words), "-q"]


def turns_of(contenders: dict[str, list[str]], out: Path, turns: int) -> dict[str, list[Run]]:
    """Runs of each contender, one directly after the other; what each writes at `out` is removed."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for turn in range(turns):
        for name in list(contenders) if turn % 2 == 0 else list(reversed(contenders)):
            os.sync()
            runs[name].append(loratool_run(contenders[name]))
            last = runs[name][-1]
            say(f"turn {turn + 1}: {name} {last.wall:.2f} s, {last.peak_memory / 1e6:.0f} MB")
            for path in out.parent.glob(f"{out.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return runs


def walls(runs: Sequence[Run]) -> float:
    return median(one.wall for one in runs)


def svd_seconds(sizes: Sequence[tuple[int, int]]) -> float:
    """What kohya's resize_lora computes of modules: a full SVD of each whole update, in float32.

    Each size up to a limit is timed once, and larger ones are taken in proportion: rows · columns · the smaller one.
    """
    import torch

    timed: dict[tuple[int, int], float] = {}
    for rows, columns in sorted(set(sizes)):
        if rows * columns <= SVD_AT_MOST:
            update = torch.randn(rows, RANK) @ torch.randn(RANK, columns)
            started = time.perf_counter()
            torch.linalg.svd(update, full_matrices=True)
            timed[rows, columns] = time.perf_counter() - started
            say(f"full SVD of {rows} × {columns}: {timed[rows, columns]:.1f} s")

    def work(size: tuple[int, int]) -> float:
        return size[0] * size[1] * min(size)

    pace = median(taken / work(size) for size, taken in timed.items())
    return sum(timed.get(size, pace * work(size)) for size in sizes)


def resize(folder: Path, options: argparse.Namespace) -> list[Finding]:
    modules = flux_modules()
    apart(make_kohya, folder / "flux.safetensors", modules, RANK)
    out = folder / "resized.safetensors"
    words = loratool("resize", folder / "flux.safetensors", "-o", out, "--rank", str(NEW_RANK), "--device", "cpu")
    runs = turns_of({"resize": words}, out, options.turns)["resize"]
    svd = apart(svd_seconds, list(modules.values()))
    count = Counter(modules.values())
    note = f"{len(modules)} modules of {len(count)} sizes; larger ones in proportion"
    return [
        Finding(
            f"resize of a Flux adapter in kohya's layout, rank {RANK} to {NEW_RANK}", seconds(walls(runs)), walls(runs)
        ),
        Finding("a full SVD of each update, as kohya's resize_lora computes it", seconds(svd), svd, note=note),
        at_least("resize: full SVDs over the whole process", svd / walls(runs), 300, multiple),
    ]


def merge(folder: Path, options: argparse.Namespace) -> list[Finding]:
    blocks = (DOUBLE, SINGLE) if options.whole else PART
    base, adapter, out = folder / "flux1.safetensors", folder / "lora.safetensors", folder / "merged.safetensors"
    apart(make_flux, base, *blocks)
    apart(make_kohya, adapter, flux_modules(*blocks), 16)
    contenders = {
        "cp": ["cp", "--reflink=never", str(base), str(out)],
        "merge": loratool("merge", base, adapter, "-o", out, "--device", "cpu", "--json"),
    }
    size = base.stat().st_size
    runs = turns_of(contenders, out, options.turns)
    for path in (base, adapter):
        path.unlink()
    what = f"merge into one Flux file of {size / 1e9:.0f} GB"
    return [
        Finding(f"{what}: cp", seconds(walls(runs["cp"])), walls(runs["cp"])),
        at_most(f"{what}: over cp", walls(runs["merge"]) / walls(runs["cp"]), 1.5, ratio),
        at_most(f"{what}: peak memory", max(one.peak_memory for one in runs["merge"]), 450e6, megabytes),
    ]


def convert(folder: Path, options: argparse.Namespace) -> list[Finding]:
    source, out = folder / "kohya.safetensors", folder / "converted.safetensors"
    apart(make_kohya, source, flux_modules(), RANK)
    contenders = {
        "read and write": [sys.executable, "-c", COPY, str(source), str(out)],
        "convert": loratool("convert", source, "-o", out, "--to", "comfy"),
    }
    runs = turns_of(contenders, out, options.turns)
    copied = walls(runs["read and write"])
    what = f"convert of a Flux adapter of {source.stat().st_size / 1e6:.0f} MB, with its proof"
    return [
        Finding(f"{what}: reading and writing the bytes", seconds(copied), copied),
        at_most(f"{what}: over it", walls(runs["convert"]) / copied, 3.0, ratio),
    ]


def gguf(folder: Path, options: argparse.Namespace) -> list[Finding]:
    shape = SHAPES["llama-3.2-1b"]
    base, out = folder / "base.gguf", folder / "merged.gguf"
    apart(make_gguf, base, shape.name)
    attention = {name: size for name, size in linear_layers(shape).items() if ".self_attn." in name}
    apart(write_adapter, folder / "attention", attention, 16, 1)
    contenders = {
        "cp": ["cp", "--reflink=never", str(base), str(out)],
        "merge": loratool("merge", base, folder / "attention", "-o", out, "--device", "cpu", "--json"),
    }
    runs = turns_of(contenders, out, options.turns)
    what = "merge of an adapter on attention into a 1B GGUF in Q4_K and Q6_K"
    return [
        Finding(f"{what}: cp", seconds(walls(runs["cp"])), walls(runs["cp"])),
        at_most(f"{what}: over cp", walls(runs["merge"]) / walls(runs["cp"]), 3.0, ratio),
        Finding(f"{what}: peak memory", megabytes(peak := max(r.peak_memory for r in runs["merge"])), peak),
    ]


RECOGNISE = """
import sys, time
from loratool.adapters.formats import read_adapter
read_adapter(sys.argv[1])
started = time.perf_counter()
for path in sys.argv[1:]:
    read_adapter(path)
print((time.perf_counter() - started) / len(sys.argv[1:]))
"""


def recognition(folder: Path, options: argparse.Namespace) -> list[Finding]:
    paths = apart(make_mixture, folder / "mixed", ADAPTERS)
    each = [float(run([sys.executable, "-c", RECOGNISE, *map(str, paths)])[1]) for _ in range(options.turns)]
    found = median(each)
    what = f"reading the headers of {ADAPTERS} adapters of five dialects: time of each"
    return [at_most(what, found, 0.002, lambda value: f"{1000 * value:.2f} ms")]


ROWS: dict[str, Callable[[Path, argparse.Namespace], list[Finding]]] = {
    "resize": resize,
    "merge": merge,
    "convert": convert,
    "gguf": gguf,
    "recognition": recognition,
}


if __name__ == "__main__":
    parser = parser_of(__doc__, ROWS)
    parser.add_argument("--whole", action="store_true", help="merge into all of a Flux model, 24 GB")
    measure(parser, ROWS, "dialects")
