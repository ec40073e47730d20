"""A checkpoint whose packed weights are seen as plain ones, and the weights of any checkpoint by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loratool.bases.packed import Codec, Packed, Packing, Settings
from loratool.bases.weights import Plain, Room, StoredWeight, plain_of
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import SafeFile, TensorInfo
from loratool.notes import Note
from loratool.templates import listed


@dataclass(frozen=True, repr=False)
class Decoded(Checkpoint):
    """A checkpoint whose packed weights are seen as plain ones: each has its own name, its parts have none."""

    codec: Codec | None = None
    settings: Settings = field(default_factory=lambda: Settings(()))
    packing: Packing = field(default_factory=lambda: Packing({}))

    @property
    def weights(self) -> Mapping[str, Packed]:
        """The packed weights, by the names of their plain copies."""
        return self.packing.weights

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: weight.info if isinstance(weight, Plain) else TensorInfo(name, weight.dtype, weight.shape, 0, 0)
            for shard in self.shards
            for name, weight in weights_in(self, shard, self.weights)
        }

    @cached_property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The tensors on disk by name."""
        return {name: info for shard in self.shards for name, info in shard.tensors.items()}

    @cached_property
    def packed(self) -> Mapping[str, tuple[str, bool]]:
        """Tensor of a packed weight → the weight's name, and whether the tensor is the first of it."""
        return {
            tensor.info.name: (name, tensor is weight.tensors[0])
            for name, weight in self.weights.items()
            for tensor in weight.tensors
        }

    @cached_property
    def parts(self) -> frozenset[str]:
        """Tensors that packed weights are made of, and what goes along with those."""
        return frozenset((*self.packed, *self.left_over(self.weights)))

    def check(self, names: Iterable[str]) -> list[Note]:
        """Notes on weights that tools decode differently. The values of scales and indices are read for it.

        Raises `InputError` naming all weights whose scales or indices are not usable.
        """
        problems: list[str] = []
        doubts: dict[str, list[str]] = {}
        with OpenSources() as sources:
            for name in names:
                weight, room = self.weights[name], Room(sources)
                if found := weight.check(room):
                    problems += [f"{printable(name)} ({weight.scheme}): {found}"]
                elif found := weight.doubt(room):
                    doubts.setdefault(found, []).append(name)
        if problems:
            raise InputError(f"{self.name}: packed weights that cannot be decoded:", problems)
        return [Note("decoding-doubtful", f"{listed(names)}: {found}") for found, names in doubts.items()]

    def metadata(self, said: Mapping[str, str] | None, plain: Collection[str]) -> Mapping[str, str] | None:
        """The metadata of a file's header where some weights become plain."""
        if said is None or self.codec is None or not plain:
            return said
        return self.codec.metadata(said, self.packing, plain)

    def bytes_of(self, name: str) -> int:
        """Bytes of all tensors that go where a packed weight becomes plain."""
        more = (self.stored[each] for each in self.packing.leftovers.get(name, ()) if each in self.stored)
        return sum(info.nbytes for info in (*(tensor.info for tensor in self.weights[name].tensors), *more))

    def left_over(self, plain: Collection[str]) -> frozenset[str]:
        """Tensors that go as well where some weights become plain."""
        marks = self.packing.marks if self.weights.keys() <= set(plain) else ()
        return frozenset((*marks, *(name for weight in plain for name in self.packing.leftovers.get(weight, ()))))


def weights_in(base: Checkpoint, shard: SafeFile, plain: Collection[str]) -> Iterator[tuple[str, StoredWeight]]:
    """The weights of a shard with their names, in the order of their bytes.

    Of packed weights those in `plain` are decoded, each where the first of its tensors is; of all others, the tensors
    on disk are what comes.
    """
    gone = base.left_over(plain) if isinstance(base, Decoded) else ()
    for info in sorted(shard.tensors.values(), key=lambda info: (info.start, info.stop)):
        weight, is_first = base.packed.get(info.name, ("", False)) if isinstance(base, Decoded) else ("", False)
        if isinstance(base, Decoded) and weight in plain and weight:
            if is_first:
                yield weight, base.weights[weight]
        elif info.name not in gone:
            yield info.name, Plain(shard, info)


def weight_of(base: Checkpoint, name: str) -> StoredWeight:
    """A weight of a base, by the name that it has there."""
    packed = base.weights.get(name) if isinstance(base, Decoded) else None
    return packed or plain_of(base, name)
