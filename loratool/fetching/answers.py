"""What a server says, checked before anything is made of it: a path, a range, a size, an address.

The Hub's client joins headers of an answer into paths of its cache (the commit, the ETag), so those are checked as
the answer arrives, by hooks on the client's session. What comes as JSON is checked where it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from unicodedata import category

from loratool.errors import HubError, printable
from loratool.lazy import hub, hub_constants, hub_utils

COMMIT = re.compile(r"[0-9a-f]{40}")
RESOLVED = re.compile(r"/resolve/([0-9a-f]{40})/")  # in the address of a file
DIGEST = re.compile(r"[0-9a-f]{64}")
TAG = re.compile(r"(?:W/)?\"?[0-9A-Za-z_=+][0-9A-Za-z_=+.:-]{0,199}\"?")  # an ETag, which becomes a file's name
COUNT = re.compile(r"[0-9]{1,16}")
ADDRESS = re.compile(r"https?://[^/\s]", re.IGNORECASE)
DRIVE = re.compile(r"[A-Za-z]:")
JOINERS = "\u200c\u200d"  # which some scripts and emoji need
LONGEST_NAME = 255  # bytes of one part of a path
LONGEST_PATH = 2048  # bytes
LARGEST_FILE = 1 << 43  # bytes; file systems take no larger one
LARGEST_ANSWER = 64 << 20  # bytes of an answer that is no file
LONGEST_WAIT = 600  # seconds that a server may ask for
PATIENCE = {"GET": 30.0, "HEAD": 30.0}  # seconds without a byte, where the client sets no limit of its own
LONG_PATIENCE = 600.0  # the same for what a server has to work on
OURS = "loratool/"  # in the User-Agent of requests that are answered with more than a word
# What the value of a header has to look like. Each becomes a part of a path, a size or an address.
HEADERS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "x-repo-commit": (COMMIT, "40 hexadecimal digits"),
    "x-linked-etag": (TAG, "the digest of a file"),
    "x-linked-size": (COUNT, "a number of bytes"),
    "content-length": (COUNT, "a number of bytes"),
    "content-range": (re.compile(r"bytes (?:\d{1,16}-\d{1,16}|\*)/(?:\d{1,16}|\*)"), "a range of bytes"),
    "x-xet-hash": (DIGEST, "64 hexadecimal digits"),
    "x-xet-cas-url": (re.compile(rf"{ADDRESS.pattern}\S*", re.IGNORECASE), "an http(s) address"),
}


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit."""

    size: int  # bytes
    blob: str  # SHA-1 as git makes it; of an LFS file that of its pointer
    sha256: str = ""  # of an LFS file's content


def wrong(where: str, what: str, found: object, expected: str) -> HubError:
    """The error for an answer that no Hub gives."""
    return HubError(
        f"{printable(where)}: the server does not answer like a Hub: {what} is {printable(repr(found))}, expected "
        f"{expected}; check HF_ENDPOINT and any proxy"
    )


def commit_of(repo: str, value: object) -> str:
    """The name of a commit; raises `HubError` where it can be none."""
    if isinstance(value, str) and COMMIT.fullmatch(value):
        return value
    raise wrong(repo, "a commit", value, "40 hexadecimal digits")


def files_of(repo: str, entries: Iterable[tuple[object, object, object, object]]) -> dict[str, RemoteFile]:
    """The files of a commit, from (name, size, git's SHA-1, SHA-256 or None) of each.

    Raises `HubError` for a name that cannot be one of a file in a folder, and for a size or digest that is none.
    """
    files: dict[str, RemoteFile] = {}
    for name, told, blob, sha256 in entries:
        if not isinstance(name, str) or (reason := why_no_name(name)):
            expected = f"a plain relative path ({reason})" if isinstance(name, str) else "text"
            raise wrong(repo, "the name of a file", name, expected)
        size = 0 if told is None else told
        if type(size) is not int or not 0 <= size <= LARGEST_FILE:
            raise wrong(repo, f"the size of {printable(name)}", size, "a number of bytes")
        if not is_digest(blob, COMMIT) or not is_digest(sha256, DIGEST):
            raise wrong(repo, f"the digest of {printable(name)}", (blob, sha256), "hexadecimal digits")
        files[name] = RemoteFile(size, str(blob or ""), str(sha256 or ""))
    folders = {folder for name in files for folder in accumulate(name.split("/")[:-1], "{}/{}".format)}
    for name in sorted(folders & files.keys()):
        raise wrong(repo, "the name of a file", name, "a name that is not also a folder")
    return files


def why_no_name(name: str) -> str:
    """Empty for a plain relative path; else what is wrong with it."""
    parts = name.split("/")
    if not name or {"", ".", ".."} & set(parts) or "\\" in name or DRIVE.match(name):
        return "no empty part, '.', '..', drive or backslash"
    if any(category(c) in ("Cc", "Cs", "Cf") and c not in JOINERS for c in name):
        return "no control characters"
    encoded = [len(part.encode()) for part in parts]
    return (
        "" if max(encoded) <= LONGEST_NAME and sum(encoded) <= LONGEST_PATH else ("no longer than a file system allows")
    )


def is_digest(value: object, pattern: re.Pattern[str]) -> bool:
    return value in (None, "") or (isinstance(value, str) and pattern.fullmatch(value) is not None)


def check_range(where: str, response: Any, start: int, count: int, size: int) -> None:
    """Raise `HubError` unless the bytes of an answer are those that were asked for: `count` of them from `start` on.

    `size` is that of the whole file.
    """
    if response.status_code == 200:
        return  # a server that knows no ranges and sends the whole file
    found, expected = response.headers.get("content-range", ""), f"bytes {start}-{start + count - 1}/"
    if response.status_code != 206 or found not in (f"{expected}{size}", f"{expected}*"):
        raise wrong(where, f"Content-Range, with status {response.status_code},", found, repr(f"{expected}{size}"))


limits: list[int] = []  # of every block under way: bytes that an answer may have


@contextmanager
def limited(most: int) -> Iterator[None]:
    """Check all that servers say while the block runs; none of their answers may have more than `most` bytes.

    `most` is the size of the largest file that is asked for; what is no file may have `LARGEST_ANSWER` in any case.
    """
    most = max(most, LARGEST_ANSWER)
    guard_session()
    limits.append(most)
    try:
        yield
    finally:
        limits.remove(most)


def guard_session() -> None:
    """Have every request of ours, and its answer, pass `check_request` and `check_response`.

    The client makes a new session of its factory where a connection fails, so that the factory is what is wrapped.
    """
    if check_response in hub_utils.get_session().event_hooks["response"]:
        return
    # the user's, or the client's own; there is no public way to it
    make: Callable[[], Any] = hub_utils._http._GLOBAL_CLIENT_FACTORY  # noqa: SLF001

    def guarded() -> Any:
        session = make()
        hooks = session.event_hooks
        session.event_hooks = {
            "request": [*hooks["request"], check_request],
            "response": [*hooks["response"], check_response],
        }
        return session

    hub.set_client_factory(guarded)


def check_request(request: Any) -> None:
    """An address that a server gave, of a redirection, a page or an upload, is as safe as the Hub's own.

    A request without a time limit gets one.
    """
    if not limits:
        return  # somebody else's
    scheme = str(request.url.scheme)
    if scheme != "https" and (scheme != "http" or str(hub_constants.ENDPOINT).startswith("https:")):
        raise wrong(str(request.url.host), "an address it returned", str(request.url), "one that begins with https://")
    given = request.extensions.get("timeout") or {}
    if not any(given.values()):
        patience = PATIENCE.get(request.method, LONG_PATIENCE)
        request.extensions = {
            **request.extensions,
            "timeout": dict.fromkeys(("connect", "read", "write", "pool"), patience),
        }


def check_response(response: Any) -> None:
    """Headers as a Hub sends them, and a body of no more bytes than anything that was asked for has."""
    if not limits:
        return
    where = str(response.request.url.host)
    for name, (pattern, expected) in HEADERS.items():
        if (value := response.headers.get(name)) is not None and not pattern.fullmatch(value):
            raise wrong(where, name.title(), value, expected)
    if "x-repo-commit" in response.headers and not TAG.fullmatch(tag := response.headers.get("etag", "x")):
        raise wrong(where, "ETag", tag, "the digest of a file")
    asked, commit = RESOLVED.search(str(response.request.url.path)), response.headers.get("x-repo-commit")
    if asked and commit not in (None, asked[1]):
        raise wrong(where, "X-Repo-Commit", commit, f"{asked[1]}, as requested")
    if (wait := asked_wait(response.headers)) > LONGEST_WAIT:
        raise HubError(f"{printable(where)}: the server asks to wait {wait:.0f} seconds; run the same command later")
    if OURS in response.request.headers.get("user-agent", ""):
        bound(response, where, max(limits))


def bound(response: Any, where: str, most: int) -> None:
    """Have a body end with a `HubError` after `most` bytes; a server may send without an end."""
    pieces = response.iter_bytes

    def bounded(chunk_size: int | None = None) -> Iterator[bytes]:
        count = 0
        for piece in pieces(chunk_size):
            count += len(piece)
            if count > most:
                raise wrong(where, "the length of an answer", f"more than {most} bytes", "no more")
            yield piece

    response.iter_bytes = bounded


def asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, 0 where it does not say."""
    match = re.search(r"\bt=(\d+)", headers.get("ratelimit", "")) or re.match(r"(\d+)$", headers.get("retry-after", ""))
    return float(match[1][:18]) if match else 0.0
