"""Names that some file systems do not take, tried out before any work is done.

Windows has no file `aux.txt`, a FAT stick takes no `a:b`, and on both `Model` is `model`. What a file system takes cannot
be known from outside, so a name that some are known to refuse is tried where it will be; all other names cost nothing. `os.path.isreserved`
came with Python 3.13 and is there on Windows only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

from loratool.arguments import PathLike
from loratool.errors import ANOTHER_OUT, StorageError, UsageError, printable
from loratool.files.system import create_file, shell_word
from loratool.grouping import by_key

DEVICES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)\s*(?:\..*)?", re.IGNORECASE | re.DOTALL)
ODD = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$')
LONGEST = 240  # characters of a path that every file system takes, with some room for a longer name beside it


def has_other_parts(name: str) -> bool:
    """Whether this system reads a relative path with slashes in another way: `..\\x`, `C:x`."""
    path = PurePath(name)
    return bool(path.drive) or path.parts != PurePosixPath(name).parts


def at_home(operand: PathLike) -> Path:
    """The path that an operand is, with `~` at its start for the user's folder unless something here is called so."""
    return Path(operand) if os.path.lexists(operand) else Path(os.path.expanduser(operand))


def is_unusual(part: str) -> bool:
    """Whether some systems refuse a file or folder of that name."""
    return bool(DEVICES.fullmatch(part) or ODD.search(part))


def check_names(folder: Path, names: Collection[str], all_names: Iterable[str]) -> None:
    """Raise `StorageError` for each of these relative paths that cannot be a file below `folder`.

    Those that may be refused, or are another of `all_names` but for case, are made there, and removed again. `folder`
    does not exist before, nor after.
    """
    doubtful = [name for name in names if any(map(is_unusual, name.split("/")))]
    doubtful += twins(names, all_names)
    longest = max(names, key=len, default="")
    if len(str(folder / longest)) >= LONGEST:
        doubtful.append(longest)
    if not doubtful:
        return
    try:
        problems = {name: why for name in dict.fromkeys(doubtful) if (why := why_refused(folder, name))}
    finally:
        if folder.exists():
            from shutil import rmtree  # which brings packages of archives

            rmtree(folder)
    if problems:
        raise StorageError(
            f"{printable(folder.parent.parent)}: this file system cannot store some files of the output; choose an "
            "OUT elsewhere:",
            [f"{printable(name)}: {why}" for name, why in problems.items()],
        )


def check_separators(out: Path, flag: str = "-o") -> None:
    """Raise `UsageError` for an output that was typed as on Windows where a backslash is a letter like any other.

    A folder of that name would lie in the working directory, hidden if it begins with a dot. An absolute path is what it
    is, and so is a name that exists.
    """
    text = os.fspath(out)
    if os.sep != "/" or "\\" not in text or "/" in text or os.path.lexists(out):
        return
    typed = PureWindowsPath(text)
    last = text.rpartition("\\")[2]
    meant = f"./{last if typed.drive or typed.root else typed.as_posix()}"
    raise UsageError(
        f"{printable(text)}: on this system folders are separated by '/', and a backslash would be part of the name, so "
        "nothing was written",
        hint=f"{flag} {shell_word(meant)}",
    )


def check_output_name(out: Path) -> None:
    """Raise `StorageError` where the name of an output that does not exist is one that cannot be made there."""
    if not is_unusual(out.name) or os.path.lexists(out):
        return
    try:
        os.mkdir(out)
        try:
            taken = out.name in os.listdir(out.parent)
        finally:
            os.rmdir(out)
    except OSError:
        taken = False
    if not taken:
        raise refused_name(out)


def refused_name(out: Path) -> StorageError:
    """The sentence for an output whose name cannot be that of a folder."""
    return StorageError(
        f"{printable(out)}: this file system does not allow that folder name; choose another OUT", hint=ANOTHER_OUT
    )


def twins(names: Collection[str], all_names: Iterable[str]) -> Iterator[str]:
    """The paths of `all_names` that differ in case only, where `names` has one of them."""
    folded = by_key((name.casefold(), name) for name in sorted(all_names))
    for name in names:
        if len(folded.get(name.casefold(), ())) > 1:
            yield from folded[name.casefold()]


def why_refused(folder: Path, name: str) -> str:
    """Empty where a file of that name can be made below `folder`, and is there under that name; else the reason."""
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(create_file(path))
    except FileExistsError:
        return "differs from another file only in case, and this file system ignores case"
    except OSError as error:
        if len(str(path)) >= LONGEST:
            return f"the path would have {len(str(path))} characters, which is too long for this system"
        return f"this file system does not allow that name ({error.strerror or error})"
    place = folder
    for part in name.split("/"):
        if part not in os.listdir(place):
            return "this file system stores it under another name"
        place /= part
    return ""


def is_plain(name: object) -> bool:
    """Whether a name is a relative path that stays in its folder, spelled in the one usual way."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    if has_other_parts(name):
        return False
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and name != "."
