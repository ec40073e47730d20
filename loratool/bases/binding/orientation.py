"""Which way round a weight is stored, where its shape does not tell.

A square weight may be (out, in) as nn.Linear keeps it, or (in, out) as Conv1D of GPT-2 does; a square matrix of an
expert likewise. The caller's option decides, then what is known of the model's class, then the adapter's config, then
the weights that are not square. Where one of the first three contradicts the last, nothing is decided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.model_settings import model_types
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.experts import ExpertFactors
from loratool.bases.binding.places import Match
from loratool.files.safefile import TensorInfo
from loratool.layouts.architectures import CONV1D_CLASSES, CONV1D_MODULES, CONV1D_TYPES, LINEAR_TYPES
from loratool.layouts.fusions import FLAGGED_EXPERTS, TWO_WAY_EXPERTS
from loratool.layouts.native import NATIVE_TYPES
from loratool.notes import Note

if TYPE_CHECKING:
    from loratool.files.checkpoint import Checkpoint


YES, NO = "--fan-in-fan-out", "--no-fan-in-fan-out"
OPTION = f"{YES} or {NO}"


def stored(in_out: bool) -> str:
    """How a matrix lies on disk."""
    return "(in, out)" if in_out else "(out, in)"


def option(in_out: bool) -> str:
    """The option that says so."""
    return YES if in_out else NO


@dataclass
class Orientation:
    """Decides whether weights are stored the other way round, from everything that an adapter and its base tell."""

    adapter: Adapter
    base: Checkpoint
    given: bool | None
    # module's last name → how many of its weights that are not square lie (in, out), and how many (out, in)
    shown: dict[str, Counter[bool]] = field(default_factory=dict)
    experts: dict[str, set[bool]] = field(default_factory=dict)  # container → the same for its parameters
    leaves: set[str] = field(default_factory=set)  # of all layers, square or not
    open_experts: bool = False
    decided: Counter[bool] = field(default_factory=Counter)  # of the layers that a config's flag speaks of
    remarks: Counter[tuple[str, str]] = field(default_factory=Counter)  # (code, sentence about one weight or more)

    def watch(self, matches: Mapping[str, Match]) -> None:
        """Learn from every weight whose shape leaves no choice."""
        for target, match in matches.items():
            update = self.adapter.updates[target]
            if isinstance(update, ExpertFactors):
                if match.open:
                    self.open_experts = True
                elif is_stack(update, match):
                    self.experts.setdefault(target.rpartition(".")[0], set()).add(bool(match.turned))
            elif is_matrix(update, match):
                leaf = leaf_of(match)
                self.leaves.add(leaf)
                if not match.open:
                    self.shown.setdefault(leaf, Counter())[bool(match.turned)] += 1

    def decide(self, target: str, match: Match) -> bool | str:
        """Whether the weight of `target` is stored turned round; or why that cannot be said."""
        update = self.adapter.updates[target]
        if isinstance(update, ExpertFactors):
            return self.decide_expert(target) if match.open else bool(match.turned)
        if not is_matrix(update, match):
            return bool(match.turned) and not match.open
        leaf = leaf_of(match)
        found = self.decide_square(leaf) if match.open else self.check(leaf, bool(match.turned))
        if not isinstance(found, str) and self.is_meant(leaf):
            self.decided[found] += 1
        return found

    def is_meant(self, leaf: str) -> bool:
        """Whether a flag speaks of a layer: of those with Conv1D's names where there are any, else of all."""
        return is_conv1d(leaf) or not any(map(is_conv1d, self.leaves))

    def said_by_option(self, leaf: str) -> bool | None:
        """What the caller says of a layer; where experts are to be decided, the option is about them."""
        meant = is_conv1d(leaf) or (self.is_meant(leaf) and not self.open_experts)
        return self.given if meant else None

    def said_by_class(self, leaf: str) -> bool | None:
        return False if self.base.is_linear else class_says(self.base.config, leaf, self.adapter.training.model_class)

    def said_by_config(self, leaf: str) -> bool | None:
        return self.adapter.training.in_out if self.is_meant(leaf) else None

    def claims(self, leaf: str) -> Iterator[tuple[str, bool]]:
        """(who says it, what it says) of a layer, in the order in which it counts."""
        for who, says in (
            (f"{option(bool(self.given))} says", self.said_by_option(leaf)),
            ("the model's class says", self.said_by_class(leaf)),
            ("its config says (fan_in_fan_out)", self.said_by_config(leaf)),
        ):
            if says is not None:
                yield who, says

    def shown_of(self, leaf: str) -> bool | None:
        """What weights that are not square show of a layer: those of its name, then of its kind, then the base's biases."""
        for seen in (set(self.shown.get(leaf, ())), set(self.shown_of_kind(leaf))):
            if seen:
                return next(iter(seen)) if len(seen) == 1 else None
        by_bias = {
            shown
            for name in self.base.tensors
            if is_conv1d(leaf) and is_conv1d(module_of(name)) and name.endswith(".weight")
            for shown in [bias_shows(self.base.tensors, name)]
            if shown is not None
        }
        return next(iter(by_bias)) if len(by_bias) == 1 else None

    def shown_of_kind(self, leaf: str) -> Counter[bool]:
        """How many weights that are not square, of layers named like Conv1D or of all others, lie each way round."""
        kin = (counts for other, counts in self.shown.items() if is_conv1d(other) == is_conv1d(leaf))
        return sum(kin, Counter[bool]())

    def decide_square(self, leaf: str) -> bool | str:
        shown, claims = self.shown_of(leaf), list(self.claims(leaf))
        if claims:
            who, says = claims[0]
            if shown is not None and shown != says:
                return (
                    f"{who} that it is stored {stored(says)}, but the non-square weights of such layers are stored "
                    f"{stored(shown)}; if that holds here too, pass {option(shown)}"
                )
            if self.said_by_option(leaf) is not None and self.said_by_class(leaf) == (not says):
                self.remark(
                    "orientation-overruled",
                    f"assumed to be stored {stored(says)}, because {who} so, contrary to the model's class",
                )
            return says
        if shown is not None:
            self.remark("orientation-guessed", f"assumed to be stored {stored(shown)}, like the non-square ones")
            return shown
        if is_conv1d(leaf):
            return (
                "the weight is square, and neither other weights nor either config says whether it is stored (in, "
                f"out), as in Conv1D; pass {OPTION}"
            )
        self.remark("orientation-guessed", f"assumed to be stored {stored(False)}, like most layers")
        return False

    def check(self, leaf: str, turned: bool) -> bool | str:
        """What the only way round that fits is held against: all that is said, and all layers like it."""
        by_option, by_class, alike = self.said_by_option(leaf), self.said_by_class(leaf), self.shown_of_kind(leaf)
        if by_option is not None:
            if by_option == turned or (by_option and alike[True]):
                return turned
            return (
                f"{option(by_option)} says that it is stored {stored(by_option)}, but it fits only as "
                f"{stored(turned)}; drop the option"
            )
        if by_class is not None and by_class != turned:
            told = f"it fits only a weight stored {stored(turned)}, but the model's class stores {stored(by_class)}"
            return told if turned or alike[True] else f"{told}; if this base differs from its class, pass {NO}"
        if turned and by_class is None:
            if alike[False]:
                return (
                    f"it fits only transposed, but {alike[False]} layers like it are stored (out, in); if they really "
                    f"differ, pass {YES}"
                )
            if not is_conv1d(leaf) and self.said_by_config(leaf) is False:
                return (
                    "it fits only transposed, but its config (fan_in_fan_out) says that weights are stored (out, in); "
                    f"if the base stores them (in, out), pass {YES}"
                )
            if self.said_by_config(leaf) is None:
                self.remark(
                    "orientation-guessed", f"assumed to be stored {stored(True)}, the only orientation that fits"
                )
        return turned

    def remark(self, code: str, sentence: str) -> None:
        self.remarks[code, sentence] += 1

    def decide_expert(self, target: str) -> bool | str:
        every = (self.experts.get(target.rpartition(".")[0], set()), set[bool]().union(*self.experts.values()))
        seen = next((next(iter(shown)) for shown in every if len(shown) == 1), None)
        if self.given is not None:
            if seen is not None and seen != self.given:
                return f"{option(self.given)} contradicts the adapter's non-square experts; drop the option"
            return self.given
        if seen is not None:
            return seen
        types, trained = model_types(self.base.config), self.adapter.training
        by_first = trained.expert_axes == "first"  # A acts on the first dimension, whatever the class
        if types & TWO_WAY_EXPERTS or not (types or by_first):
            return (
                "each expert's weight is square, and neither other experts nor peft_version show the orientation of "
                f"lora_A and lora_B; pass {OPTION}"
            )
        who = "the release of PEFT that saved it" if trained.release else "releases of PEFT before 0.18"
        self.remark("expert-orientation-guessed", f"of experts assumed to have the orientation that {who} uses")
        return by_first or bool(types & FLAGGED_EXPERTS) == (trained.expert_axes == "as flagged")

    def notes(self) -> list[Note]:
        """What was guessed, and what the adapter's config says that is not so."""
        notes = [Note(code, f"{count} square weights {sentence}") for (code, sentence), count in self.remarks.items()]
        flag, decided = self.adapter.training.in_out, self.decided
        said = ""
        if flag is False and decided[True]:
            said = f"its config says that weights are stored (out, in), but {decided[True]} are stored (in, out)"
        elif flag is True and decided[False] and not decided[True]:
            said = f"its config says that weights are stored (in, out), but all {decided[False]} are stored (out, in)"
        if said:
            notes.append(Note("orientation-overruled", f"{said}; the base decides"))
        return notes


def class_says(config: Mapping[str, Any], module: str, trained: str = "") -> bool | None:
    """Whether a model's class keeps a module's weight (in, out), as Conv1D does; None where the class is not known.

    Args:
        config: the model's.
        module: the last component of its name.
        trained: the class that was trained, where the adapter names it.
    """
    if "_class_name" in config:  # of diffusers, all of whose layers are nn.Linear
        return False
    types = all_types(config)
    classes = config.get("architectures") or ([trained] if trained else [])
    if not types and isinstance(classes, list):
        named = [str(name) for name in classes]
        types = frozenset(kind for start, kind in CONV1D_CLASSES for name in named if name.startswith(start))
    if any(module in CONV1D_TYPES.get(kind, ()) for kind in types):
        return True
    known = bool(types) and all(kind in NATIVE_TYPES or kind in LINEAR_TYPES or kind in CONV1D_TYPES for kind in types)
    return False if known else None


def all_types(config: Mapping[str, Any]) -> frozenset[str]:
    """The model types of a config and of all configs within it."""
    found = {config["model_type"]} if isinstance(config.get("model_type"), str) else set[str]()
    return frozenset(found).union(*(all_types(part) for part in config.values() if isinstance(part, dict)))


def bias_shows(tensors: Mapping[str, TensorInfo], weight: str) -> bool | None:
    """Whether a matrix is stored (in, out) by its bias, which is as long as the output is wide; None where it is silent."""
    own, bias = tensors.get(weight), tensors.get(f"{weight.rpartition('.')[0]}.bias")
    if own is None or bias is None or len(own.shape) != 2 or len(bias.shape) != 1 or own.shape[0] == own.shape[1]:
        return None
    return bias.shape[0] == own.shape[1] if bias.shape[0] in own.shape else None


def is_stack(update: ExpertFactors, match: Match) -> bool:
    """Whether a parameter has a matrix for each expert; one that is a matrix, such as a router, shows nothing of those."""
    places = match.straight or match.turned
    return update.experts != 1 and (len(places) > 1 or places[0].fold > 1)


def is_matrix(update: Update, match: Match) -> bool:
    """Whether an update is one of a whole matrix, or of a part of one, that may be stored either way."""
    place = (match.straight or match.turned)[0]
    return update.turnable and place.update.turnable and place.fold == 1


def leaf_of(match: Match) -> str:
    """The last component of the module, as the base calls it, that a target means."""
    return module_of((match.straight or match.turned)[0].tensor)


def module_of(target: str) -> str:
    """The last component of a weight's module."""
    return target.rpartition(".")[0].rpartition(".")[2]


def is_conv1d(module: str) -> bool:
    """Whether a module has a name that Conv1D layers have."""
    return module in CONV1D_MODULES
