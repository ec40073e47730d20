"""Small checkpoints as quantisers write them, and what their weights are by the documented formulas.

A maker takes plain weights, (rows, columns) or stacks of them, and gives the tensors that take their places, what the
config says, and the values that the packed weights have: worked out in numpy from the integers before they are packed,
element by element, so nothing here is shared with the code that decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP8_MAX, TINY = 448.0, 2.0**-20


@dataclass
class Quantised:
    """What takes the place of plain weights."""

    config: dict[str, Any]  # quantization_config
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)  # float32, by the names of the plain weights
    files: dict[str, Any] = field(default_factory=dict)  # other JSON files of the folder
    metadata: dict[str, str] = field(default_factory=dict)  # of the header

    def add(self, name: str, values: Array, **parts: Array | Tensor) -> None:
        """A weight that has these values, and the tensors `name` with these endings: `_` is for the bare name."""
        self.values[name] = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        for ending, part in parts.items():
            full = name if ending == "_" else f"{stem}{ending}"
            self.tensors[full] = (part if isinstance(part, Tensor) else torch.from_numpy(part.copy())).contiguous()


Weights = Mapping[str, Tensor]
Maker = Callable[[Weights], Quantised]


def entries(grid: Array, shape: tuple[int, ...], block: tuple[int, int]) -> Array:
    """Of a grid with an entry for each block, that of each element of (…, rows, columns): the definition."""
    rows, columns = shape[-2:]
    down, across = np.arange(rows) // block[0], np.arange(columns) // block[1]
    return grid[..., down[:, None], across[None, :]]


def largest(values: Array, block: tuple[int, int]) -> Array:
    """The largest magnitude of each block, (…, ⌈rows/b⌉, ⌈columns/c⌉)."""
    rows, columns = (range(0, size, side) for size, side in zip(values.shape[-2:], block, strict=True))
    of_rows: Array = np.maximum.reduceat(np.abs(values), rows, axis=-2)
    return np.maximum.reduceat(of_rows, columns, axis=-1)


def whole(values: Array) -> tuple[int, int]:
    return values.shape[-2], values.shape[-1]


def in_fp8(values: Array) -> tuple[Tensor, Array]:
    """e4m3, and the float32 that they are."""
    packed = torch.from_numpy(values).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return packed, packed.float().numpy()


def in_e2m1(values: Array) -> tuple[Array, Array]:
    """Codes of 4 bits of the nearest values, and these."""
    nearest = np.searchsorted((E2M1[1:] + E2M1[:-1]) / 2, np.abs(values))
    codes = (nearest + 8 * (values < 0)).astype(np.uint8)
    return codes, np.where(values < 0, -E2M1[nearest], E2M1[nearest]).astype(np.float32)


def paired(codes: Array, axis: int = -1) -> Array:
    """Codes of 4 bits as bytes, two along an axis, the first in the low nibble."""
    codes = np.moveaxis(codes, axis, -1)
    return np.moveaxis(codes[..., ::2] | codes[..., 1::2] << 4, -1, axis)


def in_words(integers: Array, bits: int, axis: int = -1) -> Array:
    """Unsigned integers as int32, one bit after the other along an axis, padded with zeros."""
    lying = np.moveaxis(integers, axis, -1)
    stream = (lying[..., None] >> np.arange(bits) & 1).reshape(*lying.shape[:-1], -1).astype(np.uint8)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    words = np.packbits(stream, -1, bitorder="little").copy().view("<i4")
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def powers_of_two(scales: Array) -> Array:
    """The E8M0 bytes of the powers of two at or above some scales."""
    return (np.ceil(np.log2(np.maximum(scales, TINY))) + 127).astype(np.uint8)


def fp8(
    weights: Weights, block: tuple[int, int] | None, *, ending: str = "weight_scale_inv", powers: bool = False
) -> Quantised:
    """FP8 of transformers: blocks as DeepSeek-V3 has them, or one scale; `powers` are bytes (`scale_fmt` ue8m0)."""
    made = Quantised(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block)}
    )
    if powers:
        made.config["scale_fmt"] = "ue8m0"
    for name, weight in weights.items():
        values = weight.float().numpy()
        sides = block or whole(values)
        scales = np.maximum(largest(values, sides), TINY) / np.float32(FP8_MAX)
        stored: Array = powers_of_two(scales) if powers else scales
        scales = np.exp2(stored.astype(np.float32) - 127) if powers else scales
        each = entries(scales, values.shape, sides)
        packed, numbers = in_fp8(values / each)
        stored = stored if block else stored.squeeze((-2, -1))
        of_stack = {} if name.endswith(".weight") else {"scale_inv": stored}
        made.add(name, numbers * each, _=packed, **(of_stack or {ending: stored}))
    return made


def fbgemm(weights: Weights) -> Quantised:
    """FP8 with a scale for each row, as Llama-405B-FP8."""
    made = Quantised(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    )
    for name, weight in weights.items():
        values = weight.float().numpy()
        scales = np.maximum(largest(values, (1, values.shape[-1])), TINY) / np.float32(FP8_MAX)
        packed, numbers = in_fp8(values / scales)
        made.add(name, numbers * scales, _=packed, weight_scale=scales)
    return made


def scheme(form: str, **weights: object) -> dict[str, Any]:
    """The config of compressed-tensors with one group; the formats of 8 bits without packing are for inputs of 8 bits."""
    said = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False, **weights}
    static = {"strategy": "tensor", "dynamic": False}
    inputs = static if said["strategy"] == "tensor" else {"strategy": "token", "dynamic": True}
    inputs = {"num_bits": 8, "type": said["type"], "symmetric": True, **inputs}
    group = {
        "targets": ["Linear"],
        "weights": said,
        "input_activations": inputs if form in ("int-quantized", "float-quantized") else None,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def in_integers(values: Array, sides: tuple[int, int], bits: int, *, symmetric: bool) -> tuple[Array, Array, Array]:
    """Signed integers, scales and zero points by the smallest and largest value of each block."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    if symmetric:
        scales = np.maximum(largest(values, sides), TINY) / np.float32(high)
        zeros = np.zeros_like(scales)
    else:
        top, bottom = largest(np.maximum(values, 0), sides), -largest(np.minimum(values, 0), sides)
        scales = np.maximum(top - bottom, TINY) / np.float32(high - low)
        zeros = np.clip(np.rint(low - bottom / scales), low, high)
    each, zero = (entries(grid, values.shape, sides) for grid in (scales, zeros))
    return np.clip(np.rint(values / each) + zero, low, high).astype(np.int64), scales, zeros.astype(np.int64)


def ct_packed(
    weights: Weights,
    bits: int,
    group: int | None,
    *,
    symmetric: bool = True,
    order: bool = False,
    dtype: str = "bfloat16",
) -> Quantised:
    """pack-quantized: groups of columns, or one scale for each row. `order`: the older act-order with an index."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    made = Quantised(scheme("pack-quantized", num_bits=bits, symmetric=symmetric, **strategy))
    for number, (name, weight) in enumerate(weights.items()):
        values, offset = weight.float().numpy(), 1 << bits - 1
        columns = values.shape[-1]
        sides = (1, group or columns)
        integers, scales, zeros = in_integers(values, sides, bits, symmetric=symmetric)
        rounded = torch.from_numpy(scales).to(getattr(torch, dtype))  # as they are stored
        index = np.arange(columns) // sides[1]
        parts: dict[str, Array | Tensor] = {}
        if order:
            index = np.random.default_rng(number).permutation(index)
            parts["weight_g_idx"] = index.astype(np.int32)
        each = rounded.float().numpy()[..., index]
        if not symmetric:
            parts["weight_zero_point"] = in_words(zeros + offset, bits, -2)
        made.add(
            name,
            (integers - zeros[..., index]).astype(np.float32) * each,
            weight_packed=in_words(integers + offset, bits),
            weight_scale=rounded,
            weight_shape=np.array(values.shape),
            **parts,
        )
    return made


def ct_int8(weights: Weights, *, symmetric: bool = True, form: str = "int-quantized") -> Quantised:
    """W8A8: int8 with a scale for each row, and perhaps zero points."""
    made = Quantised(scheme(form, strategy="channel", symmetric=symmetric))
    for name, weight in weights.items():
        values = weight.float().numpy()
        integers, scales, zeros = in_integers(values, (1, values.shape[-1]), 8, symmetric=symmetric)
        more = {} if symmetric else {"weight_zero_point": zeros.astype(np.int8)}
        decoded = (integers - zeros).astype(np.float32) * scales
        made.add(name, decoded, _=integers.astype(np.int8), weight_scale=scales, **more)
    return made


def ct_float(weights: Weights, strategy: str, form: str = "float-quantized") -> Quantised:
    """FP8 by tensor, channel, block, or group with powers of two (mxfp8)."""
    sizes: dict[str, dict[str, object]] = {"block": {"block_structure": [16, 24]}, "group": {"group_size": 32}}
    made = Quantised(scheme(form, type="float", strategy=strategy, **sizes.get(strategy, {})))
    for name, weight in weights.items():
        values = weight.float().numpy()
        columns = values.shape[-1]
        sides = {"tensor": whole(values), "channel": (1, columns), "block": (16, 24), "group": (1, 32)}[strategy]
        scales = np.maximum(largest(values, sides), TINY) / np.float32(FP8_MAX)
        stored: Array = powers_of_two(scales) if strategy == "group" else scales
        scales = np.exp2(stored.astype(np.float32) - 127) if strategy == "group" else scales
        each = entries(scales, values.shape, sides)
        packed, numbers = in_fp8(values / each)
        stored = stored.reshape(1) if strategy == "tensor" and values.ndim == 2 else stored
        made.add(name, numbers * each, _=packed, weight_scale=stored)
        if strategy == "tensor" and name.endswith(".weight"):
            made.tensors[f"{name.removesuffix('weight')}input_scale"] = torch.ones(1)
    return made


def ct_nvfp4(weights: Weights) -> Quantised:
    """nvfp4: e4m3 scales for 16 columns, **divided** by that of the whole matrix."""
    made = Quantised(scheme("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16))
    for name, weight in weights.items():
        values = weight.float().numpy()
        total = (FP8_MAX * 6 / np.maximum(largest(values, whole(values)), TINY)).astype(np.float32)
        stored, scales = in_fp8(np.maximum(largest(values, (1, 16)) / 6 * total, 2.0**-9).astype(np.float32))
        each = entries(scales / total, values.shape, (1, 16))
        codes, numbers = in_e2m1(values / each)
        of_all = total.reshape(values.shape[:-2] or (1,))
        made.add(name, numbers * each, weight_packed=paired(codes), weight_scale=stored, weight_global_scale=of_all)
    return made


def ct_mxfp4(weights: Weights) -> Quantised:
    """mxfp4: a power of two for 32 columns."""
    made = Quantised(scheme("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32))
    for name, weight in weights.items():
        values = weight.float().numpy()
        stored = powers_of_two(largest(values, (1, 32)) / 6)
        each = entries(np.exp2(stored.astype(np.float32) - 127), values.shape, (1, 32))
        codes, numbers = in_e2m1(values / each)
        made.add(name, numbers * each, weight_packed=paired(codes), weight_scale=stored)
    return made


def nvidia(algorithm: str, **more: object) -> Quantised:
    """The configs of ModelOpt: config.json's, and the twin that is older."""
    producer = {"name": "modelopt", "version": "0.47.0"}
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": None, **more}
    group = {"weights": {"dynamic": False, "num_bits": 8, "type": "float", **more}, "targets": ["Linear"]}
    config = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "quant_algo": algorithm, "producer": producer}
    twin = {"producer": producer, "quantization": {**said, "exclude_modules": ["lm_head"]}}
    return Quantised({**config, "quant_method": "modelopt"}, files={"hf_quant_config.json": twin})


def modelopt_fp8(weights: Weights, kind: str) -> Quantised:
    """FP8 with one scale, one per row (pc), one per block (pb), or powers of two for 32 columns (mx)."""
    names = {"tensor": "FP8", "pc": "FP8_PER_CHANNEL_PER_TOKEN", "pb": "fp8_pb_wo", "mx": "MXFP8"}
    made = nvidia(names[kind])
    for name, weight in weights.items():
        values = weight.float().numpy()
        sides = {"tensor": whole(values), "pc": (1, values.shape[-1]), "pb": (128, 128), "mx": (1, 32)}[kind]
        scales = np.maximum(largest(values, sides), TINY) / np.float32(FP8_MAX)
        stored: Array = powers_of_two(scales) if kind == "mx" else scales
        scales = np.exp2(stored.astype(np.float32) - 127) if kind == "mx" else scales
        each = entries(scales, values.shape, sides)
        packed, numbers = in_fp8(values / each)
        if kind in ("tensor", "pc"):
            stored = stored.squeeze((-2, -1) if kind == "tensor" else -1)
        elif kind == "pb":
            stored = stored[..., :, None, :, None]
        made.add(name, numbers * each, _=packed, weight_scale=stored, input_scale=np.ones((), np.float32))
    return made


def modelopt_nvfp4(weights: Weights, *, rows_first: bool = False) -> Quantised:
    """NVFP4: e4m3 scales for 16 columns, times `weight_scale_2`. `rows_first`: stacks (experts, in, out), along `in`."""
    made = nvidia("NVFP4", group_size=16)
    for name, weight in weights.items():
        values = weight.float().numpy()
        values = values.swapaxes(-1, -2) if rows_first else values
        second = np.maximum(largest(values, whole(values)), TINY) / np.float32(FP8_MAX * 6)
        stored, scales = in_fp8(np.maximum(largest(values, (1, 16)) / 6 / second, 2.0**-9).astype(np.float32))
        each = entries(scales * second, values.shape, (1, 16))
        codes, numbers = in_e2m1(values / each)
        packed, decoded = paired(codes), numbers * each
        if rows_first:
            packed, decoded, stored = packed.swapaxes(-1, -2), decoded.swapaxes(-1, -2), stored.transpose(-1, -2)
        made.add(name, decoded, _=packed, weight_scale=stored, weight_scale_2=second.reshape(values.shape[:-2]))
        made.add(name, decoded, input_scale=np.ones((), np.float32))
    return made


def modelopt_awq(weights: Weights, group: int = 32) -> Quantised:
    """W4A16_AWQ: int4, two rows a byte, and a scale for each column, which was taken out of the inputs."""
    made = nvidia("W4A16_AWQ", group_size=group)
    for number, (name, weight) in enumerate(weights.items()):
        values = weight.float().numpy()
        columns = np.random.default_rng(number).random(values.shape[-1], np.float32) + np.float32(0.5)
        integers, scales, _ = in_integers(values / columns, (1, group), 4, symmetric=True)
        decoded = integers.astype(np.float32) * entries(scales, values.shape, (1, group)) * columns
        packed = paired((integers & 15).astype(np.uint8), -2)
        made.add(name, decoded, _=packed, weight_scale=scales, pre_quant_scale=columns)
    return made


def gpt_oss(weights: Weights) -> Quantised:
    """MXFP4 experts: plain ones are (experts, in, out), and on disk it is (experts, out, in/32, 16)."""
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    made = Quantised({"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    for name, weight in weights.items():
        values = weight.float().numpy().swapaxes(-1, -2)
        stored = powers_of_two(largest(values, (1, 32)) / 6)
        each = entries(np.exp2(stored.astype(np.float32) - 127), values.shape, (1, 32))
        codes, numbers = in_e2m1(values / each)
        blocks = paired(codes).reshape(*values.shape[:-1], -1, 16)
        made.add(name, (numbers * each).swapaxes(-1, -2), blocks=blocks, scales=stored)
    return made


AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight in a word of AWQ, from the lowest four bits on


def in_grid(values: Array, group: int, bits: int, *, symmetric: bool) -> tuple[Array, Array, Array]:
    """Unsigned integers, (groups, rows) of float16 scales and of zero points, by each group's smallest and largest value."""
    top = 2**bits - 1
    parts = values.reshape(len(values), -1, group)
    high, low = np.maximum(parts.max(-1), 0), np.minimum(parts.min(-1), 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scales = (np.maximum(high - low, TINY) / np.float32(top)).astype(np.float16)
    each = scales.astype(np.float32)[..., None]
    zeros = np.full_like(high, 2 ** (bits - 1)) if symmetric else np.clip(np.rint(-low / each[..., 0]), 1, top)
    integers = np.clip(np.rint(parts / each) + zeros[..., None], 0, top)
    return integers.astype(np.int64).reshape(values.shape), scales.T, zeros.astype(np.int64).T


def gptq(
    weights: Weights,
    bits: int = 4,
    group: int = 128,
    *,
    version: int = 1,
    order: bool = False,
    symmetric: bool = True,
    gptqmodel: bool = True,
) -> Quantised:
    """GPTQ as GPTQModel or AutoGPTQ writes it. `order`: inputs in any group, as act-order leaves them."""
    said: dict[str, Any] = {"bits": bits, "group_size": group, "desc_act": order, "sym": symmetric}
    made = Quantised({**said, "quant_method": "gptq"})
    if gptqmodel:
        form = "gptq" if version == 1 else "gptq_v2"
        meta = {"quantizer": ["gptqmodel:7.3.4"], "uri": "https://github.com/modelcloud/gptqmodel"}
        made.config |= {
            "checkpoint_format": form,
            "format": form,
            "pack_dtype": "int32",
            "lm_head": False,
            "meta": meta,
        }
        said = made.config
    made.files["quantize_config.json"] = said
    for number, (name, weight) in enumerate(weights.items()):
        values, columns = weight.float().numpy(), weight.shape[-1]
        size = columns if group == -1 else group
        index = np.arange(columns) // size
        if order:
            index = np.random.default_rng(number).permutation(index)
        sorting = np.argsort(index, kind="stable")  # those of a group one after the other
        sorted_, scales, zeros = in_grid(values[:, sorting], size, bits, symmetric=symmetric)
        integers = np.empty_like(sorted_)
        integers[:, sorting] = sorted_
        made.add(
            name,
            (integers - zeros[index].T).astype(np.float32) * scales[index].T.astype(np.float32),
            qweight=in_words(integers, bits).T.copy(),
            qzeros=in_words(zeros - (2 - version), bits),
            scales=scales,
            g_idx=index.astype(np.int32),
        )
    return made


def awq(weights: Weights, group: int = 128) -> Quantised:
    """AWQ's layout gemm as AutoAWQ writes it."""
    config = {"quant_method": "awq", "zero_point": True, "group_size": group, "bits": 4, "version": "gemm"}
    made = Quantised({**config, "modules_to_not_convert": None})
    for name, weight in weights.items():
        values, columns = weight.float().numpy(), weight.shape[-1]
        size = columns if group == -1 else group
        integers, scales, zeros = in_grid(values, size, 4, symmetric=False)
        index = np.arange(columns) // size
        decoded = (integers - zeros[index].T).astype(np.float32) * scales[index].T.astype(np.float32)
        words = [
            in_words(part.reshape(len(part), -1, 8)[..., AWQ_OUTPUTS].reshape(part.shape), 4)
            for part in (integers.T, zeros)
        ]
        made.add(name, decoded, qweight=words[0], qzeros=words[1], scales=scales)
    return made


FAMILIES: Mapping[str, Maker] = {
    "fp8 blocks": partial(fp8, block=(16, 24)),
    "fp8 blocks, powers of two": partial(fp8, block=(16, 32), powers=True),
    "fp8 one scale": partial(fp8, block=None),
    "fp8 rows (fbgemm)": fbgemm,
    "int4 groups": partial(ct_packed, bits=4, group=32),
    "int4 groups, zero points": partial(ct_packed, bits=4, group=16, symmetric=False, dtype="float16"),
    "int4 act-order": partial(ct_packed, bits=4, group=16, order=True),
    "int8 packed, rows": partial(ct_packed, bits=8, group=None, symmetric=False),
    "int3 groups": partial(ct_packed, bits=3, group=16, symmetric=False, dtype="float32"),
    "int5 rows": partial(ct_packed, bits=5, group=None),
    "int6 groups": partial(ct_packed, bits=6, group=8, symmetric=False),
    "int7 rows": partial(ct_packed, bits=7, group=None, symmetric=False),
    "int8 (W8A8)": ct_int8,
    "int8, zero points": partial(ct_int8, symmetric=False, form="naive-quantized"),
    "float8 one scale": partial(ct_float, strategy="tensor"),
    "float8 rows": partial(ct_float, strategy="channel"),
    "float8 blocks": partial(ct_float, strategy="block"),
    "mxfp8": partial(ct_float, strategy="group", form="mxfp8-quantized"),
    "nvfp4": ct_nvfp4,
    "mxfp4": ct_mxfp4,
    "modelopt FP8": partial(modelopt_fp8, kind="tensor"),
    "modelopt FP8 rows": partial(modelopt_fp8, kind="pc"),
    "modelopt FP8 blocks": partial(modelopt_fp8, kind="pb"),
    "modelopt MXFP8": partial(modelopt_fp8, kind="mx"),
    "modelopt NVFP4": modelopt_nvfp4,
    "modelopt int4": modelopt_awq,
}
MATRICES: Mapping[str, Maker] = {  # those that are for matrices alone, AWQ for a multiple of 8 rows
    **{f"GPTQ {bits} bits": partial(gptq, bits=bits, group=16) for bits in (2, 3, 4, 8)},
    "GPTQ act-order": partial(gptq, group=16, order=True, symmetric=False, gptqmodel=False),
    "GPTQ version 2": partial(gptq, group=-1, version=2, symmetric=False),
    "AWQ": partial(awq, group=16),
}
STACKS: Mapping[str, Maker] = {  # those that are for stacks of experts alone
    "gpt-oss": gpt_oss,
    "modelopt NVFP4, along rows": partial(modelopt_nvfp4, rows_first=True),
}
