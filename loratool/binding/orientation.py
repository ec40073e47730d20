"""Which way round a weight is stored, where its shape does not tell.

A square weight may be (out, in) as nn.Linear keeps it, or (in, out) as Conv1D of GPT-2 does; a square matrix of an
expert likewise. What is not square beside it decides, then what is known of the architecture, then the user.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.binding.fusing import model_types
from loratool.layouts.architectures import CONV1D_MODEL_TYPES, CONV1D_MODULES
from loratool.layouts.fusions import FLAGGED_EXPERTS, TWO_WAY_EXPERTS
from loratool.updates import ExpertFactors

if TYPE_CHECKING:
    from loratool.adapter import Adapter
    from loratool.binding.places import Landing
    from loratool.checkpoint import Checkpoint

OPTION = "--fan-in-fan-out or --no-fan-in-fan-out"
VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass
class Orientation:
    """Decides whether weights are stored the other way round, from everything that an adapter and its base tell."""

    adapter: Adapter
    base: Checkpoint
    given: bool | None
    linear: dict[str, set[bool]] = field(default_factory=dict)  # leaf → what its weights that are not square show
    experts: dict[str, set[bool]] = field(default_factory=dict)  # container → the same for its parameters
    turned: int = 0
    straight: int = 0

    def watch(self, landings: Mapping[str, Landing]) -> None:
        """Learn from every weight whose shape leaves no choice."""
        for target, landing in landings.items():
            update = self.adapter.updates[target]
            if landing.open:
                continue
            if isinstance(update, ExpertFactors):
                self.experts.setdefault(target.rpartition(".")[0], set()).add(bool(landing.turned))
            elif update.turnable:
                self.linear.setdefault(module_of(target), set()).add(bool(landing.turned))
                self.count(bool(landing.turned))

    def count(self, turned: bool) -> None:
        if turned:
            self.turned += 1
        else:
            self.straight += 1

    def decide(self, target: str) -> bool | str:
        """Whether the weight of `target`, which fits both ways, is stored turned round; or the question to ask."""
        if isinstance(self.adapter.updates[target], ExpertFactors):
            return self.decide_expert(target)
        decided = self.decide_linear(target)
        if not isinstance(decided, str):
            self.count(decided)
        return decided

    def decide_linear(self, target: str) -> bool | str:
        module = module_of(target)
        if len(seen := self.linear.get(module, set())) == 1:
            return next(iter(seen))
        kin = {shown for leaf, every in self.linear.items() for shown in every if is_conv1d(leaf) == is_conv1d(module)}
        if len(kin) == 1:
            return next(iter(kin))
        if not is_conv1d(module):
            return False
        if len(shown := set(self.biases())) == 1:
            return next(iter(shown))
        if self.base.model_type:
            return self.base.model_type in CONV1D_MODEL_TYPES
        if self.given is not None:
            return self.given
        return (
            "the weight is square, and neither other weights nor the base's config.json tell whether it is stored "
            f"(in, out) as Conv1D does; say so with {OPTION}"
        )

    def biases(self) -> Iterator[bool]:
        """What the base's own layers of Conv1D's names show: a bias is as long as the output is wide."""
        for name, info in self.base.tensors.items():
            if name.endswith(".bias") and is_conv1d(module_of(name)) and len(info.shape) == 1:
                weight = self.base.tensors.get(name.removesuffix("bias") + "weight")
                one_side = weight is not None and len(weight.shape) == 2 and weight.shape[0] != weight.shape[1]
                if weight is not None and one_side and info.shape[0] in weight.shape:
                    yield info.shape[0] == weight.shape[1]

    def decide_expert(self, target: str) -> bool | str:
        container = target.rpartition(".")[0]
        for seen in (self.experts.get(container, set()), set[bool]().union(*self.experts.values())):
            if len(seen) == 1:
                return next(iter(seen))
        types = model_types(self.base.config)
        version = peft_version(self.adapter.config.get("peft_version"))
        if not types & TWO_WAY_EXPERTS:
            if version < (0, 19, 0):
                return True  # A acts on the first dimension, whatever the class
            if types:
                flagged = bool(types & FLAGGED_EXPERTS)
                return flagged if version > (0, 19, 0) else not flagged
        if self.given is not None:
            return self.given
        return (
            "each expert's weight is square, and neither other experts nor peft_version tell which way round lora_A "
            f"and lora_B go; say so with {OPTION}"
        )

    def notes(self) -> list[str]:
        """What the adapter's config, or the caller, says against the shapes."""
        flag = self.adapter.config.get("fan_in_fan_out")
        said = [("its config says", flag)] if isinstance(flag, bool) else []
        if self.given is not None:
            said.append(("--fan-in-fan-out says" if self.given else "--no-fan-in-fan-out says", self.given))
        notes = []
        for who, word in said:
            if not word and self.turned:
                notes.append(
                    f"{who} that weights are stored (out, in), but {self.turned} are stored (in, out): what the base "
                    "shows counts"
                )
            elif word and self.straight and not self.turned:
                notes.append(
                    f"{who} that weights are stored (in, out), but all {self.straight} are stored (out, in): what the "
                    "base shows counts"
                )
        return notes


def module_of(target: str) -> str:
    """The last component of a weight's module."""
    return target.rpartition(".")[0].rpartition(".")[2]


def is_conv1d(module: str) -> bool:
    """Whether a module has a name that Conv1D layers have."""
    return module in CONV1D_MODULES


def peft_version(value: object) -> tuple[int, int, int]:
    """A version as numbers; those of PEFT before 0.18 wrote none."""
    match = VERSION.match(value) if isinstance(value, str) else None
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)
