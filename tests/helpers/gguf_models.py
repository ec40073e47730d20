"""Tiny models as GGUF files, written by llama.cpp's own `gguf` package and by the formulas of its converters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import quants
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Kind = gguf.GGMLQuantizationType
HIDDEN, MLP, LAYERS, HEADS, KEY_HEADS, VOCABULARY = 64, 96, 2, 4, 2, 40


def llama_weights(
    seed: int = 0, hidden: int = HIDDEN, mlp: int = MLP, vocabulary: int = VOCABULARY
) -> dict[str, Tensor]:
    """The weights of a Llama by the names of transformers."""
    generator = torch.Generator().manual_seed(seed)
    kv = hidden // HEADS * KEY_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.q_proj": (hidden, hidden), f"{at}.self_attn.o_proj": (hidden, hidden)}
        shapes |= {f"{at}.self_attn.k_proj": (kv, hidden), f"{at}.self_attn.v_proj": (kv, hidden)}
        shapes |= {f"{at}.mlp.gate_proj": (mlp, hidden), f"{at}.mlp.up_proj": (mlp, hidden)}
        shapes |= {f"{at}.mlp.down_proj": (hidden, mlp)}
        shapes |= {f"{at}.input_layernorm": (hidden,), f"{at}.post_attention_layernorm": (hidden,)}
    shapes["model.norm"] = (hidden,)
    return {f"{name}.weight": torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


def permuted(rows: Array, heads: int) -> Array:
    """What llama.cpp's converter does to rows of queries and keys: `LlamaModel.permute`."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    ordered: Array = split.swapaxes(1, 2).reshape(rows.shape)
    return ordered


def as_llama_cpp(name: str, rows: Array) -> tuple[str, Array]:
    """A weight of a Llama as the converter writes it: `tensor_mapping` gives the name."""
    if name.endswith("q_proj.weight"):
        rows = permuted(rows, HEADS)
    if name.endswith("k_proj.weight"):
        rows = permuted(rows, KEY_HEADS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found, rows


def packed(values: Array, kind: Any) -> Array:
    """Values as a type of llama.cpp's stores them; random blocks of it where the package cannot encode the type."""
    if kind in (Kind.F32, Kind.F16):
        return values.astype(np.float32 if kind == Kind.F32 else np.float16)
    try:
        blocks: Array = quants.quantize(values.astype(np.float32), kind)
        return blocks
    except NotImplementedError:
        return random_blocks(values.shape, kind)


def random_blocks(shape: tuple[int, ...], kind: Any, seed: int = 5) -> Array:
    """Bytes of any blocks of a type, whose float16 scales are finite and small."""
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (int(np.prod(shape)) // values, nbytes), dtype=np.uint8)
    for at in SCALES.get(kind.name, ()):  # the high byte of each float16: 0.004 … 0.03
        blocks[:, at + 1] = 0x1C + blocks[:, at + 1] % 12
    if kind.name == "MXFP4":
        blocks[:, 0] = 118 + blocks[:, 0] % 8
    return blocks.reshape(*shape[:-1], -1)


def q4_k_blocks(shape: tuple[int, ...]) -> Array:
    """Blocks of Q4_K whose values are around 0, such as a model can compute with."""
    generator = np.random.default_rng(shape[0])
    count = int(np.prod(shape)) // 256
    blocks = generator.integers(0, 256, (count, 144), dtype=np.uint8)
    scale = np.float16(0.0007)
    blocks[:, 0:4] = np.frombuffer(np.array([scale, scale * np.float16(7.5)]).tobytes(), np.uint8)
    scales = generator.integers(0, 64, (count, 8), dtype=np.uint8)  # scales and minimums are equal: value = s (q − 7.5)
    blocks[:, 4:8] = scales[:, :4] | scales[:, 4:] >> 4 << 6
    blocks[:, 8:12] = blocks[:, 4:8]
    blocks[:, 12:16] = scales[:, 4:] & 15 | (scales[:, 4:] & 15) << 4
    return blocks.reshape(*shape[:-1], -1)


# Where the float16 numbers of a block lie that its values are multiplied with.
SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def vocabulary(count: int) -> tuple[list[str], list[int]]:
    """So many tokens and their types; with the 256 bytes, without which no runtime loads a model, where there is room."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)][: max(count - len(special), 0)]
    words = [f"w{number}" for number in range(count - len(special) - len(bytes_))]
    return [*special, *bytes_, *words], [2, 3, 3, *[6] * len(bytes_), *[1] * len(words)]


def write_llama(
    path: Path,
    weights: Mapping[str, Tensor],
    kind: Any = Kind.F16,
    kinds: Mapping[str, Any] | None = None,
    tied: bool = False,
    blocks: Callable[[tuple[int, ...]], Array] | None = None,
) -> Path:
    """A Llama as a GGUF file: matrices of a type, or of that which `kinds` has for their name here, and norms in F32.

    `blocks` makes the bytes of packed matrices of a shape, whatever their weights.
    """
    hidden = weights["model.norm.weight"].shape[0]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(weights["model.layers.0.mlp.up_proj.weight"].shape[0])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens, types = vocabulary(weights["model.embed_tokens.weight"].shape[0])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    for name, weight in weights.items():
        if tied and name == "lm_head.weight":
            continue
        stored, rows = as_llama_cpp(name, weight.float().numpy())
        own = Kind.F32 if rows.ndim == 1 else (kinds or {}).get(stored, kind)
        quantised = own not in (Kind.F32, Kind.F16)
        values = blocks(rows.shape) if blocks and quantised else packed(rows, own)
        writer.add_tensor(stored, values, raw_dtype=own if quantised else None)
    return written(writer, path)


def write_tensors(path: Path, architecture: str, tensors: Mapping[str, Array]) -> Path:
    """Some tensors in F32, and nothing that says more of the model than its architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    return written(writer, path)


def write_adapter_tensors(path: Path, tensors: Mapping[str, Array], alpha: float) -> Path:
    """An adapter of llama.cpp's for a Llama."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    return written(writer, path)


def written(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(whole: Path, folder: Path, count: int = 3) -> Path:
    """A model in several files, as `llama-gguf-split` makes them; the first of them has all of the metadata."""
    folder.mkdir()
    reader = gguf.GGUFReader(whole)
    paths = [folder / f"model-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data)
        written(writer, path)
    return paths[0]


def read_back(path: Path) -> dict[str, Array]:
    """The values of all tensors as the package reads them, in float32."""
    reader = gguf.GGUFReader(path)
    return {t.name: quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}


def raw_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of each tensor as the package reads them."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}
