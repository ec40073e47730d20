"""What an adapter holds, sorted for those who rework it: low-rank updates by layer, and all that is beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from loratool.adapters.adapter import FACTOR_NAMES, Adapter, stored_tensors, unloaded
from loratool.adapters.training import Training
from loratool.adapters.unsettled import Unsettled, open_question
from loratool.algebra.lowrank.products import ROUNDING, Product
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors, downs, ups
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.algebra.updates.residual import Residual
from loratool.errors import NAME_BASE, FitError, InputError, printable
from loratool.layouts.fusions import FUSIONS
from loratool.lazy import Tensor, torch
from loratool.notes import Note
from loratool.templates import some

WITH_BASE = ("rescale", "resize", "combine", "compare", "compress", "convert")  # commands on adapters that take --base
ROUNDING_ONLY = "no larger than the rounding of its stored factors"  # said of an update that `lowrank.noise` finds so
WAY_OUT = (
    "convert it to LoRA: loratool merge BASE ADAPTER -o MERGED, then loratool extract BASE MERGED -o LORA (--rank "
    "sets the rank)"
)


ATTENTION = ".in_proj_weight"  # of an nn.MultiheadAttention, which is adapted with its out_proj
EXPERT_LAYERS = {
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}  # of one expert, as most models and Mixtral call them
EXPERTS = {part for fusion in FUSIONS if fusion.of_experts for part in fusion.parts}  # experts.#.gate_proj.weight
NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


class Kind(Enum):
    """How the factors of a layer are stored."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONVOLUTION = "convolution"
    PARAMETER = "parameter"  # a matrix for each expert; a batch of products, also where there is one

    @property
    def has_bias(self) -> bool:
        """Whether its second factor may have a bias."""
        return self in (Kind.LINEAR, Kind.CONVOLUTION)


@dataclass(frozen=True)
class Layer:
    """The low-rank update of one weight, with its factors still on disk."""

    target: str
    kind: Kind
    update: LowRank | ExpertFactors
    experts: int = 1
    magnitude: Magnitude | None = None  # of DoRA, around the update

    @property
    def module(self) -> str:
        """What patterns are matched with: the module, or the parameter itself."""
        return self.target if self.kind is Kind.PARAMETER else self.target.rpartition(".")[0]

    @property
    def rank(self) -> int:
        """Of one expert."""
        if isinstance(self.update, LowRank):
            return self.update.rank
        return self.update.rank_of(self.experts)

    @property
    def rows(self) -> int:
        return int(self.factors[0].shape[-2])

    @property
    def columns(self) -> int:
        return int(self.factors[1].shape[-1])

    @property
    def most(self) -> int:
        """The largest rank that its shape allows."""
        return min(self.rows, self.columns)

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.update.kernel if isinstance(self.update, LowRank) else ()

    @property
    def form(self) -> tuple[object, ...]:
        """What layers of several adapters must have in common to be one: all but the rank.

        A convolution of single pixels is a linear layer, as which some releases of models have it.
        """
        if self.kind is Kind.CONVOLUTION and math.prod(self.kernel) == 1:
            return (Kind.LINEAR, self.experts, self.rows, self.columns, ())
        return (self.kind, self.experts, self.rows, self.columns, self.kernel)

    @property
    def scale(self) -> float:
        """α/r, or α/√r with rsLoRA."""
        if isinstance(self.update, LowRank):
            return self.update.scale
        return self.update.alpha / (math.sqrt(self.rank) if self.update.rslora else self.rank)

    def with_alpha(self, alpha: float, divisor: float) -> Layer:
        """The same layer at another α, which is divided by so much."""
        if isinstance(self.update, LowRank):
            return replace(self, update=replace(self.update, scale=alpha / divisor))
        return replace(self, update=replace(self.update, alpha=alpha))

    @property
    def parameters(self) -> int:
        """Numbers that one rank of it takes."""
        return self.experts * (self.rows + self.columns)

    @property
    def factors(self) -> tuple[Any, Any]:
        """The stored (up, down)."""
        if isinstance(self.update, LowRank):
            return self.update.up, self.update.down
        return self.update.b, self.update.a

    def load(self, device: torch.device, dtype: torch.dtype) -> Product:
        """ΔW as a product, scaling included; for a parameter a batch of one product an expert.

        Raises `InputError` where a value is no number.
        """
        return self.load_factors(device, dtype).scaled(self.scale)

    def load_factors(self, device: torch.device, dtype: torch.dtype) -> Product:
        """The factors as they are stored, without the scale."""
        up, down = (factor.load(device, dtype) for factor in self.factors)
        return self.unscaled(up, down)

    def unscaled(self, up: Tensor, down: Tensor) -> Product:
        """ΔW of the loaded factors at a scale of 1."""
        if isinstance(self.update, ExpertFactors):
            up = ups(up, self.experts, self.update.grouped).expand(self.experts, -1, -1)
            down = downs(down, self.experts).expand(self.experts, -1, -1)
        return Product(up, down, self.rounding)

    @property
    def rounding(self) -> float:
        """The relative error of ΔW that comes of the dtype its factors are stored in; of several the largest."""
        stored = (t.info.dtype for t in stored_tensors(self.update) if t.info.dtype in FACTOR_NAMES)  # and no indices
        return max((ROUNDING[FACTOR_NAMES[dtype]] for dtype in stored), default=0.0)


@dataclass(frozen=True)
class Form:
    """What is known of a layer that is to be written: all but its factors."""

    kind: Kind
    rows: int
    columns: int
    rank: int  # the largest it may have
    experts: int = 1
    kernel: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: Layer, rank: int) -> Form:
        return cls(layer.kind, layer.rows, layer.columns, rank, layer.experts, layer.kernel)


@dataclass(frozen=True)
class Contents:
    """An adapter, sorted."""

    adapter: Adapter
    layers: Mapping[str, Layer]  # by target, as all of these
    biases: Mapping[str, Add]  # of lora_B
    saved: Mapping[str, Replace]  # whole
    bases: Mapping[str, Replace]  # weights that an update was trained on top of
    rows: Mapping[str, ReplaceRows]  # of tokens
    changes: Mapping[str, Add] = field(default_factory=dict)  # stored in full, of weights and biases without a layer
    kinds_unknown: tuple[Note, ...] = ()  # where LoHa or LoKr is taken as LoRA

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def training(self) -> Training:
        return self.adapter.training

    @property
    def dora(self) -> bool:
        return any(layer.magnitude for layer in self.layers.values())

    def is_norm(self, target: str) -> bool:
        """Whether a change that is stored in full is that of a norm: its module's weight is a line of numbers."""
        weight = self.changes.get(f"{target.rpartition('.')[0]}.weight")
        return weight is not None and len(weight.shape) == 1

    @property
    def remarks(self) -> tuple[Note, ...]:
        """What a user of plain LoRA made of it should know."""
        return (*self.adapter.notes, *self.training.notes_as_lora, *self.kinds_unknown)

    def check_finite(self, product: Product) -> Product:
        """The product; raises `InputError` naming every tensor of the adapter that holds what is no number."""
        if not product.is_finite:
            self.adapter.check_values()
            raise InputError(f"{printable(self.adapter.file.path)}: factors times their scaling overflow")
        return product

    def check_beside(self) -> None:
        """Raise `InputError` naming every tensor that holds what is no number, where one beside the factors does."""
        tables = (self.biases, self.saved, self.bases, self.rows, self.changes)
        updates = [
            *(u for table in tables for u in table.values()),
            *(layer.magnitude for layer in self.layers.values()),
        ]
        if not all(tensor.finite() for update in updates for tensor in stored_tensors(update)):
            self.adapter.check_values()

    def load(self, target: str, device: torch.device, dtype: torch.dtype) -> Product:
        """The product of a layer, checked."""
        return self.check_finite(self.layers[target].load(device, dtype))

    def load_bias(self, target: str) -> Tensor:
        """What a lora_B.bias adds, scaling included, in float64 on the CPU."""
        bias = self.biases[target]
        return unloaded(bias.value).load(torch.device("cpu"), torch.float64) * bias.scale


def check_read(adapter: Adapter, verb: str) -> None:
    """Raise `InputError` or `FitError` for an adapter of which something is not supported, or not recognised."""
    shown = printable(adapter.file.path)
    if adapter.unsupported:
        raise InputError(f"{shown}: cannot {verb} this adapter:", adapter.unsupported)
    if adapter.unused:
        raise FitError(f"{shown}: these tensors were not recognised:", map(printable, adapter.unused))


def contents_of(adapter: Adapter, verb: str, as_products: bool = False) -> Contents:
    """The adapter, sorted; raises `InputError` or `FitError` naming all that `verb` cannot be done to.

    `as_products` takes LoHa and LoKr as the LoRA that they are, whose factors are computed.
    """
    from loratool.adapters.as_lora import as_product, kind_unknown

    shown = printable(adapter.file.path)
    check_read(adapter, verb)
    layers: dict[str, Layer] = {}
    biases: dict[str, Add] = {}
    saved: dict[str, Replace] = {}
    rows: dict[str, ReplaceRows] = {}
    problems: dict[str, list[str]] = {}
    for target, update in adapter.updates.items():
        match update:
            case Add():
                biases[target] = update
            case Replace():
                saved[target] = update
            case ReplaceRows():
                rows[target] = update
            case _:
                if layer := layer_of(target, as_product(update, target) if as_products else update):
                    layers[target] = layer
                else:
                    problems.setdefault(why_not(update, verb), []).append(target)
    if problems:
        raise InputError(
            f"{shown}: cannot {verb} this adapter:",
            (f"{some(targets, 1)}: {reason}" for reason, targets in problems.items()),
            hint=NAME_BASE if verb in WITH_BASE and is_open(adapter) else "",
        )
    made = [t for t, layer in layers.items() if innermost(adapter.updates[t]) is not layer.update]
    if made:
        ranks = ", ".join(map(str, sorted({layers[target].rank for target in made})))
        text = f"{len(made)} updates are LoHa or LoKr; they are treated as the equivalent LoRA, of rank {ranks}"
        adapter = replace(adapter, notes=(*adapter.notes, Note("taken-as-lora", text)))
    of_layers = {target: bias for target, bias in biases.items() if f"{target.rpartition('.')[0]}.weight" in layers}
    changes = {target: change for target, change in biases.items() if target not in of_layers}
    unknown = kind_unknown({target: layers[target].update for target in made})
    return Contents(adapter, layers, of_layers, saved, dict(adapter.bases), rows, changes, unknown)


def layer_of(target: str, update: Update) -> Layer | None:
    """The layer that a low-rank update makes; None for any other, and for experts of unknown number."""
    match update:
        case Magnitude(inner=LowRank() as inner):
            return Layer(target, kind_of(inner), inner, magnitude=update)
        case LowRank():
            return Layer(target, kind_of(update), update)
        case ExpertFactors() if experts := update.experts:
            return Layer(target, Kind.PARAMETER, update, experts)
    return None


def adapted_module(target: str, kind: Kind) -> str:
    """The module that is adapted: of a parameter the parameter itself, of an nn.MultiheadAttention the whole."""
    if kind is Kind.PARAMETER:
        return target
    return target.removesuffix(ATTENTION).removesuffix(".weight")


def kind_of(update: LowRank) -> Kind:
    if update.kernel:
        return Kind.CONVOLUTION
    return Kind.EMBEDDING if update.table else Kind.LINEAR


def innermost(update: Update) -> Update:
    """An update without the lengths that DoRA puts around it."""
    return update.inner if isinstance(update, Magnitude) else update


def is_open(adapter: Adapter) -> bool:
    """Whether a model has to tell what some of its updates change."""
    return any(isinstance(innermost(update), Unsettled) for update in adapter.updates.values())


def why_not(update: Update, verb: str) -> str:
    """Why an update that is not low-rank stays as it is, and what to do."""
    inner = innermost(update)
    if isinstance(inner, Unsettled):
        return open_question(inner, {})
    if isinstance(inner, ExpertFactors):
        return "neither its factors nor its config says how many experts it has"
    if isinstance(inner, Residual):
        return (
            "training began by subtracting a part from the base (PiSSA, OLoRA or KaSA), so the adapter's change is "
            f"its factors minus that part, which needs the base to compute; {WAY_OUT}"
        )
    return f"its update ({type(inner).__name__}) is not a product of two factors and cannot be {verb.removesuffix('e')}ed; {WAY_OUT}"


def is_expert(target: str) -> bool:
    """Whether a target is the weight of one expert, such as `….experts.3.w1.weight`."""
    _, dot, rest = f".{target}".rpartition(".experts.")
    return bool(dot) and NUMBER.sub("#", f"experts.{rest}") in EXPERTS


def expert_place(target: str) -> tuple[str, int, str] | None:
    """What stands before the experts, the number of one, and its layer in today's words; None for any other weight."""
    match = re.fullmatch(r"(.+)\.experts\.(\d{1,9})\.(\w+)\.weight", target, re.ASCII)
    leaf = next((new for new, old in EXPERT_LAYERS.items() if match and match[3] in (new, old)), "")
    return (match[1], int(match[2]), leaf) if match and leaf else None
