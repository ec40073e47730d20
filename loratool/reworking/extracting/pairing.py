"""Two checkpoints of one model side by side: which tensors differ, and what an adapter can make of each difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from loratool.adapters.formats import WRITTEN
from loratool.adapters.formats.format import Format
from loratool.adapters.layers import ATTENTION, Kind, is_expert
from loratool.adapters.model_settings import language_parts, model_types
from loratool.adapters.writer import Carried
from loratool.bases.binding.orientation import OPTION, bias_shows, class_says, is_conv1d, module_of, option, stored
from loratool.bases.decoded import weight_of
from loratool.bases.packed import Packed
from loratool.bases.renamed import why_not
from loratool.bases.tied_weights import find_ties
from loratool.bases.weights import Plain, StoredWeight
from loratool.errors import FitError, InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.grouping import by_key
from loratool.layouts.architectures import (
    EMBEDDING_NAMES,
    INPUT_EMBEDDINGS,
    LABEL_HEADS,
    OUTPUT_HEADS,
    TASK_CLASSES,
)
from loratool.layouts.fusions import EXPERT_COUNTS, FLAGGED_EXPERTS
from loratool.notes import Note
from loratool.reworking.extracting.differences import same_values
from loratool.reworking.extracting.selecting import nearest_names, selected
from loratool.templates import listed

# Modules that are tables of vectors, which PEFT adapts otherwise than matrices; nothing on disk tells them apart.
PACKED_MODULE = (
    "its module would be saved whole, and TUNED is quantised there; dequantise it first (loratool merge TUNED "
    "--dequantize -o OUT)"
)
WIDEST_KERNEL = 64  # of a one-dimensional convolution; a third dimension that is longer is one of experts' weights


@dataclass(frozen=True)
class Change:
    """A weight that may differ, and the layer that a low-rank update of it makes."""

    target: str
    kind: Kind
    base: StoredWeight
    tuned: StoredWeight
    experts: int = 1
    turned: bool = False  # the factors act the other way round than the matrix lies on disk
    same: bool = False  # nothing differs; it gets factors because something beside it does

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.base.shape[2:] if self.kind is Kind.CONVOLUTION else ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one matrix, as it lies on disk."""
        if self.kind is Kind.PARAMETER:
            rows, columns = self.base.shape[-2:]
            return rows, columns
        return self.base.shape[0], math.prod(self.base.shape[1:])

    @property
    def layer(self) -> tuple[int, int]:
        """Rows and columns of the update, as PEFT has it."""
        return self.shape[::-1] if self.turned else self.shape


@dataclass
class Pairing:
    """What differs between two checkpoints, sorted by what an adapter can hold of it."""

    base: Checkpoint
    tuned: Checkpoint
    task: str | None
    changes: dict[str, Change] = field(default_factory=dict)  # by target
    biases: dict[str, Plain] = field(default_factory=dict)  # of layers with a change
    same_biases: dict[str, Plain] = field(default_factory=dict)  # of the other layers, which PEFT asks for too
    whole: dict[str, Plain] = field(default_factory=dict)  # tensors of modules that are saved whole
    modules: list[str] = field(default_factory=list)  # those modules
    mirrors: dict[str, tuple[str, ...]] = field(default_factory=dict)  # tensor → heads that are tied to it
    identical: int = 0
    excluded: int = 0
    left_out: dict[str, str] = field(default_factory=dict)  # tensor → reason
    doubts: list[Note] = field(default_factory=list)  # about packed weights
    guessed: dict[str, bool] = field(default_factory=dict)  # square matrices taken (in, out) or not, as others lie

    @property
    def groups(self) -> list[tuple[Change, ...]]:
        """Changes by layers: both projections of an nn.MultiheadAttention have one rank, all others their own."""
        together = by_key((self.attention_of(target) or target, change) for target, change in self.changes.items())
        return [tuple(group) for group in together.values()]

    def attention_of(self, target: str) -> str:
        """The nn.MultiheadAttention that a weight belongs to; empty for none."""
        for ending in (ATTENTION, ".out_proj.weight"):
            module = target.removesuffix(ending)
            if module != target and f"{module}{ATTENTION}" in self.base.tensors:
                return module
        return ""

    def pinned(self, change: Change) -> bool:
        """Whether it gets factors even where they are zero, because of what else its module holds."""
        parameters = [c for c in self.changes.values() if c.kind is Kind.PARAMETER]
        module = change.target.rpartition(".")[0]
        siblings = change.kind is Kind.PARAMETER and any(
            c is not change and c.target.rpartition(".")[0] == module for c in parameters
        )
        return (
            siblings
            or is_expert(change.target)
            or f"{module}.bias" in self.biases
            or bool(self.attention_of(change.target))
        )

    def told_guesses(self) -> Iterator[Note]:
        """A note on square matrices of which only the others tell how they are stored."""
        for way in (False, True):
            if mine := [name for name, turned in self.guessed.items() if turned == way and name in self.changes]:
                yield Note(
                    "orientation-guessed",
                    f"{len(mine)} square weights assumed to be stored {stored(way)}, like those with biases: "
                    f"{listed(mine)}",
                )

    def carried(self, form: Format, dialect: str) -> Carried:
        """What is written beside the factors."""
        names = form.spelling({target: change.kind for target, change in self.changes.items()}, dialect=dialect)
        inside = {names.whole(target, True): bias for target, bias in (self.biases | self.same_biases).items()}
        return Carried({**{names.whole(target, False): tensor for target, tensor in self.whole.items()}, **inside})


def pair(
    base: Checkpoint,
    tuned: Checkpoint,
    include: Sequence[str],
    exclude: Sequence[str],
    fan_in_fan_out: bool | None = None,
) -> Pairing:
    """Compare every tensor and sort what differs; `fan_in_fan_out` is what the caller says of how matrices are stored.

    Raises `FitError` where the two have no tensor in common or nothing tells how one is stored, `UsageError` for
    patterns that mean nothing.
    """
    for role, checkpoint in (("BASE", base), ("TUNED", tuned)):
        if any(".lora_" in name for name in checkpoint.tensors):
            raise InputError(
                f"{printable(checkpoint.root)}: this is an adapter, but {role} must be a model; merge it into its base "
                "first"
            )
    return Sorter(base, tuned, fan_in_fan_out).sort(include, exclude)


class Sorter:
    """Decides about every tensor of two checkpoints, with what is known of the whole model."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, fan_in_fan_out: bool | None = None) -> None:
        self.base, self.tuned, self.fan_in_fan_out = base, tuned, fan_in_fan_out
        self.found = Pairing(base, tuned, task_of(tuned) or task_of(base))
        self.types = model_types(base.config) | model_types(tuned.config)
        self.tied = tied_heads(base), tied_heads(tuned)
        names = dict.fromkeys([*base.tensors, *tuned.tensors, *self.tied[0], *self.tied[1]])
        self.pairs = {name: (self.resolved(0, name), self.resolved(1, name)) for name in names}
        # the modules around those that tensors belong to
        self.containers = {outer for name in names for outer in accumulate(name.split(".")[:-2], "{}.{}".format)}
        self.whole: set[str] = set()  # modules
        self.unclear: dict[str, str] = {}  # matrices of which nobody knows how they are stored → why

    def resolved(self, side: int, name: str) -> StoredWeight | None:
        """The tensor that a checkpoint has under a name, or that is tied to it."""
        checkpoint = (self.base, self.tuned)[side]
        name = self.tied[side].get(name, name)
        return weight_of(checkpoint, name) if name in checkpoint.tensors else None

    def sort(self, include: Sequence[str], exclude: Sequence[str]) -> Pairing:
        if not any(one and two for one, two in self.pairs.values()):
            raise FitError(
                f"{self.base.name} and {self.tuned.name} have no tensor in common:",
                nearest_names(list(self.tuned.tensors), list(self.base.tensors)),
            )
        paths = {name: self.path(name) for name in self.pairs}
        wanted = selected(include, exclude, dict.fromkeys(paths.values()))
        biases: list[str] = []
        for name, (one, two) in self.pairs.items():
            if self.mirrored(name):
                continue
            if not self.differs(name):
                self.found.identical += 1
            elif paths[name] not in wanted:
                self.found.excluded += 1
            elif reason := self.why_left_out(name, one, two):
                self.found.left_out[name] = reason
            else:
                assert two, "what only BASE has is left out"
                self.place(name, one, two, biases)
        for name in biases:
            self.place_bias(name)
        self.complete_attention()
        self.complete_experts()
        self.check_parameters()
        self.save_whole()
        self.complete_biases()
        self.mirror()
        if lost := [f"{printable(name)}: {why}" for name, why in self.unclear.items() if name in self.found.changes]:
            raise FitError(f"cannot make an adapter from {self.tuned.name}:", lost)
        return self.found

    def path(self, name: str) -> str:
        """What --include and --exclude are matched with: the module, or the parameter where that is adapted."""
        one, two = self.pairs[name]
        either = one or two
        assert either, "one of the two has it"
        return name if self.kind(name, either) is Kind.PARAMETER else name.rpartition(".")[0] or name

    def mirrored(self, name: str) -> bool:
        """Whether both models tie it to the same tensor, so that it changes as that one does."""
        first = self.tied[0].get(name)
        return first is not None and first == self.tied[1].get(name)

    def why_left_out(self, name: str, one: StoredWeight | None, two: StoredWeight | None) -> str:
        """Empty for what an adapter can hold."""
        module = name.rpartition(".")[0]
        if two is None:
            return "only BASE has it"
        if one is None and not (
            module_of(name) in LABEL_HEADS and not any(n.startswith(f"{module}.") for n in self.base.tensors)
        ):
            return "only TUNED has it"
        if reason := why_not(self.tuned, name):
            return reason
        if not module:
            return "it is not in a module, and PEFT saves only modules"
        for tensor in (one, two):
            if tensor and tensor.dtype not in FLOAT_NAMES:
                return f"cannot compute with {tensor.dtype}; dequantise the weight first"
        return ""

    def kind(self, name: str, tensor: StoredWeight) -> Kind | None:
        """What its update is; None where there can be none."""
        module, _, parameter = name.rpartition(".")
        shape = tensor.shape
        if not module or 0 in shape:
            return None
        match parameter, len(shape):
            case "weight", 2:
                return Kind.EMBEDDING if is_table(module) else Kind.LINEAR
            case "weight", 3 if self.of_experts(shape):
                return Kind.PARAMETER
            case "weight", 3 | 4 | 5:
                return Kind.CONVOLUTION if shape[1] > 1 else None  # else each channel by itself, which PEFT refuses
            case "in_proj_weight", 2 if f"{module}.out_proj.weight" in self.base.tensors:
                return Kind.LINEAR
            case _, 2 | 3 if module not in self.containers and parameter != "bias":
                return Kind.PARAMETER
        return None

    def of_experts(self, shape: tuple[int, ...]) -> bool:
        """Whether a three-dimensional weight is one matrix for each expert, not a convolution."""
        counts = {part.get(key) for _, part in language_parts(self.base.config) for key in EXPERT_COUNTS}
        return shape[0] in counts and shape[2] > WIDEST_KERNEL

    def place(self, name: str, one: StoredWeight | None, two: StoredWeight, biases: list[str]) -> None:
        """Give a tensor that differs a place: an update, a bias, or its module saved whole."""
        module, _, parameter = name.rpartition(".")
        heads = WRITTEN.task_heads(self.found.task or "")
        if head := next((part for part in module.split(".") if part in heads), ""):
            self.whole.add(f"{module[: f'.{module}.'.index(f'.{head}.')]}{head}")
        elif one is None or one.shape != two.shape:
            self.whole.add(module)
        elif change := self.change(name, one, two):
            self.found.changes[name] = change
        elif parameter == "bias":
            biases.append(name)
        else:
            self.whole.add(self.found.attention_of(f"{module}.in_proj_weight") or module)

    def change(self, name: str, one: StoredWeight, two: StoredWeight, same: bool = False) -> Change | None:
        kind = self.kind(name, one)
        if kind is None:
            return None
        experts = one.shape[0] if kind is Kind.PARAMETER and len(one.shape) == 3 else 1
        turned = self.is_in_out(name) if kind is Kind.LINEAR else False
        if kind is Kind.PARAMETER and len(one.shape) == 3:
            turned = bool(self.types & FLAGGED_EXPERTS)
        return Change(name, kind, one, two, experts, turned, same)

    def is_in_out(self, name: str) -> bool:
        """Whether a matrix is stored (in, out), as Conv1D of GPT-2 keeps it; what cannot be said goes to `unclear`.

        In the order in which it counts: the caller, the class of either model, the bias beside it, the other biases.
        """
        if self.base.is_linear:
            return False
        leaf, shown = module_of(name), bias_shows(self.base.tensors, name)
        meant = is_conv1d(leaf) or not self.has_conv1d
        by_class = (class_says(checkpoint.config, leaf) for checkpoint in (self.base, self.tuned))
        for who, says in (
            (option(bool(self.fan_in_fan_out)), self.fan_in_fan_out if meant else None),
            ("the model's class", next((said for said in by_class if said is not None), None)),
        ):
            if says is not None:
                if shown is not None and shown != says:
                    self.unclear[name] = (
                        f"{who} says that it is stored {stored(says)}, but its bias shows that it is stored "
                        f"{stored(shown)}; to confirm that, pass {option(shown)}"
                    )
                return says
        if shown is not None:
            return shown
        if len(kin := self.shown_by_biases[is_conv1d(leaf)]) == 1:
            self.found.guessed[name] = next(iter(kin))
            return self.found.guessed[name]
        if is_conv1d(leaf):
            self.unclear[name] = (
                "neither its shape, nor a bias, nor the model's class shows whether it is stored (in, out), as in "
                f"Conv1D; pass {OPTION}"
            )
        return False

    @cached_property
    def has_conv1d(self) -> bool:
        """Whether any matrix has the name of one that Conv1D layers keep."""
        return any(is_conv1d(module_of(n)) and len(info.shape) == 2 for n, info in self.base.tensors.items())

    @cached_property
    def shown_by_biases(self) -> Mapping[bool, set[bool]]:
        """How matrices with Conv1D's names (True) and others (False) are stored, as far as their biases tell."""
        found: dict[bool, set[bool]] = {False: set(), True: set()}
        for name in self.base.tensors:
            if name.endswith(".weight") and (shown := bias_shows(self.base.tensors, name)) is not None:
                found[is_conv1d(module_of(name))].add(shown)
        return found

    def place_bias(self, name: str) -> None:
        """A bias goes with the factors of its layer, which are zero where nothing else differs."""
        module = name.rpartition(".")[0]
        weight = f"{module}.weight"
        one, two = self.pairs.get(weight, (None, None))
        attention = self.found.attention_of(weight)
        if (
            attention
            or not (one and two and one.shape == two.shape and one.dtype in FLOAT_NAMES)
            or self.kind(weight, one) not in (Kind.LINEAR, Kind.CONVOLUTION)
        ):
            self.whole.add(attention or module)
            return
        if weight not in self.found.changes and (change := self.change(weight, one, two, same=True)):
            self.found.changes[weight] = change
        tensor = self.pairs[name][1]
        assert isinstance(tensor, Plain), "no bias is packed"
        self.found.biases[name] = tensor

    def complete_biases(self) -> None:
        """Where PEFT looks for the trained bias of one layer, it looks for those of all."""
        if not self.found.biases:
            return
        for weight, change in self.found.changes.items():
            name = f"{weight.removesuffix('weight')}bias"
            tensor = self.pairs.get(name, (None, None))[1]
            of_layer = weight.endswith(".weight") and change.kind is not Kind.PARAMETER
            known = self.found.biases.keys() | self.found.left_out.keys()
            if of_layer and isinstance(tensor, Plain) and tensor.dtype in FLOAT_NAMES and name not in known:
                self.found.same_biases[name] = tensor

    def complete_attention(self) -> None:
        """PEFT wraps an nn.MultiheadAttention as one layer: where one of its matrices has factors, both have.

        Beside a Conv1D it is saved whole: the one `fan_in_fan_out` of a config makes PEFT turn its out_proj as well.
        """
        conv1d = any(change.turned and change.kind is Kind.LINEAR for change in self.found.changes.values())
        for attention in dict.fromkeys(map(self.found.attention_of, list(self.found.changes))):
            if attention and conv1d:
                self.whole.add(attention)
                continue
            for name in (f"{attention}{ATTENTION}", f"{attention}.out_proj.weight"):
                one, two = self.pairs.get(name, (None, None))
                if attention and name not in self.found.changes and one and two:
                    change = self.change(name, one, two, same=True)
                    assert change, "it is a matrix"
                    self.found.changes[name] = change

    def complete_experts(self) -> None:
        """PEFT stacks the experts of a model: where one of them has factors all have, those that do not differ zeros."""
        if not any(map(is_expert, self.found.changes)):
            return
        for name, (one, two) in self.pairs.items():
            both = one and two and one.shape == two.shape and {one.dtype, two.dtype} <= set(FLOAT_NAMES)
            if is_expert(name) and name not in self.found.changes and both:
                assert two, "both exist"
                if change := self.change(name, two, two, same=True):
                    self.found.changes[name] = change

    def check_parameters(self) -> None:
        """Parameters of one module must be told apart by the order in which modules of that kind register them."""
        parameters = (t.rpartition(".") for t, change in self.found.changes.items() if change.kind is Kind.PARAMETER)
        for module, names in by_key((module, name) for module, _, name in parameters).items():
            if len(names) > 1 and not WRITTEN.tells_apart(set(names)):
                self.whole.add(module)

    def save_whole(self) -> None:
        """Take every tensor of the modules that are saved whole; a module of modules with numbers is left out."""
        for module in sorted(self.whole):
            inside = [name for name in self.tuned.tensors if name.startswith(f"{module}.")]
            below = {part for name in inside for part in name.removeprefix(f"{module}.").split(".")}
            if any(part.isdigit() for part in below):
                for name in inside:
                    if "." not in name.removeprefix(f"{module}.") and self.differs(name):
                        self.found.left_out[name] = "PEFT would save all layers of its module with it"
                continue
            if any(module.startswith(f"{outer}.") for outer in self.found.modules):
                continue
            found = {name: weight_of(self.tuned, name) for name in inside}
            if any(isinstance(weight, Packed) for weight in found.values()):
                self.found.left_out |= dict.fromkeys(filter(self.differs, inside), PACKED_MODULE)
                continue
            self.found.modules.append(module)
            for name, weight in found.items():
                if isinstance(weight, Plain) and weight.dtype in FLOAT_NAMES and 0 not in weight.shape:
                    self.found.whole[name] = weight
                    self.found.left_out.pop(name, None)
        for name in [*self.found.changes, *self.found.biases]:
            if name in self.found.whole:
                self.found.changes.pop(name, None)
                self.found.biases.pop(name, None)

    def differs(self, name: str) -> bool:
        one, two = self.pairs[name]
        return not (one and two and one.shape == two.shape and same_values(one, two))

    def mirror(self) -> None:
        """What is tied to a tensor that changes gets the same change: PEFT knows modules, not tensors."""
        for head, first in self.tied[0].items():
            if not self.mirrored(head):
                continue
            if first in self.found.changes:
                self.found.mirrors[first] = (*self.found.mirrors.get(first, ()), head)
            elif first in self.found.whole:
                self.found.whole[head] = self.found.whole[first]
                self.found.modules.append(head.rpartition(".")[0])


def tied_heads(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor → the one that it is tied to, for all that are one in memory."""
    ties = find_ties(checkpoint, [])
    return {name: group.names[0] for group in ties.groups if not group.one_role for name in ties.together(group)[1:]}


def is_table(module: str) -> bool:
    """Whether a module is an embedding, by its name."""
    leaf = module.rpartition(".")[2]
    return leaf in INPUT_EMBEDDINGS or (leaf not in OUTPUT_HEADS and bool(EMBEDDING_NAMES.fullmatch(leaf)))


def task_of(checkpoint: Checkpoint) -> str | None:
    """PEFT's word for what the model's class is for."""
    for name in checkpoint.architectures:
        if name.endswith("LMHeadModel"):
            return "CAUSAL_LM"
        for task, ending in TASK_CLASSES.items():
            # models of images and text are called so too
            if name.endswith(ending) and (
                task != "SEQ_2_SEQ_LM" or checkpoint.config.get("is_encoder_decoder") is True
            ):
                return task
    return None
