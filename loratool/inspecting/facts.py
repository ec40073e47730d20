"""What `inspect()` tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loratool.results import Result

if TYPE_CHECKING:
    from loratool.fitting import BaseFacts
    from loratool.health import Finding
    from loratool.measuring import Values
    from loratool.notes import Note


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str


@dataclass(frozen=True)
class WeightFacts:
    """Weights of one name and shape, such as every q_proj."""

    name: str  # the last part of their path
    shape: tuple[int, ...]  # as the adapter sees them, (out, in) for a linear layer
    count: int
    parameters: int  # of all of them; of an adapter: what it has for them


@dataclass(frozen=True)
class PlaceFacts:
    """Where a base holds the weight that a module means."""

    tensor: str
    rows: tuple[int, int]  # first and last + 1, of the tensor as a matrix
    rule: str  # how it was found


@dataclass(frozen=True)
class ModuleFacts:
    """What an adapter does to one weight."""

    target: str  # the weight, as the model that was trained calls it
    kind: str  # "low-rank", "saved whole", "token rows", or the class of any other update
    shape: tuple[int, ...] | None  # of the weight, where the factors tell
    rank: int | None
    alpha: float | None
    scaling: float | None  # α/r or α/√r
    parameters: int
    tensors: tuple[str, ...]
    places: tuple[PlaceFacts, ...] | None = None  # with a base


@dataclass(frozen=True)
class AdapterFacts(Result):
    """An adapter as its headers and config describe it; `values` and `findings` where they were asked for."""

    kind: Literal["adapter"]
    path: str
    format: str
    peft_type: str
    variants: tuple[str, ...]
    base: str
    task: str
    initialisation: str
    ranks: Mapping[str, int]  # rank → modules that have it
    alphas: Mapping[str, int]
    scalings: Mapping[str, int]  # α/r or α/√r → modules
    rslora: bool
    dora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    bias: str
    targets: tuple[WeightFacts, ...]
    saved: tuple[str, ...]  # tensors that replace the base's
    parameters: int  # numbers in the file
    bytes: int
    dtypes: Mapping[str, int]
    modules: tuple[ModuleFacts, ...]
    rest: Mapping[str, str]  # tensors that no module is made of → why; with the modules they are all there is
    unsupported: tuple[str, ...]
    notes: tuple[Note, ...]
    against: BaseFacts | None = None  # with a base, or a config of one
    tensors: tuple[TensorFacts, ...] | None = None
    values: Values | None = None
    findings: tuple[Finding, ...] | None = None

    def __str__(self) -> str:
        from loratool.report.inspect import adapter_text

        return adapter_text(self)


@dataclass(frozen=True)
class CheckpointFacts(Result):
    """A checkpoint as its headers and config describe it."""

    kind: Literal["checkpoint"]
    path: str
    architecture: str
    made_by: str  # where loratool made it: how, of what
    quantisation: str  # what its config says; empty for none
    tensors: int
    parameters: int
    bytes: int  # of tensor data
    dtypes: Mapping[str, int]
    weights: tuple[WeightFacts, ...]
    files: Mapping[str, int]  # weight file → bytes
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[Note, ...]
    listing: tuple[TensorFacts, ...] | None = None
    findings: tuple[Finding, ...] | None = None

    def __str__(self) -> str:
        from loratool.report.inspect import checkpoint_text

        return checkpoint_text(self)


@dataclass(frozen=True)
class UnreadableFacts(Result):
    """A path of which not even the headers can be told; only a check gives it, all else raises."""

    kind: Literal["unreadable"]
    path: str
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        from loratool.report.inspect import unreadable_text

        return unreadable_text(self)


Facts = AdapterFacts | CheckpointFacts | UnreadableFacts
