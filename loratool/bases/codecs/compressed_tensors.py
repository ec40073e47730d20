"""compressed-tensors, as llm-compressor and vLLM's world write it.

`config_groups` has schemes with the modules they are for: whole names, `re:` patterns, or classes such as `Linear`. A
module X of group size g and b bits is, by the format that its tensors show:

- pack-quantized: `X.weight_packed` (int32: integers of b bits one after the other, each row begins with a new word),
  `X.weight_scale` (rows, groups), `X.weight_shape`, perhaps `X.weight_zero_point` (int32, packed along rows) and
  `X.weight_g_idx` (the group of each column). Integers and zero points are stored with 2^(b−1) added.
- int-, float- and naive-quantized: `X.weight` (int8 or e4m3), `X.weight_scale` for the whole weight, rows, groups or
  blocks, perhaps `X.weight_zero_point` (int8). mxfp8: the same, with scales that are powers of two.
- nvfp4: `X.weight_packed` (two e2m1 values a byte, the low nibble first), `X.weight_scale` (e4m3), and
  `X.weight_global_scale`, which **divides** the scales. mxfp4, mxfp6 (e2m3): scales are powers of two.

W = (number − zero) · scale, of nvfp4 number · (scale / global scale), in float32, an operation at a time. The library
(`quantization/lifecycle/forward_helpers.py`, `_dequantize`) does the same in the dtype of the scales, so it may round more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapters.patterns import search_names
from loratool.bases.codecs.numbers import FP4, FP6, FP8, INT8, Numbers, offset_integers
from loratool.bases.codecs.parameters import POWERS, SCALES
from loratool.bases.codecs.parts import Finder, Unfit, read_whole, told
from loratool.bases.codecs.plain_modules import (
    complete,
    modules_of,
    note_unlisted,
    stacks_left,
    texts_in,
    with_entries,
)
from loratool.bases.codecs.scaled import Block, Scaled, Tiles
from loratool.bases.packed import Codec, Packed, Packing, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import Plain, Room, plain_of
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES, TensorInfo

FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"),
)
ENDINGS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale")
LEFTOVERS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
WAY_OUT = "download the model again, or pass the unquantised model as BASE"


@dataclass(frozen=True)
class Scheme:
    """What a group of the config says of its modules' weights."""

    targets: tuple[str, ...]
    bits: int
    kind: str  # int or float
    strategy: str
    group: int
    structure: Block | None  # rows, columns of a block
    symmetric: bool

    def block(self, rows: int, line: int) -> Block:
        """The sides of a block of values that share a scale."""
        match self.strategy:
            case "tensor":
                return rows, line
            case "channel":
                return 1, line
            case "block":
                return self.structure or (rows, line)
        return 1, self.group


class CompressedTensors(Codec):
    """The formats of compressed-tensors whose weights are dense."""

    name, title = "compressed-tensors", "compressed-tensors"
    kinds = (
        (
            "`pack-quantized` of 3 to 8 bits, `int-quantized`, `float-quantized`, `naive-quantized`, nvfp4, mxfp4, mxfp6, mxfp8",
            Scaled,
        ),
    )

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        if settings.method != self.name:
            return None
        refuse_unknown(base, settings.values)
        schemes = [*schemes_of(base, settings.values)]
        modules = modules_in(base)
        finder = Finder(base)
        try:
            schemes_by_module = candidates(schemes, modules)
        except ValueError as error:  # of a pattern
            raise InputError(f"{base.name}: the targets of config_groups cannot be read: {error}") from None
        found: dict[str, Packed] = {}
        with OpenSources() as sources:
            for module, parts in modules.items():
                with suppress(Unfit):
                    found[f"{module}.weight"] = weight_of(
                        finder, module, parts, schemes_by_module[module], Room(sources)
                    )
        note_unlisted(finder, found, lambda names: in_list(texts_in(settings.values.get("ignore")), names), "ignore")
        return complete(finder, found, self.title, WAY_OUT, LEFTOVERS)

    def left_plain(
        self,
        setting: Setting,
        packing: Packing,
        plain: Collection[str],
        base: Checkpoint,  # noqa: ARG002 (packing says all of it)
    ) -> Mapping[str, Any]:
        """`ignore` with whole names (`match_name`); all experts of a layer are one module for vLLM."""
        names = [*modules_of(plain), *stacks_left(packing, plain)]
        return {**setting.values, "ignore": with_entries(setting.values.get("ignore"), names)}


def refuse_unknown(base: Checkpoint, values: Mapping[str, Any]) -> None:
    """Raise `InputError` where something of a config is not known."""
    groups = values.get("config_groups")
    groups = groups if isinstance(groups, Mapping) else {}
    formats = [values.get("format"), *(group.get("format") for group in groups.values() if isinstance(group, Mapping))]
    problems = [
        f"the format {printable(each)} cannot be read; known are {', '.join(FORMATS)}"
        for each in dict.fromkeys(map(str, filter(None, formats)))
        if each not in FORMATS
    ]
    sparsity = values.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        problems.append(f"weights are sparse ({printable(sparsity.get('format'))}), which cannot be read")
    if values.get("transform_config"):
        problems.append(
            "weights are rotated (transform_config), so an adapter of the unrotated model does not fit them"
        )
    if problems:
        raise InputError(
            f"{base.name}: compressed-tensors weights that cannot be read; pass the unquantised model as BASE:",
            problems,
        )


def schemes_of(base: Checkpoint, values: Mapping[str, Any]) -> Iterator[Scheme]:
    """The schemes of a config that are for weights. Raises `InputError` where one is not as it must be."""
    groups = values.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        where = f"{base.name}: config_groups.{printable(name)}"
        said = group.get("weights") if isinstance(group, Mapping) else None
        targets = group.get("targets") if isinstance(group, Mapping) else None
        if isinstance(group, Mapping) and said is None:
            continue  # activations alone
        if not isinstance(said, Mapping) or not isinstance(targets, list):
            raise InputError(f"{where} must have targets and weights, but it is {printable(group)}")
        yield scheme_from(where, said, tuple(target for target in targets if isinstance(target, str)))


def scheme_from(where: str, said: Mapping[str, Any], targets: tuple[str, ...]) -> Scheme:
    bits, kind, group, structure = (said.get(key) for key in ("num_bits", "type", "group_size", "block_structure"))
    bits, kind = 8 if bits is None else bits, "int" if kind is None else kind
    if type(bits) is not int or not 1 <= bits <= 8 or kind not in ("int", "float"):
        raise InputError(f"{where}: weights of {printable(bits)} bits and type {printable(kind)} cannot be read")
    if group is not None and (type(group) is not int or group < -1 or group == 0):
        raise InputError(f"{where}: group_size must be a number of columns, but it is {printable(group)}")
    strategy = said.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    if strategy not in ("tensor", "channel", "group", "tensor_group", "block"):
        raise InputError(f"{where}: the strategy {printable(strategy)} is not one for weights")
    grouped = strategy in ("group", "tensor_group")
    if grouped and (group is None or group < 1):
        raise InputError(f"{where}: the strategy {strategy} needs a group_size, but it is {printable(group)}")
    sides: Block | None = None
    match [int(side) for side in structure.split("x") if side.isdigit()] if isinstance(structure, str) else structure:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            sides = rows, columns
        case _ if strategy == "block":
            raise InputError(f"{where}: block_structure must be rows and columns, but it is {printable(structure)}")
    symmetric = said.get("symmetric") is not False
    return Scheme(targets, bits, kind, strategy, int(group or 0) if grouped else 0, sides, symmetric)


def modules_in(base: Checkpoint) -> Mapping[str, Mapping[str, TensorInfo]]:
    """Module → its tensors with one of the `ENDINGS`, of modules that have any, and its weight."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in base.tensors.items():
        module, _, ending = name.rpartition(".")
        if ending in ENDINGS or (ending == "weight" and info.dtype in ("I8", "F8_E4M3")):
            found.setdefault(module, {})[ending] = info
    for module, parts in found.items():
        if f"{module}.weight" in base.tensors:
            parts["weight"] = base.tensors[f"{module}.weight"]
    return found


def candidates(schemes: Sequence[Scheme], modules: Collection[str]) -> Mapping[str, Sequence[Scheme]]:
    """Module → the schemes that may be its own: those that name it, else those that name classes.

    Which class a module is of, no file tells. Where there are several such schemes, it is the one that its tensors fit.
    """
    of_classes = [scheme for scheme in schemes if any(target[:1].isupper() for target in scheme.targets)]
    named = matching([target for scheme in schemes for target in scheme.targets], modules)
    return {
        module: [scheme for scheme in schemes if not targets.isdisjoint(scheme.targets)] or of_classes
        for module, targets in named.items()
    }


def matching(entries: Collection[str], modules: Collection[str]) -> Mapping[str, set[str]]:
    """Module → the entries that match it: its whole name, or `re:` and a regular expression from its beginning on."""
    exact = {entry for entry in entries if not entry.startswith("re:")}
    found = search_names({entry[3:] for entry in entries if entry.startswith("re:")}, modules, "^(?:{})")
    return {
        module: {f"re:{pattern}" for pattern in found[module]} | ({module} & exact) for module in dict.fromkeys(modules)
    }


def in_list(entries: Collection[str], modules: Collection[str]) -> Collection[str]:
    """The modules that an entry matches."""
    return {module for module, own in matching(entries, modules).items() if own}


def weight_of(
    finder: Finder, module: str, parts: Mapping[str, TensorInfo], schemes: Sequence[Scheme], room: Room
) -> Scaled:
    """The weight of a module by the first scheme that fits its tensors. Raises `Unfit` where none does."""
    name, other = f"{module}.weight", next((f"{module}.{ending}" for ending in ENDINGS if ending in parts), "")
    packed, plain = parts.get("weight_packed"), parts.get("weight")
    if plain is not None and (packed is not None or plain.dtype in FLOAT_NAMES):
        finder.note_both(name, other)
        raise Unfit
    if packed is None and plain is None:
        raise finder.unfit(f"{name}_packed", f"is missing, but {printable(other)} exists")
    if not schemes:
        finder.note(name, "is packed, but no group of config_groups is for it")
    problems: list[str] = []
    for scheme in schemes:
        trial = Finder(finder.base)
        with suppress(Unfit):
            weight = Parts(trial, module, parts, scheme).weight(room)
            if not trial.problems:
                return weight
        problems = problems or trial.problems
    finder.problems += problems
    raise Unfit


@dataclass(frozen=True)
class Parts:
    """The tensors of one module, seen as by one scheme."""

    finder: Finder
    module: str
    parts: Mapping[str, TensorInfo]
    scheme: Scheme

    def weight(self, room: Room) -> Scaled:
        """The weight, if nothing of it is wrong. Raises `Unfit` where so much is wrong that there is none."""
        scheme, values = self.scheme, self.parts.get("weight_packed") or self.parts["weight"]
        numbers = self.numbers(values)
        *matrices, rows, width = values.shape if len(values.shape) in (2, 3) else (0, 0)
        line = self.columns(values, width, room)
        if not (rows and line) or 0 in matrices:
            raise self.finder.unfit(values.name, f"must be a matrix of values, but it is {told(values)}")
        if values.dtype == "I32" and width != -(-line * scheme.bits // 32):
            wanted = f"I32 {[*matrices, rows, -(-line * scheme.bits // 32)]} for {line} columns of {scheme.bits} bits"
            raise self.finder.unfit(values.name, f"must be {wanted}, but it is {told(values)}")
        tiles = Tiles(tuple(matrices), rows, line, scheme.block(rows, line))
        (scales,) = self.finder.every(self.part("weight_scale", (*SCALES, *POWERS, "F8_E4M3"), tiles))
        zeros = self.zeros(tiles)
        return Scaled(
            shape=tiles.shape,
            line=line,
            dtype=plain_dtype(self.finder.base),
            tensors=self.tensors,
            scheme=tiles.scheme("NVFP4" if "weight_global_scale" in self.parts else numbers.title),
            numbers=numbers,
            tiles=tiles,
            scales=scales,
            whole=self.whole(scales, tiles),
            divides=True,
            zeros=zeros,
            zero_bits=scheme.bits if zeros is not None and zeros.info.dtype == "I32" else 0,
            groups=self.optional("weight_g_idx", ["I32"], [line]),
            values_shape=self.optional("weight_shape", ["I64", "I32"], [len(tiles.shape)]),
        )

    @property
    def tensors(self) -> tuple[Plain, ...]:
        """All of them, the numbers first."""
        names = ["weight_packed" if "weight_packed" in self.parts else "weight", *self.parts]
        return tuple(plain_of(self.finder.base, f"{self.module}.{part}") for part in dict.fromkeys(names))

    def numbers(self, values: TensorInfo) -> Numbers:
        """How the values lie in their tensor. Raises `Unfit` where the scheme has no such numbers."""
        scheme = self.scheme
        match values.dtype, scheme.kind, scheme.bits, "weight_packed" in self.parts:
            case "I32", "int", bits, True:
                return offset_integers(bits)
            case "U8", "float", 4, True:
                return FP4
            case "U8", "float", 6, True:
                return FP6
            case "I8", "int", _, False:
                return INT8
            case "F8_E4M3", "float", 8, False:
                return FP8
        raise self.finder.unfit(
            values.name, f"is {told(values)}, but by the config it is {scheme.kind} of {scheme.bits} bits"
        )

    def columns(self, values: TensorInfo, width: int, room: Room) -> int:
        """Values in a row; 0 where nothing tells."""
        scales, scheme = self.parts.get("weight_scale"), self.scheme
        if values.dtype == "U8":
            return width * 8 // scheme.bits
        if values.dtype != "I32":
            return width
        if scheme.group and scales is not None and scales.shape:
            return scales.shape[-1] * scheme.group
        told_again = self.finder.part(f"{self.module}.weight_shape", ["I64", "I32"], [len(values.shape)])
        return int(read_whole(told_again, room)[-1]) if told_again is not None else 0

    def part(self, ending: str, dtypes: Sequence[str], tiles: Tiles) -> Plain | None:
        """A tensor with an entry for each block; None where it is not so, which is noted."""
        info, name = self.parts.get(ending), f"{self.module}.{ending}"
        if info is not None and info.dtype in dtypes and tiles.fits(info.shape):
            return plain_of(self.finder.base, name)
        return self.finder.part(name, dtypes[:2], tiles.grid, f"for {[*tiles.shape]}")

    def zeros(self, tiles: Tiles) -> Plain | None:
        """The zero points, where there are any or should be."""
        info = self.parts.get("weight_zero_point")
        if info is None and self.scheme.symmetric:
            return None
        if info is None or info.dtype != "I32":
            return self.part("weight_zero_point", ["I8"], tiles)
        *stack, _, across = tiles.grid
        words = -(-tiles.rows * self.scheme.bits // 32)
        return self.finder.part(info.name, ["I32"], [*stack, words, across], f"for {[*tiles.shape]}")

    def whole(self, scales: Plain, tiles: Tiles) -> Plain | None:
        """The scale of the whole matrix, which scales in FP8 need."""
        if "weight_global_scale" not in self.parts and scales.info.dtype != "F8_E4M3":
            return None
        return self.part("weight_global_scale", ["F32"], replace(tiles, block=(tiles.rows, tiles.line)))

    def optional(self, ending: str, dtypes: Sequence[str], shape: Sequence[int]) -> Plain | None:
        if ending not in self.parts:
            return None
        return self.finder.part(f"{self.module}.{ending}", dtypes, shape)
