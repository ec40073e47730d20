"""A checkpoint whose packed weights are seen as plain ones, and the weights of any checkpoint by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loratool.bases.packed import Codec, Packed, Packing
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import Plain, Room, StoredWeight, plain_of
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import SafeFile, TensorInfo
from loratool.notes import Note
from loratool.templates import listed

PACKED_NAMES = ("qweight", "weight_packed", "W_q")  # of GPTQ and AWQ, compressed-tensors, HQQ


@dataclass(frozen=True)
class PackedModel:
    """A model with packed weights: all of a checkpoint, or a component of a pipeline, in which its names have a prefix."""

    model: Checkpoint  # with its own names, and so are those in `packing`
    packing: Packing
    codec: Codec
    settings: Settings = field(default_factory=lambda: Settings(()))
    prefix: str = ""  # such as "transformer."

    @property
    def folder(self) -> str:
        """Where its files are in the checkpoint: "transformer/", or nothing."""
        return self.prefix.replace(".", "/")

    def own(self, names: Iterable[str]) -> list[str]:
        """Those of some names of the checkpoint that are the model's, as it has them."""
        return [name[len(self.prefix) :] for name in names if name.startswith(self.prefix)]

    def left_plain(self, setting: Setting, plain: Collection[str]) -> Mapping[str, Any]:
        """The values of one of its settings where some of its weights are not packed any more."""
        return self.codec.left_plain(setting, self.packing, plain, self.model)

    def left_over(self, plain: Iterable[str]) -> Iterator[str]:
        """Tensors of the checkpoint that go as well where some of its weights become plain."""
        own = set(self.own(plain))
        marks = self.packing.marks if own and self.packing.weights.keys() <= own else ()
        along = (name for weight in own for name in self.packing.leftovers.get(weight, ()))
        yield from (self.prefix + name for name in (*marks, *along))


@dataclass(frozen=True, repr=False)
class Decoded(Checkpoint):
    """A checkpoint whose packed weights are seen as plain ones: each has its own name, its parts have none."""

    models: tuple[PackedModel, ...] = ()

    @cached_property
    def weights(self) -> Mapping[str, Packed]:
        """The packed weights, by the names of their plain copies."""
        return {each.prefix + name: weight for each in self.models for name, weight in each.packing.weights.items()}

    @cached_property
    def unread(self) -> Mapping[str, str]:
        """Tensor on disk of a weight that cannot be decoded → what packs it."""
        return {each.prefix + name: kind for each in self.models for name, kind in each.packing.unread.items()}

    @cached_property
    def undescribed(self) -> Mapping[str, str]:
        """Tensor on disk that is packed, but not as a config says → what packs it, as far as anybody can tell."""
        return {
            name: f"values in {info.dtype} that no config describes"
            for name, info in self.stored.items()
            if name not in self.parts and name not in self.unread and is_packed(name, info)
        }

    @cached_property
    def leftovers(self) -> Mapping[str, Sequence[str]]:
        """Weight → the tensors that go as well where it becomes plain, of those that are there."""
        return {
            each.prefix + weight: [each.prefix + name for name in names if each.prefix + name in self.stored]
            for each in self.models
            for weight, names in each.packing.leftovers.items()
        }

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: weight.info if isinstance(weight, Plain) else TensorInfo(name, weight.dtype, weight.shape, 0, 0)
            for _, weights in weights_by_shard(self, self.weights)
            for name, weight in weights
        }

    @cached_property
    def made_of(self) -> Mapping[str, tuple[str, ...]]:
        """Packed weight → the tensors on disk that it is made of."""
        return {
            each.prefix + name: tuple(each.prefix + tensor.info.name for tensor in weight.tensors)
            for each in self.models
            for name, weight in each.packing.weights.items()
        }

    @cached_property
    def packed(self) -> Mapping[str, tuple[str, bool]]:
        """Tensor of a packed weight → the weight's name, and whether the tensor is the first of it."""
        return {tensor: (name, tensor == made[0]) for name, made in self.made_of.items() for tensor in made}

    @cached_property
    def parts(self) -> frozenset[str]:
        """Tensors that packed weights are made of, and what goes along with those."""
        return frozenset((*self.packed, *self.left_over(self.weights)))

    @property
    def title(self) -> str:
        """How the weights are packed, for a person."""
        return " and ".join(dict.fromkeys(each.codec.title for each in self.models))

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

    def metadata(
        self, said: Mapping[str, str] | None, plain: Collection[str], prefix: str = ""
    ) -> Mapping[str, str] | None:
        """The metadata of a file's header where some weights become plain; `prefix` is that of the file's component."""
        for each in self.models:
            if said is not None and each.prefix == prefix and (own := each.own(plain)):
                return each.codec.metadata(said, each.packing, own)
        return said

    def notes_on(self, plain: Collection[str]) -> list[Note]:
        """What a user should know of a model in which some weights are not packed any more."""
        return [note for each in self.models for note in each.codec.notes(each.packing, each.own(plain))]

    def named_too(self, plain: Collection[str]) -> frozenset[str]:
        """Other packed weights that loaders take for plain where their lists name those of `plain`."""
        return frozenset(
            each.prefix + name
            for each in self.models
            if (own := each.own(plain))
            for name in each.codec.named_too(each.packing, own, each.model)
        )

    def bytes_of(self, name: str) -> int:
        """Bytes of all tensors that go where a packed weight becomes plain."""
        more = (self.stored[each] for each in self.leftovers.get(name, ()))
        return sum(info.nbytes for info in (*(tensor.info for tensor in self.weights[name].tensors), *more))

    def left_over(self, plain: Collection[str]) -> frozenset[str]:
        """Tensors that go as well where some weights become plain."""
        return frozenset(name for each in self.models for name in each.left_over(plain))


def weights_by_shard(
    base: Checkpoint, plain: Collection[str]
) -> Iterator[tuple[SafeFile, Iterator[tuple[str, StoredWeight]]]]:
    """Each shard with its weights and their names, in the order of their bytes.

    Of packed weights those in `plain` are decoded, each where the first of its tensors is; of all others, the tensors
    on disk are what comes.
    """
    gone = base.left_over(plain) if isinstance(base, Decoded) else frozenset[str]()
    for shard in base.shards:
        yield shard, weights_in(base, shard, plain, gone)


def weights_in(
    base: Checkpoint, shard: SafeFile, plain: Collection[str], gone: Collection[str]
) -> Iterator[tuple[str, StoredWeight]]:
    for info in sorted(shard.tensors.values(), key=lambda info: (info.start, info.stop)):
        weight, is_first = base.packed.get(info.name, ("", False)) if isinstance(base, Decoded) else ("", False)
        if isinstance(base, Decoded) and weight in plain and weight:
            if is_first:
                yield weight, base.weights[weight]
        elif info.name not in gone:
            yield info.name, Plain(shard, info)


class OtherNames(Checkpoint):
    """A checkpoint under other names than those in its files, which knows its weights by these."""

    def weight(self, name: str) -> StoredWeight:
        """One of them."""
        raise NotImplementedError


def weight_of(base: Checkpoint, name: str) -> StoredWeight:
    """A weight of a base, by the name that it has there."""
    if isinstance(base, OtherNames):
        return base.weight(name)
    packed = base.weights.get(name) if isinstance(base, Decoded) else None
    return packed or plain_of(base, name)


def is_packed(name: str, info: TensorInfo) -> bool:
    """Whether a tensor can only be a matrix of packed values, by its dtype and its name."""
    ending = name.rpartition(".")[2]
    small = info.dtype in ("I8", "U8") and ending == "weight"
    return len(info.shape) >= 2 and (info.dtype.startswith("F8_E") or small or ending in PACKED_NAMES)
