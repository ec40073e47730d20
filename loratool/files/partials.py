"""Partial results of a command in a folder that many workers share, which the last one adds up.

    FOLDER/run.json             what is being worked on; whoever comes first writes it, all others compare
    FOLDER/partial-000007.json  what came out for one unit of the work, with a digest
    FOLDER/partial-000007.bin   the tensors of it, where there are any

Names appear whole or not at all, and the first result of a unit stands, so no lock is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool.arguments import PathLike
from loratool.errors import StorageError, UsageError, VerificationError, printable
from loratool.files.outputs import check_local
from loratool.files.presence import draft_of, publish_new
from loratool.files.staging import write_durably
from loratool.files.system import open_file

RUN = "run.json"
OURS = re.compile(r"(run\.json|partial-[0-9]{6}\.(json|bin))(\.[0-9a-f]{32}\.new)?")
LARGEST = 256 << 20  # bytes of a partial result without tensors


class Partials:
    """The partial results of one command."""

    def __init__(self, folder: PathLike, command: str, fingerprint: str, costs: Sequence[float]) -> None:
        """`fingerprint` tells inputs and options; `costs` are those of the units of work, in any measure.

        Raises `UsageError` for an address in a store.
        """
        check_local(Path(folder), "--into")
        self.folder, self.costs = Path(folder), costs
        self.run = {"loratool": command, "fingerprint": fingerprint, "units": len(costs)}

    def claim(self) -> None:
        """Begin the work, or join those who are at it.

        Raises:
            UsageError: the folder has partial results of something else, or other files.
            StorageError: the file system said no.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            if odd := sorted(entry.name for entry in os.scandir(self.folder) if not OURS.fullmatch(entry.name)):
                raise UsageError(
                    f"{printable(self.folder)}: contains files that loratool did not write, such as {printable(odd[0])}; "
                    "choose an empty folder for --into, or a new one"
                )
            publish_new(self.folder / RUN, as_lines(self.run))
        except OSError as error:
            raise refused(error, self.folder) from error
        self.check()

    def check(self) -> None:
        """Raise `UsageError` where the folder is not one of this work."""
        found = self.lines_of(RUN)
        if found is None:
            raise UsageError(f"{printable(self.folder)}: contains no partial results; run --part first")
        if found != self.run:
            raise UsageError(
                f"{printable(self.folder)}: contains partial results of other inputs or options, or of another version of "
                "loratool; pass the same ones to every worker, or choose another folder for --into"
            )

    def publish(self, unit: int, table: Mapping[str, Any], content: bytes = b"") -> None:
        """Keep what came out for a unit; where another worker was first, its result stands."""
        name, sha256 = f"partial-{unit:06d}", hashlib.sha256(content).hexdigest()
        try:
            if content and self.content_of(unit, sha256) is None:
                draft = draft_of(self.folder / f"{name}.bin")
                write_durably(draft, content, os.O_EXCL)
                os.replace(draft, self.folder / f"{name}.bin")
            publish_new(
                self.folder / f"{name}.json", as_lines({"unit": unit, "sha256": sha256, "size": len(content), **table})
            )
        except OSError as error:
            raise refused(error, self.folder) from error

    def read(self, unit: int) -> tuple[dict[str, Any], bytes] | None:
        """What came out for a unit; None where there is nothing, or it is damaged."""
        table = self.lines_of(f"partial-{unit:06d}.json")
        if table is None or table.get("unit") != unit:
            return None
        content = self.content_of(unit, table["sha256"]) if table.get("size") else b""
        return None if content is None else (table, content)

    def every(self) -> list[tuple[dict[str, Any], bytes]]:
        """What came out for all units, in order. Raises `VerificationError` where some are missing or damaged."""
        self.check()
        found = [self.read(unit) for unit in range(len(self.costs))]
        if missing := [unit for unit, each in enumerate(found) if each is None]:
            raise VerificationError(
                f"{printable(self.folder)}: {len(missing)} of {len(found)} partial results are missing or damaged; run "
                "the missing workers, or --part 1/1 for all that is left"
            )
        return [each for each in found if each is not None]

    def forget(self, unit: int) -> None:
        """Remove a result that is damaged."""
        (self.folder / f"partial-{unit:06d}.json").unlink(missing_ok=True)

    def lines_of(self, name: str) -> dict[str, Any] | None:
        """The table of a file whose digest is right."""
        line, _, rest = (self.bytes_of(name, LARGEST) or b"").partition(b"\n")
        if rest.strip() != hashlib.sha256(line).hexdigest().encode():
            return None
        table = json.loads(line)
        return table if isinstance(table, dict) else None

    def content_of(self, unit: int, sha256: str) -> bytes | None:
        """The tensors of a unit, if they are those that are listed."""
        raw = self.bytes_of(f"partial-{unit:06d}.bin", -1)
        return raw if raw is not None and hashlib.sha256(raw).hexdigest() == sha256 else None

    def bytes_of(self, name: str, most: int) -> bytes | None:
        try:
            descriptor = open_file(self.folder / name, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with open(descriptor, "rb") as stream:
            return stream.read(most)


def as_lines(table: Mapping[str, Any]) -> bytes:
    """A line of JSON, and a line with its SHA-256. NaN and infinity are as Python writes them."""
    line = json.dumps(table).encode()
    return line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"


def refused(error: OSError, folder: Path) -> StorageError:
    where = printable(error.filename) if error.filename else printable(folder)
    return StorageError(f"{where}: {error.strerror or error}")
