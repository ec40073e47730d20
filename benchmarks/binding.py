"""How long it takes to find the place of every adapter weight, from headers alone.

    python benchmarks/binding.py

A dense model in the shape of Llama-3-70B, and a mixture of 256 experts in 61 layers with 45,000 tensors, each with
adapters on every linear layer, under the names of several generations. Headers are made in memory: no file is read or
written. Each line is the best of several runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from findings import Finding, at_most, finding_table, seconds, write_result
from machine import describe

from loratool import plan_merge
from loratool.adapters.adapter import Adapter, StoredTensor
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.experts import ExpertFactors
from loratool.bases.binding import bind, tell
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import Identity, Layout, SafeFile

if TYPE_CHECKING:
    from loratool.algebra.updates.base import Update

TARGET = 3.0  # seconds for one base and one adapter
RANK, ALPHA = 16, 32.0
SHARD = 150  # tensors of one file, as in checkpoints of this size
HIDDEN, EXPERT_MLP, EXPERTS, MOE_LAYERS, DENSE_LAYERS = 7168, 2048, 256, 61, 3

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Base(Checkpoint):
    """A checkpoint of headers, with a config."""

    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.settings


def file_of(name: str, tensors: Shapes) -> SafeFile:
    return SafeFile(Path(name), Layout.of((n, "BF16", s) for n, s in tensors.items()), Identity(0, 0, 0, 0))


def base_of(tensors: Shapes, **settings: Any) -> Base:
    names = list(tensors)
    files = [
        file_of(f"model-{n}.safetensors", {name: tensors[name] for name in names[start : start + SHARD]})
        for n, start in enumerate(range(0, len(names), SHARD))
    ]
    return Base(root=Path("."), shards=tuple(files), settings=settings)


def adapter_of(folder: Path, targets: Mapping[str, tuple[int, ...]]) -> Adapter:
    """An adapter with a low-rank update for each target: a matrix, or the matrices of all experts."""
    factors: Shapes = {}
    for target, shape in targets.items():
        experts = shape[0] if len(shape) == 3 else 1
        factors[f"{target}.A"] = (RANK * experts, shape[-1])
        factors[f"{target}.B"] = (shape[-2], RANK * experts)
    file = file_of("adapter_model.safetensors", factors)
    updates: dict[str, Update] = {}
    for target, shape in targets.items():
        a, b = (StoredTensor(file, file.tensors[f"{target}.{side}"]) for side in "AB")
        if len(shape) == 3:
            updates[target] = ExpertFactors(a, b, ALPHA)  # type: ignore[arg-type]  # loaded when it is used
        else:
            updates[target] = LowRank(b, a, ALPHA / RANK, turnable=True)  # type: ignore[arg-type]
    leaves = sorted({target.removesuffix(".weight").rpartition(".")[2] for target in targets})
    config = {"peft_type": "LORA", "target_modules": leaves, "peft_version": "0.21.2"}
    return Adapter("adapter", "peft", folder, file, config, folder / "adapter_config.json", updates, {})


def dense() -> Shapes:
    """The matrices and norms of Llama-3-70B."""
    found: Shapes = {"model.embed_tokens.weight": (128256, 8192), "lm_head.weight": (128256, 8192)}
    for n in range(80):
        layer = f"model.layers.{n}."
        for name, shape in {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192)}.items():
            found[f"{layer}self_attn.{name}_proj.weight"] = shape
        for name, shape in {"gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672)}.items():
            found[f"{layer}mlp.{name}_proj.weight"] = shape
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (8192,)
    return found


def mixture(experts: Callable[[str], Iterator[tuple[str, tuple[int, ...]]]]) -> Shapes:
    """A model in the shape of DeepSeek-V3, its experts named by a function of the layer's name."""
    found: Shapes = {"model.embed_tokens.weight": (129280, HIDDEN), "lm_head.weight": (129280, HIDDEN)}
    attention = {
        "q_a_proj": (1536, HIDDEN),
        "q_b_proj": (24576, 1536),
        "kv_a_proj_with_mqa": (576, HIDDEN),
        "kv_b_proj": (32768, 512),
        "o_proj": (HIDDEN, 16384),
    }
    for n in range(MOE_LAYERS):
        layer = f"model.layers.{n}."
        found.update((f"{layer}self_attn.{name}.weight", shape) for name, shape in attention.items())
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
        if n < DENSE_LAYERS:
            found.update(mlp(f"{layer}mlp", 18432))
        else:
            found.update(mlp(f"{layer}mlp.shared_experts", EXPERT_MLP))
            found[f"{layer}mlp.gate.weight"] = (EXPERTS, HIDDEN)
            found.update(experts(f"{layer}mlp.experts"))
    return found


def mlp(path: str, width: int) -> Shapes:
    wide, back = (width, HIDDEN), (HIDDEN, width)
    return {f"{path}.{name}_proj.weight": shape for name, shape in (("gate", wide), ("up", wide), ("down", back))}


def apart(path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for expert in range(EXPERTS):
        yield from mlp(f"{path}.{expert}", EXPERT_MLP).items()


def together(path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.gate_up_proj", (EXPERTS, 2 * EXPERT_MLP, HIDDEN)
    yield f"{path}.down_proj", (EXPERTS, HIDDEN, EXPERT_MLP)


def linear(tensors: Shapes) -> Shapes:
    """What an adapter of all linear layers targets."""
    heads = ("embed_tokens.weight", "lm_head.weight")
    return {name: shape for name, shape in tensors.items() if len(shape) > 1 and not name.endswith(heads)}


def renamed(targets: Shapes, old: str, new: str) -> Shapes:
    return {name.replace(old, new, 1): shape for name, shape in targets.items()}


def cases() -> Iterator[tuple[str, Base, Shapes]]:
    llama = dense()
    yield "70B dense, same names", base_of(llama, model_type="llama"), linear(llama)
    vision = renamed(linear(llama), "model.", "model.language_model.")
    yield "70B dense, as the text part of a vision model", base_of(llama, model_type="llama"), vision
    split, fused = mixture(apart), mixture(together)
    settings: dict[str, Any] = {"model_type": "deepseek_v3", "n_routed_experts": EXPERTS}
    yield "MoE, adapter and base by expert", base_of(split, **settings), linear(split)
    yield "MoE, fused adapter, base by expert", base_of(split, **settings), linear(fused)
    yield "MoE, adapter by expert, fused base", base_of(fused, **settings), linear(split)
    yield "MoE, fused adapter and base", base_of(fused, **settings), linear(fused)
    mixtral = renamed(linear(split), ".mlp.", ".block_sparse_moe.")
    yield "MoE, adapter by expert under other names", base_of(split, **settings), mixtral
    strange = renamed(linear(split), "model.layers.", "net.stack.")
    yield "MoE, adapter by expert with a strange prefix", base_of(split, **settings), strange
    lost = renamed(linear(split), "_proj.", "_projection.")
    yield "MoE, adapter by expert of another model", base_of(split, **settings), lost


def shortest(run: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=3, help="runs of which the best counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found, facts = list(findings(Path(folder), arguments.times)), describe(Path(folder), load)
    write_result(arguments.json, facts, found)
    print(finding_table(found))


def findings(folder: Path, times: int) -> Iterator[Finding]:
    for name, base, targets in cases():
        adapter = adapter_of(folder, targets)
        bound = bind(adapter, base)
        places = sum(map(len, bound.places.values()))
        assert len(bound.places) + len(bound.problems) == len(targets)
        took = shortest(lambda adapter=adapter, base=base: bind(adapter, base), times)  # type: ignore[misc]
        note = f"{len(base.tensors):,} tensors, {len(targets):,} targets, {places:,} places"
        if bound.problems:
            note += f"; no place, said in {len(tell(bound.problems))} lines"
        else:
            plan = shortest(lambda adapter=adapter, base=base: plan_merge(base, [adapter]), 1)  # type: ignore[misc]
            note += f"; the whole plan takes {plan:.2f} s"
        yield at_most(name, took, TARGET, seconds, note=note)


if __name__ == "__main__":
    main()
