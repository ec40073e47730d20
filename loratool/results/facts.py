"""What `inspect` tells of adapters and checkpoints, as text that fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.findings import Finding, findings_text
from loratool.results.text import columns, counted, fill, shortened, size, spread, wrapped
from loratool.results.values import Values, values_text
from loratool.templates import grouped, template_of


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


@dataclass(frozen=True, repr=False)
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
        return adapter_text(self)


@dataclass(frozen=True, repr=False)
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
        return checkpoint_text(self)


@dataclass(frozen=True, repr=False)
class UnreadableFacts(Result):
    """A path of which not even the headers can be told; only a check gives it, all else raises."""

    kind: Literal["unreadable"]
    path: str
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        return unreadable_text(self)


Facts = AdapterFacts | CheckpointFacts | UnreadableFacts


def adapter_text(facts: AdapterFacts) -> str:
    """What is in an adapter, for people."""
    rows: list[tuple[str, object]] = [
        ("adapter", facts.path),
        ("format", ", ".join(filter(None, [facts.format, facts.peft_type, *facts.variants]))),
        ("base", facts.base or "not named"),
        *([("task", facts.task)] if facts.task else []),
        *([("initialised", facts.initialisation)] if facts.initialisation else []),
        *low_rank_rows(facts),
        *(("saved whole", name) for name in shortened(facts.saved)),
        *([("bias", facts.bias)] if facts.bias != "none" else []),
        ("parameters", f"{facts.parameters:,}"),
        ("size", size(facts.bytes)),
        ("dtypes", counted(facts.dtypes)),
        *(("not mergeable", reason) for reason in facts.unsupported),
        *(("note", note) for note in facts.notes if facts.findings is None),  # else a finding is made of it
    ]
    parts = [wrapped(rows)]
    if facts.against:
        parts += base_text(facts.against, facts.modules)
    if facts.values:
        parts.append(values_text(facts.values))
    if facts.tensors is not None:
        parts.append(tensors_text(facts.tensors))
    if facts.findings is not None:
        parts.append(findings_text(facts.findings))
    return "\n\n".join(parts)


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


def checkpoint_text(facts: CheckpointFacts) -> str:
    """What is in a checkpoint, for people."""
    rows: list[tuple[str, object]] = [
        ("checkpoint", facts.path),
        ("architecture", facts.architecture or "not named"),
        *([("made by", facts.made_by)] if facts.made_by else []),
        *([("quantised", facts.quantisation)] if facts.quantisation else []),
        ("tensors", f"{facts.tensors:,}"),
        ("parameters", f"{facts.parameters:,}"),
        ("size", size(facts.bytes)),
        ("dtypes", counted(facts.dtypes)),
        *(("weight", line) for line in shortened([weight_line(weight) for weight in facts.weights])),
        *(("file", line) for line in shortened([f"{name}: {size(nbytes)}" for name, nbytes in facts.files.items()])),
        *(("left out", name) for name in facts.left_out),
        *(("note", note) for note in facts.notes if facts.findings is None),
    ]
    parts = [wrapped(rows)]
    if facts.listing is not None:
        parts.append(tensors_text(facts.listing))
    if facts.findings is not None:
        parts.append(findings_text(facts.findings))
    return "\n\n".join(parts)


def unreadable_text(facts: UnreadableFacts) -> str:
    """What keeps a path from being read, for people."""
    return f"{wrapped([('path', facts.path)])}\n\n{findings_text(facts.findings)}"


def base_text(base: BaseFacts, modules: Sequence[ModuleFacts]) -> list[str]:
    """Parameters as PEFT prints them, and where each kind of module lands."""
    rows: list[tuple[str, object]] = [
        (
            "against",
            f"{base.path}: {base.architecture or 'not named'}, {base.parameters:,} parameters, from its {base.source}",
        ),
    ]
    rows += [("does not fit", problem) for problem in base.problems]
    parts = [f"{wrapped(rows)}\n{base.line}"]
    landed = [(module.target, place) for module in modules for place in module.places or ()]
    if landed:
        parts.append("matching weights:\n" + "\n".join(landing_lines(landed)))
    return parts


def landing_lines(landed: Sequence[tuple[str, PlaceFacts]]) -> list[str]:
    """Target → tensor; those that differ in numbers alone share a line."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for target, place in landed:
        tensor = place.tensor
        found.setdefault((template_of(target)[0], template_of(tensor)[0]), []).append((target, tensor))
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


def tensors_text(tensors: Sequence[TensorFacts]) -> str:
    """Every tensor: dtype, shape, bytes, name."""
    header = ["dtype", "shape", "bytes", "tensor"]
    rows = [[t.dtype, "×".join(map(str, t.shape)) or "scalar", f"{t.bytes:,}", t.name] for t in tensors]
    return columns(header, rows)
