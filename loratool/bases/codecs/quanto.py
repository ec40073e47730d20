"""quanto of optimum, as `QuantizedModel.save_pretrained` writes it: `X.weight._data` and `X.weight._scale`.

In float32, W = _data · _scale, with int8 or float8 values and a scale for each row (or column, or one for all). Which
modules are packed is said in `quanto_qmap.json`. Values of 4 and 2 bits (`X.weight._data._data`) lie in groups, and no
tensor says what shape the weight has, so these are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from loratool.bases.codecs.affine import Affine
from loratool.bases.codecs.parts import Finder, Unfit, told
from loratool.bases.codecs.plain_modules import (
    grown,
    is_of_diffusers,
    last_name,
    matched_in_diffusers,
    modules_of,
)
from loratool.bases.packed import Codec, Packed, Packing, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES

VALUES = ".weight._data"
GROUPED = "._data"  # what comes after it in the names of 4 and 2 bits
SCALES_OF_ACTIVATIONS = ("input_scale", "output_scale")
MAP = "quanto_qmap.json"
LISTED = "modules_to_not_convert"
WAY_OUT = "save the model with optimum-quanto again, or pass the unquantised model as BASE"


class Quanto(Codec):
    """quanto's int8 and float8."""

    name, title = "quanto", "quanto"
    kinds = (("int8, float8", Affine),)

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        if settings.method not in ("", "quanto"):
            return None
        finder = Finder(base)
        found: dict[str, Packed] = {}
        leftovers: dict[str, list[str]] = {}
        for module in finder.stems(VALUES):
            with suppress(Unfit):
                found[f"{module}.weight"] = weight_of(finder, module)
            scales = (f"{module}.{scale}" for scale in SCALES_OF_ACTIVATIONS)
            leftovers[f"{module}.weight"] = [scale for scale in scales if scale in base.tensors]
        unread = dict.fromkeys(
            (name for name in base.tensors if name.endswith(VALUES + GROUPED)), "quanto's groups of 4 or 2 bits"
        )
        for module in mapped(settings):
            if (info := base.tensors.get(f"{module}.weight")) is not None and f"{module}{VALUES}" not in base.tensors:
                finder.note(info.name, f"is {told(info)}, but {MAP} says that it is packed")
        finder.refuse(self.title, WAY_OUT)
        return Packing(found, leftovers, unread) if found or unread else None

    def left_plain(
        self, setting: Setting, packing: Packing, plain: Collection[str], base: Checkpoint
    ) -> Mapping[str, Any]:
        """The map without the modules that are plain (`requantize` of quanto packs those in it), or the list with them."""
        if setting.file == MAP:
            gone = set(modules_of(plain))
            return {module: said for module, said in setting.values.items() if module not in gone}
        entries = grown(setting.values.get(LISTED), base, packing, plain)
        named = map(last_name, entries) if is_of_diffusers(base) else entries
        return {**setting.values, LISTED: [*dict.fromkeys(named)]}

    def named_too(self, packing: Packing, plain: Collection[str], base: Checkpoint) -> Collection[str]:
        """In diffusers an entry is matched with the last part of a name, and for nothing else (`_replace_with_quanto_layers`)."""
        return matched_in_diffusers(packing, plain, base, lambda entry, module: last_name(entry) == last_name(module))


def mapped(settings: Settings) -> Iterator[str]:
    """The modules whose weights are packed by the map; other entries are for activations alone."""
    for place in settings.places:
        for module, said in place.values.items() if place.file == MAP else ():
            if isinstance(said, Mapping) and said.get("weights") not in (None, "none"):
                yield module


def weight_of(finder: Finder, module: str) -> Affine:
    """The weight of one module. Raises `Unfit` where anything of it is wrong."""
    name = f"{module}.weight"
    if name in finder.base.tensors:
        raise finder.unfit(name, f"is there as well as {printable(module + VALUES)}, and only one of them may be")
    values, scale = finder.every(
        finder.part(f"{module}{VALUES}", ["I8", "F8_E4M3", "F8_E5M2"]),
        finder.part(f"{name}._scale", [*FLOAT_NAMES]),
    )
    shape = values.info.shape
    blocks = scale.info.shape or (1,) * len(shape)
    if (
        len(shape) != 2
        or len(blocks) != 2
        or any(here not in (1, size) for here, size in zip(blocks, shape, strict=True))
    ):
        wanted = f"one scale for each row or column of {list(shape)}, or one for all"
        raise finder.unfit(scale.info.name, f"must hold {wanted}, but it is {told(scale.info)}")
    return Affine(
        shape=shape,
        line=shape[1],
        dtype=plain_dtype(finder.base),
        tensors=(values, scale),
        scheme=f"quanto {'int8' if values.info.dtype == 'I8' else 'float8'}",
        blocks=blocks,
        sign="not negative",
    )
