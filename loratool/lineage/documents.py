"""The formats in which a bill of materials is written, each by the library of its standard."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from loratool.errors import UsageError
from loratool.lazy import cyclonedx_ids
from loratool.lineage.bill import Part
from loratool.results.base import plain

INSTALL = 'pip install "loratool[bom]"'
FORMATS = ("json", "spdx", "cyclonedx")


def document(bill: Part, name: str) -> dict[str, Any]:
    """A bill in one of `FORMATS`. Raises `UsageError` where the library of its standard is not installed."""
    if name == "json":
        return dict(plain(bill))
    try:
        write: Callable[[Part], dict[str, Any]] = import_module(f"loratool.lineage.{name}").document
        return write(bill)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("loratool"):
            raise
        raise UsageError(f"--format {name} needs packages that are not installed", hint=INSTALL) from None


def identity_of(bill: Part) -> str:
    """SHA-256 over all of a bill, in hexadecimal: bills that say the same have one identity."""
    return hashlib.sha256(json.dumps(plain(bill), sort_keys=True).encode()).hexdigest()


def moment() -> datetime.datetime:
    """Now, in whole seconds, or the time that SOURCE_DATE_EPOCH has, with which the same bill gives the same bytes."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = int(given) if given.isascii() and given.isdigit() else time.time()
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).replace(microsecond=0)


def address(part: Part) -> str:
    """Where a part is published; empty where it is not."""
    return f"https://huggingface.co/{part.repo}/tree/{part.revision or 'main'}" if part.repo else ""


def facts_of(part: Part) -> dict[str, str]:
    """What the standards have no field for, as texts by name."""
    found: Mapping[str, object] = {
        "command": part.command,
        "weight": part.weight,
        "gain": part.gain,
        **{f"version of {name}": version for name, version in part.versions.items()},
        **{f"option {name}": json.dumps(value) for name, value in part.options.items()},
        **{f"root of {file.name}": file.root for file in part.files},
        **{f"header of {file.name}": file.header for file in part.files},
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def license_id(name: str) -> str:
    """The identifier in SPDX's list of a licence as a card names it; empty where the list has none."""
    return cyclonedx_ids.fixup_id(name) or ""
