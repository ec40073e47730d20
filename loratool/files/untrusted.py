"""A file that anyone may have written: opened without blocking, read within a bound, parsed in bounded memory.

A file that is parsed has a bound in bytes, which `stat` tells before anything is read, and one in values, which are
counted before they are made: Python takes up to 200 bytes for a value that is written with three. Files that are only
copied, a tokenizer for one, have no bound.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.arguments import PathLike
from loratool.errors import InputError, StorageError, printable
from loratool.files.system import open_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LARGEST_CONFIG = 16 << 20  # bytes of a config, or any other JSON file that is parsed
LARGEST_RECORD = 64 << 20  # bytes of a `loratool.json`, which lists digests of every tensor
LARGEST_INDEX = 256 << 20  # bytes of an index
MOST_VALUES = 2_500_000  # arrays, objects and entries of one JSON text
LONGEST_NUMBER = 308  # digits: an integer of more may be beyond float64, and nothing that is read here counts so far
DEEPEST = 127  # levels of arrays and objects, as in the reference parser of safetensors

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # organisation/name
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/)/?(?=.)")  # as a Path has it; one letter is a drive of Windows
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
TOO_DEEP = "nested too deeply"
LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (LONGEST_NUMBER + 1))
# A text of JSON, to the end of all where it has none. No input makes the search go back.
TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file; anything else is an `InputError`, found without blocking.

    `stat` comes before `open`, since opening a device or a pipe may hang or have effects.
    """
    with reading(path):
        if what := special(path):
            raise InputError(f"{printable(path)}: is {what}, not a file")
        descriptor = open_file(path, os.O_RDONLY, links=True)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{printable(path)}: was replaced while it was being opened")
    return descriptor


def special(path: Path) -> str:
    """Empty for a regular file; else what it is. Raises `OSError` where there is nothing, or a link to nothing."""
    kind = os.stat(path).st_mode
    return "" if stat.S_ISREG(kind) else KINDS.get(stat.S_IFMT(kind), "not a regular file")


def special_files(folder: Path, names: Iterable[str]) -> list[str]:
    """A sentence for each of these that is a named pipe, a socket or a device, which are never read."""
    found: list[str] = []
    for name in names:
        with suppress(OSError):  # missing, or a link to nothing
            if (what := special(folder / name)) and what != KINDS[stat.S_IFDIR]:
                found.append(f"{printable(name)}: is {what}, not a file")
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """An `OSError` in the block is told in a sentence about an input."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> InputError | StorageError:
    """The sentence for an `OSError` met on opening an input."""
    shown = printable(path)
    match error.errno:
        case errno.ENOENT if path.is_symlink():
            return InputError(f"{shown}: is a link to {printable(os.readlink(path))}, which does not exist")
        case errno.ENOENT | errno.ENOTDIR if address := ADDRESS.match(path.as_posix()):
            scheme, rest = f"{address[1]}/", path.as_posix()[address.end() :]
            if scheme == "s3://":  # which operands may be; this is a file that an option names, or the like
                return InputError(
                    f"{printable(scheme + rest)}: must be a local file, not an address in an object store"
                )
            if scheme == "file://":
                return InputError(f"file:///{printable(rest)}: pass the path alone, /{printable(rest)}")
            return InputError(
                f"{printable(scheme + rest)}: {scheme} addresses are not supported; expected s3://bucket/prefix, "
                "hf://org/name, org/name or a local path"
            )
        case errno.ENOENT | errno.ENOTDIR:
            named = HUB_ID.fullmatch(path.as_posix()) and not path.parent.exists()
            hint = f"; for a Hub repository run `hf download {path}` and pass the folder it prints"
            return InputError(f"{shown}: no such file or folder{hint if named else ''}")
        case errno.EACCES | errno.EPERM:
            return InputError(f"{shown}: permission denied")
        case errno.ELOOP:
            return InputError(f"{shown}: is a link that leads to itself")
        case errno.ENAMETOOLONG:
            return InputError(f"{shown}: the name is too long for the file system")
        case _:
            return StorageError(f"{shown}: {error.strerror or error}")


def read_bounded(path: Path, largest: int = LARGEST_CONFIG) -> bytes:
    """The bytes of a small file; one of more than `largest` bytes is an `InputError`, and none of it is read."""
    with reading(path), open(open_regular(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        raw = stream.read(largest + 1) if size <= largest else b""
    check_bound(printable(path), max(size, len(raw)), largest)
    return raw


def is_stdin(path: PathLike) -> bool:
    """Whether a list or a manifest is read from stdin: it is called `-`, and no file here has that name."""
    return os.fspath(path) == "-" and not os.path.lexists("-")


def read_file_or_stdin(path: PathLike, largest: int = LARGEST_CONFIG) -> bytes:
    """The bytes of a small file, or of stdin (`is_stdin`), within the same bound."""
    if not is_stdin(path):
        return read_bounded(Path(path), largest)
    raw: bytes = sys.stdin.buffer.read(largest + 1) if sys.stdin else b""
    if len(raw) > largest:
        raise InputError(f"stdin: more than the limit of {largest} bytes for a file of this kind")
    return raw


def source_name(path: PathLike) -> str:
    """What messages call the file that `read_file_or_stdin` reads."""
    return "stdin" if is_stdin(path) else printable(path)


def check_bound(shown: str, size: int, largest: int) -> None:
    """Raise `InputError` for a file that is larger than files of its kind are."""
    if size > largest:
        raise InputError(f"{shown}: is {size} bytes, over the limit of {largest} for a file of this kind")


def holds_text(path: Path, words: bytes) -> bool:
    """Whether a file of any size holds some bytes; it is read piece by piece."""
    end = b""
    with open(open_regular(path), "rb", buffering=0) as stream:
        while piece := stream.read(1 << 20):
            if words in end + piece:
                return True
            end = piece[-len(words) :]
    return False


def read_json(
    path: Path, largest: int = LARGEST_CONFIG, *, repeated: bool = False, lenient: bool = False
) -> dict[str, Any]:
    """The JSON object in a file; everything that is wrong with it is an `InputError`, which holds none of its text."""
    raw = read_bounded(path, largest)
    if not raw.strip():
        raise InputError(f"{printable(path)}: the file is empty, which is not valid JSON")
    try:
        return json_object(raw, repeated=repeated, lenient=lenient)
    except ValueError as error:
        raise InputError(f"{printable(path)}: {error}") from None


class RepeatedKeyError(ValueError):
    """An object has a key twice. Only those who may show text of the file name it."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__("a key is duplicated")


def json_object(raw: bytes, *, repeated: bool = False, lenient: bool = False) -> dict[str, Any]:
    """One JSON object in UTF-8; raises `ValueError`."""
    parsed = json_value(raw, repeated=repeated, lenient=lenient)
    if not isinstance(parsed, dict):
        raise ValueError(f"expected a JSON object, found {type(parsed).__name__}")
    return parsed


def json_or_empty(raw: bytes, *, lenient: bool = False) -> dict[str, Any]:
    """The same; empty for anything else."""
    try:
        return json_object(raw, lenient=lenient)
    except ValueError:
        return {}


def json_value(raw: bytes, *, repeated: bool = False, lenient: bool = False) -> Any:
    """JSON in UTF-8, as strictly as serde_json reads it; `ValueError` says what is wrong.

    Python's own parser takes repeated keys, NaN and lone surrogates, and overflows on deep nesting.

    Args:
        raw: the text.
        repeated: allow a key to be there twice; the last one counts.
        lenient: allow NaN and Infinity, which some models' configs hold, and half surrogate pairs.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise RepeatedKeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return found

    def no_minus_zero(literal: str) -> int:
        return -1 if literal == "-0" else int(literal)  # a count it is not

    def refuse(literal: str) -> Any:
        raise ValueError(f"{literal} is not valid JSON")

    check_values(raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=None if repeated else unique,
            parse_constant=None if lenient else refuse,
            parse_int=no_minus_zero if "-0" in text else None,
        )
        if nesting(parsed) > DEEPEST:
            raise ValueError(TOO_DEEP)
        if "\\u" in text and not lenient:  # only an escape can smuggle in half a surrogate pair
            json.dumps(parsed, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except UnicodeEncodeError:
        raise ValueError("a string contains half a surrogate pair") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    return parsed


def check_values(raw: bytes) -> None:
    """Raise `ValueError` where a JSON text has more values than fit into a bounded memory; none of them is made."""
    if separators(raw) > MOST_VALUES and (count := separators(TEXT.sub(b"", raw))) > MOST_VALUES:
        raise ValueError(f"it contains {count} values, over the limit of {MOST_VALUES}")
    if LONG_NUMBER.search(raw) and LONG_NUMBER.search(TEXT.sub(b"", raw)):
        raise ValueError(f"it contains a number of more than {LONGEST_NUMBER} digits")


def separators(raw: bytes) -> int:
    """What begins a value in JSON, commas in texts included."""
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")


def nesting(value: object) -> int:
    """Levels of arrays and objects in a JSON value."""
    levels, nodes = 0, [value]
    while nodes := [node for node in nodes if isinstance(node, (dict, list))]:  # level by level: no recursion
        levels += 1
        nodes = [inner for node in nodes for inner in (node.values() if isinstance(node, dict) else node)]
    return levels
