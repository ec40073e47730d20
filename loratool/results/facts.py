"""What `inspect` tells of adapters and checkpoints, as text that fits 80 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loratool.grouping import by_key
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.findings import Finding, findings_text
from loratool.results.text import (
    COLUMNS,
    ENDLESS,
    aligned,
    counted,
    fill,
    one_of,
    plural,
    row_if,
    shortened,
    spread,
    table,
)
from loratool.shown import size
from loratool.templates import grouped, template_of

if TYPE_CHECKING:  # most adapters are shown without
    from loratool.results.history import Ancestor
    from loratool.results.sketch import Neighbour, SketchFacts
    from loratool.results.values import Values
UNDERSCORED = re.compile(r"(?<=_)[0-9]+(?=[_.])")  # numbers of a name without dots


@dataclass(frozen=True)
class BaseFacts:
    """Parameters of the base and of the adapter, counted as PEFT's `print_trainable_parameters` counts them."""

    path: str
    architecture: str
    source: Literal["headers", "config"]
    parameters: int  # of the base, tied tensors once
    trainable: int
    all_parameters: int
    percent: float
    line: str  # as PEFT prints it
    problems: tuple[str, ...]  # targets that the base has no place for


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
class ComponentFacts:
    """A component of an image or video model."""

    name: str  # what adapters and `--only` call it
    architecture: str  # its class, or the family that its names show; empty where neither is known
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class PlaceFacts:
    """Where a base holds the weight that a module means."""

    tensor: str
    rows: tuple[int, int]  # first and last + 1, of the tensor as a matrix
    rule: str  # how it was found


@dataclass(frozen=True)
class ModuleFacts:
    """What an adapter does to one weight."""

    name: str  # of the module: the target without `.weight`
    target: str  # the weight, as the model that was trained calls it
    kind: str  # "low-rank", "saved whole", "token rows", or the class of any other update
    shape: tuple[int, ...] | None  # of the weight, where the factors tell
    rank: int | None
    alpha: float | None
    scaling: float | None  # α/r or α/√r
    parameters: int
    tensors: tuple[str, ...]
    places: tuple[PlaceFacts, ...] | None = None  # with a base


@dataclass(frozen=True, repr=False)
class AdapterFacts(Result):
    """An adapter as its headers and config describe it; `values` and `findings` where they were asked for."""

    kind: Literal["adapter"]
    path: str
    format: str | tuple[str, ...]  # several where names are spelled in several dialects
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
    metadata: Mapping[str, str]  # what the tool wrote into the header of the file, whole
    against: BaseFacts | None = None  # with a base, or a config of one
    tensors: tuple[TensorFacts, ...] | None = None
    shown_metadata: Mapping[str, str] | None = None  # long values shortened
    values: Values | None = None
    findings: tuple[Finding, ...] | None = None
    history: Ancestor | None = None  # where loratool made it
    sketch: tuple[float, ...] | None = None  # with values
    sketched: SketchFacts | None = None
    near: tuple[Neighbour, ...] | None = None  # with an index
    models: tuple[str, ...] = ()  # image and video models that its names and shapes fit, such as "SDXL"

    @property
    def formats(self) -> tuple[str, ...]:
        return (self.format,) if isinstance(self.format, str) else self.format

    def __str__(self) -> str:
        """What is in an adapter, for people."""
        rows: list[tuple[str, object]] = [
            ("adapter", self.path),
            ("format", ", ".join(filter(None, [*self.formats, self.peft_type, *self.variants]))),
            ("base", self.base or "not named"),
            *row_if(self.models, "model", one_of(self.models)),
            *row_if(self.task, "task", self.task),
            *row_if(self.initialisation, "initialised", self.initialisation),
            *low_rank_rows(self),
            *(("saved whole", name) for name in shortened(self.saved)),
            *row_if(self.bias != "none", "bias", self.bias),
            ("parameters", f"{self.parameters:,}"),
            ("size", size(self.bytes)),
            ("dtypes", counted(self.dtypes)),
            *(("not mergeable", reason) for reason in self.unsupported),
            *(("note", note) for note in self.notes if self.findings is None),  # else a finding is made of it
        ]
        parts = [
            aligned(rows, COLUMNS),
            *([str(self.history)] if self.history else []),
            *(base_text(self.against, self.modules) if self.against else []),
            *([metadata_text(self.shown_metadata)] if self.shown_metadata is not None else []),
            *([str(self.values)] if self.values else []),
            *([tensors_text(self.tensors)] if self.tensors is not None else []),
            *([findings_text(self.findings)] if self.findings is not None else []),
            *([nearest_text(self.near)] if self.near is not None else []),
        ]
        return "\n\n".join(parts)


@dataclass(frozen=True)
class SchemeFacts:
    """Packed weights of one scheme."""

    scheme: str  # such as "nf4, blocks of 64"
    weights: int
    parameters: int  # the values that they stand for
    packed_bytes: int  # of packed values
    scale_bytes: int  # of scales, zero points, indices and the like
    bits: float  # of both, for each parameter


@dataclass(frozen=True)
class PackingFacts:
    """How a quantised checkpoint is stored, and whether an adapter can be merged into it."""

    family: str  # such as "bitsandbytes"
    schemes: tuple[SchemeFacts, ...]
    parameters: int | None  # of all packed weights; None for all that follow where they cannot be decoded
    packed_bytes: int | None
    scale_bytes: int | None
    plain_bytes: int | None  # of all other tensors
    bits: float | None  # of packed values and scales together, for each parameter
    plain: tuple[str, ...]  # matrices that are not quantised, with their numbers as ranges
    mergeable: bool
    reason: str  # what a merge does to it, or why there can be none

    def rows(self) -> Iterable[tuple[str, object]]:
        """Name and value of each line."""
        yield "quantised", self.family
        for each in self.schemes:
            yield "scheme", f"{each.scheme} ×{each.weights}, {each.bits:.3f} bits a weight"
        if self.packed_bytes is not None and self.scale_bytes is not None and self.plain_bytes is not None:
            sizes = (self.packed_bytes, self.scale_bytes, self.plain_bytes)
            told = zip(map(size, sizes), ("packed values", "scales and the like", "not quantised"), strict=True)
            yield "bytes", ", ".join(f"{each} {what}" for each, what in told)
        if self.plain:
            yield "not quantised", ", ".join(shortened(self.plain, 8))
        yield "merge into", f"{'yes' if self.mergeable else 'no'}: {self.reason}"


@dataclass(frozen=True, repr=False)
class CheckpointFacts(Result):
    """A checkpoint as its headers and config describe it."""

    kind: Literal["checkpoint"]
    path: str
    architecture: str
    made_by: str  # where loratool made it: how, of what
    quantisation: str  # what its config says; empty for none
    tensors: int  # on disk
    parameters: int  # packed weights are counted as the values that they stand for
    bytes: int  # of tensor data
    dtypes: Mapping[str, int]
    weights: tuple[WeightFacts, ...]
    files: Mapping[str, int]  # weight file → bytes
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[Note, ...]
    packing: PackingFacts | None = None  # where it is quantised
    components: tuple[ComponentFacts, ...] = ()  # of an image or video model
    listing: tuple[TensorFacts, ...] | None = None
    findings: tuple[Finding, ...] | None = None
    history: Ancestor | None = None  # where loratool made it
    models: tuple[str, ...] = ()  # image and video models that its names and shapes fit, such as "SDXL"

    def __str__(self) -> str:
        """What is in a checkpoint, for people."""
        rows: list[tuple[str, object]] = [
            ("checkpoint", self.path),
            ("architecture", self.architecture or "not named"),
            *row_if(self.models, "model", one_of(self.models)),
            *row_if(self.made_by and not self.history, "made by", self.made_by),
            *(self.packing.rows() if self.packing else ()),
            ("tensors", f"{self.tensors:,}"),
            ("parameters", f"{self.parameters:,}"),
            ("size", size(self.bytes)),
            ("dtypes", counted(self.dtypes)),
            *(("component", component_line(part)) for part in self.components),
            *(("weight", line) for line in shortened([weight_line(weight) for weight in self.weights])),
            *(("file", line) for line in shortened([f"{name}: {size(nbytes)}" for name, nbytes in self.files.items()])),
            *(("left out", name) for name in self.left_out),
            *(("note", note) for note in self.notes if self.findings is None),
        ]
        parts = [
            aligned(rows, COLUMNS),
            *([str(self.history)] if self.history else []),
            *([tensors_text(self.listing)] if self.listing is not None else []),
            *([findings_text(self.findings)] if self.findings is not None else []),
        ]
        return "\n\n".join(parts)


def component_line(part: ComponentFacts) -> str:
    """A component, for people."""
    named = f" ({part.architecture})" if part.architecture else ""
    return f"{part.name}{named}: {plural(part.parameters, 'parameter')} in {plural(part.tensors, 'tensor')}, {counted(part.dtypes)}"


@dataclass(frozen=True, repr=False)
class UnreadableFacts(Result):
    """A path of which not even the headers can be told; only a check gives it, all else raises."""

    kind: Literal["unreadable"]
    path: str
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        """What keeps a path from being read, for people."""
        return f"{aligned([('path', self.path)], COLUMNS)}\n\n{findings_text(self.findings)}"


OneFacts = AdapterFacts | CheckpointFacts | UnreadableFacts  # of one path


def low_rank_rows(facts: AdapterFacts) -> Iterable[tuple[str, object]]:
    if facts.ranks:
        yield "rank", spread(facts.ranks)
        yield "alpha", spread(facts.alphas)
        yield "scaling", spread(facts.scalings) + (" (rsLoRA: alpha/√r)" if facts.rslora else "")
    for name, pattern in (("rank_pattern", facts.rank_pattern), ("alpha_pattern", facts.alpha_pattern)):
        if pattern:
            yield name, ", ".join(shortened([f"{key}: {value:g}" for key, value in pattern.items()], 8))
    for target in facts.targets:
        yield "target", weight_line(target)
    others = [m.kind for m in facts.modules if m.rank is None and m.kind != "saved whole"]
    for kind in dict.fromkeys(others):
        yield "target", f"{kind} ×{others.count(kind)}"


def weight_line(weight: WeightFacts) -> str:
    return f"{weight.name}: {'×'.join(map(str, weight.shape)) or 'scalar'} ×{weight.count}"


def base_text(base: BaseFacts, modules: Sequence[ModuleFacts]) -> Iterable[str]:
    """Parameters as PEFT prints them, and where each kind of module lands."""
    about = f"{base.path}: {base.architecture or 'not named'}, {base.parameters:,} parameters, from its {base.source}"
    rows = [("against", about), *(("does not fit", problem) for problem in base.problems)]
    yield f"{aligned(rows, COLUMNS)}\n{fill(base.line, room=ENDLESS)}"
    if matched := [(module.target, place) for module in modules for place in module.places or ()]:
        yield "\n".join(["matching weights:", *matching_lines(matched)])


def matching_lines(matched: Sequence[tuple[str, PlaceFacts]]) -> list[str]:
    """Target → tensor; those that differ in numbers alone share a line."""
    pairs = ((numberless(target), place.tensor) for target, place in matched)
    found = by_key(((template_of(target)[0], template_of(tensor)[0]), (target, tensor)) for target, tensor in pairs)
    lines = []
    for members in found.values():
        targets, tensors = (grouped(dict.fromkeys(m[side] for m in members)) for side in (0, 1))
        same = targets == tensors
        text = (
            " + ".join(tensors) + f" ×{len(members)}"
            if same
            else f"{' + '.join(targets)} → {' + '.join(tensors)} ×{len(members)}"
        )
        lines.append(fill(text, "  ", "    "))
    template_of.cache_clear()
    return shortened(lines)


def numberless(target: str) -> str:
    """A target as it is; one without dots with # for its numbers, as nothing tells which of them count layers."""
    return target if "." in target.removesuffix(".weight") else UNDERSCORED.sub("#", target)


def metadata_text(metadata: Mapping[str, str]) -> str:
    """What the header holds besides tensors, a line for each entry."""
    return aligned(metadata.items(), COLUMNS) if metadata else "no metadata in the header"


def tensors_text(tensors: Sequence[TensorFacts]) -> str:
    """Every tensor: dtype, shape, bytes, name."""
    header = ["dtype", "shape", "bytes", "tensor"]
    rows = [[t.dtype, "×".join(map(str, t.shape)) or "scalar", f"{t.bytes:,}", t.name] for t in tensors]
    return table(header, rows, room=COLUMNS)


def nearest_text(near: Sequence[Neighbour]) -> str:
    """Adapters of an index by their distances."""
    from loratool.results.sketch import neighbours_text

    return f"nearest in the index\n{neighbours_text(near)}"
