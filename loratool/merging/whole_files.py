"""Weight files of the records of their parts: digests of what passed through here, versions of what a store copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loratool.files.digests import CopiedRange, Digest, Listed, Reference, Tree, digest_of_part
from loratool.files.journal import FinishedShard
from loratool.files.known_digests import KnownDigests
from loratool.files.part_records import FilePart, PartRecord
from loratool.files.seen import together
from loratool.files.stand_ins import stand_in
from loratool.grouping import by_key
from loratool.merging.output_layout import ShardPlan
from loratool.merging.plan import Plan
from loratool.merging.tasks import known_of
from loratool.stores.objects import StoredObject
from loratool.stores.upload_part import UploadPart


def whole_file(
    plan: Plan, shard: ShardPlan, parts: Sequence[tuple[FilePart, PartRecord]], known: KnownDigests | None
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
        name, reference = shard.own_name(span), known_of(known, span)
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
    return FinishedShard(shard.name, whole, together(record.seen for _, record in parts))


def version_of(plan: Plan, tensor: Any) -> Reference:
    """Where the bytes of a tensor are from that is copied inside the store."""
    there = stand_in(tensor.file.path)
    assert isinstance(there, StoredObject)
    start = tensor.file.position(tensor.info)
    return Reference(name_in(plan, tensor.file.path), "", start, start + tensor.info.nbytes, there.tag)


def name_in(plan: Plan, path: Path) -> str:
    """The name of a file in the base."""
    home = plan.base.root if plan.base.root.is_dir() else plan.base.root.parent
    return path.relative_to(home).as_posix()


def copies_in(plan: Plan, part: FilePart, record: PartRecord) -> Iterator[CopiedRange]:
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
