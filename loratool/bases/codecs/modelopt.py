"""ModelOpt (NVIDIA): FP8, NVFP4, MXFP8, MXFP4, int8 and W4A16_AWQ, as `export_hf_checkpoint` writes them.

What a module has tells how it is packed; by dtype of `X.weight` and `X.weight_scale`:

- e4m3 and float32: FP8, with one scale, one per row (FP8_PER_CHANNEL_PER_TOKEN) or per block (fp8_pb_wo,
  (rows/128, 1, columns/128, 1)); e4m3 and bytes: MXFP8, a power of two for 32 columns.
- bytes and e4m3: NVFP4, (rows, columns/2), two e2m1 values a byte, the low nibble first; `X.weight_scale_2` multiplies the
  scales. Bytes and bytes: MXFP4.
- bytes and floats: W4A16_AWQ, (rows/2, columns), two int4 of a column a byte, the low nibble that of the even row.
- int8 and floats: one scale per row.

A stack of experts `X.gate_up_proj` has `X.gate_up_proj_weight_scale`; where it is (experts, in, out), values and scales
are packed along its rows. `X.pre_quant_scale` is for the layer's inputs, so it multiplies columns. In float32, in order:

    W = number · (scale · weight_scale_2) · pre_quant_scale
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from loratool.bases.codecs.numbers import FP4, FP4_OF_TWO_ROWS, FP8, INT4_OF_TWO_ROWS, INT8, Numbers
from loratool.bases.codecs.parameters import SCALES
from loratool.bases.codecs.parts import Finder, Unfit, told
from loratool.bases.codecs.plain_modules import complete, modules_of, note_unlisted, stacks_left, texts_in, with_entries
from loratool.bases.codecs.scaled import Scaled, Tiles
from loratool.bases.packed import Codec, Packed, Packing, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import Plain, plain_of
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES, TensorInfo

ALGORITHMS = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8"),
    *("MXFP8", "MXFP4", "W4A8_MXFP4_FP8", "W4A16_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL", "MIXED_PRECISION"),
)
PACKED = ("F8_E4M3", "U8", "I8")  # dtypes of packed values
LEFTOVERS = ("input_scale", "output_scale")
WAY_OUT = "download the model again, or pass the unquantised model as BASE"


@dataclass(frozen=True)
class Way:
    """One way in which a weight may be packed: what its values are, and the block that shares a scale."""

    title: str
    numbers: Numbers
    tiles: Tiles


class ModelOpt(Codec):
    """The formats of ModelOpt that its unified export writes."""

    name, title = "modelopt", "ModelOpt"
    kinds = (("FP8, MXFP8, NVFP4, MXFP4, int8, W4A16_AWQ", Scaled),)

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        if not any(is_own(place.values) for place in settings.places):
            return None
        refuse_unknown(base, settings)
        group = next((size for each in settings.places if (size := group_size(each.values))), 0)
        finder = Finder(base)
        found: dict[str, Packed] = {}
        for name, info in base.tensors.items():
            scales = base.tensors.get(beside(name, "weight_scale"))
            if name.endswith(("_scale", "_scale_2")) or len(info.shape) not in (2, 3):
                continue
            if info.dtype in PACKED and (scales or name.endswith(".weight")):
                with suppress(Unfit):
                    found[name] = weight_of(finder, name, info, group)
            elif info.dtype in FLOAT_NAMES and scales:
                finder.note_both(name, scales.name)
        note_unlisted(finder, found, lambda modules: in_lists(settings, modules), "ignore")
        return complete(finder, found, self.title, WAY_OUT, LEFTOVERS)

    def left_plain(
        self,
        setting: Setting,
        packing: Packing,
        plain: Collection[str],
        base: Checkpoint,  # noqa: ARG002 (packing says all of it)
    ) -> Mapping[str, Any]:
        """`ignore` in config.json, `quantization.exclude_modules` in hf_quant_config.json: whole names.

        vLLM takes an entry for a whole name, a part of one or a pattern of fnmatch (`is_layer_excluded`). Where modules
        have schemes of their own, those that are plain have none any more.
        """
        names = [*modules_of(plain), *stacks_left(packing, plain)]
        values = dict(setting.values)
        if isinstance(nested := values.get("quantization"), Mapping):
            listed = {"exclude_modules": with_entries(nested.get("exclude_modules"), names)}
            return {**values, "quantization": {**without_schemes(nested, names), **listed}}
        return {**without_schemes(values, names), "ignore": with_entries(values.get("ignore"), names)}


def without_schemes(values: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """The values of a config in which these modules have no schemes of their own."""
    gone, changed = frozenset(modules), dict(values)
    if isinstance(layers := values.get("quantized_layers"), Mapping):
        changed["quantized_layers"] = {name: said for name, said in layers.items() if name not in gone}
    if isinstance(groups := values.get("config_groups"), Mapping):
        changed["config_groups"] = {
            name: {
                **group,
                "targets": [each for each in group["targets"] if not isinstance(each, str) or each not in gone],
            }
            if isinstance(group, Mapping) and isinstance(group.get("targets"), list)
            else group
            for name, group in groups.items()
        }
    return changed


def is_own(values: Mapping[str, Any]) -> bool:
    """Whether a place in a config is ModelOpt's: config.json names the method, hf_quant_config.json the producer."""
    method, producer = values.get("quant_method"), values.get("producer")
    named = producer.get("name") if isinstance(producer, Mapping) else None
    return (isinstance(method, str) and method.lower().startswith("modelopt")) or (
        method is None and named == "modelopt"
    )


def details(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a place says how weights are packed: in `quantization`, or in itself."""
    nested = values.get("quantization")
    return nested if isinstance(nested, Mapping) else values


def group_size(values: Mapping[str, Any]) -> int:
    """Columns that share a scale, where a place says so; 0 else."""
    said = [details(values).get("group_size")]
    groups = values.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        said.append(weights.get("group_size") if isinstance(weights, Mapping) else None)
    sizes = {size for size in said if type(size) is int and size > 0}
    return sizes.pop() if len(sizes) == 1 else 0


def refuse_unknown(base: Checkpoint, settings: Settings) -> None:
    """Raise `InputError` where an algorithm is not known."""
    said = [details(place.values) for place in settings.places if is_own(place.values)]
    layers = [each.get("quantized_layers") for each in said]
    each_layer = [layer for some in layers if isinstance(some, Mapping) for layer in some.values()]
    algorithms = [each.get("quant_algo") for each in (*said, *each_layer) if isinstance(each, Mapping)]
    unknown = [each for each in dict.fromkeys(map(str, algorithms)) if each.upper() not in (*ALGORITHMS, "NONE")]
    if unknown:
        raise InputError(
            f"{base.name}: ModelOpt weights packed by {', '.join(map(printable, unknown))} cannot be read; "
            f"known are {', '.join(ALGORITHMS)}. Pass the unquantised model as BASE"
        )


def weight_of(finder: Finder, name: str, info: TensorInfo, group: int) -> Scaled:
    """The weight whose values a tensor holds. Raises `Unfit` where something is wrong."""
    base = finder.base
    scales = finder.need(beside(name, "weight_scale"), [*SCALES, "F8_E4M3", "U8"])
    if not info.elements:
        raise finder.unfit(name, f"must have values, but it is {told(info)}")
    ways = [
        way
        for way in ways_of(info, scales.info.dtype, group)
        if way.tiles.stack or way.tiles.block != (info.shape[-2], 1)
    ]
    fitting = [way for way in ways if way.tiles.fits(scales.info.shape)]
    if beside(name, "svdquant_lora_a") in base.tensors:
        raise finder.unfit(name, "has a low-rank part of its own (svdquant_lora_a), which cannot be read")
    if not fitting or len({(way.tiles.rows, way.tiles.grid) for way in fitting}) > 1:
        wanted = " or ".join(f"{[*way.tiles.grid]} ({way.title})" for way in ways)
        raise finder.unfit(
            scales.info.name, f"must be {wanted or 'of another dtype'} for {told(info)}; it is {told(scales.info)}"
        )
    way, tiles = fitting[0], fitting[0].tiles
    second, columns = beside(name, "weight_scale_2"), beside(name, "pre_quant_scale")
    whole = prescale = None
    if second in base.tensors or way.title == "NVFP4":
        whole = finder.need(second, ["F32"])
        if not replace(tiles, block=(tiles.rows, tiles.line)).fits(whole.info.shape):
            raise finder.unfit(
                second, f"must be one scale for each matrix of {told(info)}, but it is {told(whole.info)}"
            )
    if way.numbers is INT4_OF_TWO_ROWS and whole is not None:
        raise finder.unfit(name, "is int4 made of FP8 (W4A8_AWQ), which cannot be read")
    if columns in base.tensors:
        prescale = finder.need(columns, SCALES, [tiles.line])
    parts: list[Plain | None] = [plain_of(base, name), scales, whole, prescale]
    return Scaled(
        shape=tiles.shape,
        line=tiles.line,
        dtype=plain_dtype(base),
        tensors=tuple(part for part in parts if part is not None),
        scheme=tiles.scheme(way.title),
        numbers=way.numbers,
        tiles=tiles,
        scales=scales,
        whole=whole,
        columns=prescale,
    )


def ways_of(values: TensorInfo, scales: str, group: int) -> Iterator[Way]:
    """The ways in which these values may be packed, with scales of this dtype."""
    *stack, rows, width = values.shape
    whole = Tiles(tuple(stack), rows, width, (rows, width))
    high, wide = replace(whole, rows=2 * rows), replace(whole, line=2 * width)  # where a byte has two values
    match values.dtype, scales:
        case "F8_E4M3", "U8":
            yield Way("MXFP8", FP8, replace(whole, block=(1, 32)))
        case "F8_E4M3", "F32" | "BF16" | "F16":
            for block in ((rows, width), (1, width), (rows, 1), (group or 128, group or 128)):
                yield Way("FP8", FP8, replace(whole, block=block))
        case "U8", "F8_E4M3":
            yield Way("NVFP4", FP4, replace(wide, block=(1, group or 16)))
            yield Way("NVFP4", FP4_OF_TWO_ROWS, replace(high, block=(group or 16, 1)))
        case "U8", "U8":
            yield Way("MXFP4", FP4, replace(wide, block=(1, 32)))
            yield Way("MXFP4", FP4_OF_TWO_ROWS, replace(high, block=(32, 1)))
        case "U8", "F32" | "BF16" | "F16":
            yield Way("int4", INT4_OF_TWO_ROWS, replace(high, block=(1, group or 128)))
        case "I8", "F32" | "BF16" | "F16":
            yield Way("int8", INT8, replace(whole, block=(1, width)))


def beside(name: str, ending: str) -> str:
    """The tensor with this ending that goes with a weight: `X.input_scale`, or `X_input_scale` of a stack of experts."""
    return f"{name.removesuffix('weight')}{ending}" if name.endswith(".weight") else f"{name}_{ending}"


def in_lists(settings: Settings, modules: Collection[str]) -> Collection[str]:
    """Those of some modules that a config names as not quantised, as vLLM matches them (`is_layer_excluded`)."""
    lists = [details(place.values).get(key) for place in settings.places for key in ("ignore", "exclude_modules")]
    entries = [entry for some in lists for entry in texts_in(some)]
    return {m for m in modules if any(entry in m or fnmatchcase(m, entry) for entry in entries)}
