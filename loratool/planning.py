"""Decide a whole merge from headers alone: every edit, every error, the place of every output byte.

A plan is plain data, and making one writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from loratool import __version__
from loratool.adapter import StoredTensor, same_bytes, stored_tensors
from loratool.binding import bind, tell
from loratool.checkpoint import INDEX_SUFFIX, NUMBERED, PROVENANCE, SINGLE, Checkpoint, index_text
from loratool.companions import OutputFile, companions
from loratool.errors import FitError, InputError, UsageError, printable
from loratool.layouts.architectures import GENERATIVE, INPUT_EMBEDDINGS, OUTPUT_HEADS
from loratool.safefile import FLOAT_NAMES, Layout, SafeFile, TensorInfo
from loratool.updates import Replace, ReplaceRows, Update

if TYPE_CHECKING:
    from loratool.adapter import Adapter
    from loratool.binding import Bound

DTYPES = ("keep", "float32", "bfloat16", "float16")
MOST_NAMED = 8  # places of one kind that a problem names before it counts the rest


@dataclass(frozen=True)
class Edit:
    """One update, or some rows of one, on rows `first_row` … `first_row + rows` of one weight."""

    weight: str
    first_row: int
    rows: int
    update: Update
    strength: float
    adapter: int  # which of the merge's adapters
    target: str  # what that adapter calls the weight
    rule: str  # how its tensor was found
    update_row: int = 0  # the update's row that goes to `first_row`
    columns: slice = field(default_factory=lambda: slice(None))  # those of the weight that the update's columns go to
    fold: int = 1  # leading dimensions of the weight that make up its rows

    shared: bool = False  # other edits take other rows of the same update


@dataclass(frozen=True)
class Span:
    """One tensor's way from a base file to its place in an output file."""

    source: SafeFile
    info: TensorInfo  # in the source
    placed: TensorInfo  # in the output
    edits: tuple[Edit, ...] = ()

    @property
    def untouched(self) -> bool:
        return not self.edits and self.info.dtype == self.placed.dtype

    @cached_property
    def rows(self) -> int:
        """Of the matrix that the edits see; a row's elements are next to each other in the file."""
        fold = max((edit.fold for edit in self.edits), default=1)
        return math.prod(self.info.shape[:fold]) if fold > 1 else self.info.rows

    @cached_property
    def width(self) -> int:
        return self.info.elements // max(self.rows, 1)


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its head, and its spans in the order of their bytes."""

    name: str
    layout: Layout
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class MergePlan:
    """All that a merge will do."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    dtype: str
    shards: tuple[ShardPlan, ...]
    side_files: tuple[OutputFile, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    naming: tuple[object, ...] = ()  # what the caller said about names and orientation

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        return tuple(span for shard in self.shards for span in shard.spans)

    @cached_property
    def edited(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.edits)

    @property
    def copied(self) -> int:
        """Tensors that are carried over byte for byte."""
        return sum(span.untouched for span in self.spans)

    @property
    def bytes_read(self) -> int:
        return sum(span.info.nbytes for span in self.spans) + sum(a.file.layout.size for a in self.adapters)

    @cached_property
    def bytes_written(self) -> int:
        return sum(shard.layout.size for shard in self.shards) + sum(file.size for file in self.side_files)

    def fingerprint(self, digests: Sequence[Mapping[str, str]], device: str) -> str:
        """SHA-256 of everything the output depends on; `digests` are those of the adapters' files."""
        facts = {
            "loratool": __version__,
            "base": [(str(s.path.resolve()), s.identity.size, s.identity.modified) for s in self.base.shards],
            "adapters": list(digests),
            "weights": self.weights,
            "naming": self.naming,
            "device": device,
            "shards": [(s.name, hashlib.sha256(s.layout.header).hexdigest()) for s in self.shards],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode(errors="surrogateescape")).hexdigest()


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "keep",
    shard_size: int | None = None,
    maps: Sequence[str] = (),
    fan_in_fan_out: bool | None = None,
) -> MergePlan:
    """Plan `base` + Σ weight · adapter.

    Args:
        base: the model to merge into.
        adapters: one or more adapters trained on it.
        weights: a strength for each adapter, 1 by default; negative ones take an adapter out again.
        dtype: "keep", or the dtype that every float tensor of the output gets.
        shard_size: bytes of tensor data per output file; by default the base's own shards.
        maps: `REGEX=TEMPLATE` each, other names for the weights of adapters.
        fan_in_fan_out: whether square weights that nothing else decides are stored (in, out).

    Raises:
        UsageError: the arguments contradict each other.
        InputError: an adapter uses a feature, or the base a dtype, that is not supported.
        FitError: an adapter tensor has no place in the base, or two claim one place.
    """
    strengths = check_arguments(adapters, weights, dtype, shard_size)
    check_supported(adapters)
    notes = [*base.notes, *(f"{a.name}: {note}" for a in adapters for note in a.notes)]
    bounds = [bind(adapter, base, maps=maps, fan_in_fan_out=fan_in_fan_out) for adapter in adapters]
    edits = find_edits(base, adapters, strengths, bounds, notes)
    shards = place(base, edits, dtype, shard_size)
    files, left_out = companions(base, adapters, dtype, notes)
    if (index := plan_index(base, shards)) is not None:
        files[index.name] = index
    side_files = tuple(files[name] for name in sorted(files))
    check_names([PROVENANCE, *(s.name for s in shards), *files])
    naming = (*maps, fan_in_fan_out)
    return MergePlan(base, tuple(adapters), strengths, dtype, shards, side_files, tuple(left_out), tuple(notes), naming)


def check_arguments(
    adapters: Sequence[Adapter], weights: Sequence[float] | None, dtype: str, shard_size: int | None
) -> tuple[float, ...]:
    if not adapters:
        raise UsageError("a merge needs at least one adapter")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {printable(repr(dtype))} is none of {', '.join(DTYPES)}")
    if shard_size is not None and shard_size <= 0:
        raise UsageError(f"a shard size of {shard_size} bytes is too small")
    strengths = tuple(float(w) for w in weights) if weights else (1.0,) * len(adapters)
    if len(strengths) != len(adapters):
        raise UsageError(f"{len(strengths)} weights for {len(adapters)} adapters; give each adapter one, in order")
    if not all(math.isfinite(w) for w in strengths):
        raise UsageError("a weight must be a finite number")
    return strengths


def check_supported(adapters: Sequence[Adapter]) -> None:
    """Everything recognised and not merged, of all adapters at once; then everything unrecognised."""
    if missing := [f"{a.name}: {feature}" for a in adapters for feature in a.unsupported]:
        raise InputError("this version of loratool does not merge:", missing)
    if unused := [f"{a.name}: {printable(tensor)}" for a in adapters for tensor in a.unused]:
        raise FitError("no rule gives these adapter tensors a place, so nothing is merged:", unused)


def find_edits(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], bounds: Sequence[Bound], notes: list[str]
) -> dict[str, tuple[Edit, ...]]:
    """Tensor of the base → its edits, replacements first. All misfits are told in one `FitError`."""
    edits: dict[str, list[Edit]] = {}
    problems: list[str] = []
    unsupported: list[str] = []
    for number, (adapter, weight, bound) in enumerate(zip(adapters, weights, bounds, strict=True)):
        notes += [f"{adapter.name}: {note}" for note in bound.notes]
        problems += [f"{adapter.name}: {line}" for line in tell(bound.problems)]
        for target, places in bound.places.items():
            where = f"{adapter.name}: {printable(target)}"
            for place in places:
                tensor, info = place.tensor, base.tensors[place.tensor]
                if info.dtype not in FLOAT_NAMES:
                    unsupported.append(
                        f"{where}: {printable(tensor)} is stored as {info.dtype}; only {', '.join(FLOAT_NAMES)} "
                        "weights can be edited, so give the model before its quantisation as BASE"
                    )
                elif tied := why_tied(target, base):
                    problems.append(f"{where}: {tied}")
                elif isinstance(place.update, (Replace, ReplaceRows)) and weight < 0:
                    problems.append(
                        f"{where}: replaces the weight outright, which a weight of {weight:g} cannot take back"
                    )
                else:
                    edit = Edit(
                        weight=tensor,
                        first_row=place.first_row,
                        rows=place.rows,
                        update=place.update,
                        strength=weight,
                        adapter=number,
                        target=target,
                        rule=place.rule,
                        update_row=place.update_row,
                        columns=place.columns,
                        fold=place.fold,
                        shared=len(places) > 1,
                    )
                    if target in adapter.bases and not has_base(adapter, target, base, tensor):
                        own = adapter.bases[target]
                        if own.shape != info.shape:
                            problems.append(
                                f"{where} was trained on top of a weight of its own: it is {list(own.shape)}, "
                                f"{printable(tensor)} is {list(info.shape)}"
                            )
                        edits.setdefault(tensor, []).append(replace(edit, update=own))
                    edits.setdefault(tensor, []).append(edit)
        if weight not in (0.0, 1.0) and any(isinstance(u, Replace) for u in adapter.updates.values()):
            notes.append(f"{adapter.name}: saved modules replace the base's whole, whatever the weight ({weight:g})")
    problems += rivals(edits, adapters)
    if unsupported:
        raise InputError("the base stores weights in a form that cannot be edited:", unsupported)
    if problems:
        owners = ", ".join(dict.fromkeys(a.name for a in adapters))
        raise FitError(f"{owners} does not fit the base {base.name}:", problems)
    live = {tensor: [edit for edit in found if edit.strength] for tensor, found in edits.items()}
    return {tensor: tuple(sorted(found, key=replaces_first)) for tensor, found in live.items() if found}


def has_base(adapter: Adapter, target: str, base: Checkpoint, tensor: str) -> bool:
    """Whether the weight that the adapter saved under its update is the one that the base has anyway.

    The one place where a plan reads values: PEFT saves the embedding of every adapter that targets it.
    """
    home = next(shard for shard in base.shards if tensor in shard.tensors)
    (saved,) = stored_tensors(adapter.bases[target])
    return same_bytes(saved, StoredTensor(home, home.tensors[tensor]))


def rivals(edits: Mapping[str, Sequence[Edit]], adapters: Sequence[Adapter]) -> list[str]:
    """The tensors that more than one adapter replaces."""
    problems = []
    for tensor, found in edits.items():
        owners = [adapters[e.adapter].name for e in found if isinstance(e.update, Replace) and e.strength]
        if len(owners) > 1:
            problems.append(
                f"{printable(tensor)}: replaced by several adapters ({', '.join(owners)}); only one can win"
            )
    return problems


def replaces_first(edit: Edit) -> bool:
    return not isinstance(edit.update, Replace)


def why_tied(target: str, base: Checkpoint) -> str:
    """Empty where editing `target` edits nothing else; else the reason it cannot be done.

    Where the head shares the input embedding's tensor, the adapter changed one of the two only.
    """
    module = target.rpartition(".")[0].rpartition(".")[2]
    generative = any(part in name for name in base.architectures for part in GENERATIVE)
    if module in INPUT_EMBEDDINGS | OUTPUT_HEADS and generative and base.config.get("tie_word_embeddings", True):
        return "the base ties its head to this embedding, and editing one of the two is not supported yet"
    return ""


@dataclass(frozen=True)
class Source:
    """Where the bytes of an output tensor come from before any edit: a tensor of the base, or of an adapter."""

    file: SafeFile
    info: TensorInfo
    name: str  # in the output
    dtype: str  # in the output, where no dtype is asked for


def place(
    base: Checkpoint,
    edits: Mapping[str, tuple[Edit, ...]],
    dtype: str,
    shard_size: int | None,
    moved: Mapping[str, Source] = MappingProxyType({}),
    added: Sequence[Source] = (),
) -> tuple[ShardPlan, ...]:
    """Every tensor's place in the output.

    `moved` gives tensors of the base another source, with another shape perhaps; `added` are tensors that the base
    has not, which go to the end of its last file.
    """
    wanted = {name: key for key, name in FLOAT_NAMES.items()}.get(dtype)
    files: list[tuple[str, list[Source]]] = []
    for shard in base.shards:
        entries = [moved.get(t.name) or Source(shard, t, t.name, t.dtype) for t in in_file_order(shard.layout)]
        files.append((shard_name(base, shard), entries))
    files[-1][1].extend(added)
    if shard_size is not None:
        every = [entry for _, entries in files for entry in entries]
        files = repack(every, wanted, shard_size, stem_of(files[0][0]))
    plans: list[ShardPlan] = []
    for name, entries in files:
        head = [(e.name, new_dtype(e.dtype, wanted), e.info.shape) for e in entries]
        own = base.shards[len(plans)].layout if shard_size is None else None
        if own is not None and head == [(t.name, t.dtype, t.shape) for t in in_file_order(own)]:
            layout = own
        else:
            layout = Layout.of(head, next((entry.file.layout.metadata for entry in entries), None))
        spans = tuple(Span(e.file, e.info, layout.tensors[e.name], edits.get(e.name, ())) for e in entries)
        plans.append(ShardPlan(name, layout, spans))
    return tuple(plans)


def in_file_order(layout: Layout) -> list[TensorInfo]:
    return sorted(layout.tensors.values(), key=lambda t: (t.start, t.stop))


def shard_name(base: Checkpoint, shard: SafeFile) -> str:
    return shard.path.relative_to(base.root).as_posix() if base.root.is_dir() else shard.path.name


def new_dtype(dtype: str, wanted: str | None) -> str:
    return wanted if wanted and dtype in FLOAT_NAMES else dtype


def repack(entries: Sequence[Source], wanted: str | None, limit: int, stem: str) -> list[tuple[str, list[Source]]]:
    """Fill files up to `limit` bytes in the given order; a larger tensor gets a file of its own."""
    groups: list[list[Source]] = [[]]
    filled = 0
    for entry in entries:
        (placed,) = Layout.of([(entry.name, new_dtype(entry.dtype, wanted), entry.info.shape)]).tensors.values()
        if groups[-1] and filled + placed.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += placed.nbytes
    if len(groups) == 1:
        return [(f"{stem}.safetensors", groups[0])]
    return [(f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)]


def stem_of(name: str) -> str:
    match = NUMBERED.match(name)
    return match["stem"] if match else name.removesuffix(".safetensors")


def plan_index(base: Checkpoint, shards: Sequence[ShardPlan]) -> OutputFile | None:
    """The output's index: the base's bytes where they still hold, a new one, or None for a single file."""
    weight_map = {span.placed.name: shard.name for shard in shards for span in shard.spans}
    total = sum(span.placed.nbytes for shard in shards for span in shard.spans)
    if base.index is None and len(shards) == 1:
        return None
    if base.index is not None:
        same_files = weight_map == {t: shard_name(base, s) for s in base.shards for t in s.tensors}
        if same_files and (base.index_metadata or {}).get("total_size") == total:
            return OutputFile(base.index.name, base.index)
        if len(shards) == 1 and shards[0].name == SINGLE:
            return None
        name = base.index.name if same_files else f"{stem_of(shards[0].name)}{INDEX_SUFFIX}"
        return OutputFile(name, content=index_text(weight_map, total, base.index_metadata))
    if unwritable := {s.name for s in shards if not s.name.isprintable() and not is_utf8(s.name)}:
        raise InputError("an index cannot hold file names that are no UTF-8:", map(printable, sorted(unwritable)))
    return OutputFile(f"{stem_of(shards[0].name)}{INDEX_SUFFIX}", content=index_text(weight_map, total, None))


def is_utf8(name: str) -> bool:
    return name == name.encode(errors="replace").decode()


def check_names(names: Iterable[str]) -> None:
    """Names that some file systems take for one and the same must not meet in the output."""
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(printable(name))
    if clashing := [" and ".join(alike) for alike in folded.values() if len(alike) > 1]:
        raise InputError("files of the output differ by upper and lower case or Unicode form only:", clashing)
