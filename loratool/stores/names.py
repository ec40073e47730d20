"""The words that name a place in an object store: `s3://bucket/prefix`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from loratool.arguments import PathLike
from loratool.errors import UsageError, printable, without_credentials
from loratool.files.hub_names import slashed

SCHEME = re.compile(r"s3:/{1,2}")  # a Path has lost one of its slashes
BUCKET = r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]"
LONGEST_KEY = 1024  # bytes
FOLDER = ".loratool"  # in an output, or next to one of one object: what those who make it share


@dataclass(frozen=True)
class StorePath:
    """A bucket, or what lies below a key of it: a folder, if the key is that of no object."""

    bucket: str
    key: str = ""  # a plain relative path

    def __str__(self) -> str:
        return f"s3://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def parent(self) -> StorePath:
        return StorePath(self.bucket, self.key.rpartition("/")[0])

    @property
    def name(self) -> str:
        """The last part of it."""
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def output(self) -> StorePath:
        """The output that this is of, where it is something that only its making needs; else itself."""
        before, found, _ = f"/{self.key}".partition(f"/{FOLDER}/")
        return StorePath(self.bucket, before.removeprefix("/")) if found else self

    @property
    def prefix(self) -> str:
        """What the keys of objects in this folder begin with."""
        return f"{self.key}/" if self.key else ""


def is_in_store(operand: PathLike) -> bool:
    """Whether a word begins as an address in a store does, and is not the name of something here."""
    return SCHEME.match(slashed(operand)) is not None and not os.path.lexists(operand)


def parse_store(operand: PathLike) -> StorePath | None:
    """The place in a store that a word names; None for a word that names none.

    Raises `UsageError` for an address that begins with `s3:` and cannot be one.
    """
    text = slashed(operand)
    if (scheme := SCHEME.match(text)) is None:
        return None
    if without_credentials(text) != text:
        raise UsageError(
            f"{printable(operand)}: credentials are never taken from an address; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and pass s3://bucket/prefix"
        )
    bucket, _, key = text[scheme.end() :].partition("/")
    key = key.removesuffix("/")
    if not re.fullmatch(BUCKET, bucket):
        raise UsageError(
            f"{printable(operand)}: {printable(repr(bucket))} is not the name of a bucket; expected s3://bucket/prefix"
        )
    parts = key.split("/") if key else []
    if {"", ".", ".."} & set(parts) or len(key.encode(errors="surrogatepass")) > LONGEST_KEY:
        raise UsageError(f"{printable(operand)}: {printable(key)} is not a plain path inside a bucket")
    return StorePath(bucket, key)
