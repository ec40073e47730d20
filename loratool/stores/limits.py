"""What a store takes of uploads in parts: S3's own limits, and those of stores that are stricter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from loratool.errors import UsageError, printable
from loratool.stores.client import HUB_GATEWAY, connection

WAYS = ("any", "uncopied", "uniform")
SETTING = "LORATOOL_S3_PARTS"
UNCOPIED_HOSTS = (HUB_GATEWAY,)  # which copy no ranges
UNIFORM_HOSTS = (".r2.cloudflarestorage.com",)  # where all parts of an object but the last must have one size


@dataclass(frozen=True)
class Limits:
    """Of the parts of one upload. Sizes are bytes."""

    smallest: int = 5 << 20  # of any but the last
    largest: int = 5 << 30
    most: int = 10_000  # parts of an object
    piece: int = 16 << 20  # of a part that goes through this machine, which holds it in memory
    copies: bool = True  # whether a part can be a range of another object
    uniform: bool = False  # whether all parts but the last have to be of one size


def limits() -> Limits:
    """Those of the store that is used.

    Raises `UsageError` where the environment asks for something else than there is.
    """
    way = os.environ.get(SETTING, "")
    if way not in ("", *WAYS):
        raise UsageError(f"{SETTING} must be one of {', '.join(WAYS)} (got {printable(repr(way))})")
    host = urlsplit(connection().endpoint).hostname or ""
    uniform = way == "uniform" or (not way and host.endswith(UNIFORM_HOSTS))
    uncopied = way == "uncopied" or (not way and host in UNCOPIED_HOSTS)
    return Limits(copies=not uncopied and not uniform, uniform=uniform)
