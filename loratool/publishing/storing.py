"""Outputs that are built in a local stage and then put into a store, with the record last as their commit.

An output of one file has its record in its header, and appears in one step. Of a merge only small files are built
here; adapters are small, and the commands that write them know folders.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loratool.adapters.weight_files import MODEL_CONFIG
from loratool.errors import InputError, StoreError, UsageError, shown_as
from loratool.files.digests import sha256_of
from loratool.files.folders import PROVENANCE
from loratool.files.outputs import BUSY
from loratool.files.system import shell_word
from loratool.merging.in_parts import abort
from loratool.merging.parted_merge import apart_from_inputs, checked_place, replaced_at, split
from loratool.stores import uploads
from loratool.stores.begun import Begun, read_begun
from loratool.stores.bucket import Bucket, each_of, home_of
from loratool.stores.names import StorePath

if TYPE_CHECKING:
    from loratool.arguments import PathLike
    from loratool.results.base import Result

Report = TypeVar("Report", bound="Result")
LOCAL = "local"  # in place of how files are cut: they are made anew each time
PIECE = 16 << 20  # bytes of a part of an upload; a smaller file is sent whole
SENDING = threading.Semaphore(4)  # such parts at a time: each is in memory


def made_in_store(make: Callable[..., Report], operands: Sequence[Any], options: Any, progress: Any) -> Report:
    """The report of `make(*operands, options, progress)`, whose output, the last operand, goes into a store.

    It is a prefix, or one object, where `make` can write one file.

    Raises:
        UsageError: what is there may not be replaced, or is an input.
        StoreError: the store refuses, or is out of reach.
    """
    *inputs, out = operands
    with built_here(out, inputs, getattr(options, "overwrite", False)) as (made, replaces):
        place = checked_place(out)
        report = make(*inputs, made, options, progress)
        command = getattr(make, "func", make).__name__.removeprefix("finish_")  # of a `partial`, too
        try:
            if made.is_file():
                upload_file(made, place, replaces, command)
            elif made.is_dir():  # nothing was written by a dry run
                upload(made, place, replaces, command)
        except KeyboardInterrupt as error:
            error.args = (f"{place} may be incomplete; run the same command again to finish it",)
            raise
    return dataclasses.replace(report, out=Path(str(place)))  # type: ignore[call-arg]


@contextmanager
def built_here(out: PathLike, inputs: Sequence[Any], overwrite: bool) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A path on this disk for an output in a store, by whose address messages call it; and what it replaces there.

    Raises `UsageError` and `StoreError` as `made_in_store` does.
    """
    place = checked_place(out)
    apart_from_inputs(
        place, [each for given in inputs for each in (given if isinstance(given, (list, tuple)) else [given])]
    )
    begun = begun_here(place)
    replaces = replaced_at(place, overwrite) if begun is None else begun.replaces
    if MODEL_CONFIG in replaces:
        raise UsageError(f"{place} is not an adapter, so --overwrite does not replace it with one; remove it yourself")
    with tempfile.TemporaryDirectory(prefix="loratool-") as folder:
        home = os.path.realpath(folder)
        shown_as[home] = str(split(place)[0])
        try:
            yield Path(home, place.name), replaces
        finally:
            del shown_as[home]


def begun_here(place: StorePath) -> Begun | None:
    """What a run that was killed has begun at a place. Raises `UsageError` where that is a merge."""
    begun = read_begun(home_of(*split(place)))
    if begun is not None and begun.parts != LOCAL:
        raise UsageError(
            f"{place}: contains an unfinished {begun.command}; finish it, or remove it with "
            f"`loratool merge -o {shell_word(str(place))} --abort`"
        )
    return begun


def upload_file(path: Path, place: StorePath, replaces: tuple[str, ...], command: str) -> None:
    """Put one file there that a command has made, in one step: it appears when all of it has arrived.

    An old record goes first.
    """
    large = path.stat().st_size > PIECE
    begun = Begun(sha256_of(path), LOCAL, (place.name,), (), replaces, command=command)
    bucket = Bucket(place.parent, begun, {}, {}, place.name)
    if large:
        begin(bucket)
    if PROVENANCE in replaces:
        uploads.remove(bucket.path(PROVENANCE))
    if large:
        send_large(path, place)
        bucket.clear()
    elif replaces:
        uploads.put(place, path.read_bytes())
    elif not uploads.put_new(place, path.read_bytes()):
        raise UsageError(f"{place}: was written by something else in the meantime")


def upload(folder: Path, place: StorePath, replaces: tuple[str, ...], command: str) -> None:
    """Put a folder that a command has made below a prefix: weights first, then other files, its record last."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if PROVENANCE not in files:
        raise InputError(
            f"{place}: this output has no {PROVENANCE}, so it cannot be put into a store; choose a local OUT"
        )
    content = hashlib.sha256(
        "".join(f"{name} {sha256_of(path)}\n" for name, path in files.items()).encode()
    ).hexdigest()
    large = tuple(name for name, path in files.items() if path.stat().st_size > PIECE and name != PROVENANCE)
    others = tuple(name for name in files if name not in large)
    begun = Begun(content, LOCAL, large, others, replaces, command=command)
    bucket = Bucket(place, begun, {}, {})
    begin(bucket)
    bucket.begin_naming(large)
    for name in large:
        send_large(files[name], place / name)
    bucket.put_files(folder, files.keys() - {*large})
    bucket.clear()


def begin(bucket: Bucket) -> None:
    """Say what is being written; what a run that was killed has left of another output goes."""
    if (earlier := read_begun(bucket.home)) is not None and earlier.plan != bucket.plan:
        abort(str(bucket.address))
    if bucket.begin():
        return
    if (earlier := read_begun(bucket.home)) is None or earlier.plan != bucket.plan:
        raise UsageError(f"{bucket.address}: {BUSY}")
    bucket.begun = earlier  # whose uploads go at the end


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
            raise StoreError(f"{place}: the file was truncated while it was being sent; run the command again")
        return uploads.send(place, upload_id, start // piece + 1, content)
