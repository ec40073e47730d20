"""`Adapter`: for each target the update to make, whatever file it came from."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

from loratool.adapters.training import Training
from loratool.adapters.weight_files import WeightFile
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.replacing import Replace
from loratool.errors import InputError, as_typed, printable
from loratool.files.open_sources import OpenSources
from loratool.files.process import on_all_cores
from loratool.files.safefile import FLOAT_NAMES, SafeFile, TensorInfo
from loratool.files.system import shell_line
from loratool.lazy import NDArray, Tensor, numpy as np, torch
from loratool.notes import Note
from loratool.shown import Shown

AnyUpdate = TypeVar("AnyUpdate", bound=Update)

# The bits that are all ones in an inf or a NaN, as (unsigned integer type, mask).
EXPONENT = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E4M3": ("<u1", 0x7F),  # which has no infinity, and one NaN
    "F8_E5M2": ("<u1", 0x7C),
}
# The dtypes that factors are stored in, by their names in torch.
FACTOR_NAMES: Mapping[str, str] = {**FLOAT_NAMES, "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
# Bytes that are looked at together. They stay in a core's cache, and in memory that is used again: larger buffers are
# fresh pages each time, which took a third of the processor time of a conversion.
PIECE = 1 << 18
INTEGER_NAMES = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}  # of indices
# of what is saved whole, a count of batches or a mask
WHOLE_NAMES = {**INTEGER_NAMES, "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool"}

LARGEST_SCALE = 3.4e38  # of a float32


def is_scale(value: object) -> TypeGuard[float]:
    """Whether a number of a file may multiply factors: it is none of JSON's booleans, and in the range of float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_SCALE


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file: it has a shape and can be loaded, so it can be planned with."""

    file: SafeFile
    info: TensorInfo
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape[::-1] if self.transposed else self.info.shape

    @property
    def T(self) -> StoredTensor:  # noqa: N802 (the name tensors give it)
        return dataclasses.replace(self, transposed=not self.transposed)

    def read(self, start: int, into: memoryview, sources: OpenSources | None = None) -> None:
        """Fill `into` with the tensor's bytes from `start` on; everything that is read of it comes this way."""
        at = self.file.position(self.info) + start
        if sources is not None:
            sources.read(self.file, at, into)
            return
        with self.file.open() as source:
            source.read(at, len(into), into)

    def load(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The values, on `device` in `dtype` (whole numbers as they are), contiguous in the shape this has."""
        raw = torch.empty(self.info.nbytes, dtype=torch.uint8)
        self.read(0, raw.numpy().data)
        stored_as = getattr(torch, FACTOR_NAMES.get(self.info.dtype) or WHOLE_NAMES[self.info.dtype])
        loaded = raw.view(stored_as).reshape(self.info.shape).to(device)
        if self.info.dtype in FACTOR_NAMES:
            loaded = loaded.to(dtype)  # last, so that fewer bytes travel
        return loaded.T.contiguous() if self.transposed else loaded

    def load_rows(self, first: int, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Rows `first` … `first + count` as a (count, columns) matrix; nothing else is read."""
        row_bytes = self.info.nbytes // max(self.info.rows, 1)
        raw = torch.empty(count * row_bytes, dtype=torch.uint8)
        self.read(first * row_bytes, raw.numpy().data)
        stored = raw.view(getattr(torch, FACTOR_NAMES[self.info.dtype])).reshape(count, -1)
        return stored.to(device, dtype)

    def bits(self, sources: OpenSources | None = None) -> tuple[NDArray[Any], int]:
        """The values as unsigned integers, and the mask of their exponent."""
        kind, mask = EXPONENT[self.info.dtype]
        raw = bytearray(self.info.nbytes)
        self.read(0, memoryview(raw), sources)
        return np.frombuffer(raw, dtype=kind), mask

    def finite(self) -> bool:
        """Whether no value is NaN or infinite; whole numbers are none."""
        return self.info.dtype not in EXPONENT or is_finite(*self.largest())

    def largest(self, sources: OpenSources | None = None, memory: bytearray | None = None) -> tuple[int, int]:
        """The bits of the largest magnitude, which NaN and infinities are above all others, and the mask of its exponent.

        Without their sign, floats are ordered as their bits are. `memory` is for the bytes of a piece.
        """
        largest = max(
            (int(np.left_shift(bits, 1, out=bits).max()) for bits, _ in self.pieces(sources, memory)), default=0
        )
        return largest >> 1, EXPONENT[self.info.dtype][1]

    def pieces(
        self, sources: OpenSources | None = None, memory: bytearray | None = None
    ) -> Iterator[tuple[NDArray[Any], int]]:
        """The values as unsigned integers, with the mask of their exponent, some at a time, in the same memory."""
        kind, mask = EXPONENT[self.info.dtype]
        raw = memory or bytearray(min(PIECE, self.info.nbytes) or 1)
        with ExitStack() as stack:
            sources = sources or stack.enter_context(OpenSources())
            for at in range(0, self.info.nbytes, len(raw)):
                part = memoryview(raw)[: self.info.nbytes - at]
                self.read(at, part, sources)
                yield np.frombuffer(part, dtype=kind), mask


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from stored ones when it is loaded."""

    shape: tuple[int, ...]
    parts: tuple[StoredTensor | Derived, ...]
    formula: Callable[..., Tensor]  # of the parts, each loaded

    @property
    def T(self) -> Derived:  # noqa: N802 (the name tensors give it)
        return Derived(self.shape[::-1], (self,), turned)

    @property
    def mT(self) -> Derived:  # noqa: N802 (the same)
        *stacked, rows, columns = self.shape
        return Derived((*stacked, columns, rows), (self,), turned_each)

    def load(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The values, on `device` in `dtype`."""
        return self.formula(*(part.load(device, dtype) for part in self.parts)).to(dtype).contiguous()


def derived(shape: tuple[int, ...], formula: Callable[..., Tensor], *parts: Any) -> Any:
    """A field of an update that `formula` makes of others when it is loaded.

    Of any type, as fields are typed as what they are when an update is used: tensors in memory.
    """
    return Derived(shape, parts, formula)


def unloaded(field: object) -> StoredTensor:
    """A field of an update that is not loaded yet, whatever its type says."""
    return cast("StoredTensor", field)


def turned(tensor: Tensor) -> Tensor:
    return tensor.T


def turned_each(tensor: Tensor) -> Tensor:
    return tensor.mT


def stored_tensors(node: object) -> Iterator[StoredTensor]:
    """The tensors of an update, or of a part of one, that are still in their file."""
    if isinstance(node, StoredTensor):
        yield node
    elif isinstance(node, Derived):
        for part in node.parts:
            yield from stored_tensors(part)
    elif isinstance(node, Update):
        for value in fields_of(node).values():
            yield from stored_tensors(value)


def load_update(update: AnyUpdate, device: torch.device, dtype: torch.dtype) -> AnyUpdate:
    """The same update with its tensors read from disk, those of the updates within it too."""
    loaded: dict[str, object] = {}
    for name, value in fields_of(update).items():
        if isinstance(value, (StoredTensor, Derived)):
            loaded[name] = value.load(device, dtype)
        elif isinstance(value, Update):
            loaded[name] = load_update(value, device, dtype)
    return dataclasses.replace(update, **loaded)  # type: ignore[type-var]


def fields_of(update: Update) -> dict[str, object]:
    return {each.name: getattr(update, each.name) for each in dataclasses.fields(update)}  # type: ignore[arg-type]


def load_rows(update: Replace, first: int, count: int, device: torch.device, dtype: torch.dtype) -> Replace:
    """The part of a replacement that gives rows `first` … `first + count`; only they are read from disk."""
    value: StoredTensor | torch.Tensor = update.value
    if isinstance(value, StoredTensor):
        return Replace(value.load_rows(first, count, device, dtype))
    return Replace(value[first : first + count].to(device, dtype))


class Flattened(str):
    """A target whose module is written with underscores for dots, as `layers_0_self_attn_q_proj.weight`.

    Nobody can tell which of them were dots, so it is looked up among the base's names, and never written in a new adapter.
    """

    __slots__ = ()

    @classmethod
    def of(cls, name: str) -> Flattened:
        """The name of a weight, flattened."""
        module, dot, parameter = name.rpartition(".")
        return cls(f"{module.replace('.', '_')}{dot}{parameter}")


@dataclass(frozen=True, repr=False)
class Adapter(Shown):
    """A fine-tuned change to a model. Scaling is already in the updates: alpha, rank and rsLoRA ended in the reader.

    A target is the name of a weight as the model that was trained calls it in memory, such as
    `model.layers.0.self_attn.q_proj.weight`, or that name `Flattened`; `binding` finds the base's tensor for it.
    """

    name: str
    format: str
    folder: Path
    file: SafeFile
    config: Mapping[str, Any]  # raw: for its format alone
    config_file: Path
    updates: Mapping[str, Update]
    sources: Mapping[str, tuple[str, ...]]  # target → the tensors of the file it was made of
    training: Training = field(default_factory=Training)
    bases: Mapping[str, Replace] = field(default_factory=dict)  # target → the weight its update was trained on top of
    dialects: tuple[str, ...] = ()  # in which its tensors' names are spelled, where its format has several
    component: str = ""  # of an image model that all targets are in, where the name of its folder is one
    optional: frozenset[str] = frozenset()  # targets that a base may be without, as a layer without a bias is
    packing: str = ""  # how factors are packed in the file, where not as PEFT packs them
    unsupported: tuple[str, ...] = ()  # features that are recognised and not merged
    unused: tuple[str, ...] = ()  # tensors that no rule gives a place
    notes: tuple[Note, ...] = ()
    beside: tuple[WeightFile, ...] = ()  # other files of weights in its folder
    alone: bool = False  # whether its file was named itself, so that its folder may hold anything

    @property
    def parameters(self) -> int:
        return sum(t.elements for t in self.file.tensors.values())

    def check_values(self) -> bool:
        """Whether any value can change a model; raises `InputError` naming every tensor with NaN or inf.

        An adapter whose updates are all zero (B = 0, as before the first training step) gives False.
        """
        updates = [*self.updates.values(), *self.bases.values()]
        every = {
            each.info.name: each for update in updates for each in stored_tensors(update)
        }  # some are shared by all
        some = [tensor for tensor in every.values() if tensor.info.dtype in EXPONENT]  # and no indices
        memory = threading.local()  # what a thread reads into: fresh memory for each tensor would take longer
        with OpenSources() as sources:

            def look_at(tensor: StoredTensor) -> tuple[int, int]:
                memory.raw = getattr(memory, "raw", None) or bytearray(PIECE)
                return tensor.largest(sources, memory.raw)

            found = dict(zip((each.info.name for each in some), on_all_cores(look_at, some), strict=True))
        broken = [
            f"{printable(name)} contains NaN or infinite values" for name, one in found.items() if not is_finite(*one)
        ]
        zero = {name for name, (largest, _) in found.items() if largest == 0}
        products = ((update.up, update.down) if isinstance(update, LowRank) else () for update in updates)
        effective = any(
            not any(all(each.info.name in zero for each in stored_tensors(part)) for part in parts)
            for parts in products
        )
        if broken:
            place = self.file.path if self.alone else self.folder
            step = shell_line(["loratool", "inspect", as_typed(str(place)), "--check"])
            raise InputError(f"{printable(self.file.path)}: the adapter has values that are not finite:", broken, step)
        return effective

    def digests(self) -> dict[str, str]:
        """SHA-256 of the weights and of the config, by file name."""
        from loratool.files.digests import sha256_of  # here, as it imports `hashlib`, too

        paths = dict.fromkeys([*(file.path for file in self.file.files), self.config_file])
        return {path.name: sha256_of(path) for path in paths}


def adds_zero(update: Update) -> bool:
    """Whether it adds a stored tensor all of whose values are zero; they are read for it."""
    value: object = update.value if isinstance(update, Add) else None
    return isinstance(value, StoredTensor) and is_zero(value)


def is_zero(tensor: StoredTensor) -> bool:
    """Whether all values of a tensor of floats are zero; they are read for it."""
    return tensor.info.dtype in EXPONENT and tensor.largest()[0] == 0


def is_finite(bits: int, mask: int) -> bool:
    """Whether a magnitude is that of a number, by its bits and the mask of the exponent."""
    return bits < mask


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same dtype and the same bytes, compared piece by piece."""
    size = one.info.nbytes
    if one.info.dtype != other.info.dtype or size != other.info.nbytes:
        return False
    first, second = (bytearray(min(PIECE, size)) for _ in range(2))
    with OpenSources() as sources:
        for at in range(0, size, PIECE):
            del first[size - at :], second[size - at :]  # whole bytearrays compare far faster than views of them
            one.read(at, memoryview(first), sources)
            other.read(at, memoryview(second), sources)
            if first != second:
                return False
    return True


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same dtype and the same values in the same places, however they lie on disk."""
    if one.shape != other.shape or one.transposed == other.transposed:
        return one.shape == other.shape and same_bytes(one, other)
    if one.info.dtype != other.info.dtype or one.info.dtype not in EXPONENT:
        return False
    first, second = (each.bits()[0].reshape(each.info.shape) for each in (one, other))
    return bool((first == second.T).all())
