"""Where an output may go, and what it may replace: files of names that are given, and those that we have listed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import ANOTHER_OUT, LoratoolError, StorageError, UsageError, printable
from loratool.files.digests import Digest, read_recorded, why_unlike
from loratool.files.folders import PROVENANCE, WEIGHT_FILES, sidecar_of
from loratool.files.hub_names import slashed
from loratool.files.journal import JOURNAL, REPLACED, ForeignError, Journal, look, read_journal, walk
from loratool.files.locks import is_locked
from loratool.files.model_files import RECORD_KEY, FileNames
from loratool.files.names import check_separators, is_unusual, refused_name
from loratool.files.system import create_file, shell_line, sync_file
from loratool.files.untrusted import LARGEST_RECORD, read_json
from loratool.files.weight_formats import read_weight_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


BUSY = "another run is writing this output; wait for it to end"


def check_local(out: Path, flag: str = "") -> None:
    """Raise `UsageError` for an address in a store, as an output that is written here only; `flag` is what names it."""
    if slashed(out).startswith("s3://") and not os.path.lexists(out):
        named = f"{flag} {printable(out)}" if flag else printable(out)
        raise UsageError(
            f"{named}: this cannot be written into a store; choose a local path",
            hint=ANOTHER_OUT if flag in ("", "-o") else "",
        )


def check_target(
    out: Path, inputs: Sequence[Path], replaced: FileNames | None, config: str = "", single: bool = False
) -> Path:
    """`out` as it will be written, after every check that can be made before any work. Nothing is changed.

    Args:
        out: the output folder, or file.
        inputs: what it must keep away from.
        replaced: the files that a folder of that name may hold and be replaced; None where it may not be there.
        config: for an adapter, the file that another folder must have to be replaced by it.
        single: whether it is a file.

    Raises:
        UsageError: it exists and nothing is to be replaced, it holds what may not be replaced, or it is, holds or lies in
            an input.
        StorageError: its parent is missing or cannot be written, or the folder it is staged in holds what is not ours.
    """
    shown = printable(out)
    check_local(out)
    check_separators(out)
    if out.suffix in WEIGHT_FILES and not single:
        raise UsageError(f"{shown}: OUT must be a folder, such as {printable(out.with_suffix(''))}")
    try:
        out = Path(os.path.realpath(out))
        if not stat.S_ISDIR(out.parent.stat().st_mode):
            raise NotADirectoryError
    except FileNotFoundError:
        parents = ("mkdir", str(out.parent)) if os.altsep else ("mkdir", "-p", str(out.parent))
        raise StorageError(
            f"{shown}: the folder {printable(out.parent)} does not exist; create it first", hint=shell_line(parents)
        ) from None
    except NotADirectoryError:
        raise StorageError(
            f"{shown}: {printable(out.parent)} is not a folder; choose another OUT", hint=ANOTHER_OUT
        ) from None
    except OSError as error:
        raise StorageError(f"{shown}: cannot create it in {printable(out.parent)}: {error.strerror}") from error
    around = identities(out)
    for path in (each for given in inputs for each in (given, *links_in(given))):
        if identity(path) in around or inside(path, out) or inside(path, stage_of(out)):
            raise UsageError(
                f"{shown}: OUT is, contains or is inside the input {printable(path)}, which loratool never writes to; "
                "choose another OUT",
                hint=ANOTHER_OUT,
            )
    try:
        if single:
            check_file_place(out, shown, replaced is not None)
        else:
            check_place(out, shown, replaced, config)
    except OSError as error:
        raise (refused_name(out) if is_unusual(out.name) else StorageError(f"{shown}: {error.strerror}")) from error
    check_stage(stage_of(out))
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{shown}: the folder {printable(out.parent)} is not writable")
    return out


def links_in(folder: Path) -> list[Path]:
    """The real files that links in an input's folder lead to, which are inputs too."""
    try:
        return [Path(os.path.realpath(entry.path)) for entry in os.scandir(folder) if entry.is_symlink()]
    except OSError:
        return []  # no folder; who reads it says so


def check_place(out: Path, shown: str, replaced: FileNames | None, config: str) -> None:
    """Raise `UsageError` where what is at `out`, or was until a run was killed, may not be replaced."""
    waiting = stage_of(out) / REPLACED
    if not os.path.lexists(out):
        if waiting.is_dir() and replaced is None:
            raise UsageError(
                f"{shown}: a run was killed while replacing this output, which is now {printable(waiting)}; pass "
                "--overwrite to replace it, or rename that folder"
            )
        return
    if not out.is_dir():
        raise UsageError(f"{shown} exists and is not a folder; choose another OUT", hint=ANOTHER_OUT)
    if replaced is None:
        raise already_there(out, shown)
    names = replaceable_files(out, shown, replaced)
    if config and names and (config not in names or "config.json" in names):
        raise UsageError(f"{shown} is not an adapter, so --overwrite does not replace it with one; remove it yourself")


def check_file(path: Path, flag: str, is_ours: Callable[[Path], bool], overwrite: bool) -> None:
    """Raise `UsageError` where a file that is no model may not be written, because of what is there; `flag` names it."""
    check_separators(path, flag)
    hint = ANOTHER_OUT if flag == "-o" else ""
    if path.is_dir():
        raise UsageError(f"{flag} {printable(path)}: is a folder; expected a file", hint=hint)
    if path.exists() and not is_ours(path):
        raise UsageError(
            f"{flag} {printable(path)} already exists and was not made by loratool, so it is never replaced; choose another "
            "name",
            hint=hint,
        )
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{flag} {printable(path)} already exists; pass --overwrite to replace it", hint="--overwrite")


def check_file_place(out: Path, shown: str, replace: bool) -> None:
    """Raise `UsageError` where what is at `out` may not be replaced by a file: anything but a file that was made here."""
    there = [path for path in (out, sidecar_of(out)) if os.path.lexists(path)]
    if odd := next((path for path in there if not path.is_file()), None):
        raise UsageError(f"{printable(odd)} exists and is not a file; choose another OUT", hint=ANOTHER_OUT)
    if there and not replace:
        raise already_there(out, shown if out in there else printable(there[0]))
    if there and not (made_here(out) if out in there else record_at(there[0])):
        raise UsageError(f"{shown} was not made by loratool, so --overwrite does not replace it; remove it yourself")


def made_here(path: Path) -> bool:
    """Whether a weight file says itself that it was made here, or is still what its own record lists."""
    try:
        if RECORD_KEY in read_weight_file(path).metadata:
            return True
        listed = record_at(sidecar_of(path)).get(path.name)
        return listed is not None and not why_unlike(path, listed)
    except LoratoolError:
        return False


def replaceable_files(folder: Path, shown: str, known: FileNames) -> list[str]:
    """The files of a model or an adapter that `--overwrite` may replace, relative to its folder.

    Raises `UsageError` where it is none, or holds anything that is neither listed in the folder's own `loratool.json` nor
    `known` by its name. What only that list knows must be as it was written.
    """
    recorded = record_at(folder / PROVENANCE)
    found = dict(walk(folder))
    files = [path for path, status in found.items() if not stat.S_ISDIR(status.st_mode)]
    odd = {path: why for path in files if (why := why_kept(folder, path, found[path], known, recorded))}
    kept = [path for path in files if path not in odd or path in recorded]
    ways = {parent.as_posix() for path in kept for parent in Path(path).parents}
    strange = [path for path, status in found.items() if stat.S_ISDIR(status.st_mode) and path not in ways]
    top = [path for path in strange if Path(path).parent.as_posix() not in strange]
    odd = {path: why for path, why in odd.items() if not any(path.startswith(f"{way}/") for way in top)}
    odd |= {f"{path}/": "not a folder of a model" for path in top}
    if odd:
        raise UsageError(
            f"{shown}: contains files that are not part of a model or an adapter, so --overwrite does not replace it; "
            "move them away, or choose another OUT:",
            (f"{printable(path)}: {why}" for path, why in sorted(odd.items())),
        )
    if files and not recorded and not any(map(known.are_weights, files)):
        raise UsageError(
            f"{printable(folder)} contains no model, so --overwrite does not replace it; remove it yourself"
        )
    return files


def why_kept(folder: Path, path: str, status: os.stat_result, known: FileNames, recorded: Mapping[str, Digest]) -> str:
    """Empty for a file that `--overwrite` may replace; else the reason it may not."""
    if not stat.S_ISREG(status.st_mode):
        return "a link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
    if known.know(path):
        return ""
    if path not in recorded:
        return f"not listed in {PROVENANCE}, and not a usual model file"
    return f"changed since {PROVENANCE} listed it" if why_unlike(folder / path, recorded[path]) else ""


def record_at(path: Path) -> dict[str, Digest]:
    """The files that a record lists; none where it cannot be read."""
    if path.is_symlink():
        return {}
    try:
        return read_recorded(read_json(path, LARGEST_RECORD, lenient=True))
    except StorageError:
        raise  # which says nothing of the file
    except LoratoolError:
        return {}


def check_stage(home: Path) -> Journal | None:
    """The journal of a stage of ours, as `look` tells it; a stage in which another run is at work is told as that."""
    try:
        return look(home)
    except ForeignError:
        if is_locked(home):  # and what is in it may change while it is looked at
            raise UsageError(f"{printable(home)}: {BUSY}", hint=ANOTHER_OUT) from None
        raise
    except OSError as error:
        out = home.with_name(home.name.removesuffix(".partial"))
        if is_unusual(out.name):
            raise refused_name(out) from error
        raise StorageError(f"{printable(error.filename or home)}: {error.strerror or error}") from error


def already_there(out: Path, shown: str) -> UsageError:
    """The refusal of an output that is there, which says so where it is that of a run which ended while it cleared up."""
    ended = ": an earlier run completed it, and was stopped right after" if is_published(out) else ""
    return UsageError(f"{shown} already exists{ended}; pass --overwrite to replace it", hint="--overwrite")


def is_published(out: Path) -> bool:
    """Whether an output is the one whose stage is left, with nothing in it that can be continued."""
    home = stage_of(out)
    try:
        journal = look(home) if is_spent(out) and not is_locked(home) else None
        return journal is not None and journal.becomes == out.stat().st_ino
    except (ForeignError, OSError):
        return False


def is_spent(out: Path) -> bool:
    """Whether nothing in the stage of an output can be continued, nor is a list of parts.

    It has no file but its journal; or it has the files of an old output, which has changed places with the new one.
    """
    home = stage_of(out)
    if not home.is_dir() or home.is_symlink():
        return False
    files = [path for path, status in walk(home) if not stat.S_ISDIR(status.st_mode)]
    journal = read_journal(home, home.stat().st_uid)
    if journal is None or journal.parts is not None:
        return not files
    return files == [JOURNAL] or (journal.replaces is not None and journal.becomes == out.stat().st_ino)


def stage_of(out: Path) -> Path:
    """The folder in which `out` is staged."""
    return out.parent / f"{out.name}.partial"  # with_name refuses the root


def inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder`, or lies in it, whatever the links on the way."""
    wanted = identity(folder)
    return wanted is not None and wanted in identities(path)


def identities(path: Path) -> set[tuple[int, int] | None]:
    """What is at `path`, where something is, and the folders that it really lies in."""
    return {identity(place) for place in (path, *Path(os.path.realpath(path)).parents)} - {None}


def identity(path: Path) -> tuple[int, int] | None:
    """What no two files or folders that are there have in common."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def as_json(table: object) -> bytes:
    """A table as a file of JSON, in lines that people read."""
    return (json.dumps(table, indent=2) + "\n").encode()


def write_file(path: Path, content: bytes) -> None:
    """An output of one file: whole under its name, or not there; what stands beside it under whatever name is kept.

    Raises `StorageError`.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name[:100]}.{os.urandom(16).hex()}.partial")
    try:
        descriptor = create_file(partial)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                sync_file(descriptor)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"{printable(path)}: {error.strerror or error}") from None
