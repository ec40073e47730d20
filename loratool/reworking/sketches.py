"""Sketches of adapters: a few hundred numbers by which the same update is found again in any dialect, split or order.

The formula is in `algebra.sketching`; here are the names that are hashed, the factors, and the digest of everything else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loratool.adapters.adapter import Adapter, StoredTensor, unloaded
from loratool.adapters.layers import Contents, Kind, Layer, contents_of
from loratool.adapters.unsettled import settled
from loratool.algebra.lowrank.products import ROUNDING
from loratool.algebra.sketching import SHORT, Sketcher, folded, spread, squared_norm
from loratool.errors import InputError, Problem, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import NDArray, numpy as np, torch
from loratool.results.sketch import SketchFacts
from loratool.reworking.base_names import BaseNames, Origin, base_names

NOT_FINITE = "not-finite"  # the code of a problem
LARGEST = 1e38  # of the numbers of a sketch, which tables and indexes have in float32
DIGITS = 9  # of a number that is shown, as many as float32 has
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class Sketch:
    """The sketch of one adapter."""

    values: NDArray[Any]  # (SIZE,), float64
    names: Origin
    norm: float  # ‖ΔW‖, exact
    rounding: float  # relative, of ΔW, by the dtype of the stored factors: the largest of all layers
    saved: str  # SHA-256 of everything besides factors; empty for nothing

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
    adapter = settled(adapter, base.config) if base is not None else adapter
    contents = contents_of(adapter, "sketch", as_products=True)
    names = base_names(contents, base)
    parts = names.by_layer()
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
        saved = digest_of(contents, names, sources)
    values = sketcher.sketch()
    if len(values) and np.abs(values).max() > LARGEST:
        raise not_finite(adapter)
    return Sketch(values, names.origin, math.sqrt(math.fsum(squares)), max(roundings), saved)


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
    if tensor.info.dtype == "BF16":
        values = (bits.astype("<u4") << 16).view("<f4")
    else:
        values = bits.view(KINDS[tensor.info.dtype])
    shaped = values.astype(np.float64).reshape(tensor.info.shape)
    return shaped.T if tensor.transposed else shaped


def digest_of(contents: Contents, names: BaseNames, sources: OpenSources) -> str:
    """SHA-256 of what an adapter holds besides factors; empty where that is nothing.

    It goes over `name\\0role\\0` and the values as little-endian float32, in the order of names and roles.
    """
    entries = sorted(entries_of(contents, names), key=lambda entry: entry[:2])
    if not entries:
        return ""
    digest = hashlib.sha256()
    for name, role, tensor, scale, rows in entries:
        values = numbers_of(tensor, sources) * scale if scale != 1.0 else numbers_of(tensor, sources)
        digest.update(f"{name}\0{role}\0".encode("utf-8", "surrogatepass"))
        digest.update(np.ascontiguousarray(values[rows] if rows else values, dtype="<f4").data)
    return digest.hexdigest()


Entry = tuple[str, str, Any, float, slice | None]  # name, role, tensor, what multiplies it, rows of it


def entries_of(contents: Contents, names: BaseNames) -> Iterator[Entry]:
    """What stands besides the factors: magnitudes of DoRA, biases, tensors saved whole, rows of tokens."""
    for target, parts in names.by_layer().items():
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
