"""Models and adapters of other dialects in real shapes, with pseudo-random values, written as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from algebra_inputs import factors
from safetensors.torch import save_file
from shapes import SHAPES
from torch import Tensor

Sizes = dict[str, tuple[int, int]]  # module → (out, in)
HIDDEN, MLP = 3072, 12288
DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1
PIECE = 1 << 25  # values that are made at a time
ALPHA = 16.0


def flux_modules(double: int = DOUBLE, single: int = SINGLE) -> Sizes:
    """The linear layers that kohya's scripts adapt, in Black Forest Labs' layout."""
    found: Sizes = {}
    for block in range(double):
        for side in ("img", "txt"):
            at = f"double_blocks.{block}.{side}"
            found[f"{at}_attn.qkv"] = (3 * HIDDEN, HIDDEN)
            found[f"{at}_attn.proj"] = (HIDDEN, HIDDEN)
            found[f"{at}_mlp.0"] = (MLP, HIDDEN)
            found[f"{at}_mlp.2"] = (HIDDEN, MLP)
            found[f"{at}_mod.lin"] = (6 * HIDDEN, HIDDEN)
    for block in range(single):
        at = f"single_blocks.{block}"
        found[f"{at}.linear1"] = (3 * HIDDEN + MLP, HIDDEN)
        found[f"{at}.linear2"] = (HIDDEN, HIDDEN + MLP)
        found[f"{at}.modulation.lin"] = (3 * HIDDEN, HIDDEN)
    return found


def flux_tensors(double: int, single: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The weights of a FLUX.1 of so many blocks, as its one file has them."""
    yield from (("img_in.weight", (HIDDEN, 64)), ("img_in.bias", (HIDDEN,)))
    yield from (("txt_in.weight", (HIDDEN, 4096)), ("txt_in.bias", (HIDDEN,)))
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        yield from ((f"{name}.in_layer.weight", (HIDDEN, width)), (f"{name}.in_layer.bias", (HIDDEN,)))
        yield from ((f"{name}.out_layer.weight", (HIDDEN, HIDDEN)), (f"{name}.out_layer.bias", (HIDDEN,)))
    for module, (out, into) in flux_modules(double, single).items():
        yield from ((f"{module}.weight", (out, into)), (f"{module}.bias", (out,)))
        if module.endswith(("qkv", "linear1")):
            norm = f"{module.removesuffix('.qkv')}.norm" if module.endswith("qkv") else f"{module[:-8]}.norm"
            yield from ((f"{norm}.query_norm.scale", (128,)), (f"{norm}.key_norm.scale", (128,)))
    yield from (("final_layer.linear.weight", (64, HIDDEN)), ("final_layer.linear.bias", (64,)))
    yield from (
        ("final_layer.adaLN_modulation.1.weight", (2 * HIDDEN, HIDDEN)),
        ("final_layer.adaLN_modulation.1.bias", (2 * HIDDEN,)),
    )


def make_flux(path: Path, double: int, single: int) -> None:
    """One file in bfloat16; real bytes, none of them a hole."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, sizes = 0, []
    for name, shape in flux_tensors(double, single):
        count = int(np.prod(shape))
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * count]}
        sizes.append(count)
        at += 2 * count
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    pool = (generator.standard_normal(PIECE, dtype=np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    bits = pool.astype(np.uint16)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for number, count in enumerate(sizes):
            start = number * 15_485_863 % PIECE
            while count:
                part = bits[start : start + count]
                stream.write(part.tobytes())
                count -= len(part)
                start = 0


def make_kohya(path: Path, modules: Sizes, rank: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """An adapter as kohya's scripts save it: names flattened, an α a module."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for module, (out, into) in modules.items():
        up, down = factors(out, into, rank, generator)
        flat = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = down.to(dtype)
        tensors[f"{flat}.lora_up.weight"] = up.to(dtype)
        tensors[f"{flat}.alpha"] = torch.tensor(ALPHA, dtype=dtype)
    metadata = {"ss_network_module": "networks.lora_flux", "ss_network_dim": str(rank), "ss_network_alpha": "16"}
    save_file(tensors, path, metadata={**metadata, "ss_base_model_version": "flux1"})


def small_modules() -> Sizes:
    """The attention of two blocks of SD1.5, by the names of diffusers."""
    at = "down_blocks.0.attentions.0.transformer_blocks.0"
    return {f"{at}.{attention}.to_{part}": (32, 32) for attention in ("attn1", "attn2") for part in ("q", "k", "v")}


def make_mixture(folder: Path, count: int) -> list[Path]:
    """Small adapters of five dialects, one file each."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    paths = []
    for number in range(count):
        tensors: dict[str, Tensor] = {}
        for module, (out, into) in small_modules().items():
            up, down = factors(out, into, 4, generator)
            tensors |= spelled(number % 5, module, up, down)
        paths.append(folder / f"{number:04}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def spelled(dialect: int, module: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """The factors of a module by the names of kohya, diffusers (old and new), ComfyUI, and LyCORIS."""
    flat, alpha = module.replace(".", "_"), torch.tensor(4.0)
    match dialect:
        case 0:
            at = f"lora_unet_{flat}"
            return {f"{at}.lora_down.weight": down, f"{at}.lora_up.weight": up, f"{at}.alpha": alpha}
        case 1:
            return {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        case 2:
            return {f"unet.{module}.lora.down.weight": down, f"unet.{module}.lora.up.weight": up}
        case 3:
            at = f"diffusion_model.{module}"
            return {f"{at}.lora_down.weight": down, f"{at}.lora_up.weight": up, f"{at}.alpha": alpha}
    at = f"lora_unet_{flat}"
    halves = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up.clone(), "hada_w2_b": down.clone()}
    return {f"{at}.{name}": half for name, half in halves.items()} | {f"{at}.alpha": alpha}


def make_gguf(path: Path, shape: str) -> None:
    """A Llama in the types of Q4_K_M: Q6_K for half of the values and of `down`, Q4_K for the rest."""
    import gguf

    model, kinds = SHAPES[shape], gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(model.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.mlp)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(model.vocabulary)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.layers)
    generator = np.random.default_rng(3)
    for name, _, size in model.tensors:
        spelled_there = names.get_name(name, try_suffixes=(".weight",))
        assert spelled_there is not None, name
        if len(size) == 1:
            writer.add_tensor(spelled_there, np.ones(size, dtype=np.float32))
            continue
        six = name.endswith(("embed_tokens.weight", "v_proj.weight", "down_proj.weight"))
        kind = kinds.Q6_K if six else kinds.Q4_K
        writer.add_tensor(spelled_there, blocks(kind, size, generator), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(kind: object, size: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Random blocks of a type whose scales are small."""
    import gguf

    values, width = gguf.GGML_QUANT_SIZES[kind]
    raw = generator.integers(0, 256, (size[0], size[1] // values, width), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.0003).tobytes(), dtype=np.uint8)
    if kind == gguf.GGMLQuantizationType.Q6_K:
        raw[:, :, -2:] = scale
    else:
        raw[:, :, 0:2], raw[:, :, 2:4] = scale, scale
    found: np.ndarray = raw.reshape(size[0], -1)
    return found
