"""Adapters of Megatron-Core models: `….linear_in.weight`, `….linear_out.weight`, as Megatron-Bridge, NeMo 2 and 1 save them.

    NeMo 1  model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight
    Bridge  decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight
            decoder.layers.self_attention.…   all layers in one tensor, as distributed checkpoints hold them

NeMo 1 may have a folder for each rank (`mp_rank_00`, `tp_rank_00_pp_rank_001`), in which each has a part of every
factor, and of the layers (`tensor_ranks`).

`linear_in` is (rank, in) and `linear_out` (out, rank), scaling α / rank, which stand in the settings of the run. Rows of the
fused projection lie group by group: the group's heads of queries, a head of keys, one of values; a gated MLP's are
those of the gate, then of up. "Canonical" adapters have a pair for each of them, with rows as transformers has them.
(NeMo's converter to canonical cuts the fused rows as if they were not grouped; the forward pass adds them as they
are.) Facts: Megatron-Bridge of August 2026, `peft/utils.py` and `models/conversion/param_mapping.py`; NeMo 1.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import FACTOR_NAMES, Derived, StoredTensor
from loratool.adapters.formats.format import Config
from loratool.adapters.formats.found import MISSING_PARTNER, Found, modules_with
from loratool.adapters.formats.known import MegatronFiles
from loratool.adapters.formats.rows import OfGroups, entry_of, of_rows, part_of
from loratool.adapters.formats.tensor_ranks import DIVIDER, gathered, read_ranks
from loratool.adapters.formats.trainer import TrainerFormat, text_in, value_in, whole_in
from loratool.adapters.model_settings import Heads, attention_heads
from loratool.adapters.training import Training
from loratool.adapters.unsettled import WAY_OUT, Unsettled
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.errors import InputError, printable
from loratool.files.heads import HasNames
from loratool.files.safefile import SafeFile
from loratool.notes import Note

A, B, M = ".linear_in.weight", ".linear_out.weight", ".weight_magnitude"
RUN, MODEL = MegatronFiles.settings
INTERLEAVED = "virtual_pipeline_model_parallel_size"
MODULE = re.compile(
    r"(?:model\.|module\.)*(?:decoder|language_model\.encoder)\.layers\.(?:(?P<layer>\d+)\.)?"
    r"(?:self_attention|mlp)\.(?P<leaf>.*adapter.*)"
)
HEAD = re.compile(r"(?:model\.|module\.)*output_layer\.adapter")
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# What stands after the layer's number and part → the modules of transformers whose rows it has.
LEAVES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("linear_qkv.adapter", "adapter_layer.lora_kqv_adapter"), QKV),
    **dict.fromkeys(("linear_proj.adapter", "adapter_layer.lora_dense_attention_adapter"), ("o_proj",)),
    **dict.fromkeys(("linear_fc1.adapter", "adapter_layer.lora_hto4h_adapter"), GATE_UP),
    **dict.fromkeys(("linear_fc2.adapter", "adapter_layer.lora_4htoh_adapter"), ("down_proj",)),
    **{f"linear_qkv.adapter.adapter_{name[0]}": (name,) for name in QKV},
    **{f"linear_fc1.adapter.adapter_{name.split('_')[0]}": (name,) for name in GATE_UP},
    **{f"adapter_layer.lora_unfused_kqv_adapter.{name[0]}_adapter": (name,) for name in QKV},
    **{f"adapter_layer.lora_unfused_hto4h_adapter.{name.split('_')[0]}_adapter": (name,) for name in GATE_UP},
}
DIVIDED_COLUMNS = ("o_proj", "down_proj")  # what tensor parallelism divides by columns; the rest it divides by rows
# Where the settings of each tool have α, and the rank; NeMo 1 takes the rank for an α that is not set.
ALPHAS = (("peft", "alpha"), ("peft", "lora_tuning", "alpha"))
RANKS = (("peft", "dim"), ("peft", "lora_tuning", "adapter_dim"))


@dataclass(frozen=True)
class Factors:
    """The factors of one module of one layer."""

    a: StoredTensor | Derived
    b: StoredTensor | Derived
    scale: float
    magnitude: StoredTensor | None = None

    def update(self, up: Any, lengths: Any) -> Update:
        plain = LowRank(up, self.a, self.scale, turnable=True)  # type: ignore[arg-type]  # loaded later
        return plain if lengths is None else Magnitude(plain, lengths)

    def rows(self, first: int, count: int) -> Update:
        """The update of some of the rows."""
        lengths = part_of(self.magnitude, first, count) if self.magnitude else None
        return self.update(part_of(self.b, first, count), lengths)


@dataclass(frozen=True)
class Grouped:
    """Queries, keys and values of one layer, whose rows lie group by group."""

    start: str  # of their targets, to which the name of the part is added
    factors: Factors

    def __call__(self, config: Mapping[str, Any]) -> Mapping[str, Update]:
        heads, total = attention_heads(config), self.factors.b.shape[0]
        if heads is None:
            raise ValueError(
                "Megatron interleaves the rows of queries, keys and values by head, so the number of heads is needed; "
                f"{WAY_OUT}"
            )
        if total % (heads.queries + 2 * heads.keys):
            raise ValueError(f"its {total} rows cannot be those of {heads.queries} + 2 · {heads.keys} heads")
        return {f"{self.start}.{name}.weight": self.part(number, heads) for number, name in enumerate(QKV)}

    def part(self, number: int, heads: Heads) -> Update:
        each = self.factors.b.shape[0] // (heads.queries + 2 * heads.keys)
        count = each * (heads.queries if number == 0 else heads.keys)
        formula, lengths = OfGroups(heads, number), self.factors.magnitude
        return self.factors.update(
            of_rows(count, self.factors.b, formula), None if lengths is None else of_rows(count, lengths, formula)
        )


class Megatron(MegatronFiles, TrainerFormat):
    """Adapters of Megatron-Core models, gathered into one file."""

    title = "Megatron or NeMo"
    alpha_paths = ALPHAS

    def claims(self, file: HasNames) -> frozenset[str]:
        modules = [
            module for module in modules_with(file, (A, B)) if MODULE.fullmatch(module) or HEAD.fullmatch(module)
        ]
        return frozenset(name for module in modules for end in (A, B, M) if (name := module + end) in file.tensors)

    def weights_in(self, folder: Path) -> SafeFile:
        paths = self.weights_at(folder)
        if folder in {path.parent for path in paths}:
            return super().weights_in(folder)
        _, config = self.settings_in(folder)
        if (whole_in(config, INTERLEAVED) or 1) > 1:
            raise InputError(
                f"{printable(folder)}: its pipeline stages alternate ({INTERLEAVED}), so that nothing says which layers "
                "each has; save it with a pipeline of one stage first"
            )
        return read_ranks(folder, paths, whole_in(config, "num_layers") or whole_in(config, "model", "num_layers"))

    def model_at(self, folder: Path, config: Config) -> Mapping[str, Any]:
        own = {**config, **(table if isinstance(table := config.get("model"), dict) else {})}
        return own if attention_heads(own) else super().model_at(folder, config)

    def training_of(self, config: Config) -> Training:
        return Training(
            base=text_in(config, "checkpoint", "pretrained_checkpoint") or text_in(config, "restore_from_path"),
            task="CAUSAL_LM",
            rank=next((found for path in RANKS if (found := whole_in(config, *path))), None),
            in_out=False,
        )

    def take(self, found: Found, config: Config) -> None:
        alpha = self.trained_alpha(found, config)
        ranks = list(dict.fromkeys(name.rpartition(DIVIDER)[0] for name in found.file.tensors))
        divided = ranks != [""]
        for module in dict.fromkeys(name.rpartition(DIVIDER)[2] for name in modules_with(found.file, (A, B))):
            match, head = MODULE.fullmatch(module), HEAD.fullmatch(module)
            parts = ("lm_head",) if head else LEAVES.get(match["leaf"], ()) if match else ()
            every = [f"{rank}{DIVIDER}{module}" for rank in ranks] if divided else [module]
            names = tuple(n for each in every for end in (A, B, M) if (n := each + end) in found.file.tensors)
            stacked = match is not None and match["layer"] is None
            if not parts or (divided and stacked):
                found.told.update(names)
                found.unsupported.append(f"Megatron's module {printable(module)} has no known name in transformers")
                continue
            layers = (
                layers_of_ranks(found, every, parts, alpha) if divided else layers_of(found, module, alpha, stacked)
            )
            for layer, factors in layers:
                self.place(found, layer if stacked or match is None else match["layer"], parts, factors, names)

    def place(self, found: Found, layer: str, parts: tuple[str, ...], factors: Factors, names: tuple[str, ...]) -> None:
        """Take up the factors of one module of a layer."""
        if parts == ("lm_head",):
            found.add("lm_head.weight", factors.update(factors.b, factors.magnitude), names)
            return
        inner = "self_attn" if parts[0] in (*QKV, "o_proj") else "mlp"
        start, total = f"model.layers.{layer}.{inner}", factors.b.shape[0]
        if parts == QKV:
            unsettled = Unsettled(factors.b, factors.a, factors.scale, Grouped(start, factors), factors.magnitude)
            found.add(f"{start}.qkv_proj.weight", unsettled, names)
            return
        if total % len(parts):
            found.refuse(names[1], f"has {total} rows; expected those of {' and '.join(parts)}")
            return
        for number, part in enumerate(parts):
            count = total // len(parts)
            found.add(f"{start}.{part}.weight", factors.rows(number * count, count), names)

    def trained_alpha(self, found: Found, config: Config) -> float | None:
        """α of all modules; None where it is the rank of each."""
        own = next((value for path in ALPHAS if (value := value_in(config, *path)) is not None), None)
        if own is None and found.reading.input_alpha is None and isinstance(value_in(config, "peft"), Mapping):
            text = "the settings of its run have no alpha, in which case its trainer takes the rank: scale 1"
            found.notes.append(Note("alpha-missing", text))
            return None
        return found.alpha(own, f"peft.alpha in {RUN}, or peft.lora_tuning.alpha in {MODEL},")


def layers_of(found: Found, module: str, alpha: float | None, stacked: bool) -> Iterator[tuple[str, Factors]]:
    """(number of a layer, its factors) of a module: of all layers where they are stacked, else of the one, unnumbered."""

    def factors(a: StoredTensor, b: StoredTensor, lengths: StoredTensor | None) -> Factors:
        return Factors(a, b, 1.0 if alpha is None else alpha / a.shape[0], lengths)

    if (pair := found.pair(module, A, B, dimensions=3 if stacked else 2)) is None:
        return
    a, b = pair
    if a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
        found.refuse(module, f"linear_in is {list(a.shape)} and linear_out {list(b.shape)}; expected one rank")
    elif not stacked:
        yield "", factors(a, b, found.lengths(module + M, b.shape[0]))
    elif module + M in found.file.tensors:
        found.unsupported.append(f"DoRA with all layers in one tensor ({printable(module + M)})")
    else:
        yield from ((str(at), factors(entry_of(a, at), entry_of(b, at), None)) for at in range(a.shape[0]))


def layers_of_ranks(
    found: Found, modules: Sequence[str], parts: tuple[str, ...], alpha: float | None
) -> Iterator[tuple[str, Factors]]:
    """The same of a module whose factors are divided among ranks; `modules` are its names there."""
    every = [[each + end for each in modules] for end in (A, B)]
    there = [name for names in every for name in names if name in found.file.tensors]
    found.told.update(there)
    if missing := [name for names in every for name in names if name not in found.file.tensors]:
        found.refuse(modules[0], f"{printable(missing[0])} is missing", MISSING_PARTNER)
        return
    if any(each + M in found.file.tensors for each in modules):
        found.unsupported.append(f"DoRA that is divided among ranks ({printable(modules[0] + M)})")
        found.told.update(name for each in modules if (name := each + M) in found.file.tensors)
        return
    a, b = ([found.stored(name) for name in names] for names in every)
    if odd := next((each for each in (*a, *b) if each.info.dtype not in FACTOR_NAMES or 0 in each.shape), None):
        found.refuse(odd.info.name, f"is {odd.info.dtype} {list(odd.shape)}; expected floats")
        return
    pair = gathered(a, b, parts[0] not in DIVIDED_COLUMNS, len(parts) if parts == GATE_UP else 1)
    if pair is None:
        shown = f"linear_in is {list(a[0].shape)} and linear_out {list(b[0].shape)}"
        found.refuse(modules[0], f"{shown}; expected one rank that {len(modules)} processes share")
        return
    yield "", Factors(*pair, 1.0 if alpha is None else alpha / pair[0].shape[0])


MEGATRON = Megatron()
