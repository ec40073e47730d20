"""HQQ: `X.W_q` with 1 to 8 bits a value, `X.scale` and `X.zero`, and small tensors that say how (hqq 0.2).

With the values numbered row by row and G groups of n/G values each, value i belongs to group i // (n/G) where `axis` is
1, and to group i % G where it is 0. In float32, an operation at a time:

    W[i] = (q[i] − zero[group]) · scale[group]

A word of `W_q` holds values that lie far apart: with P words, value i is in word i % P, and the i // P -th from the top
bits on (`core/bitpack.py`). Three bits are packed ten to an int32, whose two top bits are free, and the last words are
filled up.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loratool.bases.codecs.parameters import InMemory, OnDisk, Parameters, WithParameters
from loratool.bases.codecs.parts import Finder, Unfit, bytes_of, in_blocks, in_turns, is_count, told, wrong_scales
from loratool.bases.codecs.plain_modules import fused_modules, last_name, modules_of, texts_in
from loratool.bases.packed import Codec, Packed, Packing, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import Plain, Room, plain_of
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import Tensor, torch

VALUES = ".W_q"
SKIPPED = "skip_modules"
LARGEST = 64  # bytes of a tensor that says something
# What says how a weight is packed, and goes with it. Some of these are for training alone.
ABOUT = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
)
SAYING = ("nbits", "shape", "axis", "packing", "group_size", "quant_scale", "quant_zero")  # those of them that are read
NUMBERS = {"U8": "B", "I8": "b", "I16": "h", "I32": "i", "I64": "q", "F32": "f"}  # dtype → how `struct` names it
# of hqq: the range below which a group has steps of 1, and the most steps in a range of 1
SMALLEST_RANGE, MOST_STEPS = 1e-4, 2e4
WAY_OUT = "save the model with hqq again, or pass the unquantised model as BASE"


@dataclass(frozen=True)
class Word:
    """How values are packed in a word: `count` of them, the first of which ends at bit `top`."""

    bits: int
    count: int
    top: int
    size: int = 1  # bytes

    def shift(self, field: int) -> int:
        """Bits below one of the values."""
        return self.top - self.bits * (field + 1)


WORDS = {
    "8bit_u8": Word(8, 1, 8),
    "4bit_u8": Word(4, 2, 8),
    "3bit_32": Word(3, 10, 30, 4),
    "2bit_u8": Word(2, 4, 8),
    "1bit_u8": Word(1, 8, 8),
}


@dataclass(frozen=True, kw_only=True)
class Hqq(WithParameters):
    """A matrix of unsigned values in groups, each with a scale and a zero. `tensors`: W_q, scale, zero, and others."""

    word: Word
    groups: int
    axis: int
    most: int  # the largest of the unsigned values

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        start, stop = first * self.line, (first + count) * self.line
        values = torch.empty(stop - start, dtype=torch.float32, device=device)
        words = self.tensors[0].info.nbytes // self.word.size
        for field in range(start // words, (stop - 1) // words + 1):
            low, high = max(start, field * words), min(stop, (field + 1) * words)
            raw = self.words(low - field * words, high - low, device, room)
            shifted = raw.bitwise_right_shift_(self.word.shift(field))
            values[low - start : high - start] = shifted.bitwise_and_((1 << self.word.bits) - 1)
        return self.scaled(values, first, OnDisk(device, room))

    def scaled(self, values: Tensor, first: int, parameters: Parameters) -> Tensor:
        """Lines from line `first` on, out of their unsigned values in float32, which are changed in place."""
        for part, zero, scale in self.in_groups(values, first, parameters):
            part.sub_(zero).mul_(scale)
        return values.view(-1, self.line)

    @property
    def size(self) -> int:
        """Values in a group."""
        return math.prod(self.shape) // self.groups

    def in_groups(self, values: Tensor, first: int, parameters: Parameters) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The values of lines from line `first` on in parts, each with the zeros and the scales of its groups."""
        scales, zeros = (parameters.kept(tensor, lambda each: each.float().flatten()) for tensor in self.tensors[1:3])
        start, size = first * self.line, self.size
        if self.axis:
            zeros, scales = zeros[start // size :], scales[start // size :]
            for part, which in in_blocks(values, start, size):
                yield part, zeros[which, None], scales[which, None]
        else:
            for part, which in in_turns(values, start, self.groups):
                yield part, zeros[which], scales[which]

    def words(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        """Some words of `W_q`, in memory of their own: several pieces of it may be needed at a time."""
        size = self.word.size
        raw = Room(room.sources).read(self.tensors[0], first * size, count * size, device)
        return raw if size == 1 else raw.view(torch.int32)

    def check(self, room: Room) -> str:
        return wrong_scales(self.tensors[1], room, "positive") or wrong_scales(self.tensors[2], room)

    @property
    def together(self) -> int:
        """Lines after which a group ends, or all groups have had their turn."""
        values = self.size if self.axis else self.groups
        return values // math.gcd(values, self.line)

    def measure(self, values: Tensor) -> Tensor:
        """The least and the largest value of each group: (groups, 2), or (1, groups, 2) where all groups take turns."""
        grouped = values.reshape(-1, self.size) if self.axis else values.reshape(1, -1, self.groups)
        return torch.stack([grouped.amin(1), grouped.amax(1)], -1)

    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those that hqq begins with (`Quantizer.quantize`): all of a group's range. 4 bits have whole zeros there."""
        lowest, largest = measured.cpu().unbind(-1)
        if not self.axis:
            lowest, largest = lowest.amin(0), largest.amax(0)
        steps = (self.most / (largest - lowest)).where(largest - lowest > SMALLEST_RANGE, 1.0).clamp_max_(MOST_STEPS)
        zeros = -lowest * steps
        found = (1 / steps, zeros.round() if self.word.bits == 4 else zeros)
        names = [tensor.info.name for tensor in self.tensors[1:3]]
        new = {name: made.view(own[name].shape).to(own[name].dtype) for name, made in zip(names, found, strict=True)}
        return {**own, **new}

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """A byte for each value."""
        flat = values.flatten().clone()
        for part, zero, scale in self.in_groups(flat, first, InMemory(values.device, parameters)):
            part.div_(scale).add_(zero)
        return flat.round_().clamp_(0, self.most).to(torch.uint8)

    def decode_packed(self, packed: Tensor, first: int, count: int, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        return self.scaled(packed.float(), first, InMemory(packed.device, parameters))

    def laid_out(self, packed: Tensor) -> Tensor:
        """The words: each has values that lie far apart."""
        count = self.tensors[0].info.nbytes // self.word.size
        words = torch.zeros(count, dtype=torch.int32)
        for field, first in enumerate(range(0, len(packed), count)):
            part = packed[first : first + count].to(torch.int32)
            words[: len(part)] |= part << self.word.shift(field)
        return words if self.word.size == 4 else words.to(torch.uint8)


class HqqCodec(Codec):
    """HQQ as the hqq package and transformers save it."""

    name, title = "hqq", "HQQ"
    kinds = (("1, 2, 3, 4 and 8 bits", Hqq),)

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        if settings.method not in ("", "hqq"):
            return None
        finder = Finder(base)
        found: dict[str, Packed] = {}
        with OpenSources() as sources:
            for module in finder.stems(VALUES):
                with suppress(Unfit):
                    found[f"{module}.weight"] = weight_of(finder, module, Room(sources))
        finder.refuse(self.title, WAY_OUT)
        return Packing(found) if found else None

    def left_plain(
        self, setting: Setting, packing: Packing, plain: Collection[str], base: Checkpoint
    ) -> Mapping[str, Any]:
        """`skip_modules` with the modules that are plain.

        hqq itself packs a module whose `W_q` there is, and needs no list. transformers compares entries with names
        without `model`, `layers` and numbers (`name_to_linear_tag`), and vLLM with single components of names
        (`HQQMarlinConfig.is_layer_skipped`): neither can tell one layer from another, so these spellings are added
        where all modules are plain that they stand for.
        """
        given = setting.values.get(SKIPPED)
        listed = texts_in(given) if isinstance(given, list) else ["lm_head"]
        packed = packing.weights.keys() - set(plain)
        edited, every, still = (modules_of(names) for names in (plain, packing.weights, packed))
        still += set(fused_modules(every, base, ())) - set(fused_modules(every, base, packed))
        names = [*listed, *edited]
        for spelt in (tag_of, last_name):
            ambiguous = set(map(spelt, still))
            served = edited if spelt is tag_of else [*edited, *fused_modules(edited, base, packed)]
            names += [name for name in map(spelt, served) if name not in ambiguous]
        return {**setting.values, SKIPPED: [*dict.fromkeys(names)]}


def tag_of(module: str) -> str:
    """A module's name as transformers compares it."""
    return ".".join(part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric())


def weight_of(finder: Finder, module: str, room: Room) -> Hqq:
    """The weight of one module. Raises `Unfit` where anything of it is wrong."""
    if f"{module}.weight" in finder.base.tensors:
        raise finder.unfit(
            f"{module}.weight", f"is there as well as {printable(module + VALUES)}, and only one of them may be"
        )
    said = said_of(finder, module, room)
    numbers = finder.part(f"{module}.scale", [*FLOAT_NAMES])
    shape = numbers.info.shape if numbers else None
    scale, zero = finder.every(numbers, finder.part(f"{module}.zero", [*FLOAT_NAMES], shape))
    if said is None:
        raise Unfit
    elements, groups, word = math.prod(said.shape), scale.info.elements, WORDS[said.packing]
    size = elements // max(groups, 1)
    if elements != size * groups or (said.group or size) != size:
        groups_of = f"groups of {said.group}" if said.group else "groups"
        raise finder.unfit(
            scale.info.name,
            f"must have a value for each of the {groups_of} of {list(said.shape)}, but it is {told(scale.info)}",
        )
    columns = size if said.axis else groups
    wanted = -(-(elements // columns) // word.count) * columns * word.size
    values = finder.base.tensors[module + VALUES]
    if values.nbytes != wanted:
        why = f"for {list(said.shape)} in groups of {size}, packed as {said.packing}"
        raise finder.unfit(
            values.name, f"must be {wanted} bytes {why}, but it is {told(values)}, {values.nbytes} bytes"
        )
    return Hqq(
        shape=said.shape,
        line=said.shape[1],
        dtype=plain_dtype(finder.base),
        tensors=(plain_of(finder.base, values.name), scale, zero, *said.tensors),
        scheme=f"HQQ {word.bits}-bit, groups of {size} along axis {said.axis}",
        word=word,
        groups=groups,
        axis=said.axis,
        most=min(round(2**said.bits - 1), 2**word.bits - 1) if said.bits else 2**word.bits - 1,
    )


@dataclass(frozen=True)
class Said:
    """What the small tensors of a module say."""

    shape: tuple[int, int]
    axis: int
    packing: str
    group: int  # values in a group; 0 where nothing says so
    bits: float  # which may be fewer than are stored; 0 where nothing says so
    tensors: tuple[Plain, ...]


def said_of(finder: Finder, module: str, room: Room) -> Said | None:
    """What the small tensors of a module say; None where one is missing or says what is not known, which is noted."""
    there = {key: plain_of(finder.base, f"{module}.{key}") for key in ABOUT if f"{module}.{key}" in finder.base.tensors}
    known: dict[str, Any] = {key: value_of(there[key], room) for key in SAYING if key in there}
    wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
        "shape": (lambda v: isinstance(v, list) and len(v) == 2 and all(map(is_count, v)), "hold two sizes"),
        "axis": (lambda v: v in (0, 1), "be 0 or 1"),
        "packing": (lambda v: text_of(v) in WORDS, f"be the text of one of {', '.join(WORDS)}"),
        "quant_scale": (lambda v: not v, "be 0: scales that are packed themselves are not read"),
        "quant_zero": (lambda v: not v, "be 0: zeros that are packed themselves are not read"),
    }
    wrong = [key for key, (is_right, _) in wanted.items() if not is_right(known.get(key))]
    for key in wrong:
        found = f"it is {printable(repr(known[key]))}" if key in known else "it is missing"
        finder.note(f"{module}.{key}", f"must {wanted[key][1]}, but {found}")
    if wrong:
        return None
    rows, columns = known["shape"]
    group = known.get("group_size")
    size = group if isinstance(group, int) else 0
    bits = known.get("nbits")
    fewer = float(bits) if isinstance(bits, (int, float)) and 0 < bits <= 8 else 0.0
    return Said((rows, columns), known["axis"], text_of(known["packing"]), size, fewer, tuple(there.values()))


def value_of(tensor: Plain, room: Room) -> object:
    """A number, or a list of them; None of a tensor that is no small one of numbers."""
    info = tensor.info
    if info.nbytes > LARGEST or info.dtype not in NUMBERS:
        return None
    numbers = [*struct.unpack(f"<{info.elements}{NUMBERS[info.dtype]}", bytes_of(tensor, room.sources))]
    return numbers if info.shape else numbers[0]


def text_of(codes: object) -> str:
    """Text that a tensor holds, a number for each letter; empty where it holds none."""
    numbers = codes if isinstance(codes, list) else []
    return "".join(chr(code) for code in numbers if is_count(code) and code < 128)
