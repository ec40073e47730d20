"""One pass over an adapter's values, without torch: what is no number, what is zero, what leaves a dtype's range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import EXPONENT, Adapter, StoredTensor, stored_tensors
from loratool.adapters.formats.roles.module import of_e4m3
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.experts import ExpertFactors
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded
from loratool.bases.weights import Plain
from loratool.errors import InputError, folded, printable
from loratool.files.checkpoint import Checkpoint
from loratool.lazy import numpy as np
from loratool.results.findings import Finding, command
from loratool.results.text import plural
from loratool.templates import some

LARGEST_FLOAT16 = 65504.0
MANY = 0.01  # the part of a tensor's values from which on subnormal ones are told


@dataclass(frozen=True)
class Scan:
    """What the values of one tensor are."""

    count: int
    nonfinite: int
    zeros: int
    subnormal: int  # of the dtype it is stored in
    largest: float  # magnitude of the finite ones


def scan(tensor: StoredTensor) -> Scan:
    """Count the values of a tensor, piece by piece."""
    nonfinite = zeros = subnormal = 0
    largest = 0.0
    for bits, mask in tensor.pieces():
        exponents = bits & mask
        special = exponents == mask
        zero = (bits << 1) == 0
        nonfinite += int(special.sum())
        zeros += int(zero.sum())
        subnormal += int((exponents == 0).sum()) - int(zero.sum())
        magnitudes = (bits << 1) >> 1  # without the sign, floats are ordered as their bits are
        magnitudes[special] = 0
        largest = max(largest, value_of(int(magnitudes.max()), tensor.info.dtype))
    return Scan(tensor.info.elements, nonfinite, zeros, subnormal, largest)


def value_of(bits: int, dtype: str) -> float:
    """The float that some bits are."""
    if dtype == "BF16":
        return float(np.uint32(bits << 16).view(np.float32))
    if dtype == "F8_E4M3":
        return of_e4m3(bits)
    if dtype == "F8_E5M2":  # the upper half of an F16
        bits, dtype = bits << 8, "F16"
    kinds: dict[str, tuple[Any, Any]] = {
        "F16": (np.uint16, np.float16),
        "F32": (np.uint32, np.float32),
        "F64": (np.uint64, np.float64),
    }
    integer, number = kinds[dtype]
    return float(integer(bits).view(number))


def scan_all(adapter: Adapter) -> dict[str, Scan]:
    """Every tensor of floats of the file, by name."""
    return {
        name: scan(StoredTensor(home := adapter.file.home(name), home.tensors[name]))
        for name, info in adapter.file.tensors.items()
        if info.dtype in EXPONENT and info.elements
    }


def look_at_values(adapter: Adapter, path: Path) -> Iterator[Finding]:
    """What the values of an adapter say of its training, and of the dtype they are stored in."""
    scans = scan_all(adapter)
    if broken := [name for name, found in scans.items() if found.nonfinite]:
        yield Finding(
            "problem",
            "not-finite",
            f"NaN or infinite values in {some(broken)}",
            "use an earlier training checkpoint; the lost values cannot be recovered",
            tuple(map(printable, broken)),
        )
    yield from look_at_training(adapter, scans)
    idle = [target for target, update in adapter.updates.items() if scale_of(update) == 0]
    if idle and adapter.training.zero_alpha:
        yield Finding(
            "problem",
            "zero-scaling",
            f"alpha is 0, so the update is zero in {some(idle)}; llama.cpp reads it as a scale of 1",
            f"set alpha in {adapter.config_file.name} to the value used in training, for example with loratool "
            "rescale --alpha",
            tuple(map(printable, idle)),
        )
    yield from look_at_ranges(adapter, scans, path)


def look_at_model(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What the values of a checkpoint say: NaN and infinity, but for the mask that float16 turns into infinity."""
    broken = [
        name
        for shard in checkpoint.shards
        for name, info in shard.tensors.items()
        if not name.endswith("masked_bias") and not Plain(shard, info).finite()
    ]
    if broken:
        yield Finding(
            "problem",
            "not-finite",
            f"NaN or infinite values in {some(broken)}",
            "",
            tuple(map(printable, broken)),
        )


def look_at_packing(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What keeps packed weights from being decoded; their scales and indices are read."""
    try:
        base = decoded(checkpoint)
        if isinstance(base, Decoded):
            yield from (Finding("note", note.code, note.text) for note in base.check(base.weights))
    except InputError as error:
        for text, names in folded(error.problems) or [(error.message, ())]:
            yield Finding("problem", "not-decodable", text, "", names)


def look_at_training(adapter: Adapter, scans: dict[str, Scan]) -> Iterator[Finding]:
    """Modules whose update is zero."""
    products: list[str] = []
    idle: list[str] = []
    for target, update in adapter.updates.items():
        inner = getattr(update, "inner", update)
        match inner:
            case LowRank():
                factors = [list(stored_tensors(factor)) for factor in (inner.up, inner.down)]
            case ExpertFactors():
                factors = [list(stored_tensors(factor)) for factor in (inner.b, inner.a)]
            case _:
                continue
        products.append(target)
        if any(side and all(is_zero(scans, t.info.name) for t in side) for side in factors):
            idle.append(target)
    if not idle:
        return
    where = tuple(map(printable, idle))
    if len(idle) < len(products):
        message = (
            f"the update is zero in {len(idle)} of {len(products)} modules, which received no gradient: {some(idle)}"
        )
        yield Finding("note", "partly-untrained", message, "", where)
        return
    beside = any(isinstance(update, (Replace, ReplaceRows)) for update in adapter.updates.values())
    magnitudes = adapter.training.dora
    message = f"every update is zero ({plural(len(idle), 'module')}, B = 0): it was not trained, or the trained weights were not saved"
    if beside or magnitudes:
        message += "; only " + " and ".join(
            what
            for what, there in (
                ("modules saved whole change the model", beside),
                ("DoRA's magnitudes may", magnitudes),
            )
            if there
        )
    yield Finding("problem", "untrained", message, "", where)


def scale_of(update: object) -> float | None:
    """The factor before BA; None where there is none."""
    inner = getattr(update, "inner", update)
    return inner.alpha if isinstance(inner, ExpertFactors) else getattr(inner, "scale", None)


def is_zero(scans: dict[str, Scan], name: str) -> bool:
    return name in scans and scans[name].zeros == scans[name].count


def look_at_ranges(adapter: Adapter, scans: dict[str, Scan], path: Path) -> Iterator[Finding]:
    """Values at the ends of a dtype's range."""
    ranks = [update.rank for update in adapter.updates.values() if isinstance(update, LowRank)]
    # the rank that others need, such as LoKr, is not known here, and a smaller one would lose most of them
    alike = len(ranks) == len(adapter.updates) > 0
    balance = command("resize", path, f"--rank {max(ranks)} --uniform") if alike else ""
    if large := [n for n, found in scans.items() if found.largest > LARGEST_FLOAT16]:
        most = max(scans[name].largest for name in large)
        yield Finding(
            "problem",
            "float16-overflow",
            f"values reach {most:.3g}, which is infinite in float16 (65504 at most), in {some(large)}",
            balance,
            tuple(map(printable, large)),
        )
    if small := [n for n, f in scans.items() if f.subnormal > MANY * f.count]:
        share = max(scans[name].subnormal / scans[name].count for name in small)
        dtypes = ", ".join(sorted({adapter.file.tensors[name].dtype for name in small}))
        yield Finding(
            "note",
            "subnormal",
            f"subnormal values of {dtypes}, up to {100 * share:.0f} % of a tensor, in {some(small)}: they are less "
            "precise, and some hardware treats them as 0",
            balance,
            tuple(map(printable, small)),
        )
