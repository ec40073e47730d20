"""Where an input came from: the cache of the Hub names repository and commit in its paths.

The Hub's client can list all of a cache, but not say what one path of it is.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import printable
from loratool.files.system import do_without
from loratool.lazy import hub_constants

SNAPSHOT = r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<inside>.+))?$"


SHA256 = re.compile(r"[0-9a-f]{64}")  # of smaller files the cache has SHA-1
HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether `text` may be the name of a repository: `org/name`."""
    return bool(HUB_ID.fullmatch(text))


@dataclass(frozen=True)
class Origin:
    """A commit of a repository, or a folder or file in it."""

    repo: str
    commit: str
    inside: str = ""

    @property
    def name(self) -> str:
        """Without the commit, for people."""
        return self.repo + (f":{self.inside}" if self.inside else "")

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}" + (f":{self.inside}" if self.inside else "")


def origin_of(path: Path) -> Origin | None:
    """What a path in a cache of the Hub is; None for any other."""
    # not resolved: the files of a snapshot are links to blobs
    match = re.search(SNAPSHOT, Path(os.path.abspath(path)).as_posix())
    if match is None:
        return None
    return Origin(f"{match['owner']}/{match['name']}", match["commit"], printable(match["inside"] or ""))


def name_of(path: Path) -> str:
    """What an input is called: its repository, or the name of its folder or file."""
    origin = origin_of(path)
    return origin.name if origin else printable(path.resolve().name)


def told_origin(path: Path) -> dict[str, str]:
    """The entry of provenance that tells the commit; empty for what is not from the Hub."""
    origin = origin_of(path)
    return {"hub": str(origin)} if origin else {}


def sha256_of_link(path: Path) -> str:
    """The SHA-256 of a weight file in a cache of the Hub, which names what it has of a file by it; empty elsewhere."""
    if origin_of(path) is None:
        return ""
    if not path.is_symlink():
        if path.is_relative_to(os.path.realpath(hub_constants.HF_HUB_CACHE)):  # elsewhere it stands for a repository
            do_without(
                "no links in the Hub's cache on this system, which name files by their SHA-256; digests of files from "
                "the Hub are computed"
            )
        return ""
    blob = Path(os.readlink(path))
    return blob.name if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name) else ""


def find_blob(sha256: str) -> Path | None:
    """A file with that SHA-256 by its name in the Hub's cache."""
    return next(iter(Path(hub_constants.HF_HUB_CACHE).glob(f"models--*/blobs/{sha256}")), None)
