"""FP8: values of 8 bits with scales for blocks, rows or whole weights, as DeepSeek-V3, Qwen3-FP8 and fbgemm store them.

`X.weight` is in e4m3, and its scales lie in `X.weight_scale_inv` (they multiply, whatever the name says), `X.weight_scale`,
`X.scale` (DeepSeek-V4) or `X.qscale_weight` (Mistral). W = values · scale, in float32. `config.json` names the rows and the
columns of a block (`quantization_config.weight_block_size`); blocks at the edges may be cut. Scales may be powers of two,
as bytes. A stack of experts is one tensor, such as `experts.gate_up_proj`, with its scales in `…_scale_inv`.

DeepSeek-V4 has experts in FP4: two e2m1 values in each int8, and a scale for 32 of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from loratool.adapters.patterns import search_names
from loratool.bases.codecs.numbers import FP4, FP8
from loratool.bases.codecs.parameters import POWERS, SCALES
from loratool.bases.codecs.parts import Finder, Unfit, told
from loratool.bases.codecs.plain_modules import complete, modules_of, note_unlisted, stacks_left, texts_in, with_entries
from loratool.bases.codecs.scaled import Block, Scaled, Tiles
from loratool.bases.packed import Codec, Packed, Packing, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import plain_of
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES

METHODS = ("fp8", "fbgemm_fp8")
LISTS = ("modules_to_not_convert", "ignored_layers")  # of modules that are not quantised
DEFAULT_BLOCK = (128, 128)  # of transformers, where a config names none
WAY_OUT = "download the model again, or pass the unquantised model as BASE"
LEFTOVERS = ("input_scale", "activation_scale", "input_scale_ub")


class Fp8(Codec):
    """FP8 as transformers writes it, and as fbgemm does."""

    name, title = "fp8", "FP8"
    kinds = (("a scale for each block, row or weight; FP4 experts of DeepSeek-V4", Scaled),)

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        if settings.method not in METHODS:
            return None
        block = block_of(base, settings)
        finder = Finder(base)
        found: dict[str, Packed] = {}
        for name, info in base.tensors.items():
            scales = scales_of(base, name)
            if info.dtype in ("F8_E4M3", "I8") and len(info.shape) in (2, 3) and (scales or info.dtype != "I8"):
                with suppress(Unfit):
                    found[name] = weight_of(finder, name, scales, block)
            elif info.dtype in FLOAT_NAMES and len(info.shape) > 1 and scales:
                finder.note_both(name, scales)
        note_unlisted(finder, found, lambda modules: listed(settings, modules), LISTS[0])
        return complete(finder, found, self.title, WAY_OUT, LEFTOVERS)

    def left_plain(
        self,
        setting: Setting,
        packing: Packing,
        plain: Collection[str],
        base: Checkpoint,  # noqa: ARG002 (packing says all of it)
    ) -> Mapping[str, Any]:
        """The list names whole modules, as vLLM matches them (`is_layer_skipped`).

        For transformers all experts of a layer are one module, and without a list it leaves the head out by itself, but
        not with one (`HfQuantizer.get_modules_to_not_convert`).
        """
        names = [*modules_of(plain), *stacks_left(packing, plain)]
        if not any(name.endswith("lm_head.weight") for name in packing.weights.keys() - set(plain)):
            names.insert(0, "lm_head")
        keys = [key for key in LISTS if setting.values.get(key)] or LISTS[:1]
        return {**setting.values, **{key: with_entries(setting.values.get(key), names) for key in keys}}


def block_of(base: Checkpoint, settings: Settings) -> Block | None:
    """Rows and columns of a block by the config; None where it names none."""
    match given := settings.values.get("weight_block_size"):
        case None:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise InputError(
        f"{base.name}: weight_block_size must be the rows and the columns of a block, but it is {printable(given)}"
    )


def weight_of(finder: Finder, name: str, scales: str, block: Block | None) -> Scaled:
    """The weight whose values a tensor holds. Raises `Unfit` where something is wrong."""
    info = finder.base.tensors[name]
    numbers = FP8 if info.dtype == "F8_E4M3" else FP4
    if not scales:
        raise finder.unfit(name, f"is {told(info)}, but its scales are missing: {printable(next(scale_names(name)))}")
    if not info.elements:
        raise finder.unfit(name, f"must have values, but it is {told(info)}")
    *matrices, rows, width = info.shape
    line = width if numbers is FP8 else 2 * width
    allowed = [
        Tiles(tuple(matrices), rows, line, each)
        for each in ([(1, 32)] if numbers is FP4 else blocks(block, rows, line, bool(matrices)))
    ]
    there = finder.base.tensors[scales]
    fitting = [tiles for tiles in allowed if tiles.fits(there.shape)]
    if not fitting or there.dtype not in (*SCALES, *POWERS):
        shapes = " or ".join(str([*tiles.grid]) for tiles in allowed)
        raise finder.unfit(scales, f"must be F32 {shapes} for {list(info.shape)}, but it is {told(there)}")
    parts = (plain_of(finder.base, name), plain_of(finder.base, scales))
    return Scaled(
        shape=fitting[0].shape,
        line=line,
        dtype=plain_dtype(finder.base),
        tensors=parts,
        scheme=fitting[0].scheme(numbers.title),
        numbers=numbers,
        tiles=fitting[0],
        scales=parts[1],
    )


def blocks(block: Block | None, rows: int, line: int, stacked: bool) -> list[Block]:
    """The blocks that scales may be for. Gate and up of an expert, in one tensor, may have a scale each."""
    if block is not None:
        return [block, (rows // 2, block[1])] if stacked and rows % 2 == 0 and rows <= block[0] else [block]
    of_stacks = [(rows, 1), (rows // 2, line)] if stacked and rows % 2 == 0 else []
    return [(rows, line), (1, line), *of_stacks, DEFAULT_BLOCK]


def scales_of(base: Checkpoint, name: str) -> str:
    """The tensor with the scales of a weight; empty where there is none."""
    return next((each for each in scale_names(name) if each in base.tensors), "")


def scale_names(name: str) -> Iterator[str]:
    yield f"{name}_scale_inv"
    yield f"{name}_scale"
    if name.endswith(".weight"):
        yield f"{name.removesuffix('weight')}scale"
        yield f"{name.removesuffix('weight')}qscale_weight"


def listed(settings: Settings, modules: Collection[str]) -> Collection[str]:
    """Those of some modules that the config names as not quantised, as transformers matches them.

    An entry is a regular expression for the beginning of a name up to a dot, or the end of it (`should_convert_module`).
    """
    given = [entry for key in LISTS for entry in texts_in(settings.values.get(key))]
    ends = {module for module in modules if module.endswith(tuple(given))}
    found = search_names(given, set(modules) - ends, r"^(?:{})(?:(?<=\.)|(?=\.|$))")
    return ends | {module for module, matching in found.items() if matching}
