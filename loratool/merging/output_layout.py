"""Where every byte of the output lies: which tensor goes into which file, at which place, from which source."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from loratool.adapters.adapter import StoredTensor
from loratool.algebra.updates.replacing import Replace
from loratool.bases.decoded import Decoded, weights_by_shard
from loratool.bases.edits import Edit
from loratool.bases.side_files import ConfigEdit, OutputFile
from loratool.bases.weights import Plain, StoredWeight
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint, index_text
from loratool.files.folders import INDEX_SUFFIX, SINGLE
from loratool.files.pipelines import Member, identities, itself
from loratool.files.safefile import FLOAT_NAMES, Layout, SafeFile, TensorInfo
from loratool.grouping import by_key
from loratool.layouts.ggml import TYPES

NUMBER = re.compile(r"-\d+-of-\d+(?=$|\.)")  # in the name of a shard, before what tells a variant in old ones


@dataclass(frozen=True)
class Span:
    """One tensor's way from a file of the base, or of an adapter, to its place in an output file."""

    weight: StoredWeight
    placed: TensorInfo  # in the output
    edits: tuple[Edit, ...] = ()
    packed: str = ""  # the weight that is packed anew, where this is one of its tensors
    rounding: str = "nearest"  # of what edits make of it

    @property
    def computed(self) -> str:
        """The dtype that merged values are rounded to."""
        return "F32" if self.packed else self.placed.dtype

    @property
    def untouched(self) -> bool:
        """Whether the bytes of the one tensor that it is made of go to the output as they are."""
        return not self.edits and self.carried is not None

    @cached_property
    def carried(self) -> StoredTensor | None:
        """The tensor whose bytes go to the output as they are: its own, or the one that replaces all of it.

        None where the output is computed.
        """
        if self.packed or not isinstance(self.weight, StoredTensor) or self.weight.info.dtype != self.placed.dtype:
            return None
        if not self.edits:
            return self.weight
        edit = self.edits[0]
        value: object = edit.update.value if isinstance(edit.update, Replace) else None
        if len(self.edits) > 1 or not isinstance(value, StoredTensor) or value.transposed:
            return None
        whole = edit.rows == self.rows and edit.columns == slice(None)
        same = (value.info.dtype, value.info.nbytes) == (self.placed.dtype, self.placed.nbytes)
        return value if whole and same else None

    @property
    def source(self) -> SafeFile:
        """The file that the weight lies in, with the first of its tensors."""
        return self.weight.tensors[0].file

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape

    @cached_property
    def rows(self) -> int:
        """Of the matrix that the edits see; a row's elements are next to each other in the file."""
        fold = max((edit.fold for edit in self.edits), default=1)
        return math.prod(self.shape[: max(fold, 1)])

    @cached_property
    def width(self) -> int:
        return math.prod(self.shape) // max(self.rows, 1)

    @cached_property
    def matrix(self) -> StoredWeight:
        """The weight as the edits see it."""
        return self.weight.matrix(self.width)


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its head, and its spans in the order of their bytes."""

    name: str
    layout: Layout
    spans: tuple[Span, ...]
    prefix: str = ""  # of the tensors' names in the plan, where they are those of one component; the file has none
    cut: tuple[int, int] | None = None  # the bytes of the file that are made, where it is only a part of it

    def own_name(self, span: Span) -> str:
        """The name of a tensor in the file."""
        return span.placed.name[len(self.prefix) :]

    def place(self, span: Span, at: int = 0) -> int:
        """The byte of the file that is byte `at` of a tensor."""
        return self.layout.data_start + span.placed.start + at


@dataclass(frozen=True)
class Origin:
    """Where the bytes of an output tensor come from before any edit: a tensor of the base, or of an adapter."""

    weight: StoredWeight
    name: str  # in the output
    dtype: str  # in the output, where no dtype is asked for
    stored: TensorInfo | None = None  # of a part of a packed weight, whose dtype and shape stay
    packed: str = ""  # as in a span

    @property
    def shape(self) -> tuple[int, ...]:
        """In the output."""
        return self.weight.shape if self.stored is None else self.stored.shape


@dataclass(frozen=True)
class OutputChanges:
    """In what the output's tensors and its config differ from those of the base."""

    edits: Mapping[str, tuple[Edit, ...]]  # tensor of the output → its edits, replacements first
    moved: Mapping[str, Origin]  # tensors that begin as what an adapter saved, or padded with zeros
    added: Sequence[Origin]  # tensors that the base has not, which go to the end of its last file
    config: Sequence[ConfigEdit]
    plain: Collection[str] = ()  # packed weights that are not packed any more
    anew: Collection[str] = ()  # packed weights that are packed anew
    kind: str = ""  # the type of edited matrices of a GGUF model; empty for what each is by itself
    rounding: str = "nearest"


@dataclass(frozen=True)
class FileDraft:
    """An output file before its bytes are placed."""

    name: str
    entries: Sequence[Origin]
    prefix: str = ""  # as in a `ShardPlan`
    replaced: SafeFile | None = None  # the file of the base that it takes the place of


def plan_shards(base: Checkpoint, changes: OutputChanges, dtype: str, shard_size: int | None) -> tuple[ShardPlan, ...]:
    """Every tensor's place in the output."""
    wanted = {name: key for key, name in FLOAT_NAMES.items()}.get(dtype)
    of_base = identities(base.shards)
    plans: list[ShardPlan] = []
    for draft in drafts_of(base, changes, wanted, shard_size):
        prefix, file, entries = draft.prefix, draft.replaced, draft.entries
        head = [(e.name[len(prefix) :], new_dtype(e, wanted), e.shape) for e in entries]
        files_of = [tensor.file for e in entries for tensor in e.weight.tensors]
        source = file or next((itself(each) for each in files_of if id(itself(each)) in of_base), None)
        said = source.layout.metadata if source else None
        metadata = base.metadata(said, changes.plain, prefix) if isinstance(base, Decoded) else said
        if any(e.name in changes.edits or e.name in changes.moved for e in entries):
            metadata = metadata and {key: value for key, value in metadata.items() if not is_digest(key)}
        same = file is not None and head == [(t.name, t.dtype, t.shape) for t in file.layout.in_order]
        kept = file is not None and same and metadata == said
        layout = file.layout if file is not None and kept else base.shards[0].layout.like(head, metadata)
        here = {e.packed for e in entries if not isinstance(e.weight, Plain)}
        placed = [
            replace(layout.tensors[own_name], name=e.name) for (own_name, _, _), e in zip(head, entries, strict=True)
        ]
        spans = tuple(span_of(e, at, changes, here) for e, at in zip(entries, placed, strict=True))
        plans.append(ShardPlan(draft.name, layout, spans, prefix))
    return tuple(plans)


def drafts_of(
    base: Checkpoint, changes: OutputChanges, wanted: str | None, shard_size: int | None
) -> Iterator[FileDraft]:
    """The files of the output: those of the base where the same ones have anything, else new ones, of each component."""
    files = files_of_base(base, changes)
    for prefix in dict.fromkeys(prefix_of(shard) for shard in base.shards):
        own = [file for file in files if file.prefix == prefix]
        if shard_size is not None and own:
            every = [entry for file in own for entry in file.entries]
            groups = numbered(stem_of(own[0].name), filled(every, wanted, shard_size))
            yield from (FileDraft(name, entries, prefix) for name, entries in groups)
        elif own and len(own) < sum(prefix_of(shard) == prefix for shard in base.shards):
            groups = numbered(stem_of(own[0].name), [file.entries for file in own])
            yield from (replace(file, name=name) for file, (name, _) in zip(own, groups, strict=True))
        else:
            yield from own


def prefix_of(shard: SafeFile) -> str:
    """What the names of a file's tensors have in front in a pipeline; nothing elsewhere."""
    return shard.prefix if isinstance(shard, Member) else ""


def is_digest(key: str) -> bool:
    """Whether a header's entry is a digest of the file's values, as trainers of image models write them."""
    return key == "modelspec.hash_sha256" or key.startswith("sshs_")


def span_of(entry: Origin, placed: TensorInfo, changes: OutputChanges, here: Collection[str]) -> Span:
    """A tensor of the output with its edits: those of a weight that is packed anew are with its packed values.

    Scales in another file than those, which has the weights `here`, are copied: they stay the base's own.
    """
    if entry.packed in here and entry.packed:
        own = () if isinstance(entry.weight, Plain) else changes.edits[entry.packed]
        return Span(entry.weight, placed, own, entry.packed)
    own = () if entry.stored is not None else changes.edits.get(entry.name, ())  # or it stays as it is packed
    return Span(entry.weight, placed, own, rounding=changes.rounding)


def files_of_base(base: Checkpoint, changes: OutputChanges) -> list[FileDraft]:
    """The files of the base that have any tensor of the output."""
    files: list[FileDraft] = []
    for each, weights in weights_by_shard(base, changes.plain):
        entries = [
            in_kind(changes.moved.get(name) or origin_of(base, name, weight, changes.anew), changes)
            for name, weight in weights
        ]
        # scales may have had a file to themselves; a split GGUF may begin with a file of metadata
        if entries or each is base.shards[-1] or base.is_gguf:
            files.append(FileDraft(shard_name(base, each), entries, prefix_of(each), itself(each)))
    files[-1] = replace(files[-1], entries=[*files[-1].entries, *changes.added])
    if not files[-1].entries and len(files) > 1:
        files.pop()
    return files


def shard_name(base: Checkpoint, shard: SafeFile) -> str:
    return shard.path.relative_to(base.root).as_posix() if base.root.is_dir() else shard.path.name


def origin_of(base: Checkpoint, name: str, weight: StoredWeight, anew: Collection[str]) -> Origin:
    """Where an output tensor comes from: a weight, or one of the tensors of a weight that is or stays packed."""
    if not isinstance(base, Decoded) or not isinstance(weight, Plain) or name not in base.parts:
        return Origin(weight, name, weight.dtype)
    whole, is_first = base.packed.get(name, ("", False))
    if whole not in anew:
        return Origin(weight, name, weight.dtype, weight.info)
    return Origin(base.weights[whole] if is_first else weight, name, weight.dtype, weight.info, whole)


def in_kind(entry: Origin, changes: OutputChanges) -> Origin:
    """An entry of a GGUF model in the type that was asked for, where it is a matrix that changes or becomes plain."""
    changed = entry.name in changes.edits or entry.name in changes.moved or entry.name in changes.plain
    if not changes.kind or not changed or len(entry.shape) < 2:
        return entry
    if changes.kind in FLOAT_NAMES:
        return replace(entry, dtype=changes.kind)
    from loratool.bases.codecs.gguf import packed_info, repacked

    if entry.shape[-1] % TYPES[changes.kind].values:
        return entry
    stored = packed_info(entry.name, changes.kind, entry.shape)
    return Origin(repacked(entry.weight, changes.kind), entry.name, stored.dtype, stored, entry.name)


def new_dtype(entry: Origin, wanted: str | None) -> str:
    return wanted if wanted and entry.dtype in FLOAT_NAMES and entry.stored is None else entry.dtype


def filled(entries: Sequence[Origin], wanted: str | None, limit: int) -> list[list[Origin]]:
    """The tensors of files that are filled up to `limit` bytes in the given order; a larger one is alone in its file."""
    groups: list[list[Origin]] = [[]]
    filled = 0
    for entry in entries:
        (placed,) = Layout.of([(entry.name, new_dtype(entry, wanted), entry.shape)]).tensors.values()
        if groups[-1] and filled + placed.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += placed.nbytes
    return groups


def numbered(stem: str, groups: Sequence[Sequence[Origin]]) -> list[tuple[str, Sequence[Origin]]]:
    """Files by the names that transformers and diffusers give to shards."""
    if len(groups) == 1:
        return [(f"{stem}.safetensors", groups[0])]
    return [(f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)]


def stem_of(name: str) -> str:
    """The name of a weight file without its number: `model.fp16` of a variant."""
    return NUMBER.sub("", name.removesuffix(".safetensors"))


def index_name(shard: str, variants: bool) -> str:
    """The name of the index of some shards; `variants` may be in their names, as in pipelines."""
    stem, dot, variant = stem_of(shard).rpartition(".")
    return f"{stem}.safetensors.index.{variant}.json" if variants and dot else f"{stem_of(shard)}{INDEX_SUFFIX}"


def plan_indexes(base: Checkpoint, shards: Sequence[ShardPlan]) -> list[OutputFile]:
    """The indexes of the output: one, none, or those of a pipeline's components, each of its own files."""
    if not base.components:
        index = plan_index(base, shards)
        return [index] if index else []
    found: list[OutputFile] = []
    for name, model in base.components.items():
        own = [replace(s, name=s.name[len(name) + 1 :]) for s in shards if s.prefix == f"{name}."]
        if own and (index := plan_index(model, own, component=True)) is not None:
            found.append(replace(index, name=f"{name}/{index.name}"))
    return found


def plan_index(base: Checkpoint, shards: Sequence[ShardPlan], component: bool = False) -> OutputFile | None:
    """The output's index: the base's bytes where they still hold, a new one, or None for a single file."""
    if base.is_gguf:
        return None
    weight_map = {shard.own_name(span): shard.name for shard in shards for span in shard.spans}
    total = sum(span.placed.nbytes for shard in shards for span in shard.spans)
    if base.index is None and len(shards) == 1:
        return None
    if base.index is not None:
        metadata = dict(base.index_metadata or {})
        before = {t: name for s in base.shards for name in (shard_name(base, s),) for t in s.tensors}
        if weight_map == before and metadata.get("total_size") == total:
            return OutputFile(base.index.name, base.index)
        if len(shards) == 1 and (shards[0].name == SINGLE or (component and not NUMBER.search(shards[0].name))):
            return None
        if isinstance(count := metadata.get("total_parameters"), int):
            grown = sum(span.placed.elements for shard in shards for span in shard.spans)
            metadata["total_parameters"] = (
                count + grown - sum(t.elements for s in base.shards for t in s.tensors.values())
            )
        same_files = set(weight_map.values()) == set(before.values())
        name = base.index.name if same_files else index_name(shards[0].name, component)
        return OutputFile(name, content=index_text(weight_map, total, metadata))
    odd = {shard.name for shard in shards if not shard.name.isprintable()}
    if unwritable := [name for name in sorted(odd) if name != name.encode(errors="replace").decode()]:
        raise InputError("an index cannot contain file names that are not UTF-8:", map(printable, unwritable))
    return OutputFile(index_name(shards[0].name, component), content=index_text(weight_map, total, None))


def check_names(names: Iterable[str]) -> None:
    """Names that some file systems take for one and the same must not meet in the output."""
    folded = by_key((unicodedata.normalize("NFC", name).casefold(), printable(name)) for name in names)
    if clashing := [" and ".join(alike) for alike in folded.values() if len(alike) > 1]:
        raise InputError("files of the output differ only in case or Unicode form:", clashing)
