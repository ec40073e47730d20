"""What `estimate` tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.text import ENDLESS, aligned, fill, in_columns, row_if
from loratool.shown import size

Shape = tuple[int, ...]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a parameter
ADAM_BYTES = 8  # of one parameter: two moments in float32 (Kingma and Ba 2015, arXiv:1412.6980)
# NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314, section 3): 4 bits a weight, 8 bits for each
# block of 64, and 32 bits for each 256 of those.
QUANTISED_BITS = 4 + 8 / 64 + 32 / (64 * 256)
SHOWN_RANKS = (8, 128)  # between which growth is shown where only one rank is asked for


@dataclass(frozen=True)
class TargetEstimate:
    """Weights of one name and shape that a target chooses."""

    name: str  # the last part of their path
    shape: Shape  # as the base stores it
    count: int
    per_rank: int  # parameters of all their factors together at rank 1; r times as many at rank r


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds for parameters. Activations are not among them."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments, float32
    total: int


@dataclass(frozen=True)
class RankEstimate:
    """What one rank makes of the targets."""

    rank: int
    trainable: int  # parameters
    all_parameters: int  # of base and adapter
    percent: float  # trainable of all
    line: str  # the three as PEFT's `print_trainable_parameters` prints them
    adapter_bytes: int  # of adapter_model.safetensors
    lora: Memory
    qlora: Memory


@dataclass(frozen=True, repr=False)
class Estimate(Result):
    """Parameters, sizes and memory of LoRA on one base."""

    kind: Literal["estimate"] = field(default="estimate", init=False)
    path: str
    architecture: str
    source: Literal["headers", "config"]
    parameters: int  # of the base
    bytes: int  # of the base's weights in memory
    dtypes: Mapping[str, int]  # of the base: dtype → parameters
    quantisation: str  # how the base is stored, where it is quantised
    quantisable: int  # parameters that QLoRA holds in a few bits: those quantised, or all linear weights but the head
    quantised_bits: float  # of each of them: as the base is stored, or as QLoRA would store them
    merged_bytes: int  # tensor data of the merged model: in the base's dtypes, what is edited plain
    dtype: str  # of the adapter
    targets: tuple[TargetEstimate, ...]
    per_rank: int  # parameters of the adapter at rank 1
    ranks: tuple[RankEstimate, ...]
    full: Memory
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        """What LoRA on a base would have and take, for people."""
        dtypes = ", ".join(self.dtypes)
        rows: list[tuple[str, object]] = [
            ("base", self.path),
            ("architecture", self.architecture or "unknown"),
            ("parameters", f"{self.parameters:,} in {dtypes}, {size(self.bytes)}"),
            *row_if(self.quantisation, "quantised", quantised_line(self)),
            *(("target", target_line(t.name, t.shape, t.count, t.per_rank)) for t in self.targets),
            ("growth", growth(self)),
            *(("note", note) for note in self.notes),
        ]
        lines = "\n".join(fill(one.line, room=ENDLESS) for one in self.ranks)
        return "\n\n".join([aligned(rows), lines, in_columns(side_by_side(self)), memory_text(self)])


def target_line(name: str, shape: tuple[int, ...], count: int, per_rank: int) -> str:
    rows, columns = shape
    return f"{name}: {rows}×{columns} ×{count}, r·({rows} + {columns})·{count} = {per_rank:,}·r"


def quantised_line(result: Estimate) -> str:
    bits = result.quantised_bits
    return f"{result.quantisation}; {result.quantisable:,} parameters in {bits:.2f} bits each, {size(result.quantisable * bits / 8)}"


def growth(result: Estimate) -> str:
    ranks = sorted(one.rank for one in result.ranks)
    low, high = (ranks[0], ranks[-1]) if len(ranks) > 1 else SHOWN_RANKS
    return f"{result.per_rank:,}·r in total, so r = {low} → {high} is {high / low:.4g}×"


def side_by_side(result: Estimate) -> list[list[str]]:
    """One column for each rank."""
    ranks = result.ranks
    return [
        ["", *(f"r = {one.rank}" for one in ranks)],
        ["trainable", *(f"{one.trainable:,}" for one in ranks)],
        ["of all parameters", *(f"{one.percent:.4f} %" for one in ranks)],
        [f"adapter, {result.dtype}", *(size(one.adapter_bytes) for one in ranks)],
        ["merged model", *(size(result.merged_bytes) for _ in ranks)],
        ["training with LoRA", *(size(one.lora.total) for one in ranks)],
        ["training with QLoRA", *(size(one.qlora.total) for one in ranks)],
        ["full fine-tuning", *(size(result.full.total) for _ in ranks)],
    ]


def memory_text(result: Estimate) -> str:
    """Where each kind of training spends its memory, with the formula."""
    each = f"{result.bytes / result.parameters:.3g}"
    small = BYTES[result.dtype]
    where = "quantised, as they are stored" if result.quantisation else "in linear layers, stored in 4 bits"
    trained = f"T·{small}) + T·{small} + T·{ADAM_BYTES}"
    rows: list[tuple[str, object]] = [
        ("full fine-tuning", f"P·{each} + P·{each} + P·{ADAM_BYTES} = {sum_of(result.full)}"),
        ("LoRA", f"(P·{each} + {trained}"),
        *((f"  r = {one.rank}", sum_of(one.lora)) for one in result.ranks),
        ("QLoRA", f"(Q·{result.quantised_bits / 8:.3f} + (P − Q)·{each} + {trained}"),
        *((f"  r = {one.rank}", sum_of(one.qlora)) for one in result.ranks),
        ("P", f"{result.parameters:,} parameters of the base"),
        ("Q", f"{result.quantisable:,} of them {where}"),
        ("T", "parameters that LoRA trains"),
    ]
    about = "memory: weights + gradients + the two moments of AdamW; activations not included"
    return f"{fill(about)}\n{aligned(rows)}"


def sum_of(memory: Memory) -> str:
    """`14.00 + 14.00 + 56.00 = 84.00 GB`."""
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if memory.total >= s), ("kB", 1e3))
    parts = " + ".join(f"{part / scale:.2f}" for part in (memory.weights, memory.gradients, memory.optimizer))
    return f"{parts} = {memory.total / scale:.2f} {unit}"
