"""What several GPUs of one host do, next to one of them, in one run; each number stands next to its target.

    python benchmarks/several_gpus.py --folder /dev/shm --disk DIR                 8B shape, all GPUs of this machine
    python benchmarks/several_gpus.py --folder /dev/shm --rows merge,large         some rows, to stay within a time
    python benchmarks/several_gpus.py --shape tiny --turns 1 --devices cpu,cpu     stand-ins: to see that it works

Models are made in `--folder`, and outputs go there and into `--disk`. All contenders of a row run turn by turn as whole
processes. Digests of the weights of every output are compared with those of a merge by one CPU. All that was made is
removed, after Ctrl-C too, and the JSON is written after every row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from engine import Bench, CannotMeasureError, check_space, measure_rows, merge_by, root_of
from figures import first, ratios, speed, spread
from findings import Finding, at_least, rate, ratio, seconds
from machine import describe, filesystem, gpus
from packed_shapes import make_packed
from running import HERE, REPOSITORY, Contender, apart, environment, loratool_run, say, scratch
from servers import free_port, serving
from shapes import SHAPES, TINY, Shape, make, make_adapter

ONE, ALL, PARTS, RAY = "one device", "all devices", "a process each", "Ray"
TARGETS = {  # row → of all devices over one, or of another way over one process with all of them: least, and aim
    "merge": (1.0, 1.5),
    "dequantize": (1.2, 1.8),
    "parts": (0.9, 1.0),
    "ray": (0.9, None),
    "resize": (1.0, 1.6),
    "combine": (1.0, 1.6),
    "extract": (1.0, 1.6),
}
# those on the same model follow each other; `large` is compared with `merge`
ROWS = ("merge", "parts", "ray", "resize", "combine", "extract", "dequantize", "large")
RANK, CUT = 64, 16  # of adapters that are resized and combined, and of what they become
SUMMED = 4  # adapters that are combined
Runs = Mapping[str, Any]


def make_nf4(shape: Shape, model: Path) -> None:
    """A base in nf4, and an adapter on all of its linear layers."""
    make_packed(shape, "nf4", model / "base")
    make_adapter(shape, model / "adapter")


def in_parts(devices: Sequence[str]) -> Contender:
    """`loratool merge` by a process for each device, and `--finish`."""

    def commands(model: Path, out: Path) -> list[list[str]]:
        words = [sys.executable, str(HERE / "programs.py"), "in-parts", ",".join(devices), "merge"]
        return [[*words, str(model / "base"), str(model / "adapter"), "-o", str(out / "1")]]

    return Contender(PARTS, commands)


def algebra(name: str, device: str, words: Callable[[Path], list[str]]) -> Contender:
    """A command that makes an adapter."""

    def commands(model: Path, out: Path) -> list[list[str]]:
        more = ["-o", str(out / "1"), "--device", device, "-q", "--json"]
        return [[sys.executable, "-m", "loratool", *words(model), *more]]

    return Contender(name, commands, outputs=0)


@dataclass
class SeveralDevices(Bench):
    """One call: outputs go to several places, one after the other."""

    places: Sequence[Path] = ()
    place: Path | None = None  # where they go now
    roots: dict[str, str] = field(default_factory=dict)  # model → digest of what one CPU makes of it

    @property
    def out(self) -> Path:
        return (self.place or self.folder) / "out"

    @property
    def several(self) -> str:
        """All devices, as an option; stand-ins that are the same one are one."""
        return ",".join(dict.fromkeys(self.devices))

    @property
    def real(self) -> bool:
        """Whether there are several GPUs, so that the numbers mean something."""
        return len({*self.devices}) > 1

    def one_and_all(self, *options: str) -> list[Contender]:
        return [merge_by(ONE, self.devices[0], *options), merge_by(ALL, self.several, *options)]

    def compare(
        self, row: str, shape: Shape, contenders: Sequence[Contender], *options: str, tiny: bool = False
    ) -> dict[str, Any]:
        """All contenders, turn by turn, with outputs in each place; and the digests of what they make."""
        model, reference = self.made, merge_by("cpu", "cpu", *options)
        runs: dict[str, list[dict[str, Any]]] = {}
        roots: dict[str, str] = {}
        starts = {each.name: self.start_of(each) for each in contenders if tiny}
        if model not in self.roots:
            self.once(reference, self.model, shape.base_bytes, lambda: self.roots.update({model: self.root()}))
        for place in self.places:
            self.place, name = place, filesystem(place)

            def look(contender: str, name: str = name) -> None:
                roots[f"{contender}, {name}"] = self.root()

            found = self.take_turns(f"{row}, {name}", shape.base_bytes, contenders, look=look)
            runs |= {f"{contender}, {name}": each for contender, each in found.items()}
        self.place = None
        told = {"shape": shape.name, "bytes": shape.base_bytes, "devices": list(self.devices), "starts": starts}
        return {**told, "runs": runs, "roots": {"cpu": self.roots[model], **roots}}

    def root(self) -> str:
        return root_of(self.out / "1")

    def start_of(self, contender: Contender) -> float:
        """Seconds that a contender takes for a model whose bytes cost nothing: the least of two runs."""
        tiny = self.folder / "tiny"
        if not tiny.exists():
            apart(make, TINY, tiny)
        return min(float(self.once(contender, tiny, TINY.base_bytes)["wall"]) for _ in range(2))

    def row_merge(self) -> dict[str, Any]:
        self.provide_shape(self.shape)
        return self.compare("merge", self.shape, self.one_and_all())

    def row_dequantize(self) -> dict[str, Any]:
        """The base is one file; into one file, a kernel would let one writer at a time, whatever the GPUs do."""
        self.provide(f"{self.shape.name} in nf4", make_nf4, self.shape)
        options = ("--dequantize", "--shard-size", "5GB")
        return self.compare("dequantize", self.shape, self.one_and_all(*options), *options)

    def row_large(self) -> dict[str, Any]:
        self.provide_shape(self.big)
        return self.compare("large", self.big, self.one_and_all())

    def row_parts(self) -> dict[str, Any]:
        self.provide_shape(self.shape)
        return self.compare("parts", self.shape, [merge_by(ALL, self.several), in_parts(self.devices)])

    def row_ray(self) -> dict[str, Any]:
        if find_spec("ray") is None:
            raise CannotMeasureError("needs Ray")
        self.provide_shape(self.shape)
        device = "cuda" if self.devices[0].startswith("cuda") else "cpu"
        with ray_cluster(len(self.devices) if device == "cuda" else 0):
            contenders = [merge_by(ALL, self.several), merge_by(RAY, device, "--workers=ray")]
            return self.compare("ray", self.shape, contenders, tiny=True)

    def row_resize(self) -> dict[str, Any]:
        name = self.wide(0)
        return self.of_algebra("resize", lambda model: ["resize", str(model / name), "--rank", str(CUT)])

    def row_combine(self) -> dict[str, Any]:
        names = [self.wide(number) for number in range(SUMMED)]
        words = ["--rank", str(CUT)]
        return self.of_algebra("combine", lambda model: ["combine", *(str(model / name) for name in names), *words])

    def row_extract(self) -> dict[str, Any]:
        self.provide_shape(self.shape)
        base, tuned = self.model / "base", self.model / "tuned"
        if not tuned.exists():
            words = ["merge", str(base), str(self.model / "adapter"), "-o", str(tuned), "--device", self.several, "-q"]
            loratool_run([sys.executable, "-m", "loratool", *words])
        return self.of_algebra("extract", lambda _: ["extract", str(base), str(tuned), "--rank", str(CUT)])

    def wide(self, number: int) -> str:
        """The name of an adapter of a large rank for the model."""
        self.provide_shape(self.shape)
        return self.adapter(self.shape, f"adapter-{RANK}-{number}", rank=RANK, seed=10 + number)

    def of_algebra(self, row: str, words: Callable[[Path], list[str]]) -> dict[str, Any]:
        contenders = [algebra(ONE, self.devices[0], words), algebra(ALL, self.several, words)]
        name = filesystem(self.folder)
        runs = self.take_turns(row, 0, contenders)
        told = {"shape": self.shape.name, "devices": list(self.devices)}
        return {**told, "runs": {f"{contender}, {name}": each for contender, each in runs.items()}}


@contextmanager
def ray_cluster(count: int) -> Iterator[None]:
    """A Ray cluster of this machine with so many GPUs, as `--workers ray` finds it."""
    home, port, client = Path(tempfile.mkdtemp(prefix="r", dir="/tmp")), free_port(), free_port()  # names are limited
    words = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    words += ["--port", str(port), "--ray-client-server-port", str(client), "--num-gpus", str(count)]
    words += ["--temp-dir", str(home), "--include-dashboard", "false", "--disable-usage-stats"]
    settings = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        with serving(words, client, PYTHONPATH=environment()["PYTHONPATH"]):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(home, ignore_errors=True)


def judged(rows: Mapping[str, Runs], real: bool) -> list[Finding]:
    """What was measured, next to what it has to reach; stand-ins have to reach nothing."""
    return [
        found
        for name, row in rows.items()
        if "skipped" not in row
        for found in of_row(name, row, rows.get("merge", {}), real)
    ]


def of_row(name: str, row: Runs, merge: Runs, real: bool) -> Iterator[Finding]:
    """The findings of one row, for each place of outputs."""
    what = f"{row['shape']}, {name}"
    targets = TARGETS.get(name, (None, None)) if real else (None, None)
    slow, fast = {"parts": (ALL, PARTS), "ray": (ALL, RAY)}.get(name, (ONE, ALL))
    for place in dict.fromkeys(each.partition(", ")[2] for each in row["runs"]):
        one, other = (row["runs"][f"{each}, {place}"] for each in (slow, fast))
        before, after = (spent(row, contender, runs) for contender, runs in ((slow, one), (fast, other)))
        over = [this / that for this, that in zip(before, after, strict=True)]
        where = f"output on {place}"
        yield at_least(f"{what}: {fast} over {slow}, after start-up, {where}", *first(over, targets), note=spread(over))
        if name in ("parts", "ray"):
            whole = ratios(one, other, "wall", "wall")
            yield at_least(f"{what}: {fast} over {slow}, whole processes, {where}", *first(whole), note=spread(whole))
        took = median(after)
        if "roots" not in row:
            yield Finding(f"{what}: {fast}, after start-up, {where}", seconds(took), took)
            continue
        yield Finding(f"{what}: {fast}, rate after start-up, {where}", rate(row["bytes"] / took), row["bytes"] / took)
        if name == "large" and (smaller := merge.get("runs", {}).get(f"{fast}, {place}")):
            said = f"{what}: rate of {fast} over that of {merge['shape']}, {where}"
            yield at_least(said, row["bytes"] / took / speed(smaller), 1.0 if real else None, ratio)
    if roots := row.get("roots"):
        yield of_digests(what, roots)


def spent(row: Runs, contender: str, runs: Sequence[Runs]) -> list[float]:
    """Seconds of each run after its start-up, which is that of a tiny model where it was measured."""
    if start := row.get("starts", {}).get(contender):
        return [max(one["wall"] - start, 1e-3) for one in runs]
    return [one["work"] for one in runs]


def of_digests(what: str, roots: Mapping[str, str]) -> Finding:
    """Whether every way makes the same weights."""
    equal, ways = sum(root == roots["cpu"] for root in roots.values()), "; ".join(roots)
    told = f"{equal} of {len(roots)}"
    return Finding(f"{what}: same digests as one CPU's", told, equal, "all", equal == len(roots), ways)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="llama-3-8b", help="[default: llama-3-8b]")
    add("--rows", default=",".join(ROWS), help=f"comma-separated [default: {','.join(ROWS)}]")
    add("--devices", help="comma-separated; the first is the single one [default: all GPUs]")
    add("--turns", type=int, default=3, help="runs of each contender; medians count [default: 3]")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to make models [default: the system's]")
    add("--disk", type=Path, help="another folder for outputs [default: none]")
    add("--large-size", type=float, default=40e9, help="bytes of the 70B model, at most [default: 40e9]")
    add("--json", type=Path, metavar="FILE", help="write all that was measured there too")
    options = parser.parse_args(arguments)
    options.rows = list(dict.fromkeys(options.rows.split(",")))
    if unknown := sorted({*options.rows} - {*ROWS}):
        parser.error(f"--rows: {', '.join(unknown)}: unknown; the rows are {', '.join(ROWS)}")
    found = gpus()
    options.devices = options.devices.split(",") if options.devices else [f"cuda:{n}" for n in range(len(found))]
    if len(options.devices) < 2:
        parser.error(
            f"this machine has {len(found)} GPU{'' if len(found) == 1 else 's'}, and two are needed; nothing can be "
            "measured without them (--devices cpu,cpu shows that everything works)"
        )
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    for folder in (options.folder, options.disk):
        if folder is not None and (not folder.is_dir() or folder.resolve().is_relative_to(REPOSITORY)):
            parser.error(f"{folder}: must be a folder, outside the repository")
    return options


def needs(bench: SeveralDevices, rows: Sequence[str]) -> dict[str, int]:
    """Bytes that each row has in its folder at a time: the model, an output, adapters."""
    size, wide = bench.shape.base_bytes, RANK // 4 * bench.shape.adapter_bytes // 4
    sizes = {"large": 2 * bench.big.base_bytes, "extract": 3 * size, "combine": size + SUMMED * wide}
    return {row: sizes.get(row, 2 * size) for row in rows}


def main(arguments: Sequence[str] | None = None) -> None:
    options, load = parse(arguments), os.getloadavg()[0]
    with scratch(options.folder, "gpus") as folder, scratch(options.disk or options.folder, "outputs") as disk:
        free = shutil.disk_usage(folder).free
        most, in_memory = int(min(options.large_size, free / 3)), filesystem(folder) == "tmpfs"
        places = list({filesystem(place): place for place in (disk, folder)}.values())[::-1]
        shape = SHAPES[options.shape]
        bench = SeveralDevices(folder, shape, options.devices, options.turns, None, most, in_memory, places=places)
        check_space(needs(bench, options.rows), folder)
        rows = sorted(options.rows, key=ROWS.index)
        if not bench.real:
            say("these devices are one: the numbers only show that everything works")
        measure_rows(bench, rows, describe(folder, load), lambda: judged(bench.rows, bench.real), options.json)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
