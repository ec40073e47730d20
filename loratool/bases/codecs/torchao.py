"""torchao, as transformers saves it in safetensors: `X._weight_qdata`, `X._weight_scale`, often `X._weight_zero_point`.

The metadata of each file's header describes the model: under the name of a weight there is JSON with the class of its
tensor and the size of its blocks. Three classes are decoded, in float32, an operation at a time:

    W = (qdata − zero_point) · scale of the block        Int8Tensor, IntxUnpackedToInt8Tensor
    W = qdata · scale of the block                       Float8Tensor

That is what `dequantize` of torchao 0.18 computes where it is asked for float32. The other classes (Int4Tensor,
Int4TilePackedTo4dTensor, MXTensor, NVFP4Tensor, ...) are laid out for one kind of GPU, and are refused by name.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from loratool.bases.codecs.affine import Affine
from loratool.bases.codecs.parts import Finder, Unfit, is_count
from loratool.bases.codecs.plain_modules import grown, matched_in_diffusers
from loratool.bases.packed import Codec, Packed, Packing, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import plain_of
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.untrusted import json_object

# Class of a tensor → the dtypes that its values may have.
READ = {
    "Int8Tensor": ("I8",),
    "IntxUnpackedToInt8Tensor": ("I8",),
    "Float8Tensor": ("F8_E4M3", "F8_E5M2"),
}
PLAIN = "Tensor"
LISTED = "modules_to_not_convert"
WAY_OUT = "pass the unquantised model as BASE"


class TorchAo(Codec):
    """torchao's tensors of 8 bits a value."""

    name, title = "torchao", "torchao"
    kinds = (("Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor", Affine),)

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        if settings.method not in ("", "torchao"):
            return None
        finder = Finder(base)
        found: dict[str, Packed] = {}
        unread: dict[str, str] = {}
        for name, said in described(base).items():
            if said["_type"] not in READ:
                unread |= {tensor: f"torchao's {printable(said['_type'])}" for tensor in parts_of(name, said, base)}
                continue
            with suppress(Unfit):
                found[name] = weight_of(finder, name, said)
        note_undescribed(finder, {*found, *unread})
        finder.refuse(self.title, WAY_OUT)
        return Packing(found, unread=unread) if found or unread else None

    def left_plain(
        self, setting: Setting, packing: Packing, plain: Collection[str], base: Checkpoint
    ) -> Mapping[str, Any]:
        """`modules_to_not_convert` with the modules that are plain.

        transformers takes an entry for a regular expression from the start of a weight's name up to a dot; vLLM looks
        for it within the names of its own, fused modules (`should_skip`).
        """
        return {**setting.values, LISTED: grown(setting.values.get(LISTED), base, packing, plain)}

    def named_too(self, packing: Packing, plain: Collection[str], base: Checkpoint) -> Collection[str]:
        """In diffusers an entry is looked for anywhere in a name, up to a dot (`check_if_quantized_param`)."""
        return matched_in_diffusers(packing, plain, base, lambda entry, module: f"{entry}." in f"{module}.")

    def metadata(self, metadata: Mapping[str, str], packing: Packing, plain: Collection[str]) -> Mapping[str, str]:
        """Each file describes all of the model, so weights of other files are plain in it, too."""
        gone = packing.weights.keys() & set(plain)
        return {name: json.dumps({"_type": PLAIN}) if name in gone else said for name, said in metadata.items()}


def described(base: Checkpoint) -> Mapping[str, Mapping[str, Any]]:
    """What the metadata of a base's files says of each weight that is packed, by its name."""
    found: dict[str, Mapping[str, Any]] = {}
    for shard in base.shards:
        for name, text in (shard.layout.metadata or {}).items():
            if "." in name and name not in found:
                with suppress(ValueError):  # what is no JSON speaks of something else
                    said = json_object(text.encode(errors="replace"))
                    if isinstance(said.get("_type"), str) and said["_type"] != PLAIN:
                        found[name] = said
    return found


def stem_of(name: str) -> str:
    """What the names of a weight's tensors begin with."""
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}"


def parts_of(name: str, said: Mapping[str, Any], base: Checkpoint) -> list[str]:
    """The tensors of a base that a weight is made of."""
    parts = said.get("_tensor_data_names")
    named = [f"{stem_of(name)}_{part}" for part in parts] if isinstance(parts, list) else []
    return [tensor for tensor in named if tensor in base.tensors]


def weight_of(finder: Finder, name: str, said: Mapping[str, Any]) -> Affine:
    """The weight of one description. Raises `Unfit` where anything of it is wrong."""
    stem = stem_of(name)
    if name in finder.base.tensors:
        raise finder.unfit(name, f"is there as well as {printable(stem)}_qdata, and only one of them may be")
    if (older := f"{name}:qdata") in finder.base.tensors:
        raise finder.unfit(
            older,
            "has a name from torchao 0.14 or older; load the model with that release and save it with a newer one",
        )
    qdata = finder.need(f"{stem}_qdata", READ[said["_type"]], why=f"for {said['_type']}")
    shape, data = qdata.info.shape, said.get("_data")
    block = data.get("block_size") if isinstance(data, Mapping) else None
    sizes = [size for size in block if is_count(size)] if isinstance(block, list) else []
    if len(shape) < 2 or len(sizes) != len(shape) or any(map(operator.mod, shape, sizes)):
        wanted = f"block_size must have a divisor of each size of {list(shape)}"
        raise finder.unfit(name, f"{wanted}, but it is {printable(repr(block))}")
    blocks = tuple(size // each for size, each in zip(shape, sizes, strict=True))
    each = f"for blocks of {block}"
    parts = [qdata, finder.part(f"{stem}_scale", [*FLOAT_NAMES], blocks, each)]
    has_zero = f"{stem}_zero_point" in finder.base.tensors
    if has_zero:
        parts.append(finder.part(f"{stem}_zero_point", ["I8", *FLOAT_NAMES], blocks, each))
    if f"{stem}_act_pre_scale" in finder.base.tensors:
        finder.note(f"{stem}_act_pre_scale", "scales the layer's inputs, which is not read")
    others = [plain_of(finder.base, tensor) for tensor in parts_of(name, said, finder.base)]
    tensors = finder.every(*parts)
    read = {tensor.info.name for tensor in tensors}
    return Affine(
        shape=shape,
        line=shape[-1],
        dtype=plain_dtype(finder.base),
        tensors=(*tensors, *(tensor for tensor in others if tensor.info.name not in read)),
        scheme=f"torchao {said['_type']}, blocks of {' x '.join(map(str, sizes))}",
        blocks=blocks,
        has_zero=has_zero,
        bits=bits_of(data),
    )


def bits_of(data: object) -> int:
    """The bits of the values of an IntxUnpackedToInt8Tensor, as in `{"target_dtype": {"_data": "int4"}}`; else 8."""
    target = data.get("target_dtype") if isinstance(data, Mapping) else None
    name = target.get("_data") if isinstance(target, Mapping) else None
    return next((bits for bits in range(1, 9) if name == f"int{bits}"), 8)


def note_undescribed(finder: Finder, known: Collection[str]) -> None:
    """Note the tensors of packed weights that the metadata says nothing of."""
    noted = " ".join(finder.problems)
    for name in finder.base.tensors:
        stem, found, _ = name.rpartition("_qdata")
        module, _, parameter = stem.rpartition("._")
        weight = f"{module}.{parameter}"
        if found and name not in known and weight not in known and stem not in noted and weight not in noted:
            finder.note(name, "the metadata of the file does not say how it is packed, so no loader can read it")
