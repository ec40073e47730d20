"""How PEFT 0.21 names and lays out what it saves: the way back from targets and products to tensors of a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool.adapters.adapter import Adapter, StoredTensor
from loratool.adapters.formats.format import Format, Parts, Spelling, most_common, told_losses, uneven_dora
from loratool.adapters.formats.peft import keys
from loratool.adapters.formats.peft.describing import config_of, describe
from loratool.adapters.formats.peft.experts import stacked_by_peft
from loratool.adapters.formats.peft.lora import doubles
from loratool.adapters.formats.peft.parameters import REGISTERED
from loratool.adapters.formats.roles.names import of_factors
from loratool.adapters.layers import ATTENTION, Form, Kind
from loratool.adapters.training import Training
from loratool.algebra.lowrank.products import Product
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.grouping import by_key
from loratool.lazy import Tensor
from loratool.notes import Note

PREFIX = "base_model.model."


class Names(Spelling):
    """The tensors of each adapted weight, as all adapted weights together determine them."""

    reader = "PEFT"
    scales_biases = True

    def __init__(self, form: Format, kinds: Mapping[str, Kind], release: str = "") -> None:
        self.form, self.kinds = form, kinds
        self.doubles = doubles(release)
        self.attentions = {
            target.removesuffix(ATTENTION)
            for target, kind in kinds.items()
            if kind is Kind.LINEAR and target.endswith(ATTENTION)
        }
        parts = (target.rpartition(".") for target, kind in kinds.items() if kind is Kind.PARAMETER)
        # module → its adapted parameters, innermost first
        self.nested = by_key((module, parameter) for module, _, parameter in parts)
        for parameters in self.nested.values():
            order = next((row for row in REGISTERED if set(parameters) <= set(row)), tuple(parameters))
            parameters.sort(key=order.index)

    def inside_attention(self, target: str) -> bool:
        """Whether it is the out_proj of an nn.MultiheadAttention, which PEFT adapts with the whole: at one rank.

        PEFT up to 0.21.2 applies its update twice.
        """
        module = target.removesuffix(".weight")
        return module.endswith(".out_proj") and module.removesuffix(".out_proj") in self.attentions

    @property
    def inside(self) -> set[str]:
        """All such targets."""
        return {target for target in self.kinds if self.inside_attention(target)}

    def times(self, target: str) -> float:
        """How often PEFT applies the update of a target, whose factors hold that much less."""
        return 2.0 if self.doubles and self.inside_attention(target) else 1.0

    def of_one_rank(self) -> list[tuple[str, ...]]:
        """The targets that PEFT gives one rank: those of an nn.MultiheadAttention, and experts that it stacks."""
        attentions = [(f"{module}{ATTENTION}", f"{module}.out_proj.weight") for module in sorted(self.attentions)]
        experts = stacked_by_peft(self.kinds)
        return [*(pair for pair in attentions if pair[1] in self.kinds), *([experts] if experts else [])]

    def scales(self, wanted: Mapping[str, float]) -> dict[str, float]:
        """α/r of every module; what PEFT gives one α is the most frequent of those that it should have."""
        one = {target: most_common(wanted[t] for t in group) for group in self.of_one_rank() for target in group}
        return {**wanted, **one}

    def path(self, target: str) -> str:
        """The module that PEFT saves the factors of a target under."""
        module, _, parameter = target.rpartition(".")
        if self.kinds[target] is Kind.PARAMETER:
            inside = self.nested[module]
            return module + ".base_layer" * (len(inside) - 1 - inside.index(parameter))
        if self.inside_attention(target):
            return f"{module.removesuffix('.out_proj')}.base_layer.out_proj"
        return module

    def factors(self, target: str) -> tuple[str, str]:
        if self.kinds[target] is Kind.EMBEDDING:
            start = f"{PREFIX}{self.path(target)}.lora_embedding_"
            return f"{start}A", f"{start}B"
        start = f"{PREFIX}{self.path(target)}.lora_"
        return f"{start}A.weight", f"{start}B.weight"

    def bias(self, target: str) -> str:
        return f"{PREFIX}{self.path(target)}.lora_B.bias"

    def whole(self, target: str, inside: bool) -> str:
        """The name of a tensor that is saved whole; `inside` a layer that was wrapped, if it still is."""
        module, _, parameter = target.rpartition(".")
        owners = (target, f"{module}.weight", module + ATTENTION)
        owner = next((t for t in owners if self.kinds.get(t, Kind.PARAMETER) is not Kind.PARAMETER), None)
        if inside and owner:
            return f"{PREFIX}{self.path(owner)}.base_layer.{parameter}"
        return saved_whole(target, inside and module in self.nested)

    def magnitude(self, target: str) -> str:
        return f"{PREFIX}{self.path(target)}.lora_magnitude_vector"

    def lengths(self, form: Form, columns: int = 0) -> tuple[int, ...]:  # noqa: ARG002 (the kind tells)
        """The shape of these lengths; of an embedding they are of columns."""
        if form.kind is Kind.CONVOLUTION:
            return (1, form.rows, *(1 for _ in form.kernel))
        return (form.columns if form.kind is Kind.EMBEDDING else form.rows,)

    def rows(self, target: str) -> str:
        return f"{PREFIX}{target.rpartition('.')[0]}.token_adapter.{keys.TOKENS}"

    def shapes(self, form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rank, rows, columns = form.rank, form.rows, form.columns
        match form.kind:
            case Kind.EMBEDDING:
                return (rank, rows), (columns, rank)
            case Kind.CONVOLUTION:
                channels = columns // math.prod(form.kernel)
                return (rank, channels, *form.kernel), (rows, rank, *(1 for _ in form.kernel))
            case Kind.PARAMETER:
                return (form.experts * rank, columns), (rows, rank * form.experts)
        return (rank, columns), (rows, rank)

    def stored(self, form: Form, found: Product) -> tuple[Tensor, Tensor]:
        up, down = found.up, found.down
        match form.kind:
            case Kind.EMBEDDING:
                down, up = up.T, down.T
            case Kind.PARAMETER:
                down = down.reshape(-1, down.shape[-1])  # expert-major
                up = up.permute(1, 2, 0).reshape(up.shape[1], -1)  # rank-major
            case Kind.CONVOLUTION:
                of_a, of_b = self.shapes(replace(form, rank=found.rank))
                down, up = down.reshape(of_a), up.reshape(of_b)
        return down.contiguous(), up.contiguous()

    def keeps(self, form: Form) -> bool:
        return form.kind in (Kind.LINEAR, Kind.CONVOLUTION)

    def describe(self, sources: Sequence[Adapter], parts: Parts) -> dict[str, Any]:
        own = [s.config if s.format == self.form.name else config_of(s.training) for s in sources]
        return describe(self.kinds, self.inside, own, parts)

    def describe_new(self, training: Training, parts: Parts) -> dict[str, Any]:
        return dict(
            sorted({"task_type": None, **describe(self.kinds, self.inside, [config_of(training)], parts)}.items())
        )

    def second_copies(
        self, adapters: Iterable[Adapter], tensors: Mapping[str, StoredTensor | Tensor]
    ) -> dict[str, StoredTensor | Tensor]:
        """The second copies of biases that PEFT saves with bias="all", where a module is saved whole: it asks for them.

        That under `modules_to_save` is of the value among `tensors`, which counts; that under `original_module` stays
        as it is.
        """
        found: dict[str, StoredTensor | Tensor] = {}
        for adapter in adapters:
            if adapter.training.bias != "all":
                continue
            paths = keys.Paths(frozenset(), keys.saved_modules(adapter.config), biases=True)
            for name, info in adapter.file.tensors.items():
                path = ".".join(keys.path_of(name))
                target, wrapper = paths.saved_as(path)
                if PREFIX + path in tensors:
                    continue
                if wrapper == "original_module":
                    found.setdefault(PREFIX + path, StoredTensor(adapter.file, info))
                elif wrapper == "modules_to_save" and PREFIX + target in tensors:
                    found.setdefault(PREFIX + path, tensors[PREFIX + target])
        return found


def losses(adapter: Adapter) -> tuple[Note, ...]:
    """What would be lost, with the way out where there is one."""

    def said(target: str, update: Update) -> str:
        match update:
            case Magnitude(by_column=True) if not (isinstance(update.inner, LowRank) and update.inner.table):
                return "DoRA of input columns"  # which PEFT has of an embedding alone
            case Add() if not of_factors(target, adapter.sources):
                return "changes stored in full (--base writes the new values)"
        return ""

    return (*told_losses(adapter, "not-in-peft", "PEFT cannot store", said), *uneven_dora(adapter, "PEFT"))


def saved_whole(target: str, inside: bool) -> str:
    """The name of a tensor that is saved whole; `inside` a layer that PEFT has wrapped."""
    module, _, parameter = target.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{parameter}" if inside else PREFIX + target


def was_inside(adapter: Adapter, target: str) -> bool:
    """Whether a tensor that is saved whole stood in a wrapped layer, whose name its target is without."""
    own = wrappers(target.split("."))
    return any(wrappers(keys.path_of(name)) > own for name in adapter.sources.get(target, ()))


def wrappers(parts: Iterable[str]) -> int:
    """How many components are what PEFT calls its wrappers."""
    return sum(part in keys.INNER for part in parts)
