"""Bases and adapters in the shapes of real models, with pseudo-random values, written as a stream.

    python benchmarks/shapes.py llama-3.2-1b DIR    makes DIR/base and DIR/adapter

Names, shapes, shards and configs are those of the model on the Hub; only the values are made up.
Memory stays near the size of one pool of values, whatever the model's size.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHT_STD = 0.02  # as Llama is initialised
DELTA_STD = 0.0032  # 16 % of it: a well-trained adapter
RANK = 16
SCALE = 2  # α/r
ITEMSIZE = {"BF16": 2, "F32": 4}
POOL = 1 << 26  # values: 128 MiB as bfloat16
EXPERTS, EXPERT_ROWS, EXPERT_COLUMNS = 256, 1536, 2048  # of gate and up, stored as (experts, out, in)
EXPERT_BYTES = 2 * EXPERTS * EXPERT_ROWS * EXPERT_COLUMNS
EXPERT_PARAMETER = "model.layers.0.mlp.experts.gate_up_proj"
STRIDE = 15_485_863  # values between the starts of neighbouring tensors in the pool; a prime, so none repeats soon
Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Shape:
    """What decides every tensor of a Llama."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    shard_bytes: int  # a file ends before it would hold more tensor data than this
    config: dict[str, Any] = field(default_factory=dict)  # beyond what follows from the above

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name → (out, in)."""
        head = self.hidden // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv_heads * head, self.hidden),
            "self_attn.v_proj": (self.kv_heads * head, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    @property
    def tensors(self) -> list[Tensor]:
        """All weights in the model's own order."""
        found: list[Tensor] = [("model.embed_tokens.weight", "BF16", (self.vocabulary, self.hidden))]
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            found += [(f"{block}.{name}.weight", "BF16", shape) for name, shape in self.linear.items()]
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found.append((f"{block}.{norm}.weight", "BF16", (self.hidden,)))
        found.append(("model.norm.weight", "BF16", (self.hidden,)))
        if not self.tied:
            found.append(("lm_head.weight", "BF16", (self.vocabulary, self.hidden)))
        return found

    @property
    def adapter(self) -> list[Tensor]:
        """The factors of rank 16 on every linear layer, in PEFT's layout."""
        return self.factors(RANK, "F32", self.layers)

    def factors(self, rank: int, dtype: str, layers: int) -> list[Tensor]:
        """The same of any rank and dtype, on the linear layers of the first blocks."""
        return [
            (f"base_model.model.model.layers.{layer}.{name}.lora_{factor}.weight", dtype, shape)
            for layer in range(layers)
            for name, (out, into) in self.linear.items()
            for factor, shape in (("A", (rank, into)), ("B", (out, rank)))
        ]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of layers."""
        return sum(nbytes(tensor) for tensor in self.tensors if tensor[0].startswith("model.layers.0."))

    def cut(self, most: int) -> Shape:
        """This model with as many blocks as fit in `most` bytes, at least one."""
        blocks = (most - self.base_bytes) // self.block_bytes + self.layers
        return replace(self, layers=max(1, min(self.layers, blocks)))

    @property
    def in_one_file(self) -> Shape:
        return replace(self, shard_bytes=self.base_bytes)

    @property
    def base_bytes(self) -> int:
        return sum(map(nbytes, self.tensors))

    @property
    def adapter_bytes(self) -> int:
        return sum(map(nbytes, self.adapter))

    @property
    def model_config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": WEIGHT_STD,
            "intermediate_size": self.mlp,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            **self.config,
        }


TINY = Shape("tiny", 256, 688, 6, 4, 2, 2048, tied=False, shard_bytes=4_000_000)
ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "llama-3.2-1b",
            2048,
            8192,
            16,
            32,
            8,
            128256,
            tied=True,
            shard_bytes=5_000_000_000,
            config={"head_dim": 64, "max_position_embeddings": 131072, "rope_scaling": ROPE},
        ),
        Shape("llama-3-8b", 4096, 14336, 32, 32, 8, 128256, tied=False, shard_bytes=5_000_000_000),
        Shape("llama-3-70b", 8192, 28672, 80, 64, 8, 128256, tied=False, shard_bytes=4_700_000_000),
        TINY,
    )
}


def nbytes(tensor: Tensor) -> int:
    _, dtype, shape = tensor
    return math.prod(shape) * ITEMSIZE[dtype]


def make(shape: Shape, folder: Path) -> None:
    """`folder/base` and `folder/adapter` of this shape; the same bytes every time."""
    make_base(shape, folder / "base")
    make_adapter(shape, folder / "adapter")


def make_base(shape: Shape, folder: Path) -> None:
    folder.mkdir(parents=True)
    pool = bf16_pool(min(POOL, 2 * max(map(nbytes, shape.tensors))))
    shards = split(shape.tensors, shape.shard_bytes)
    numbers = {tensor[0]: number for number, tensor in enumerate(shape.tensors)}
    weight_map: dict[str, str] = {}

    def write_shard(name: str, shard: list[Tensor]) -> None:
        with open(folder / name, "wb", buffering=0) as stream:
            write_header(stream, shard)
            for tensor in shard:
                write_values(stream, tensor, pool, numbers[tensor[0]])

    with ThreadPoolExecutor() as threads:
        done = []
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            weight_map.update({tensor[0]: name for tensor in shard})
            done.append(threads.submit(write_shard, name, sorted(shard)))  # the reference writer sorts by name too
        for each in done:
            each.result()
    if len(shards) > 1:
        index = {"metadata": {"total_size": shape.base_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", shape.model_config)


def make_adapter(
    shape: Shape, folder: Path, rank: int = RANK, dtype: str = "F32", seed: int = 1, layers: int | None = None
) -> None:
    """α/r · BA has a standard deviation of `DELTA_STD` whatever the layer's width and the rank."""
    tensors = shape.factors(rank, dtype, layers or shape.layers)
    write_adapter(folder, tensors, [name.partition(".")[2] for name in shape.linear], seed)
    config = {
        **adapter_config([name.partition(".")[2] for name in shape.linear]),
        "r": rank,
        "lora_alpha": SCALE * rank,
    }
    if layers:
        config["layers_to_transform"] = list(range(layers))
    write_json(folder / "adapter_config.json", config)


def make_saved_norm(shape: Shape, folder: Path) -> None:
    """An adapter that has saved a norm whole and changes nothing else, so that a merge copies every byte."""
    folder.mkdir(parents=True)
    with open(folder / "adapter_model.safetensors", "wb", buffering=0) as stream:
        write_header(stream, [("base_model.model.model.norm.weight", "BF16", (shape.hidden,))])
        write_all(stream, np.full(shape.hidden, 0x3FC0, np.uint16).data.cast("B"))  # 1.5
    write_json(folder / "adapter_config.json", {**adapter_config([]), "modules_to_save": ["norm"]})


def write_adapter(folder: Path, tensors: Sequence[Tensor], targets: Sequence[str], seed: int = 1) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    with open(folder / "adapter_model.safetensors", "wb", buffering=0) as stream:
        write_header(stream, tensors)
        into = rank = 1
        for name, dtype, size in tensors:
            if ".lora_A." in name:
                rank, into = size
                std = into**-0.5
            else:
                std = DELTA_STD / (SCALE * into**-0.5 * rank**0.5)
            values = generator.standard_normal(size, dtype=np.float32) * np.float32(std)
            write_all(stream, (values if dtype == "F32" else to_bf16(values)).data.cast("B"))
    write_json(folder / "adapter_config.json", adapter_config(targets))


def adapter_config(targets: Sequence[str]) -> dict[str, Any]:
    """`adapter_config.json` as PEFT saves it."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": SCALE * RANK,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def make_experts(folder: Path) -> None:
    """A base with one fused parameter of 256 experts, 1.6 GB, and an adapter on it as PEFT saves `target_parameters`."""
    tensors: list[Tensor] = [
        ("model.embed_tokens.weight", "BF16", (64, EXPERT_COLUMNS)),
        (EXPERT_PARAMETER, "BF16", (EXPERTS, EXPERT_ROWS, EXPERT_COLUMNS)),
    ]
    pool = bf16_pool(1 << 22)
    (folder / "base").mkdir(parents=True)
    with open(folder / "base/model.safetensors", "wb", buffering=0) as stream:
        write_header(stream, tensors)
        for number, tensor in enumerate(tensors):
            write_values(stream, tensor, pool, number)
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False}
    write_json(folder / "base/config.json", config)
    module = f"base_model.model.{EXPERT_PARAMETER.rpartition('.')[0]}"
    factors: list[Tensor] = [
        (f"{module}.lora_A.weight", "F32", (EXPERTS * RANK, EXPERT_COLUMNS)),
        (f"{module}.lora_B.weight", "F32", (EXPERT_ROWS, RANK * EXPERTS)),
    ]
    write_adapter(folder / "adapter", factors, [])
    settings = {"target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": "0.21.2"}
    write_json(folder / "adapter/adapter_config.json", {**adapter_config([]), **settings})


def split(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Files as transformers cuts them: in the model's order, each as full as the limit allows."""
    shards: list[list[Tensor]] = [[]]
    full = 0
    for tensor in tensors:
        size = nbytes(tensor)
        if shards[-1] and full + size > limit:
            shards.append([])
            full = 0
        shards[-1].append(tensor)
        full += size
    return shards


def bf16_pool(count: int) -> NDArray[np.uint16]:
    """Normal values of `WEIGHT_STD` as bfloat16 bits, made piece by piece."""
    generator = np.random.default_rng(0)
    pool = np.empty(count, np.uint16)
    step = 1 << 20
    for at in range(0, count, step):
        part = pool[at : at + step]
        part[:] = to_bf16(generator.standard_normal(len(part), dtype=np.float32) * np.float32(WEIGHT_STD))
    return pool


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write_header(stream: BinaryIO, tensors: Sequence[Tensor]) -> None:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        name, dtype, shape = tensor
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes(tensor)]}
        at += nbytes(tensor)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_all(stream, memoryview(len(text).to_bytes(8, "little") + text))


def write_values(stream: BinaryIO, tensor: Tensor, pool: NDArray[np.uint16], number: int) -> None:
    """A norm is ones; a matrix takes its values out of the pool, each from another place on."""
    count = nbytes(tensor) // 2
    if len(tensor[2]) == 1:
        write_all(stream, np.full(count, 0x3F80, np.uint16).data.cast("B"))  # 1.0
        return
    for part in cycle(pool, number * STRIDE % len(pool), count):
        write_all(stream, part.data.cast("B"))


def cycle(pool: NDArray[np.uint16], start: int, count: int) -> Iterator[NDArray[np.uint16]]:
    """`count` values of the pool from `start` on, over its end and round again."""
    while count:
        part = pool[start : start + count]
        yield part
        count -= len(part)
        start = 0


def write_all(stream: BinaryIO, data: memoryview) -> None:
    while data:  # one write stops at 2 GiB
        data = data[stream.write(data) :]


def write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: shapes.py {{{','.join(SHAPES)}}} DIR")
    make(SHAPES[sys.argv[1]], Path(sys.argv[2]))
