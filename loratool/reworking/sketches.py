"""Sketches of adapters: a few hundred numbers by which the same update is found again in any dialect, split or order.

The formula is in `algebra.sketching`; here are the names that are hashed, the factors, and the digest of everything else.

The names are those under which the base has the weights, whatever dialect the adapter is spelled in. Weights that some
releases fuse are named by their parts, with rows counted from the first of each part: those of known image models as
diffusers names them, those of language models as most of them do (`q_proj`, `gate_proj`, each expert).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loratool.adapters.adapter import Adapter, Flattened, StoredTensor, unloaded
from loratool.adapters.formats import NAMED
from loratool.adapters.layers import Contents, Kind, Layer, contents_of
from loratool.adapters.unsettled import settled
from loratool.algebra.lowrank.products import ROUNDING
from loratool.algebra.sketching import SHORT, Sketcher, folded, spread, squared_norm
from loratool.errors import InputError, LoratoolError, Problem, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.grouping import by_key
from loratool.lazy import NDArray, numpy as np, torch
from loratool.results.sketch import SketchFacts
from loratool.reworking.converting.fusing import split
from loratool.reworking.converting.naming import DIFFUSERS, Divided, chosen, dotted, hint_of, looked_up, readings
from loratool.reworking.converting.rows import Rows, Target

NOT_FINITE = "not-finite"  # the code of a problem
LARGEST = 1e38  # of the numbers of a sketch, which tables and indexes have in float32
DIGITS = 9  # of a number that is shown, as many as float32 has
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
Origin = Literal[
    "base", "as stored"
]  # where names are from: the base's own, or the adapter's, which others may not have
LANGUAGE = ("model.", "language_model.", "transformer.h.")  # how names of no image model begin


@dataclass(frozen=True)
class Sketch:
    """The sketch of one adapter."""

    values: NDArray[Any]  # (SIZE,), float64
    names: Origin
    norm: float  # ‖ΔW‖, exact
    rounding: float  # relative, of ΔW, by the dtype of the stored factors: the largest of all layers
    saved: str  # SHA-256 of everything besides factors; empty for nothing
    needs_base: bool = False  # names or rows are told by a base alone

    @property
    def numbers(self) -> tuple[float, ...]:
        """Those that are shown."""
        return tuple(float(f"{value:.{DIGITS}g}") for value in folded(self.values))

    @property
    def facts(self) -> SketchFacts:
        """What is to be known of them."""
        return SketchFacts(self.names, self.norm, self.rounding, spread(SHORT), self.saved)


def sketch_of(adapter: Adapter, base: Checkpoint | None = None) -> Sketch:
    """The sketch of an adapter, from its values; `base` tells names and rows that neither it nor tables do.

    Raises `InputError` or `FitError` where an update is not a product of two factors, or a value is no number.
    """
    known = settled(adapter, base.config) if base is not None else adapter
    contents = contents_of(known, "sketch", as_products=True)
    origin, targets = names = base_names(contents, base)
    needs_base = base is not None and (known is not adapter or names != base_names(contents, None))
    parts = parts_of(targets)
    sketcher, squares, roundings = Sketcher(), [0.0], [0.0]
    with OpenSources() as sources:
        for target, layer in contents.layers.items():
            roundings.append(max(layer.rounding, ROUNDING["float32"]))
            for number, (up, down) in enumerate(factors_of(layer, sources)):
                squares.append(squared_norm(up, down))
                if not math.isfinite(squares[-1]):
                    raise not_finite(adapter)
                for part in parts.get(target, ()):
                    if (part.rows.expert or 0) == number:
                        sketcher.add(part.name, up[part.rows.first : part.rows.first + part.rows.count], down, part.at)
        saved = digest_of(contents, parts, sources)
    values = sketcher.sketch()
    if len(values) and np.abs(values).max() > LARGEST:
        raise not_finite(adapter)
    return Sketch(values, origin, math.sqrt(math.fsum(squares)), max(roundings), saved, needs_base)


def not_finite(adapter: Adapter) -> InputError:
    """The error for an adapter whose updates are not numbers, with a code for each problem."""
    try:
        adapter.check_values()
    except InputError as error:
        return InputError(error.message, (Problem(problem, NOT_FINITE) for problem in error.problems))
    return InputError(
        f"{printable(adapter.file.path)}: cannot sketch this adapter:",
        [Problem("factors times their scaling overflow", NOT_FINITE)],
    )


def factors_of(layer: Layer, sources: OpenSources) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """(up, down) in float64, the scale in `up`, for each expert; torch is needed only for factors that are computed."""
    up, down = layer.factors
    if layer.kind is not Kind.PARAMETER and isinstance(up, StoredTensor) and isinstance(down, StoredTensor):
        return [(values_of(up, sources) * layer.scale, values_of(down, sources))]
    found = layer.load(torch.device("cpu"), torch.float64)
    if found.up.dim() == 2:
        return [(found.up.numpy(), found.down.numpy())]
    return [(found.up[at].numpy(), found.down[at].numpy()) for at in range(found.up.shape[0])]


def values_of(tensor: StoredTensor, sources: OpenSources) -> NDArray[Any]:
    """The values of a stored tensor of floats, as float64."""
    bits, _ = tensor.bits(sources)
    is_upper_half = tensor.info.dtype == "BF16"  # of a float32
    values = (bits.astype("<u4") << 16).view("<f4") if is_upper_half else bits.view(KINDS[tensor.info.dtype])
    shaped = values.astype(np.float64).reshape(tensor.info.shape)
    return shaped.T if tensor.transposed else shaped


def digest_of(contents: Contents, parts: Mapping[str, Sequence[Part]], sources: OpenSources) -> str:
    """SHA-256 of what an adapter holds besides factors; empty where that is nothing.

    It goes over `name\\0role\\0` and the values as little-endian float32, in the order of names and roles.
    """
    entries = sorted(entries_of(contents, parts), key=lambda entry: entry[:2])
    if not entries:
        return ""
    digest = hashlib.sha256()
    for name, role, tensor, scale, rows in entries:
        values = numbers_of(tensor, sources) * scale if scale != 1.0 else numbers_of(tensor, sources)
        digest.update(f"{name}\0{role}\0".encode("utf-8", "surrogatepass"))
        digest.update(np.ascontiguousarray(values[rows] if rows else values, dtype="<f4").data)
    return digest.hexdigest()


Entry = tuple[str, str, Any, float, slice | None]  # name, role, tensor, what multiplies it, rows of it


def entries_of(contents: Contents, by_layer: Mapping[str, Sequence[Part]]) -> Iterator[Entry]:
    """What stands besides the factors: magnitudes of DoRA, biases, tensors saved whole, rows of tokens."""
    for target, parts in by_layer.items():
        layer = contents.layers[target]
        if layer.magnitude is None:
            continue
        for part in parts:
            by_row = not layer.magnitude.by_column
            rows = slice(part.rows.first, part.rows.first + part.rows.count) if by_row else None
            yield part.name, "magnitude", layer.magnitude.magnitude, 1.0, rows
    for role, added in (("bias", contents.biases), ("change", contents.changes)):
        for target, add in added.items():
            yield target, role, add.value, add.scale, None
    for role, table in (("saved", contents.saved), ("base", contents.bases)):
        for target, saved in table.items():
            yield target, role, saved.value, 1.0, None
    for target, rows_of in contents.rows.items():
        yield target, "rows " + ",".join(map(str, rows_of.index)), rows_of.values, 1.0, None


def numbers_of(tensor: Any, sources: OpenSources) -> NDArray[Any]:
    """The values of a tensor on disk, also of one that is computed or whole numbers."""
    if isinstance(tensor, StoredTensor) and tensor.info.dtype in FLOAT_NAMES:
        return values_of(tensor, sources)
    return unloaded(tensor).load(torch.device("cpu"), torch.float64).numpy()


@dataclass(frozen=True)
class Part:
    """Some rows of a layer that is read, as rows `at` … of a weight of the base."""

    name: str
    at: int
    rows: Rows


def base_names(contents: Contents, base: Checkpoint | None) -> tuple[Origin, dict[str, Target]]:
    """Where names are from, and the weights of the base that an adapter changes, of its layers' rows.

    `base` tells what neither names nor tables do.
    """
    layers = contents.layers
    config: Mapping[str, Any] = base.config if base is not None else {}
    found = [] if all(target.startswith(LANGUAGE) for target in layers) else readings(layers)
    if found:
        reading, _ = chosen(found, layers, hint_of(contents))
        try:
            return "base", Divided(reading, DIFFUSERS, layers, frozenset(layers)).targets()
        except LoratoolError:  # its rows are not those of the architecture
            return "as stored", {target: Target.same(layer) for target, layer in layers.items()}
    origin: Origin = "base"
    names = dotted(base)
    targets: dict[str, Target] = {}
    for target, layer in layers.items():
        name = looked_up(target, names) if names else target
        if name == target and (isinstance(target, Flattened) or contents.adapter.format == NAMED.name):
            origin = "as stored"
        try:
            targets |= split({target: layer}, config)[0] if name == target else {name: Target.same(layer)}
        except LoratoolError:  # how its rows are divided depends on the model
            origin = "as stored"
            targets[name] = Target.same(layer)
    return origin, targets


def parts_of(targets: Mapping[str, Target]) -> dict[str, list[Part]]:
    """The rows of each layer; a matrix of several experts has the number of the expert in its name."""
    return by_key(
        (rows.target, Part(f"{name}#{expert}" if target.kind is Kind.PARAMETER else name, at, rows))
        for name, target in targets.items()
        for expert, at, rows in target.places
        if rows.target
    )
