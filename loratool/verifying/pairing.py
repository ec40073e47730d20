"""The tensors of a merged model beside those that a merge would give: names, shapes and dtypes, before any value is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loratool.bases.decoded import Decoded
from loratool.bases.packed import Requantizable
from loratool.bases.tied_weights import Ties, find_ties
from loratool.bases.trained_view import is_of_tokens
from loratool.bases.weights import StoredWeight, plain_of
from loratool.errors import FitError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES, TensorInfo
from loratool.merging.output_layout import Span
from loratool.merging.plan import Plan

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Buffers that a model makes itself when it is loaded, and that some releases save and others do not.
BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias|token_type_ids)$")


@dataclass(frozen=True)
class Pair:
    """A tensor of the merged model, and what it should be."""

    span: Span  # with the dtype that the merged model has
    theirs: StoredWeight
    rows: int  # of the span's matrix that are compared: fewer than it has where a vocabulary was resized

    @property
    def name(self) -> str:
        return self.span.placed.name

    def rounded(self, rounding: str) -> Pair:
        """The same, if sums are rounded in that way."""
        if self.span.rounding == rounding:
            return self
        return dataclasses.replace(self, span=dataclasses.replace(self.span, rounding=rounding))

    @property
    def nbytes(self) -> int:
        """That are read for it."""
        return sum(tensor.info.nbytes for weight in (self.span.weight, self.theirs) for tensor in weight.tensors)


@dataclass
class Pairing:
    """All tensors of a merged model and of the plan."""

    pairs: list[Pair] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # of the plan, and not in the merged model
    buffers: list[str] = field(default_factory=list)  # those of either side that no model needs
    unknown: list[str] = field(default_factory=list)  # of the merged model, and not of the plan
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # ours, theirs
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)  # tokens: ours, theirs
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)  # ours, theirs
    tied: list[str] = field(default_factory=list)  # missing, for they are tied to another tensor
    still_tied: dict[str, str] = field(default_factory=dict)  # of the plan, which unties it → what it is tied to
    untied: dict[str, str] = field(default_factory=dict)  # tensor that the base ties → the one that it is tied to
    quantised: dict[str, str] = field(default_factory=dict)  # plain tensor of the plan → how the merged model packs it
    unpackable: set[str] = field(default_factory=set)  # those of a format that is only read

    @property
    def edited(self) -> list[Pair]:
        """The pairs that adapters change."""
        return [each for each in self.pairs if each.span.edits]

    def add(self, name: str, span: Span, merged: Checkpoint, ties: Ties) -> None:
        """Pair a tensor that both have."""
        plain, ours = plain_of(merged, name), span.placed
        theirs, rows = plain.info, span.rows
        if theirs.shape != ours.shape:
            if theirs.shape[1:] != ours.shape[1:] or not is_of_tokens(name, ours.shape, ties):
                self.reshaped[name] = ours.shape, theirs.shape
                return
            self.resized[name] = ours.shape[0], theirs.shape[0]
            rows = min(ours.shape[0], theirs.shape[0])
        if theirs.dtype == ours.dtype:
            self.pairs.append(Pair(span, plain, rows))
            return
        self.dtypes[name] = ours.dtype, theirs.dtype
        if {theirs.dtype, ours.dtype} <= set(FLOAT_NAMES):
            self.pairs.append(Pair(in_dtype(span, theirs.dtype), plain, rows))


def pair(plan: Plan, merged: Checkpoint) -> Pairing:
    """Find what each tensor of a merged model should be.

    Raises `FitError` where it is another model's.
    """
    spans = {span.placed.name: span for span in plan.spans}
    check_same_model(plan, merged, spans)
    stored, packed = merged.stored, merged.weights if isinstance(merged, Decoded) else {}
    ties = find_ties(plan.base, plan.adapters)
    tied = {name: group.names[0] for group in ties.groups for name in group.names[1:]}
    found = Pairing()
    known = set(spans)
    for name, span in spans.items():
        if span.placed.dtype in FLOAT_NAMES and name in packed:
            weight = packed[name]
            found.quantised[name] = weight.scheme
            if not isinstance(weight, Requantizable):
                found.unpackable.add(name)
            known |= tensors_of(merged, name)
            if weight.shape == span.shape:
                found.pairs.append(Pair(in_dtype(span, "F32"), weight, span.rows))
            else:
                found.reshaped[name] = span.shape, weight.shape
        elif name in stored:
            found.add(name, span, merged, ties)
        elif not span.edits and name in tied and name not in plan.base.tensors:
            found.still_tied[name] = tied[name]
        elif not span.edits and name in tied and ties.flag is not False:
            found.tied.append(name)
        else:
            (found.buffers if BUFFERS.search(name) else found.missing).append(name)
    for name in stored:
        if name in known:
            continue
        if name in tied and tied[name] in stored:
            found.untied[name] = tied[name]
        else:
            (found.buffers if BUFFERS.search(name) else found.unknown).append(name)
    return found


def tensors_of(merged: Checkpoint, name: str) -> set[str]:
    """The tensors of a packed weight, and those that go along with it, such as the scale of a layer's inputs."""
    return {*merged.made_of[name], *merged.leftovers.get(name, ())} if isinstance(merged, Decoded) else set()


def in_dtype(span: Span, dtype: str) -> Span:
    """The same span, written in another dtype of floats."""
    placed = span.placed
    size = placed.elements * BYTES[dtype]
    return dataclasses.replace(span, placed=TensorInfo(placed.name, dtype, placed.shape, 0, size))


def check_same_model(plan: Plan, merged: Checkpoint, spans: Mapping[str, Span]) -> None:
    """Raise `FitError` where a merged model has few of the tensors that the base has."""
    shapes = {name: info.shape for name, info in merged.tensors.items()}
    if isinstance(merged, Decoded):
        shapes |= {name: info.shape for name, info in merged.stored.items() if name not in merged.weights}
    common = [name for name in spans if name in shapes]
    alike = [name for name in common if shapes[name] == spans[name].shape]
    if len(common) < len(spans) / 2 or len(alike) < len(common) / 2:
        what = (
            f"{len(common)} of {len(spans)} tensors of the base are in it"
            if len(common) < len(spans) / 2
            else f"{len(common) - len(alike)} of {len(common)} tensors have another shape than the base's"
        )
        raise FitError(
            f"{printable(merged.name)} is not a model made from {printable(plan.base.name)}: {what}; pass the base "
            "that it was made from"
        )
