"""bitsandbytes: nf4, fp4 and int8, as transformers, QLoRA and unsloth save them.

**4 bits.** `X` (two values a byte, the high nibble first), `X.absmax`, `X.quant_map` (16 values) and
`X.quant_state.bitsandbytes__nf4` (or `fp4`), which is JSON. With the values numbered row by row,

    W[i] = quant_map[nibble i] · absmax[i // blocksize]

With nested statistics absmax is a byte for each block, and

    absmax[j] = nested_quant_map[byte j] · nested_absmax[j // nested_blocksize] + nested_offset

**int8.** `X.weight` and `X.SCB`, the largest magnitude of each row: W = (values · SCB) · (1/127), in this order.

All in float32, an operation at a time, as bitsandbytes computes it (`functional.dequantize_4bit`,
`int8_vectorwise_dequant`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loratool.adapters.adapter import StoredTensor
from loratool.bases.codecs import numpy_values
from loratool.bases.codecs.parameters import InMemory, LineByLine, Parameters
from loratool.bases.codecs.parts import (
    Finder,
    Unfit,
    bytes_of,
    floats_of,
    in_blocks,
    is_count,
    largest_in_blocks,
    nearest,
    shown,
    told,
    wrong_scales,
)
from loratool.bases.codecs.plain_modules import (
    grown,
    is_of_diffusers,
    last_name,
    matched_in_diffusers,
    note_unlisted,
    skipped_by,
)
from loratool.bases.codecs.turned import Turned, as_layers_have_them
from loratool.bases.packed import Codec, Packing, Requantizable, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import Memory, Plain, Room
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.untrusted import json_object
from loratool.lazy import NDArray, Tensor, numpy, torch

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
LARGEST_STATE = 1 << 16  # bytes of JSON
SKIPPED = "llm_int8_skip_modules"
OF_127 = 7.874015718698502e-3  # what bitsandbytes multiplies by to divide by 127
WAY_OUT = "save the model with bitsandbytes again, or pass the unquantised model as BASE"


@dataclass(frozen=True)
class Statistics:
    """What the JSON of a weight says of how it is packed."""

    block: int  # values that share an absmax
    shape: tuple[int, ...]  # of the values
    nested_block: int = 0  # absmaxes that share one of theirs; 0 where statistics are not packed themselves
    offset: float = 0.0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.elements // self.block)


@dataclass(frozen=True, kw_only=True)
class FourBit(LineByLine):
    """A weight of 4 bits a value. `tensors`: values, absmax, quant_map, JSON, and nested_absmax, nested_quant_map."""

    statistics: Statistics

    def span(self, first: int, count: int) -> tuple[int, int]:
        start, stop = first * self.line, (first + count) * self.line
        return start // 2, (stop + 1) // 2 - start // 2

    def scaled(self, raw: Tensor, first: int, count: int, parameters: Parameters) -> Tensor:
        start, size = first * self.line, count * self.line
        values = parameters.kept(self.tensors[2], pairs_of).index_select(0, raw.int()).view(torch.float32)
        values = values[start % 2 :][:size]  # a line may begin in the middle of a byte
        absmax = self.absmax(start, size, parameters)
        for part, which in in_blocks(values, start, self.statistics.block):
            part.mul_(absmax[which, None])
        return values.view(count, self.line)

    def absmax(self, start: int, count: int, parameters: Parameters) -> Tensor:
        """Those of the blocks that hold values `start` … `start + count`."""
        block, nested = self.statistics.block, self.statistics.nested_block
        first = start // block
        absmax = parameters.some(self.tensors[1], first, -(-(start + count) // block))
        if not nested:
            return absmax
        outer, table = (parameters.kept(tensor, torch.Tensor.flatten) for tensor in self.tensors[4:])
        values = table.index_select(0, absmax.int())
        for part, which in in_blocks(values, first, nested):
            part.mul_(outer[first // nested :][which, None])
        return values.add_(self.statistics.offset)

    @property
    def by_numpy(self) -> bool:
        return self.line % self.statistics.block == 0

    def decode_into(self, values: NDArray[Any], first: int, memory: Memory) -> None:
        block = self.statistics.block
        absmax = self.absmax_by_numpy(first * self.line // block, values.size // block, memory)
        pairs = memory.held.of("pairs by numpy", lambda: self.pairs_by_numpy(memory))
        raw = memory.read(self.tensors[0], first * self.line // 2, values.size // 2)
        numpy_values.look_up(values.reshape(-1), raw, pairs)
        numpy_values.multiply(values, absmax.reshape(len(values), -1), block)

    def pairs_by_numpy(self, memory: Memory) -> NDArray[Any]:
        """The two values of each byte; the first is in the high nibble."""
        values = floats_of(self.tensors[2], memory.sources)
        pairs: NDArray[Any] = numpy_values.pairs(values, values).reshape(16, 16).T.reshape(-1)
        return pairs

    def absmax_by_numpy(self, first: int, count: int, memory: Memory) -> NDArray[Any]:
        """Those of blocks from block `first` on."""
        if not (block := self.statistics.nested_block):
            return memory.small(self.tensors[1], 4 * first, 4 * count).view(numpy.float32)
        outer, table = (
            memory.held.of(tensor.info.name, partial(floats_of, tensor, memory.sources)) for tensor in self.tensors[4:]
        )
        values: NDArray[Any] = table[memory.small(self.tensors[1], first, count)]
        values *= outer[numpy.arange(first, first + count) // block]
        values += numpy.float32(self.statistics.offset)
        return values

    def check(self, room: Room) -> str:
        # a nested absmax near zero may be decoded to a negative number
        nested = bool(self.statistics.nested_block)
        scales = self.tensors[4 if nested else 1]
        maps = self.tensors[2::3]  # the quant_map, and the nested one
        found = [wrong_scales(scales, room, "not negative"), *(wrong_scales(each, room) for each in maps)]
        return next(filter(None, found), "")

    @property
    def together(self) -> int:
        return self.statistics.block // math.gcd(self.statistics.block, self.line)

    def measure(self, values: Tensor) -> Tensor:
        """The largest magnitude in each block."""
        return largest_in_blocks(values, self.statistics.block)

    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The largest magnitudes; nested ones as bytes of the base's own map, around its own offset."""
        absmax, _, _, *nested = (tensor.info.name for tensor in self.tensors[1:])
        measured = measured.cpu()
        if not nested:
            return {**own, absmax: measured}
        block = self.statistics.nested_block
        centred = measured - self.statistics.offset
        outer = largest_in_blocks(centred, block)
        for part, which in in_blocks(centred, 0, block):
            part.div_(outer[which, None])
        return {**own, absmax: nearest(centred, own[nested[1]]), nested[0]: outer}

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        start, flat = first * self.line, values.flatten().clone()
        absmax = self.absmax(start, flat.numel(), InMemory(values.device, parameters))
        for part, which in in_blocks(flat, start, self.statistics.block):
            part.div_(absmax[which, None])
        codes = nearest(flat, parameters[self.tensors[2].info.name].to(values.device))
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_zeros(1)])
        pairs = codes.view(torch.int16)  # the first of two is the lower byte, and goes to the upper half
        return (pairs << 4).bitwise_or_(pairs >> 8).to(torch.uint8)


def pairs_of(values: Tensor) -> Tensor:
    """The two values of each byte, as the bits of one number of 64 bits: one look-up gives both."""
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1).view(torch.int64).flatten()


@dataclass(frozen=True, kw_only=True)
class Int8(LineByLine):
    """A matrix of int8, with the largest magnitude of each row. `tensors`: values, SCB, perhaps weight_format."""

    def scaled(self, raw: Tensor, first: int, count: int, parameters: Parameters) -> Tensor:
        largest = parameters.some(self.tensors[1], first, first + count)
        return raw.view(torch.int8).view(count, self.line).float().mul_(largest[:, None]).mul_(OF_127)

    def check(self, room: Room) -> str:
        return wrong_scales(self.tensors[1], room, "not negative")

    def measure(self, values: Tensor) -> Tensor:
        return values.abs().amax(1)

    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**own, self.tensors[1].info.name: measured.cpu()}

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        largest = InMemory(values.device, parameters).some(self.tensors[1], first, first + len(values))
        steps = values * (127 / largest[:, None])
        codes = steps.nan_to_num_(0.0).round_().clamp_(-127, 127).to(torch.int8)  # 0 / 0 in a row of zeros
        return codes.flatten().view(torch.uint8)


class BitsAndBytes(Codec):
    """nf4, fp4 and int8 of bitsandbytes."""

    name, title = "bitsandbytes", "bitsandbytes"
    kinds = (
        ("nf4 and fp4, also with nested statistics", FourBit),
        ("int8", Int8),
        ("nf4 and fp4 of Conv1D layers", Turned),
    )

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        if settings.method not in ("", "bitsandbytes"):
            return None
        finder = Finder(base)
        found: dict[str, Requantizable] = {}
        with OpenSources() as sources:
            for name, kind in states_in(base):
                with suppress(Unfit):
                    found[name] = four_bit_weight(finder, name, kind, Room(sources))
            for module in finder.stems(".SCB"):
                with suppress(Unfit):
                    found[f"{module}.weight"] = int8_weight(finder, module, Room(sources))
        if settings.method:
            note_incomplete(finder, found)
        if settings.method and not is_of_diffusers(base):
            entries = settings.values.get(SKIPPED)
            note_unlisted(finder, found, lambda modules: skipped_by(entries, modules, base), SKIPPED)
        finder.refuse(self.title, WAY_OUT)
        return Packing(as_layers_have_them(base, found)) if found else None

    def left_plain(
        self, setting: Setting, packing: Packing, plain: Collection[str], base: Checkpoint
    ) -> Mapping[str, Any]:
        """`llm_int8_skip_modules` with the modules that are plain.

        transformers takes an entry for a regular expression from the start of a name, or for the end of it
        (`should_convert_module`); vLLM looks for its own, fused modules (`is_layer_skipped_bnb`).
        """
        return {**setting.values, SKIPPED: grown(setting.values.get(SKIPPED), base, packing, plain)}

    def named_too(self, packing: Packing, plain: Collection[str], base: Checkpoint) -> Collection[str]:
        """In diffusers an entry is matched with the last part of a name as well (`_replace_with_bnb_linear`)."""
        return matched_in_diffusers(packing, plain, base, lambda entry, module: entry == last_name(module))


def states_in(base: Checkpoint) -> Iterator[tuple[str, str]]:
    """The weights that have a quant_state, each with its kind."""
    for name, found, kind in (tensor.partition(STATE) for tensor in base.tensors):
        if found:
            yield name, kind


def four_bit_weight(finder: Finder, name: str, kind: str, room: Room) -> FourBit:
    """The weight of one quant_state. Raises `Unfit` where anything of it is wrong."""
    if kind not in KINDS:
        raise finder.unfit(name, f"is of the unknown kind {kind!a}; known are {' and '.join(KINDS)}")
    json = finder.need(f"{name}{STATE}{kind}", ["U8"])
    try:
        said = statistics_of(json, kind, room)
    except ValueError as error:
        raise finder.unfit(json.info.name, f"{error}") from None
    nested, of = bool(said.nested_block), f"of {list(said.shape)}"
    each = f"for blocks of {said.block} {of}"
    parts = [
        packed_bytes(finder, name, said),
        finder.part(f"{name}.absmax", ["U8" if nested else "F32"], [said.blocks], each),
        finder.part(f"{name}.quant_map", ["F32"], [16]),
        json,
    ]
    if nested:
        outer = -(-said.blocks // said.nested_block)
        each = f"for blocks of {said.nested_block} of {said.blocks} statistics"
        parts.append(finder.part(f"{name}.nested_absmax", ["F32"], [outer], each))
        parts.append(finder.part(f"{name}.nested_quant_map", ["F32"], [256]))
    return FourBit(
        shape=said.shape,
        line=said.shape[-1],
        dtype=plain_dtype(finder.base),
        tensors=finder.every(*parts),
        scheme=f"{kind}, blocks of {said.block}{', nested statistics' if nested else ''}",
        statistics=said,
    )


def packed_bytes(finder: Finder, name: str, said: Statistics) -> Plain | None:
    """The packed values, whatever dtype their bytes are stored as (`bnb_4bit_quant_storage`)."""
    info, wanted = finder.base.tensors.get(name), (said.elements + 1) // 2
    if info is not None and wanted <= info.nbytes < wanted + 8:  # filled up to a whole number of the dtype
        return finder.part(name, [info.dtype])
    found = f"it is {told(info)}, {info.nbytes} bytes" if info else "it is missing"
    finder.note(name, f"must be {wanted} bytes for {list(said.shape)} at 4 bits a value, but {found}")
    return None


def statistics_of(json: StoredTensor, kind: str, room: Room) -> Statistics:
    """What the JSON of a weight says. `ValueError` says what is wrong with it."""
    if json.info.nbytes > LARGEST_STATE:
        raise ValueError(f"is {json.info.nbytes} bytes of JSON, over the limit of {LARGEST_STATE}")
    said = json_object(bytes_of(json, room.sources))
    block, shape, inner = said.get("blocksize"), said.get("shape"), said.get("nested_blocksize")
    if said.get("quant_type") != kind:
        raise ValueError(f"quant_type must be {kind!a}, as in its name, but it is {shown(said.get('quant_type'))}")
    if not is_count(block) or block % 2:
        raise ValueError(f"blocksize must be an even number of values, but it is {shown(block)}")
    if not isinstance(shape, list) or len(shape) < 2 or not all(map(is_count, shape)):
        raise ValueError(f"shape must be a list of two or more sizes, but it is {shown(shape)}")
    found = Statistics(block, tuple(shape))
    if inner is None and "nested_offset" not in said:
        return found
    offset = said.get("nested_offset")
    if not is_count(inner):
        raise ValueError(f"nested_blocksize must be a number of values, but it is {shown(inner)}")
    if not isinstance(offset, (int, float)) or isinstance(offset, bool) or not math.isfinite(offset):
        raise ValueError(f"nested_offset must be a number, but it is {shown(offset)}")
    return replace(found, nested_block=inner, offset=float(offset))


def int8_weight(finder: Finder, module: str, room: Room) -> Int8:
    """The weight of one SCB. Raises `Unfit` where anything of it is wrong."""
    values = finder.need(f"{module}.weight", ["I8"])
    if len(values.info.shape) != 2:
        raise finder.unfit(values.info.name, f"must be a matrix, but it is {told(values.info)}")
    parts = [values, finder.part(f"{module}.SCB", ["F32"], [values.info.rows], f"for {list(values.info.shape)}")]
    if f"{module}.weight_format" in finder.base.tensors:
        form = finder.part(f"{module}.weight_format", ["U8"], [])
        if form is not None and (said := bytes_of(form, room.sources)[0]):
            finder.note(form.info.name, f"must be 0, values row by row, but it is {said}, a layout for one kind of GPU")
        parts.append(form)
    return Int8(
        shape=values.info.shape,
        line=values.info.width,
        dtype=plain_dtype(finder.base),
        tensors=finder.every(*parts),
        scheme="int8, by row",
    )


def note_incomplete(finder: Finder, found: Collection[str]) -> None:
    """Note the weights that bitsandbytes has packed, as their dtype shows, and that lack what says how."""
    for name, info in finder.base.tensors.items():
        if name.endswith(".weight") and info.dtype in ("U8", "I8") and name not in found:
            noted = any(problem.startswith(name.removesuffix("weight")) for problem in finder.problems)
            lacking = f"{name}{STATE}{KINDS[0]}" if info.dtype == "U8" else f"{name.removesuffix('weight')}SCB"
            if not noted:
                finder.note(name, f"is {told(info)}, but {printable(lacking)} is missing")
