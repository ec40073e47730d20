"""Weight files of the records of their parts: digests of what passed through here, versions of what a store copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.files.digests import CopiedRange, Digest, Listed, Reference, Tree, digest_of_part
from loratool.files.journal import FinishedShard, Seen
from loratool.files.known_digests import KnownDigests
from loratool.files.part_records import FilePart, PartRecord
from loratool.files.stand_ins import stand_in
from loratool.grouping import by_key
from loratool.merging.tasks import known_of
from loratool.merging.totals import summed
from loratool.stores.objects import StoredObject
from loratool.stores.upload_part import UploadPart

if TYPE_CHECKING:
    from loratool.merging.output_layout import ShardPlan
    from loratool.merging.plan import MergePlan


def whole_file(
    plan: MergePlan, shard: ShardPlan, parts: Sequence[tuple[FilePart, PartRecord]], known: KnownDigests | None
) -> FinishedShard:
    """A weight file, from the records of all of its parts.

    A tensor that did not pass through here whole is listed by where its bytes are from, unless its digests are known. In
    a folder, so is one of a file in the Hub's cache, as in a merge by one process; in a store, by its own digests.
    """
    local = not any(isinstance(part, UploadPart) for part, _ in parts)
    listed = by_key(
        (tensor, digest)
        for part, record in parts
        for (tensor, _, _), digest in zip(part.chunks, record.chunk_digests(), strict=True)
    )
    every: dict[str, Listed] = {}
    for span in shard.spans:
        name, reference = span.placed.name[len(shard.prefix) :], known_of(known, span)
        if isinstance(reference, Reference) and local:
            every[name] = reference
        elif name in listed:
            every[name] = tuple(listed[name])
        elif not span.placed.nbytes:
            every[name] = (digest_of_part(b""),)
        else:
            every[name] = reference or version_of(plan, span.carried)
    copies = tuple(copy for part, record in parts for copy in copies_in(plan, part, record))
    whole = Digest(shard.layout.size, tree=Tree.of(shard.layout, every), copies=copies)
    return FinishedShard(name=shard.name, digest=whole, **vars(together([record.seen for _, record in parts])))


def together(seen: Sequence[Seen]) -> Seen:
    """What was seen of all parts of a file."""
    nonfinite: dict[str, int] = {}
    for each in seen:
        for name, count in each.nonfinite.items():
            nonfinite[name] = nonfinite.get(name, 0) + count
    return Seen(
        changed=any(each.changed for each in seen),
        device=max((each.device for each in seen), default=""),  # "cuda" where any was
        norms=summed(each.norms for each in seen),
        kept=summed(each.kept for each in seen),
        lost={name: pair for each in seen for name, pair in each.lost.items()},
        nonfinite=nonfinite,
        effective=sorted({effect for each in seen for effect in each.effective}),
    )


def version_of(plan: MergePlan, tensor: Any) -> Reference:
    """Where the bytes of a tensor are from that is copied inside the store."""
    there = stand_in(tensor.file.path)
    assert isinstance(there, StoredObject)
    start = tensor.file.position(tensor.info)
    return Reference(name_in(plan, tensor.file.path), "", start, start + tensor.info.nbytes, there.tag)


def name_in(plan: MergePlan, path: Path) -> str:
    """The name of a file in the base."""
    home = plan.base.root if plan.base.root.is_dir() else plan.base.root.parent
    return path.relative_to(home).as_posix()


def copies_in(plan: MergePlan, part: FilePart, record: PartRecord) -> Iterator[CopiedRange]:
    """The ranges of a file that a store copied for a part, each with the checksum that the store told."""
    if not isinstance(part, UploadPart) or part.source is None:
        return
    files = {there: shard.path for shard in plan.base.shards if isinstance(there := stand_in(shard.path), StoredObject)}
    name = name_in(plan, files[part.source])
    told = record.details.get("copies")
    md5s = {each[0]: str(each[2]) for each in told} if isinstance(told, list) else {}
    for piece in part.pieces:
        start = part.source_start + piece.start - part.start
        reference = Reference(name, "", start, start + piece.size, part.source.tag)
        yield CopiedRange(piece.start, piece.stop, reference, md5s.get(piece.start, ""))
