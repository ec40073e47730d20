"""How adapters are written for llama.cpp: `GgufNames` names factors for a model, whose config decides names and rows.

    form = GGUF.for_model(config)        # of the base; raises `InputError` where it is none that llama.cpp's tables have
    names = form.spelling(kinds)         # and `form.container(…)` puts rows into llama.cpp's order

One α is for all layers, so that all get one rank; what α / rank cannot say is in the factors.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Format, Parts, Shape, Spelling, most_common, told_losses
from loratool.adapters.gguf_names import ALPHA, HUB, REPOSITORY, A, B, in_model, order_of
from loratool.adapters.layers import Form, Kind, expert_place
from loratool.adapters.model_settings import attention_heads, model_needed, model_types
from loratool.algebra.lowrank.products import Product
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors
from loratool.algebra.updates.replacing import Replace
from loratool.errors import FitError, printable
from loratool.layouts.gguf import ARCHITECTURES, MODEL_TYPES, STACKS, Architecture
from loratool.lazy import Tensor
from loratool.notes import Note

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Model:
    """What of a model decides how an adapter of it is written."""

    kind: str  # `general.architecture`
    architecture: Architecture
    config: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Model:
        """Raises `InputError` where the config is of no model that llama.cpp's tables have."""
        known = sorted(MODEL_TYPES.keys() & model_types(config))
        if not known:
            raise model_needed("llama.cpp names weights by the architecture of the model", MODEL_TYPES, config)
        kind = MODEL_TYPES[known[0]]
        return cls(kind, ARCHITECTURES[kind], config)

    def name(self, target: str) -> str | None:
        """What llama.cpp calls a weight; None for one that it has not."""
        module, _, parameter = target.rpartition(".")
        if parameter != "weight":
            return None
        for name, there in self.architecture.outside.items():
            if there == module:
                return f"{name}.weight"
        match = re.fullmatch(rf"{re.escape(self.architecture.layers)}\.(?P<layer>\d+)\.(?P<module>.+)", module)
        names = {**self.architecture.modules, **STACKS}
        found = [name for name, there in names.items() if match and there == match["module"]]
        return f"blk.{match['layer']}.{found[0]}.weight" if match and found else None

    def order(self, name: str, rows: int) -> list[int] | None:
        """For each row of a factor as it is stored its number in the model; None where they are the same."""
        if not name.endswith(B) or (wanted := in_model(name[: -len(B)], self.architecture).rows) is None:
            return None
        heads = attention_heads(self.config)
        if heads is None or not (order := order_of(wanted, heads)).fits(rows):
            raise FitError(f"{printable(name)}: {rows} rows do not fit the heads of the model's config")
        found: list[int] = order.of(rows).tolist()
        return found

    def values(self, metadata: Mapping[str, str]) -> dict[str, str | float]:
        """The metadata of a file; what is given besides are texts."""
        fixed = {"general.architecture": self.kind, "general.type": "adapter", "adapter.type": "lora"}
        base: dict[str, str | float] = {"general.base_model.count": 1} if REPOSITORY in metadata else {}
        texts = {key: value for key, value in metadata.items() if key not in (ALPHA, "format")}
        return {**fixed, ALPHA: float(metadata.get(ALPHA, 0.0)), **base, **texts}


class GgufNames(Spelling):
    """Names and layouts of an adapter that is written for llama.cpp; `FitError` for what it cannot load."""

    reader = "llama.cpp"

    def __init__(self, form: Format, kinds: Mapping[str, Kind], model: Model) -> None:
        self.form, self.kinds, self.model = form, kinds, model
        self.names = {target: model.name(target) for target in kinds}
        odd = [t for t, kind in kinds.items() if self.names[t] is None or not is_loaded(t, kind)]
        if odd:
            raise FitError(f"llama.cpp has no {model.kind} weights of these names:", map(printable, odd))
        tied = model.config.get("tie_word_embeddings") is True or not model.architecture.has_head
        if HEAD in kinds and tied:
            raise FitError(f"{HEAD}: the model ties its head, so that llama.cpp has no weight of its own for it")

    def factors(self, target: str) -> tuple[str, str]:
        return f"{self.names[target]}{A}", f"{self.names[target]}{B}"

    def shapes(self, form: Form) -> tuple[Shape, Shape]:
        if form.kind is Kind.EMBEDDING:
            return (form.rows, form.rank), (form.columns, form.rank)
        if form.kind is Kind.PARAMETER:
            return (form.experts, form.rank, form.columns), (form.experts, form.rows, form.rank)
        return (form.rank, form.columns), (form.rows, form.rank)

    def stored(self, form: Form, found: Product) -> tuple[Tensor, Tensor]:
        a, b = (found.up, found.down.T) if form.kind is Kind.EMBEDDING else (found.down, found.up)
        return a.contiguous(), b.contiguous()

    def read_as(self, target: str) -> Callable[[int], str] | None:
        if not is_stack(target):
            return None
        layer, _, part = target.removesuffix(".weight").rpartition(".")
        return lambda number: f"{layer}.{number}.{part}.weight"

    def scales(self, wanted: Mapping[str, float]) -> dict[str, float]:
        """One for all, as α is; 1 where α would be 0, which llama.cpp takes for a scale of 1."""
        return dict.fromkeys(wanted, most_common(scale for scale in wanted.values() if as_float32(scale) == scale != 0))

    def header(self, sources: Sequence[Adapter], parts: Parts) -> dict[str, str]:
        rank, scale = max(parts.ranks.values(), default=1), most_common(parts.scales.values())
        bases = {source.training.base for source in sources} - {""}
        base = bases.pop() if len(bases) == 1 else ""  # of adapters of several bases, none is that of the result
        place = {REPOSITORY: f"{HUB}{base}"} if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) else {}
        return {ALPHA: repr(scale * rank), **place}

    def describe(self, sources: Sequence[Adapter], parts: Parts) -> dict[str, Any]:
        return dict(self.header(sources, parts))


def is_stack(target: str) -> bool:
    """Whether a target is the weight of all experts of a layer."""
    return target.removesuffix(".weight").endswith(tuple(f".{there}" for there in STACKS.values()))


def is_loaded(target: str, kind: Kind) -> bool:
    """Whether llama.cpp loads factors of a kind of layer: of experts, as stacks alone."""
    return kind is Kind.PARAMETER if is_stack(target) else kind in (Kind.LINEAR, Kind.EMBEDDING)


def stack_of(target: str) -> tuple[str, int] | None:
    """The weight of all experts that llama.cpp has for the weight of one, and the number of that one."""
    if (place := expert_place(target)) is None:
        return None
    start, number, leaf = place
    layer = re.match(r"(.+\.\d+)\.", start)
    found = [there for there in STACKS.values() if there.rpartition(".")[2] == leaf]
    return (f"{layer[1]}.{found[0]}.weight", number) if layer and found else None


def as_float32(value: float) -> float:
    """The nearest float32."""
    (found,) = struct.unpack("<f", struct.pack("<f", value))
    return float(found)


def losses(adapter: Adapter) -> tuple[Note, ...]:
    """What of an adapter llama.cpp does not load."""
    return told_losses(adapter, "not-in-gguf", "llama.cpp does not load", unloadable)


def unloadable(_: str, update: Update) -> str:
    """What an update is called that is no plain LoRA; empty for one that is."""
    match update:
        case LowRank(kernel=()) | ExpertFactors():
            return ""
        case Magnitude():
            return "DoRA"
        case Replace():
            return "tensors saved whole"
        case Add():
            return "changes of biases"
    return "updates that are not plain LoRA"
