"""Sketches of many adapters in one file, the nearest of them to another adapter, and those that are the same update.

The file is a safetensors file: a tensor `sketches`, float32, a row of 1024 numbers for each adapter; its metadata say what the
rows are. Adapters are compared by the file alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import StoredTensor
from loratool.algebra.sketching import SIZE, VERSION, spread, tolerance
from loratool.errors import InputError, UsageError, printable
from loratool.files.outputs import check_file, check_local, write_file
from loratool.files.safefile import Layout, read_safefile
from loratool.files.untrusted import json_value
from loratool.lazy import NDArray, numpy as np
from loratool.notes import Note
from loratool.results.sketch import Neighbour, SketchFacts
from loratool.reworking.sketches import Sketch

FORMAT = "loratool-index"  # in the metadata, with the version of the sketch as its value
TENSOR = "sketches"
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "path", "base", "names", "saved"), str),
    **dict.fromkeys(("norm", "rounding"), (int, float)),
}


@dataclass(frozen=True)
class Entry:
    """What an index has of an adapter besides its sketch."""

    name: str
    path: str
    base: str
    names: str  # as `SketchFacts` has these
    norm: float
    rounding: float
    saved: str

    def facts(self) -> SketchFacts:
        names = "base" if self.names == "base" else "as stored"
        return SketchFacts(names, self.norm, self.rounding, spread(SIZE), self.saved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Index:
    """All of an index."""

    entries: tuple[Entry, ...]
    sketches: NDArray[Any]  # (entries, SIZE), float32


def write_index(path: Path, entries: Sequence[Entry], sketches: Sequence[NDArray[Any]]) -> None:
    """Write an index, under its name only when all of it is there."""
    told = {FORMAT: VERSION, "adapters": json.dumps([asdict(entry) for entry in entries])}
    layout = Layout.of([(TENSOR, "F32", (len(entries), SIZE))], told)
    values = np.stack(sketches) if sketches else np.zeros((0, SIZE))
    write_file(path, layout.header + np.ascontiguousarray(values, dtype="<f4").tobytes())


def check_index(path: Path, overwrite: bool) -> None:
    """Raise `UsageError` where an index may not be written to `path`; nothing but an index is replaced."""
    check_file(path, "-o", is_index, overwrite)
    check_local(path, "-o")
    if not path.parent.is_dir():
        raise UsageError(f"-o {printable(path)}: the folder {printable(path.parent)} does not exist")


def is_index(path: Path) -> bool:
    """Whether a file is an index, of this release or another."""
    try:
        return FORMAT in read_safefile(path).metadata
    except InputError:
        return False


def read_index(path: Path) -> Index:
    """The index in a file. Raises `InputError` where it is none, or is malformed."""
    shown = printable(path)
    try:
        file = read_safefile(path)
    except InputError as error:
        if not path.is_file():
            raise
        raise InputError(f"{error.message}; `loratool index DIR -o INDEX` makes an index of adapters") from None
    version = file.metadata.get(FORMAT)
    if version is None:
        raise InputError(f"{shown}: not an index of adapters; `loratool index DIR -o INDEX` makes one")
    if version != VERSION:
        raise InputError(
            f"{shown}: its sketches are {printable(version)}, and this release computes {VERSION}; make the index again "
            "with `loratool index DIR -o INDEX --overwrite`"
        )
    entries = tuple(entries_in(file.metadata.get("adapters", ""), shown))
    info = file.tensors.get(TENSOR)
    if info is None or info.dtype != "F32" or info.shape != (len(entries), SIZE):
        raise InputError(f"{shown}: malformed index: expected a tensor {TENSOR} of F32 {[len(entries), SIZE]}")
    bits, _ = StoredTensor(file, info).bits()
    return Index(entries, bits.view("<f4").reshape(info.shape))


def entries_in(text: str, shown: str) -> Iterable[Entry]:
    """The adapters that the metadata list."""
    try:
        table = json_value(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise InputError(f"{shown}: malformed index: its list of adapters is {error}") from None
    if not isinstance(table, list):
        raise InputError(f"{shown}: malformed index: its adapters must be a list")
    for number, row in enumerate(table):
        if not isinstance(row, dict) or any(
            not isinstance(row.get(key), kind) or isinstance(row.get(key), bool) for key, kind in TYPES.items()
        ):
            raise InputError(f"{shown}: malformed index: adapter {number} must have {', '.join(TYPES)}")
        yield Entry(**{key: row[key] for key in TYPES})


def nearest(index: Index, sketch: Sketch, most: int) -> tuple[tuple[Neighbour, ...], tuple[Note, ...]]:
    """The adapters of an index that are nearest to another one, by their estimated distances."""
    kept = [at for at, entry in enumerate(index.entries) if entry.names == sketch.names]
    notes: tuple[Note, ...] = ()
    if apart := len(index.entries) - len(kept):
        text = (
            f"{apart} of {len(index.entries)} adapters of the index are not compared: the names of their weights are "
            + (
                "those that are stored, not the base's"
                if sketch.names == "base"
                else "the base's, not those that are stored"
            )
        )
        notes = (Note("names-of-another-kind", text),)
    if not kept:
        return (), notes
    values = index.sketches[kept].astype(np.float64) - sketch.values.astype(np.float32).astype(np.float64)
    distances = np.sqrt((values * values).sum(1))
    order = np.argsort(distances, kind="stable")[:most]
    return tuple(neighbour(index.entries[kept[at]], sketch, float(distances[at])) for at in map(int, order)), notes


def neighbour(entry: Entry, sketch: Sketch, distance: float) -> Neighbour:
    same = is_same(entry.facts(), sketch.facts, distance)
    larger = max(entry.norm, sketch.norm)
    return Neighbour(
        name=printable(entry.name),
        distance=distance,
        error=distance * spread(SIZE),
        relative=distance / larger if larger else 0.0,
        same="" if not same else "same update" if entry.saved == sketch.saved else "same update, other saved tensors",
        path=printable(entry.path),
    )


BLOCK = 512  # adapters that are compared with all others at a time
ROOM = 1e-6  # relative: how far a distance from inner products may be off before it is computed from the difference


@dataclass(frozen=True)
class Sketched:
    """A sketch that is kept to be compared."""

    values: NDArray[Any]  # (m,), float32
    facts: SketchFacts


def is_same(one: SketchFacts, other: SketchFacts, distance: float) -> bool:
    """Whether two updates at a distance are the same but for rounding; untrained ones, which are zero, are not."""
    if one.names != other.names or not (one.norm and other.norm):
        return False
    return distance <= tolerance((one.norm, other.norm), (one.rounding, other.rounding))


def twins(sketches: Sequence[Sketched]) -> Iterator[tuple[int, int]]:
    """Every two that are the same update, the first before the second."""
    if len(sketches) < 2:
        return
    values = np.stack([each.values for each in sketches]).astype(np.float64)
    squares = (values * values).sum(1)
    # No distance within tolerance is larger than this; what is near enough is measured again, from the difference.
    most = np.array([tolerance([s.facts.norm], [s.facts.rounding] * 2) + ROOM * s.facts.norm for s in sketches])
    for start in range(0, len(sketches), BLOCK):
        stop = start + BLOCK
        near = squares[start:stop, None] + squares - 2 * (values[start:stop] @ values.T)
        limit = (most[start:stop, None] + most) ** 2
        for i, j in zip(*np.nonzero(near <= limit), strict=True):
            one = start + int(i)
            if one < int(j):
                distance = float(np.linalg.norm(values[one] - values[int(j)]))
                if is_same(sketches[one].facts, sketches[int(j)].facts, distance):
                    yield one, int(j)
