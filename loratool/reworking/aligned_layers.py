"""What several adapters hold of each weight: layers side by side, and one of everything beside them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import StoredTensor, same_values, unloaded
from loratool.adapters.formats import format_of, read_adapter
from loratool.adapters.formats.format import Spelling
from loratool.adapters.kinds import kinds_of_adapter
from loratool.adapters.layers import Contents, Kind, Layer, contents_of
from loratool.adapters.ranks import by_pattern
from loratool.adapters.reading import Reading
from loratool.adapters.unsettled import settled
from loratool.adapters.writer import Carried, add_missing_biases, torch_dtype
from loratool.algebra.lowrank.products import Product
from loratool.algebra.methods.coefficients import cancel
from loratool.algebra.rounding import round_once
from loratool.errors import FitError, UsageError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.grouping import by_key
from loratool.lazy import Tensor, torch
from loratool.notes import Note
from loratool.results.text import one_of
from loratool.templates import some

SAVED = ("refuse", "first", "mean")  # what to do where adapters have saved different values for one tensor
Weight = float | Mapping[str, float]  # of an adapter; by pattern, with "default" for what none matches


@dataclass(frozen=True)
class AlignedLayer:
    """The layer that one adapter has for a target."""

    adapter: int  # which of them
    layer: Layer
    weight: float
    turned: bool = False  # the factors of a parameter act the other way round than those of the first adapter

    def load(self, sources: Sequence[Contents], device: torch.device, dtype: torch.dtype) -> Product:
        """ΔW, scaling included, weight not."""
        found = sources[self.adapter].load(self.layer.target, device, dtype)
        return Product(found.down.mT, found.up.mT, found.rounding) if self.turned else found


def told_bases(sources: Sequence[Contents]) -> Iterator[Note]:
    """A note where adapters name different bases, with what speaks for or against their being of one model."""
    bases = {source.training.base for source in sources} - {""}
    if len(bases) < 2:
        return
    having = Counter(target for source in sources for target in source.layers)
    apart = [source.name for source in sources if source.layers and all(having[each] == 1 for each in source.layers)]
    text = f"the adapters name different bases ({', '.join(sorted(map(printable, bases)))}); "
    if apart:
        who = f"{some(apart)} and the others" if len(apart) < len(sources) else "they"
        yield Note("no-common-layer", f"{text}{who} have no layer in common, so they may be of different models")
    else:
        yield Note("base-mismatch", f"{text}their shapes agree")


def contents_apart(
    paths: Sequence[Path], ways: Sequence[Reading], command: str, base: Checkpoint | None
) -> list[Contents]:
    """What adapters of a base hold, for a command on products, with names that tell them apart. Raises as reading them does."""
    config = base.config if base is not None else {}
    seen: Counter[str] = Counter()
    found = []
    for path, way in zip(paths, ways, strict=True):
        source = contents_of(settled(read_adapter(path, way), config), command, as_products=True)
        seen[source.name] += 1
        more = f" ({seen[source.name]})" if seen[source.name] > 1 else ""
        found.append(dataclasses.replace(source, adapter=dataclasses.replace(source.adapter, name=source.name + more)))
    return found


def check_kinds(sources: Sequence[Contents], command: str) -> None:
    """Raise `FitError` for adapters of models of different kinds, as far as names and shapes tell."""
    kinds = {source.name: found for source in sources if (found := kinds_of_adapter(source.adapter))}
    if kinds and not frozenset.intersection(*kinds.values()):
        raise FitError(
            f"these adapters belong to different models, so {command} cannot put them together:",
            (f"{name}: {one_of(sorted(found))}" for name, found in kinds.items()),
        )


def align_layers(sources: Sequence[Contents], weights: Sequence[Weight]) -> dict[str, tuple[AlignedLayer, ...]]:
    """Each target that any adapter has → the layers of those that have it, in the adapters' order.

    Raises `FitError` naming every weight that adapters see in different shapes, and every one with which they do
    different kinds of things.
    """
    aligned: dict[str, list[AlignedLayer]] = {}
    problems: list[str] = []
    for at, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        each = weights_of(source, weight)
        for target, layer in source.layers.items():
            before = aligned.setdefault(target, [])
            turned: bool | None = False
            if before:
                first, other = before[0].layer, sources[before[0].adapter]
                turned = is_turned(other, source, first, layer)
                if turned is None:
                    versions = [printable(s.training.release or None) for s in (other, source)]
                    problems.append(
                        f"{printable(target)}: {shown(first)}, which PEFT {' and '.join(versions)} may have stored "
                        "transposed; combine adapters saved by one release"
                    )
                elif seen(layer, turned) != first.form:
                    problems.append(
                        f"{printable(target)}: {shown(first)} in {other.name}, {shown(layer)} in {source.name}"
                    )
            before.append(AlignedLayer(at, layer, each[target], bool(turned)))
    problems += [
        f"{printable(target)}: saved whole in {', '.join(whole)}, adapted in others"
        for target in aligned
        if (whole := [s.name for s in sources if target in s.saved])
    ]
    if problems:
        raise FitError("these adapters do not have the same base, or are of different types:", problems)
    return {target: tuple(found) for target, found in aligned.items()}


def seen(layer: Layer, turned: bool) -> tuple[object, ...]:
    kind, experts, rows, columns, kernel = layer.form
    return (kind, experts, columns, rows, kernel) if turned else layer.form


def is_turned(one: Contents, other: Contents, first: Layer, layer: Layer) -> bool | None:
    """Whether two releases of PEFT gave the factors of a parameter the other sides; None where nothing tells.

    Shapes show it: its own, or, where it is square, those of the parameters beside it.
    """
    if layer.kind is not Kind.PARAMETER or first.kind is not Kind.PARAMETER:
        return False
    if first.rows != first.columns:
        return swapped(first, layer)
    if layer.experts == 1 or one.training.expert_axes == other.training.expert_axes:
        return False
    beside = layer.target.rpartition(".")[0]
    shown = {
        swapped(one.layers[target], found)
        for target, found in other.layers.items()
        if target.rpartition(".")[0] == beside and target in one.layers
        if found.kind is Kind.PARAMETER and found.rows != found.columns
    }
    return shown.pop() if len(shown) == 1 else None


def swapped(first: Layer, layer: Layer) -> bool:
    return (layer.rows, layer.columns) == (first.columns, first.rows)


def shown(layer: Layer) -> str:
    experts = f"{layer.experts} experts of " if layer.kind is Kind.PARAMETER else ""
    kernel = f", kernel {' × '.join(map(str, layer.kernel))}" if layer.kernel else ""
    return f"{layer.kind.value} {experts}{layer.rows} × {layer.columns}{kernel}"


def weights_of(source: Contents, weight: Weight) -> dict[str, float]:
    """The weight of each of an adapter's layers; raises `UsageError` for patterns that mean nothing."""
    table = dict(weight) if isinstance(weight, Mapping) else {"default": weight}
    usual = float(table.pop("default", 1.0))
    found = by_pattern(table, source.layers, f"weights of {source.name}")
    return {target: float(found.get(target, usual)) for target in source.layers}


def usual_weight(weight: Weight) -> float:
    """The weight of what is in no layer of its own."""
    return float(weight.get("default", 1.0)) if isinstance(weight, Mapping) else float(weight)


@dataclass
class Beside:
    """Everything but the factors of several adapters, made one by a stated rule."""

    sources: Sequence[Contents]
    weights: Sequence[Weight]
    names: Spelling
    policy: str
    factor: Callable[[str], float]  # of a sum of biases, by the weight beside it
    normalize: bool = False  # divide them by the weights of all that have the layer
    carried: Carried = field(default_factory=Carried)
    problems: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)  # saved in shapes that differ, which no policy brings together
    overflows: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def collect(self) -> Carried:
        """Biases of lora_B add up with the weights; what is saved whole or by rows stays, and where adapters differ
        about it, the policy decides. Raises `FitError` telling every difference that it refuses.
        """
        for source in self.sources:
            source.check_beside()
        self.add_biases()
        self.keep_saved()
        self.keep_rows()
        adapters = [source.adapter for source in self.sources]
        self.carried.tensors.update(self.names.second_copies(adapters, self.carried.tensors))
        if self.unlike:
            raise FitError("the adapters saved modules that cannot be combined, as their shapes differ:", self.unlike)
        if self.problems:
            raise FitError(
                "the adapters saved different values, which cannot be added; pass --saved first or --saved mean to "
                "choose:",
                self.problems,
            )
        return self.carried

    def add_biases(self) -> None:
        """λ Σ w · s · bias for every layer that has one."""
        total: dict[str, Tensor] = {}
        divisors: dict[str, float] = {}
        dtypes: dict[str, torch.dtype] = {}
        for source, weight in zip(self.sources, self.weights, strict=True):
            each = weights_of(source, weight)
            for target, own in each.items():
                name = f"{target.removesuffix('weight')}bias"
                divisors[name] = divisors.get(name, 0.0) + own if self.normalize else 1.0
            for target, bias in source.biases.items():
                own = each.get(f"{target.removesuffix('bias')}weight", usual_weight(weight))
                part = source.load_bias(target) * own
                total[target] = total[target] + part if target in total else part
                dtype = torch_dtype(unloaded(bias.value).info.dtype)
                dtypes[target] = torch.promote_types(dtypes.get(target, dtype), dtype)
        for target, bias_sum in total.items():
            weight_target = f"{target.removesuffix('bias')}weight"
            bias_whole = round_once(
                bias_sum * self.factor(weight_target) / (divisors.get(target) or 1.0), dtypes[target]
            )
            if not bool(bias_whole.isfinite().all()):
                narrow = str(dtypes[target]).removeprefix("torch.")
                self.overflows.append(f"{printable(target)}: the sum of biases overflows {narrow}")
            self.carried.tensors[self.names.bias(weight_target)] = bias_whole
        if self.overflows:
            raise FitError("biases keep the adapters' dtype, which is too narrow:", self.overflows)
        without = [t for t, kind in self.names.kinds.items() if not kind.has_bias]
        if total and without:
            raise FitError(
                "some adapters have biases (lora_bias), which PEFT does not support on layers such as these; run "
                "`loratool merge` on the adapters instead:",
                map(printable, without),
            )
        if total:
            lengths = {t: layer.rows for source in self.sources for t, layer in source.layers.items()}
            add_missing_biases(self.carried, self.names, lengths, next(iter(dtypes.values())))

    def keep_saved(self) -> None:
        """What is saved whole: the one that there is, or what the policy makes of several."""
        everything = by_key(
            ((target, target in source.bases or form.was_inside(source.adapter, target)), (at, unloaded(saved.value)))
            for at, source in enumerate(self.sources)
            for form in [format_of(source.adapter)]
            for target, saved in (*source.saved.items(), *source.bases.items())
        )
        for (target, inside), found in everything.items():
            name = self.names.whole(target, inside)
            first = found[0][1]
            if any(value.shape != first.shape for _, value in found):
                self.unlike.append(f"{printable(target)}: saved whole in several shapes")
            elif all(same_values(first, value) for _, value in found[1:]) or self.policy == "first":
                self.carried.tensors[name] = first
            elif self.policy == "mean" and first.info.dtype not in FLOAT_NAMES:
                self.carried.tensors[name] = first
                text = f"{printable(target)}: integers are not averaged; those of the first adapter are kept"
                self.notes.append(Note("whole-numbers-kept", text))
            elif self.policy == "mean":
                self.carried.tensors[name] = self.mean([(at, self.loaded(value)) for at, value in found], first)
            else:
                self.problems.append(f"{printable(target)}: saved whole in {self.who(at for at, _ in found)}")
            if len(found) < len(self.sources):
                self.notes.append(
                    Note(
                        "saved-in-some",
                        f"{printable(target)}: saved whole in {self.who(at for at, _ in found)} only, and kept",
                    )
                )

    def keep_rows(self) -> None:
        """Rows of tokens: all that any adapter has trained."""
        everything: dict[str, dict[int, list[tuple[int, Tensor]]]] = {}
        dtypes: dict[str, StoredTensor] = {}
        for at, source in enumerate(self.sources):
            for target, rows in source.rows.items():
                stored = unloaded(rows.values)
                dtypes.setdefault(target, stored)
                for row, value in zip(rows.index, self.loaded(stored), strict=True):
                    everything.setdefault(target, {}).setdefault(row, []).append((at, value))
        for target, by_row in everything.items():
            kept: dict[int, Tensor] = {}
            rivals: list[int] = []
            for row, found in sorted(by_row.items()):
                if self.policy == "first" or all(torch.equal(found[0][1], value) for _, value in found[1:]):
                    kept[row] = found[0][1]
                elif self.policy == "mean":
                    kept[row] = self.mean(found, dtypes[target]).double()
                else:
                    rivals.append(row)
            if rivals:
                self.problems.append(f"{printable(target)}: {len(rivals)} token rows, the first of them {rivals[0]}")
            elif kept:
                dtype = torch_dtype(dtypes[target].info.dtype)
                self.carried.tensors[self.names.rows(target)] = torch.stack(list(kept.values())).to(dtype)
                self.carried.tokens[target] = tuple(kept)

    def mean(self, found: Sequence[tuple[int, Tensor]], like: StoredTensor) -> Tensor:
        """The mean by the adapters' weights, brought to a sum of 1."""
        weights = [usual_weight(self.weights[at]) for at, _ in found]
        total = math.fsum(weights)
        if total <= 0 or cancel(weights):
            raise UsageError("--saved mean needs weights with a sum above 0")
        parts = (value * (weight / total) for (_, value), weight in zip(found, weights, strict=True))
        return round_once(sum(parts, torch.zeros((), dtype=torch.float64)), torch_dtype(like.info.dtype))

    def loaded(self, value: StoredTensor) -> Tensor:
        return value.load(torch.device("cpu"), torch.float64)

    def who(self, which: Any) -> str:
        return ", ".join(self.sources[at].name for at in dict.fromkeys(which))
