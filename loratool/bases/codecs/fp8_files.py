"""FP8 in files that no config describes, as image models circulate: weights that were cast, and ComfyUI's scaled form.

A *cast* is `X` in e4m3 or e5m2 and nothing else: W = value. The scaled form has `X.weight` in e4m3 or e5m2 with one scale
in `X.scale_weight`, [] or [1], and a tensor `scaled_fp8` that says that the file is of this form; since the end of 2025 the
scale is `X.weight_scale`, and `X.comfy_quant`, JSON as bytes, or `_quantization_metadata` in the header says it of each
layer. W = value · scale, in float32. A layer's scale for its inputs (`scale_input`, `input_scale`) is not used for W.

What ComfyUI does with a file in which some of these weights are plain (its `comfy/utils.py`, `convert_old_quants`, and
`comfy/ops.py`, `_load_quantized_module`): a layer is quantised if it has a scale, and a plain weight is taken as it is where
the scale is gone. So the scales go with an edited weight, and `scaled_fp8` stays as long as any weight needs it. A file of
casts is made a model of the dtype that most of its values have (`weight_dtype` there, `unet_dtype` in
`comfy/model_management.py`): where the GPU computes in FP8 or memory is short, plain weights are rounded to F8 on loading.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from loratool.bases.codecs.fp8 import scale_names
from loratool.bases.codecs.numbers import BY_DTYPE, Numbers
from loratool.bases.codecs.parameters import SCALES
from loratool.bases.codecs.parts import Finder, Unfit, bytes_of, told
from loratool.bases.codecs.plain_modules import complete
from loratool.bases.codecs.scaled import Scaled, Tiles
from loratool.bases.packed import Codec, Packed, Packing, WithoutParameters, plain_dtype
from loratool.bases.packing_settings import Settings
from loratool.bases.weights import Room, plain_of
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.untrusted import json_object
from loratool.lazy import Tensor, torch
from loratool.notes import Note
from loratool.templates import listed

FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}  # ComfyUI's names
DTYPES = (*FORMATS.values(),)
MARK = "scaled_fp8"
OLD_SCALE, NEW_SCALE = "scale_weight", "weight_scale"
SAYS = "comfy_quant"
HEADER = "_quantization_metadata"
LEFTOVERS = ("scale_input", "input_scale", SAYS)
PARTS = (MARK, OLD_SCALE, NEW_SCALE, "weight_scale_2", *LEFTOVERS)  # what is no weight, whatever its dtype
LARGEST_JSON = 1 << 16  # bytes
WAY_OUT = "download the model again, or pass the unquantised model as BASE"
OTHER_SCALES = "FP8 whose scales no config describes"


@dataclass(frozen=True, kw_only=True)
class Cast(WithoutParameters):
    """A weight whose values were rounded to 8 bits as they are, without scales. A line is what the last dimension makes."""

    numbers: Numbers

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        raw = room.read(self.tensors[0], first * self.line, count * self.line, device)
        return self.numbers.floats(raw.view(count, self.line))

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        return self.numbers.bytes(self.numbers.clamped(values)).flatten()

    def decode_packed(self, packed: Tensor, first: int, count: int, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        return self.numbers.floats(packed.view(count, self.line))


class Fp8Files(Codec):
    """FP8 casts and ComfyUI's scaled FP8."""

    name, title = "fp8-files", "FP8 of image models"
    kinds = (("ComfyUI's scaled FP8, e4m3 or e5m2, with a scale for each weight", Scaled), ("FP8 casts", Cast))

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        if settings.places:
            return None  # a config says how weights are packed, and no other codec knew it
        finder = Finder(base)
        formats = formats_in(finder)
        if not formats and not any(info.dtype in DTYPES for info in base.tensors.values()):
            return None
        found: dict[str, Packed] = {}
        unread: dict[str, str] = {}
        for name, info in base.tensors.items():
            if name.rpartition(".")[2] in PARTS or not info.elements:
                continue
            layer, scale = name.removesuffix(".weight"), scale_of(base, name)
            said = formats.get(layer, "") if layer != name else ""
            if info.dtype in FLOAT_NAMES and (more := scale or (f"{layer}.{SAYS}" if said else "")):
                finder.note_both(name, more)
            elif said and FORMATS.get(said) != info.dtype:
                unread[name] = f"ComfyUI's {printable(said)}"
            elif said and not scale:
                finder.note(
                    f"{layer}.{NEW_SCALE}", f"must be F32 [], as {printable(name)} is {said}, but it is missing"
                )
            elif info.dtype in DTYPES and not said and has_other_scales(base, name):
                unread[name] = OTHER_SCALES
            elif info.dtype in DTYPES:
                with suppress(Unfit):
                    found[name] = weight_of(finder, name, scale)
        marks = [name for name in base.tensors if name.rpartition(".")[2] == MARK]
        packing = replace(complete(finder, found, self.title, WAY_OUT, LEFTOVERS), unread=unread, marks=marks)
        return packing if found or unread else None

    def metadata(
        self,
        metadata: Mapping[str, str],
        packing: Packing,  # noqa: ARG002 (its layers are those of the header)
        plain: Collection[str],
    ) -> Mapping[str, str]:
        """Without the layers that are plain, where the header lists the others."""
        if HEADER not in metadata:
            return metadata
        said = json_object(metadata[HEADER].encode())
        layers = {layer: value for layer, value in said.get("layers", {}).items() if f"{layer}.weight" not in plain}
        if not layers:
            return {key: value for key, value in metadata.items() if key != HEADER}
        return {**metadata, HEADER: json.dumps({**said, "layers": layers})}

    def notes(self, packing: Packing, plain: Collection[str]) -> Sequence[Note]:
        """ComfyUI may cast plain weights of a file of casts again."""
        casts = {name for name, weight in packing.weights.items() if isinstance(weight, Cast)}
        changed = sorted(casts & set(plain))
        if not changed or casts <= set(plain):
            return ()
        text = (
            f"{listed(changed)}: written plain, with all of the update, into a model whose other weights are F8 without "
            "scales; ComfyUI may round them to F8 when it loads the file, and an update below a step of F8 is lost "
            "then: --requantize measures how much of it F8 keeps (its gain), and --dequantize writes a model that "
            "keeps all of it"
        )
        return (Note("fp8-cast", text),)


def weight_of(finder: Finder, name: str, scale: str) -> Packed:
    """The weight whose values a tensor holds. Raises `Unfit` where something is wrong with its scale."""
    base, values, dtype = finder.base, plain_of(finder.base, name), plain_dtype(finder.base)
    info, numbers = values.info, BY_DTYPE[values.info.dtype]
    if not scale:
        line = info.shape[-1] if len(info.shape) > 1 else 1
        scheme = f"{numbers.title}, no scale"
        return Cast(shape=info.shape, line=line, dtype=dtype, tensors=(values,), scheme=scheme, numbers=numbers)
    there = base.tensors[scale]
    if len(info.shape) != 2:
        raise finder.unfit(name, f"must be a matrix, as {printable(scale)} exists, but it is {told(info)}")
    if there.shape not in ((), (1,)) or there.dtype not in SCALES:
        raise finder.unfit(scale, f"must be F32 [] or [1], the scale of all values, but it is {told(there)}")
    rows, line = info.shape
    tiles, tensors = Tiles((), rows, line, (rows, line)), (values, plain_of(base, scale))
    return Scaled(
        shape=info.shape,
        line=line,
        dtype=dtype,
        tensors=tensors,
        scheme=tiles.scheme(numbers.title),
        numbers=numbers,
        tiles=tiles,
        scales=tensors[1],
    )


def scale_of(base: Checkpoint, name: str) -> str:
    """The tensor with a weight's scale; empty where there is none."""
    if not name.endswith(".weight"):
        return ""
    stem = name.removesuffix("weight")
    return next((stem + each for each in (OLD_SCALE, NEW_SCALE) if stem + each in base.tensors), "")


def has_other_scales(base: Checkpoint, name: str) -> bool:
    """Whether a tensor of FP8 has scales of another form than ComfyUI's."""
    old = f"{name.removesuffix('weight')}{OLD_SCALE}" if name.endswith(".weight") else ""
    return old not in base.tensors and any(each in base.tensors for each in scale_names(name))


def formats_in(finder: Finder) -> Mapping[str, str]:
    """Layer → ComfyUI's name for how it is quantised, as headers and small tensors say it."""
    found: dict[str, str] = {}
    for where, layer, raw in said_in(finder.base):
        try:
            said = json_object(raw)
        except ValueError as error:
            finder.note(where, f"cannot be read: {error}")
            continue
        layers = said.get("layers") if not layer else {layer: said}
        for each, value in (layers if isinstance(layers, Mapping) else {}).items():
            kind = value.get("format") if isinstance(value, Mapping) else None
            if isinstance(kind, str):
                found[each] = kind
            else:
                finder.note(where, f"must name the format of {printable(each)}, and it does not")
    return found


def said_in(base: Checkpoint) -> Iterator[tuple[str, str, bytes]]:
    """What says how layers are quantised: its name, the layer, or none where it is about all of them, and its JSON."""
    for shard in base.shards:
        if HEADER in shard.metadata:
            yield HEADER, "", shard.metadata[HEADER].encode()
    with OpenSources() as sources:
        for name, info in base.tensors.items():
            layer, _, leaf = name.rpartition(".")
            if leaf == SAYS and layer and info.dtype == "U8" and info.nbytes <= LARGEST_JSON:
                yield name, layer, bytes_of(plain_of(base, name), sources)
