"""GPTQ, as AutoGPTQ and GPTQModel store it: `qweight`, `qzeros`, `scales` and `g_idx` for each module.

    W[o, i] = scales[g, o] · (q[o, i] − z[g, o]), where g = g_idx[i]

`qweight` is (⌈inputs · bits / 32⌉, outputs) of int32: the integers of an output lie down its column, lowest bits first.
`qzeros` is (groups, ⌈outputs · bits / 32⌉) likewise, along its rows. `g_idx`, (inputs,), is the group of each input: in
any order where `desc_act` chose it, else i // group_size.

Zero points have two versions. In version 2 (`gptq_v2`) they are stored as they are. In version 1 they are stored less 1,
so a zero point of 0, which only asymmetric quantisation has, is stored as all ones, and tools differ in what becomes of
the fields above it in its word:

- GPTQModel subtracts 1 from every field of the word at once: fields of 2, 4 and 8 bits borrow from the next, and adding
  as much to the word gives all of them back. It takes each of its 3-bit fields modulo 8.
- AutoGPTQ fills the rest of the word with ones. The field itself is read modulo 2^bits, as 0; those above it are lost.

Where no stored field is all ones, all of this is: stored + 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loratool.bases.codecs import numpy_values
from loratool.bases.codecs.bit_fields import packed, repeated, unpacked
from loratool.bases.codecs.dynamic_rules import is_negative, rules_for, settings_by_module, with_plain
from loratool.bases.codecs.grouped import Grouped, rows_of
from loratool.bases.codecs.parts import Finder, Unfit, integers_of, is_count, read_whole, shown, told
from loratool.bases.codecs.plain_modules import (
    complete,
    expert_layers,
    fused_modules,
    in_memory,
    modules_of,
    note_unlisted,
)
from loratool.bases.codecs.turned import Turned, as_layers_have_them
from loratool.bases.packed import Codec, Packing, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import Room
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import TensorInfo
from loratool.lazy import NDArray, Tensor, numpy, torch

VERSIONS = {"gptq": 1, "gptq_v2": 2}  # of zero points, by the format of a checkpoint
OTHER_FORMATS = ("marlin", "gptq_marlin", "bitblas", "gptq_bitblas")  # also written as if they were methods
BITS = (2, 3, 4, 8)
SCALES = ("F16", "BF16", "F32")
KEPT = "modules_in_block_to_quantize"
WAY_OUT = "download it again, or pass the unquantised model as BASE"


@dataclass(frozen=True)
class Scheme:
    """How weights are packed."""

    bits: int
    group: int  # inputs in a group; -1: all of them
    version: int  # of the zero points
    borrows: bool  # whether zero points of version 1 are whole words less 1 in each field
    any_order: bool  # whether groups may be in another order than their inputs

    def __str__(self) -> str:
        groups = "one group" if self.group == -1 else f"groups of {self.group}"
        return f"GPTQ, {self.bits} bits, {groups}{', act-order' if self.any_order else ''}"


@dataclass(frozen=True, kw_only=True)
class GptqWeight(Grouped):
    """A matrix (outputs, inputs) whose integers lie down columns of words."""

    how: Scheme

    def integers(self, words: Tensor, first: int, count: int) -> Tensor:
        columns = rows_of(words[:, first : first + count])  # in the cache, where turning it costs least
        return unpacked(rows_of(columns.T).view(torch.uint8), self.bits)[:, : self.line]

    def integers_by_numpy(self, words: NDArray[Any], first: int, count: int) -> NDArray[Any]:
        columns = numpy.ascontiguousarray(words[:, first : first + count].T)
        return numpy_values.nibbles(columns.view(numpy.uint8))[:, : self.line]

    def zeros_by_numpy(self, words: NDArray[Any]) -> NDArray[Any]:
        if self.how.version == 1 and self.how.borrows:
            words = words + numpy.int32(0x11111111)
        fields = numpy_values.nibbles(words.view(numpy.uint8))
        return (fields + 1) & 15 if self.how.version == 1 and not self.how.borrows else fields

    def words(self, integers: Tensor) -> Tensor:
        return packed(integers, self.bits)

    def zero_points(self, words: Tensor) -> Tensor:
        in_words = self.how.version == 1 and self.how.borrows and self.bits != 3
        if in_words:
            words = words + repeated(1, self.bits, 32)
        fields = unpacked(words.view(torch.uint8), self.bits)[:, : self.shape[0]]
        if self.how.version == 1 and not in_words:
            fields = (fields + 1).bitwise_and_((1 << self.bits) - 1)
        return fields

    def stored_zeros(self, zeros: Tensor) -> Tensor:
        return packed(zeros - (2 - self.how.version), self.bits)  # none of version 1 is 0

    def all_ones(self, room: Room) -> tuple[int, int]:
        """How many zero points are stored as all ones, and how many there are."""
        largest = (1 << self.bits) - 1
        if self.bits == 4:  # torch need not be imported for them
            words = integers_of(self.tensors[1], room.sources)
            nibbles = numpy_values.nibbles(words.view(numpy.uint8))[:, : self.shape[0]]
            return int((nibbles == largest).sum()), nibbles.size
        fields = unpacked(read_whole(self.tensors[1], room).view(torch.uint8), self.bits)[:, : self.shape[0]]
        return int((fields == largest).sum()), fields.numel()

    def doubt(self, room: Room) -> str:
        if self.how.version != 1:
            return ""
        full, of = self.all_ones(room)
        if not full:
            return ""
        writer = "GPTQModel" if self.how.borrows else "AutoGPTQ"
        return (
            f"{full} of {of} zero points are stored as all ones, which tools write and read differently; "
            f"they are read as {writer} does"
        )


class Gptq(Codec):
    """GPTQ with 2, 3, 4 or 8 bits."""

    name, title = "gptq", "GPTQ"
    kinds = (
        ("2, 3, 4 and 8 bits, also act-order, zero points of v1 and v2", GptqWeight),
        ("the same of Conv1D layers", Turned),
    )

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        # AutoGPTQ's quantize_config.json names no method
        own = any(place.file == "quantize_config.json" and "bits" in place.values for place in settings.places[:1])
        said = said_by(settings, ("gptq", *OTHER_FORMATS), own)
        if said is None or not (modules := packed_modules(base)):
            return None
        finder = Finder(base)
        schemes = settings_by_module(modules, said, finder, scheme_of)
        found: dict[str, GptqWeight] = {}
        for module, how in schemes.items():
            with suppress(Unfit):
                found[f"{module}.weight"] = weight_of(finder, module, how)
        if said.get(KEPT):  # without it, loaders go by what is in the files
            note_unlisted(finder, found, lambda modules: left_by(said, modules), "the rules of dynamic with -:")
        return complete(finder, as_layers_have_them(base, found), self.title, WAY_OUT)

    def left_plain(
        self, setting: Setting, packing: Packing, plain: Collection[str], base: Checkpoint
    ) -> Mapping[str, Any]:
        """`dynamic` with rules for the modules that are plain, and the list of those that are not.

        GPTQModel goes by `dynamic` alone (`QuantizeConfig.dynamic_get`); transformers by the list alone, which is one of
        lists (optimum, `GPTQQuantizer.convert_model`: the end of a name); vLLM by both, by `dynamic` with the names of
        its own, fused layers (`get_linear_quant_method`, `get_moe_quant_method`).
        """
        gone = frozenset(plain)  # with the names that they have in memory
        edited, kept = modules_of(plain), modules_of([name for name in packing.weights if name not in gone])
        kept += in_memory(kept, base)
        served = [*fused_modules(edited, base, packing.weights.keys() - gone), *expert_layers(edited, kept)]
        others = {*kept, *fused_modules(kept, base, ()), *expert_layers(kept, ())}
        dynamic = with_plain(setting.values.get("dynamic"), [*edited, *served], others)
        return {**setting.values, "dynamic": dynamic, KEPT: [kept]}


def left_by(said: Mapping[str, Any], modules: Collection[str]) -> Collection[str]:
    """Those of some modules that a config leaves plain: those outside the list of packed ones, and those of a rule."""
    blocks = said[KEPT] if isinstance(said[KEPT], list) else []
    every = [entry for block in blocks for entry in (block if isinstance(block, list) else [block])]
    ends = tuple(entry for entry in every if isinstance(entry, str))
    rules = rules_for(modules, said.get("dynamic") or {})
    return {m for m in modules if not m.endswith(ends) or is_negative(rules.get(m, ("", {}))[0])}


def said_by(settings: Settings, methods: Collection[str], unnamed: bool) -> Mapping[str, Any] | None:
    """What a checkpoint says of its packing, where it names one of these methods; `unnamed` if it may name none."""
    method = method_of(settings.values)
    known = unnamed if method is None else isinstance(method, str) and method.lower() in methods
    return settings.values if known else None


def method_of(said: Mapping[str, Any]) -> object:
    """What a config calls the way its weights are packed; None where it does not name it."""
    return said.get("quant_method", said.get("method"))


def packed_modules(base: Checkpoint) -> list[str]:
    """The modules that have tensors as GPTQ and AWQ name them."""
    ends = (".qweight", ".qzeros", ".g_idx")  # not `.scales`, which an activation may have
    return [*dict.fromkeys(name.rpartition(".")[0] for name in base.tensors if name.endswith(ends))]


def scheme_of(said: Mapping[str, Any]) -> Scheme:
    """How weights are packed. `ValueError` says what is unknown."""
    bits, group = said.get("bits"), said.get("group_size", -1)
    formats = formats_of(said)
    if unknown := [each for each in formats if each not in VERSIONS]:
        raise ValueError(f"the format {shown(unknown[0])} is unknown; known are {' and '.join(VERSIONS)}")
    if len({*formats}) > 1:
        raise ValueError("checkpoint_format and format disagree")
    if said.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"pack_dtype must be int32, but it is {shown(said['pack_dtype'])}")
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits must be 2, 3, 4 or 8, but it is {shown(bits)}")
    if group != -1 and not is_count(group):
        raise ValueError(f"group_size must be -1 or a number of inputs, but it is {shown(group)}")
    version, meta = VERSIONS[formats[0]] if formats else 1, said.get("meta")
    writer = meta.get("quantizer", "") if isinstance(meta, Mapping) else ""  # such as `gptqmodel:5.0.0`
    return Scheme(bits, group, version, "gptqmodel" in str(writer).lower(), bool(said.get("desc_act")))


def formats_of(said: Mapping[str, Any]) -> list[str]:
    """The formats that a config names, of which older tools know another word for one."""
    named = [said.get("checkpoint_format"), said.get("format"), "marlin" if said.get("is_marlin_format") else None]
    method = method_of(said)
    if isinstance(method, str) and method.lower() in OTHER_FORMATS:
        named.append(method)
    return [str(each).lower() for each in named if each is not None]


def words_of(finder: Finder, module: str) -> TensorInfo | None:
    """A module's matrix of packed values, if it has one. Raises `Unfit` where it cannot be one, or the weight is plain."""
    if f"{module}.weight" in finder.base.tensors:
        raise finder.unfit(f"{module}.weight", f"is there as well as {module}.qweight; a module must have one of them")
    values = finder.base.tensors.get(f"{module}.qweight")
    if values is not None and (len(values.shape) != 2 or not values.elements):
        raise finder.unfit(values.name, f"must be a matrix with values, but it is {told(values)}")
    return values


def weight_of(finder: Finder, module: str, how: Scheme) -> GptqWeight:
    """The weight of a module. Raises `Unfit` where anything of it is wrong."""
    values = words_of(finder, module)
    scales, order = (finder.base.tensors.get(f"{module}.{part}") for part in ("scales", "g_idx"))
    outputs = values.shape[1] if values else scales.width if scales else 0
    inputs = order.elements if order else values.shape[0] * 32 // how.bits if values else 0
    group = inputs if how.group == -1 else how.group
    groups = -(-inputs // max(group, 1))
    why = f"for {how.bits} bits of {[outputs, inputs]} in {f'groups of {group}' if groups > 1 else 'one group'}"
    parts = [
        finder.part(f"{module}.qweight", ["I32"], [-(-inputs * how.bits // 32), outputs], why),
        finder.part(f"{module}.qzeros", ["I32"], [groups, -(-outputs * how.bits // 32)], why),
        finder.part(f"{module}.scales", SCALES, [groups, outputs], why),
    ]
    if order is None and how.any_order and groups > 1:
        raise finder.unfit(f"{module}.g_idx", "is missing, and with desc_act nothing else has the groups of the inputs")
    if order is not None:
        parts.append(finder.part(order.name, ["I32", "I64"], [inputs], why))
    return GptqWeight(
        shape=(outputs, inputs),
        line=inputs,
        dtype=plain_dtype(finder.base),
        tensors=finder.every(*parts),
        scheme=str(how),
        bits=how.bits,
        group=group,
        least_zero=2 - how.version,
        how=how,
    )
