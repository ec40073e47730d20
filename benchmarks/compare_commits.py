"""Two commits side by side: the bytes of every command's output, and what each command costs.

    python benchmarks/compare_commits.py OLD NEW                        bytes, on a tiny model (needs peft and transformers)
    python benchmarks/compare_commits.py OLD NEW --speed merge,resize   ratios of times and memory, in models' shapes
    python benchmarks/compare_commits.py OLD NEW --speed dequantize --device cuda --where /dev/shm

OLD and NEW are commits, or folders that hold a source tree. Runs of both take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = "OUT"
CASES: dict[str, str] = {
    "merge": "merge base adapter -o OUT --device cpu",
    "merge, weight": "merge base adapter -o OUT --device cpu -w -0.7",
    "merge, float16 in small shards": "merge base adapter -o OUT --device cpu --dtype float16 --shard-size 100kB",
    "merge of two": "merge base adapter half -o OUT --device cpu -w 0.5 -w 1.5",
    "merge --dry-run": "merge base adapter -o OUT --device cpu --dry-run --json",
    "rescale": "rescale adapter -o OUT --scale 0.5",
    "rescale, baked": "rescale adapter -o OUT --bake --match mlp=0.8",
    "rescale to a norm": "rescale adapter -o OUT --spectral 1 --each",
    "resize": "resize adapter -o OUT --rank 2 --device cpu",
    "resize, energy": "resize adapter -o OUT --energy 0.9 --device cpu",
    "resize, budget": "resize adapter -o OUT --budget 4kB --device cpu",
    "combine": "combine adapter half -o OUT --device cpu -w 0.7 -w 1.2",
    "combine, ties": "combine adapter half -o OUT --device cpu --method ties --density 0.3",
    "combine, dare": "combine adapter half -o OUT --device cpu --method dare_ties --density 0.5 --seed 3",
    "combine, core": "combine adapter half -o OUT --device cpu --method tsv",
    "extract": "extract base merged -o OUT --device cpu --rank 4",
    "inspect": "inspect adapter --base base --values --check --tensors --device cpu --json",
    "inspect a model": "inspect base --check --tensors --json",
    "compare": "compare adapter half --device cpu --json",
    "estimate": "estimate base --rank 8 --target all-linear --json",
}
SPEED: dict[str, tuple[str, str]] = {  # what is timed → the model's shape and the command
    "merge": ("llama-3.2-1b", "merge base adapter -o OUT --device cpu"),
    "resize": ("llama-3.2-1b", "resize adapter -o OUT --rank 8 --device cpu"),
    "combine": ("llama-3.2-1b", "combine adapter adapter -o OUT --device cpu --rank 16"),
    "inspect": ("llama-3.2-1b", "inspect adapter --base base --device cpu"),
    "dequantize": ("llama-3-8b", "merge nf4 adapter -o OUT --dequantize --shard-size 5GB --json --device cpu"),
}
CHANGES = (
    "cost",
    "seconds",
    "startup_seconds",
    "profile",
    "peak_memory",
    "device",
    "schema",
)  # of JSON: another in each run, or moved


def main() -> None:
    """Compare, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--speed", default="", help=f"a comma list of {', '.join(SPEED)}")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each")
    parser.add_argument("--device", default="cpu", help="of what is timed")
    parser.add_argument("--where", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare-", dir=options.where) as home:
        trees = [source(word, Path(home) / name) for word, name in ((options.old, "old"), (options.new, "new"))]
        if options.speed:
            for name in options.speed.split(","):
                print(*timed(name, trees, Path(home), options.pairs, options.device), sep="\n", flush=True)
            return
        differing = 0
        for name, told in compared(trees, Path(home)):
            print(f"{name:<34}{told}", flush=True)
            differing += told != "equal"
    sys.exit(1 if differing else 0)


def source(word: str, folder: Path) -> Path:
    """The source tree of a commit; a folder is one already."""
    if Path(word).is_dir():
        return Path(word).resolve()
    folder.mkdir()
    packed = subprocess.run(["git", "archive", word, "loratool"], cwd=HERE.parent, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def run(tree: Path, words: Sequence[str], place: Path) -> tuple[str, float, int]:
    """What a command prints, its seconds with the sync behind it, and its peak memory in bytes."""
    paths = filter(None, (str(tree), os.environ.get("PYTHONPATH")))  # where packages may be that both need
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    own.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled modules are kept, as where a package is installed
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "loratool", *words], cwd=place, env=own, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        os.sync()
        seconds = time.perf_counter() - started
        if code := os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{tree}: loratool {' '.join(words)} ended with {code}")
        out.seek(0)
        return out.read(), seconds, usage.ru_maxrss * 1024


def compared(trees: Sequence[Path], home: Path) -> Iterator[tuple[str, str]]:
    """Each case, with "equal" or what differs."""
    place = home / "models"
    runpy.run_path(str(HERE.parent / "fixtures" / "make_tiny.py"))["make_tiny"](place)
    for words in ("rescale adapter -o half --scale 0.5 --bake", "merge base adapter -o merged --device cpu"):
        run(trees[0], words.split(), place)
    for name, line in CASES.items():
        found = []
        for tree in trees:
            shutil.rmtree(place / OUT, ignore_errors=True)
            said, _, _ = run(tree, line.split(), place)
            files = {p.relative_to(place / OUT): content(p) for p in (place / OUT).rglob("*") if p.is_file()}
            found.append(files or {Path("stdout"): steady(json.loads(said))})
        one, other = found
        differing = sorted(str(path) for path in {*one, *other} if one.get(path) != other.get(path))
        yield name, f"differs: {', '.join(differing)}" if differing else "equal"


def content(path: Path) -> Any:
    """The bytes of a file; of a record its data, in which nothing of the run is told."""
    return steady(json.loads(path.read_text())) if path.name == "loratool.json" else path.read_bytes()


def steady(value: Any) -> Any:
    """Data without what is another in each run."""
    if isinstance(value, dict):
        return {key: steady(each) for key, each in value.items() if key not in CHANGES}
    return [steady(each) for each in value] if isinstance(value, list) else value


def timed(name: str, trees: Sequence[Path], home: Path, pairs: int, device: str) -> Iterator[str]:
    """The ratio of times, new over old, of pairs that take turns; and that of the peak memory.

    Where the command tells its cost, that counts, without start-up.
    """
    shape, line = SPEED[name]
    line = line.replace("--device cpu", f"--device {device}")
    place = home / shape
    if not place.exists():
        subprocess.run(
            [sys.executable, str(HERE / "shapes.py"), shape, str(place)], check=True, stdout=subprocess.DEVNULL
        )
    if " nf4 " in line and not (place / "nf4").exists():
        words = [str(HERE / "packed_shapes.py"), shape, "nf4", str(place / "nf4")]
        subprocess.run([sys.executable, *words], check=True)  # in here, it would count as peak memory of all commands
    taken: list[list[float]] = [[], []]
    peaks = [0, 0]
    for turn in range(pairs + 1):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            said, seconds, peak = run(trees[which], line.split(), place)
            if "--json" in line:
                cost = json.loads(said)["cost"]
                seconds = cost["seconds"] - cost["startup_seconds"]
            shutil.rmtree(place / OUT, ignore_errors=True)
            if turn:  # the first compiles the modules
                taken[which].append(seconds)
                peaks[which] = max(peaks[which], peak)
    ratios = sorted(new / old for old, new in zip(*taken, strict=True))
    times = [statistics.median(each) for each in taken]
    yield f"{name} ({shape}): {times[0]:.2f} s → {times[1]:.2f} s, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    yield f"  peak memory {peaks[0] / 1e6:.0f} MB → {peaks[1] / 1e6:.0f} MB, ratio {peaks[1] / peaks[0]:.2f}"


if __name__ == "__main__":
    main()
