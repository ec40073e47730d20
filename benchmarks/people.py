"""What it costs to look after many adapters: a table of a thousand, the nearest of a thousand, fifty compared, pages.

    python benchmarks/people.py                       all rows, up to 4.5 GB below the temporary folder
    python benchmarks/people.py --rows table --json result.json

Adapters are made outside the repository, and removed afterwards, after Ctrl-C too. Those of the table have the headers of an
8B model's adapters, and holes for values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compressed_fleets import compress, compress_memory
from findings import Finding, at_most, megabytes, seconds
from html_pages import pages
from rows import measure, parser_of
from running import Run, apart, loratool_run, run, say
from shapes import SHAPES, Tensor, adapter_config, nbytes, write_adapter, write_header, write_json

SHAPE = SHAPES["llama-3-8b"]
BASES = ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", "someone/llama-3-8b-chat")
KINDS = (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ())  # modules that are adapted; () for all
RANKS = (8, 16, 32, 64)
SMALL = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "mlp.down_proj": (64, 128)}
LAYERS, SMALL_RANK = 8, 4
MATRIX = 50  # adapters that are compared with each other


def loratool(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "loratool", *map(str, words)]


def tensors_of(rank: int, kinds: Sequence[str]) -> list[Tensor]:
    """The factors on some modules of an 8B model, at a rank."""
    found: list[Tensor] = []
    for name, dtype, (rows, columns) in SHAPE.adapter:
        if not kinds or any(f".{kind}." in name for kind in kinds):
            found.append((name, dtype, (rank, columns) if ".lora_A." in name else (rows, rank)))
    return found


def make_headers(folder: Path, count: int, alike: bool) -> None:
    """Adapters of an 8B model whose values are holes: of 36 settings, or each with an α of its own."""
    for number in range(count):
        rank, kinds, base = RANKS[number % 4], KINDS[number // 4 % 3], BASES[number // 12 % 3]
        tensors = tensors_of(rank, kinds)
        own = folder / f"adapter-{number:04d}"
        own.mkdir(parents=True)
        with open(own / "adapter_model.safetensors", "wb", buffering=0) as stream:
            write_header(stream, tensors)
            stream.truncate(stream.tell() + sum(map(nbytes, tensors)))
        config = adapter_config(kinds or sorted({name.rpartition(".")[2] for name in SHAPE.linear}))
        alpha = 2 * rank if alike else rank + number
        write_json(
            own / "adapter_config.json", {**config, "r": rank, "lora_alpha": alpha, "base_model_name_or_path": base}
        )


def make_small(folder: Path, count: int) -> None:
    """Small adapters with values."""
    for number in range(count):
        own = folder / f"adapter-{number:04d}"
        own.mkdir(parents=True)
        modules = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in SMALL]
        sizes = {module: SMALL[module.partition(".layers.")[2].partition(".")[2]] for module in modules}
        tensors: list[Tensor] = []
        for module, (rows, columns) in sizes.items():
            tensors.append((f"base_model.model.{module}.lora_A.weight", "F32", (SMALL_RANK, columns)))
            tensors.append((f"base_model.model.{module}.lora_B.weight", "F32", (rows, SMALL_RANK)))
        values = np.random.default_rng(number).standard_normal(sum(map(nbytes, tensors)) // 4).astype("<f4")
        with open(own / "adapter_model.safetensors", "wb") as stream:
            write_header(stream, tensors)
            stream.write(values.tobytes())
        config = adapter_config(sorted({name.rpartition(".")[2] for name in SMALL}))
        write_json(own / "adapter_config.json", {**config, "r": SMALL_RANK, "lora_alpha": 8})


def timed(words: Sequence[str], turns: int) -> list[Run]:
    runs = []
    for turn in range(turns):
        runs.append(loratool_run(words))
        say(f"turn {turn + 1}: {runs[-1].wall - runs[-1].sync:.2f} s, processor {runs[-1].processor:.2f} s")
    return runs


def cost(
    what: str, runs: Sequence[Run], most_seconds: float | None = None, most_memory: float | None = None
) -> list[Finding]:
    """Time by the clock, CPU time, and peak memory."""
    wall, processor = (median(values) for values in ([r.wall - r.sync for r in runs], [r.processor for r in runs]))
    return [
        at_most(what, wall, most_seconds, seconds),
        Finding(f"{what}: processor", seconds(processor), processor),
        at_most(f"{what}: peak memory", max(each.peak_memory for each in runs), most_memory, megabytes),
    ]


def table(folder: Path, options: argparse.Namespace) -> list[Finding]:
    apart(make_headers, folder / "many", options.count, True)
    runs = timed(loratool("inspect", folder / "many", "--json"), options.turns)
    apart(make_headers, folder / "unlike", options.count // 10, False)
    unlike = timed(loratool("inspect", folder / "unlike", "--json"), 1)
    return [
        *cost(f"table of {options.count} adapters of an 8B model, from headers", runs, 3.0, 250e6),
        *cost(f"table of {options.count // 10} of them, no two with one config", unlike),
    ]


NEAREST = """
import sys, time
from pathlib import Path
from loratool.adapters.formats import read_adapter
from loratool.inspecting.neighbours import nearest, read_index
from loratool.reworking.sketches import sketch_of
sketch = sketch_of(read_adapter(sys.argv[2]))
started = time.perf_counter()
found, _ = nearest(read_index(Path(sys.argv[1])), sketch, 10)
print(time.perf_counter() - started)
"""


def near(folder: Path, options: argparse.Namespace) -> list[Finding]:
    apart(make_small, folder / "small", options.count)
    made = timed(loratool("index", folder / "small", "-o", folder / "small.index", "--json"), 1)
    adapter = folder / "small" / "adapter-0007"
    runs = timed(loratool("inspect", adapter, "--near", folder / "small.index", "--json"), options.turns)
    search = [
        float(run([sys.executable, "-c", NEAREST, str(folder / "small.index"), str(adapter)])[1])
        for _ in range(options.turns)
    ]
    what = f"the nearest of {options.count} indexed adapters"
    return [
        *cost(f"index of {options.count} adapters of {LAYERS * len(SMALL)} modules", made),
        *cost(what, runs, 0.5),
        Finding(f"{what}: reading the index and the search", f"{1000 * median(search):.1f} ms", median(search)),
    ]


SKETCH = """
import sys, time
from loratool.adapters.formats import read_adapter
from loratool.reworking.sketches import sketch_of
adapter = read_adapter(sys.argv[1])
started = time.perf_counter()
sketch_of(adapter)
print(time.perf_counter() - started)
"""


def sketch(folder: Path, options: argparse.Namespace) -> list[Finding]:
    tensors = tensors_of(16, ())
    apart(write_adapter, folder / "large", tensors, [name.partition(".")[2] for name in SHAPE.linear])
    took = [float(run([sys.executable, "-c", SKETCH, str(folder / "large")])[1]) for _ in range(options.turns)]
    what = f"sketch of an adapter of rank 16 on {len(tensors) // 2} modules of an 8B model"
    return [Finding(what, seconds(median(took)), median(took))]


def make_values(folder: Path, count: int) -> None:
    """Adapters of rank 16 on every linear layer of an 8B model, in bfloat16: 84 MB each."""
    targets = sorted({name.rpartition(".")[2] for name in SHAPE.linear})
    for number in range(count):
        write_adapter(folder / f"adapter-{number:04d}", tensors_of(16, ()), targets, seed=number)


def matrix(folder: Path, options: argparse.Namespace) -> list[Finding]:
    apart(make_values, folder / "matrix", MATRIX)
    runs = timed(loratool("compare", *sorted((folder / "matrix").iterdir()), "--json"), options.turns)
    return cost(
        f"compare {MATRIX} adapters of rank 16 on {len(SHAPE.adapter) // 2} modules of an 8B model", runs, 60.0, 1e9
    )


ROWS: dict[str, Callable[[Path, argparse.Namespace], list[Finding]]] = {
    "table": table,
    "near": near,
    "sketch": sketch,
    "compress": compress,
    "compress-memory": compress_memory,
    "matrix": matrix,
    "pages": lambda folder, options: pages(folder, options, make_headers),
}


if __name__ == "__main__":
    parser = parser_of(__doc__, ROWS)
    parser.add_argument("--count", type=int, default=1000, help="adapters [default: 1000]")
    measure(parser, ROWS, "people")
