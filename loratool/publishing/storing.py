"""Outputs that are built in a local stage and then put into a store, with the record last as their commit.

Of a merge only small files are built here; adapters are small, and the commands that write them know folders.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loratool.errors import InputError, StoreError, UsageError
from loratool.files.checkpoint import PROVENANCE
from loratool.files.digests import sha256_of
from loratool.merging.in_parts import abort
from loratool.merging.one_file import is_file
from loratool.merging.parted_merge import apart_from_inputs
from loratool.stores import uploads
from loratool.stores.begun import FOLDER, Begun, read_begun, replaceable_in
from loratool.stores.bucket import Bucket, each_of, home_of
from loratool.stores.names import StorePath, parse_store
from loratool.stores.objects import listed

if TYPE_CHECKING:
    from loratool.results.base import Result

Report = TypeVar("Report", bound="Result")
LOCAL = "local"  # in place of how files are cut: they are made anew each time
PIECE = 16 << 20  # bytes of a part of an upload; a smaller file is sent whole
SENDING = threading.Semaphore(4)  # such parts at a time: each is in memory


def made_in_store(make: Callable[..., Report], operands: Sequence[Any], options: Any, progress: Any) -> Report:
    """The report of `make(*operands, options, progress)`, whose output, the last operand, goes into a store.

    Raises:
        UsageError: what is below the prefix may not be replaced, or is an input.
        StoreError: the store refuses, or is out of reach.
    """
    *inputs, out = operands
    place = parse_store(out)
    assert place is not None
    if not place.key or is_file(Path(place.name)):
        raise UsageError(f"{place}: OUT in a store must be a prefix in a bucket, such as s3://bucket/adapters/name")
    apart_from_inputs(
        place, [each for given in inputs for each in (given if isinstance(given, (list, tuple)) else [given])]
    )
    replaces = settled(place, getattr(options, "overwrite", False))
    with tempfile.TemporaryDirectory(prefix="loratool-") as home:
        folder = Path(os.path.realpath(home), place.name)
        report = make(*inputs, folder, options, progress)
        if folder.is_dir():  # nothing was written by a dry run
            upload(folder, place, replaces)
    return dataclasses.replace(report, out=Path(str(place)))  # type: ignore[call-arg]


def settled(place: StorePath, overwrite: bool) -> tuple[str, ...]:
    """The names of what is to be replaced below a prefix; raises `UsageError` where it may not be."""
    if (begun := read_begun(home_of(place))) is not None:
        if begun.parts != LOCAL:
            raise UsageError(
                f"{place}: contains an unfinished merge; finish it, or remove it with `loratool merge --abort`"
            )
        return begun.replaces
    there = {name: each.size for name, each in listed(place).items() if not name.startswith(f"{FOLDER}/")}
    return replaceable_in(place, there, place / PROVENANCE, overwrite)


def upload(folder: Path, place: StorePath, replaces: tuple[str, ...]) -> None:
    """Put a folder below a prefix: weights first, then other files, its record last."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if PROVENANCE not in files:
        raise InputError(
            f"{place}: this output has no {PROVENANCE}, so it cannot be put into a store; name a local OUT"
        )
    content = hashlib.sha256(
        "".join(f"{name} {sha256_of(path)}\n" for name, path in files.items()).encode()
    ).hexdigest()
    large = tuple(name for name, path in files.items() if path.stat().st_size > PIECE)
    begun = Begun(content, LOCAL, large, tuple(name for name in files if name not in large), replaces)
    bucket = Bucket(place, begun, {}, {})
    if (earlier := read_begun(home_of(place))) is not None and earlier.plan != content:
        abort(str(place))
    if not bucket.begin() and ((earlier := read_begun(home_of(place))) is None or earlier.plan != content):
        raise UsageError(f"{place}: another run is writing this output; wait for it to end")
    bucket.begin_naming(large)
    for name in large:
        send_large(files[name], place / name)
    bucket.put_files(folder, files.keys() - {*large})
    bucket.clear()


def send_large(path: Path, place: StorePath) -> None:
    """Put a file that is sent in parts; what was sent of it goes where that fails."""
    size = path.stat().st_size
    piece = PIECE * -(-size // (PIECE * 9_000))
    id_ = uploads.begin(place)
    try:
        tags = each_of(partial(send_piece, path, place, id_, piece), range(0, size, piece))
        uploads.complete(place, id_, tags, size)
    except BaseException:
        uploads.abort(place, id_)
        raise


def send_piece(path: Path, place: StorePath, upload_id: str, piece: int, start: int) -> str:
    with SENDING, open(path, "rb") as stream:
        content = mmap.mmap(-1, min(piece, path.stat().st_size - start))
        stream.seek(start)
        if stream.readinto(content) < len(content):
            raise StoreError(f"{place}: the file was cut while it was being sent; run the command again")
        return uploads.send(place, upload_id, start // piece + 1, content)
