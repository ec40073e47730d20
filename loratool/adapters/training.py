"""`Training`: how an adapter was trained, in words of no format.

A format's reader fills it from a config of its own, which nobody else looks into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loratool.notes import Note
from loratool.templates import template_of

# Along which dimension of each expert's matrix A acts: the first, or as transformers flags a class of models as having
# them transposed, or just the other way round.
ExpertAxes = Literal["first", "as flagged", "against the flag"]


@dataclass(frozen=True)
class Targets:
    """Which modules were asked for by lists of names; a name is a module's path, or a whole dotted end of it."""

    modules: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    layers: frozenset[str] | None = None  # numbers of the only layers that are meant

    def __contains__(self, module: str) -> bool:
        if not named(module, self.modules) or named(module, self.excluded):
            return False
        return self.layers is None or next(iter(template_of(module)[1]), "") in self.layers


def named(module: str, entries: tuple[str, ...]) -> bool:
    """Whether an entry is the module's path, or a whole dotted end of it."""
    return any(entry and (module == entry or module.endswith(f".{entry}")) for entry in entries)


@dataclass(frozen=True)
class Training:
    """What an adapter's files say of its training; empty or None where they do not say it."""

    base: str = ""  # name or path of the model that was trained
    revision: str = ""  # of that model
    quantised: str = ""  # how that model was quantised, and which file says so, where its own name need not tell
    task: str = ""  # CAUSAL_LM say
    model_class: str = ""  # of the model that was trained
    method: str = "LORA"  # the type of adapter
    variants: tuple[str, ...] = ()  # what is made of that type, in words
    features: Mapping[str, str] = field(default_factory=dict)  # what others may not know: our word → the format's own
    initialisation: str = ""  # of the factors, where it is not the usual one
    rank: int | None = None  # of most layers
    rslora: bool = False  # scaling is α/√r, not α/r
    dora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, float] = field(default_factory=dict)  # pattern → rank, where it is another
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # pattern → α, where it is another
    zero_alpha: bool = False  # whether an α that is named is 0
    saved_modules: tuple[str, ...] = ()  # trained whole
    bias: str = "none"  # which biases of the model were trained
    lora_bias: bool = False  # whether the second factor has a bias
    targets: Targets | None = None  # None where it is not lists of names that say what was adapted
    in_out: bool | None = None  # whether matrices are said to be stored (in, out), as Conv1D has them
    expert_axes: ExpertAxes = "as flagged"
    release: str = ""  # of the library that saved it
    notes_as_lora: tuple[Note, ...] = ()  # what is to be known of plain LoRA that is made of it
