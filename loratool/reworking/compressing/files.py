"""The files of compressed adapters: `shared.safetensors`, and NAME.safetensors for each of them.

    shared  TARGET/CLUSTER/U   (out, R)      TARGET/CLUSTER/V   (R, in)
    NAME    TARGET/CLUSTER/M   (R, R)        or  TARGET/CLUSTER/B  (R, r)   TARGET/CLUSTER/A  (r, R)
            TARGET/own/B       (out, q)      TARGET/own/A       (q, in)
            other/TENSOR       as the adapter has it

    ΔW of TARGET = U M V, or U B A V, plus own B times own A, whatever of it is there.

The metadata of each header have `loratool_compressed`, the version of this format, and `about`, a JSON object. Those of
the shared file have the SHA-256 of its tensors' bytes, which those of every other file repeat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import StoredTensor
from loratool.adapters.layers import Form, Kind
from loratool.algebra.lowrank.products import Product, side_by_side
from loratool.errors import InputError, UsageError, printable
from loratool.files.containers import COMPRESSED, ENDING, SHARED
from loratool.files.safefile import SafeFile, read_safefile
from loratool.lazy import Tensor, torch

MARK, ABOUT, DIGEST = COMPRESSED, "about", "sha256_of_shared"
VERSION = "1"
OTHER = "other/"
OWN = "own"


@dataclass(frozen=True)
class Opened:
    """One of these files."""

    file: SafeFile
    about: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return str(self.file.metadata.get(DIGEST, ""))

    def has(self, *parts: str) -> bool:
        return "/".join(parts) in self.file.tensors

    def load(self, *parts: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        return StoredTensor(self.file, self.file.tensors["/".join(parts)]).load(device, dtype)

    @cached_property
    def clusters(self) -> dict[str, tuple[str, ...]]:
        """Target → the clusters that it has in this file."""
        found: dict[str, dict[str, None]] = {}
        for name in self.file.tensors:
            if not name.startswith(OTHER):
                target, cluster, _ = name.rsplit("/", 2)
                found.setdefault(target, {})[cluster] = None
        return {target: tuple(every) for target, every in found.items()}


def opened(path: Path) -> Opened:
    """One of these files; raises `InputError` for any other."""
    file = read_safefile(path)
    shown = printable(path)
    if file.metadata.get(MARK) != VERSION:
        why = "is not a file that loratool compress made"
        if MARK in file.metadata:
            why = f"has version {printable(file.metadata[MARK])} of this format, and only {VERSION} is read"
        raise InputError(f"{shown}: {why}")
    try:
        about = json.loads(file.metadata.get(ABOUT, ""))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise InputError(f"{shown}: its metadata do not say what is in it")
    if odd := [n for n in file.tensors if not n.startswith(OTHER) and n.count("/") < 2]:
        raise InputError(f"{shown}: tensors of unknown names:", map(printable, odd))
    return Opened(file, about)


def open_shared(folder: Path) -> Opened:
    """The shared file of a folder."""
    path = folder if folder.name == SHARED else folder / SHARED
    if not path.is_file():
        raise InputError(f"{printable(folder)}: no {SHARED}, so this is not a folder that loratool compress made")
    return opened(path)


def members(folder: Path) -> list[str]:
    """The names of the adapters in a folder."""
    return sorted(path.name.removesuffix(ENDING) for path in folder.glob(f"*{ENDING}") if path.name != SHARED)


def member_name(word: str) -> str:
    """The name of an adapter, which may be typed as the file that it is: `./NAME`, `NAME.safetensors`."""
    return word.removeprefix("./").removesuffix(ENDING)


def open_member(folder: Path, name: str, shared: Opened) -> Opened:
    """The small file of an adapter; raises `UsageError` where there is none, `InputError` where it is of other bases."""
    path = folder / f"{name}{ENDING}"
    if name not in members(folder):
        known = ", ".join(map(printable, members(folder)[:10])) or "none"
        raise UsageError(f"{printable(folder)} has no adapter {printable(name)!r}; it has {known}")
    found = opened(path)
    if found.digest != shared.digest:
        raise InputError(f"{printable(path)}: was made with another {SHARED}")
    return found


def form_record(form: Form) -> dict[str, Any]:
    """What a header says of a layer."""
    record = {"kind": form.kind.value, "rows": form.rows, "columns": form.columns, "rank": form.rank}
    if form.experts != 1 or form.kind is Kind.PARAMETER:
        record["experts"] = form.experts
    return record | ({"kernel": list(form.kernel)} if form.kernel else {})


def form_of(record: Mapping[str, Any]) -> Form:
    """The layer that a header describes; raises `ValueError`, `KeyError` or `TypeError` where it does not."""
    rows, columns, rank = (int(record[key]) for key in ("rows", "columns", "rank"))
    kernel = tuple(int(size) for size in record.get("kernel", ()))
    return Form(Kind(record["kind"]), rows, columns, rank, int(record.get("experts", 1)), kernel)


def core_of(member: Opened, target: str, cluster: str, device: torch.device) -> Product | None:
    """The core of an adapter in the bases of a cluster."""
    where = (target, cluster)
    if member.has(*where, "M"):
        matrix = member.load(*where, "M", device=device, dtype=torch.float64)
        return Product(matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype, device=device))
    if member.has(*where, "B"):
        up, down = (member.load(*where, part, device=device, dtype=torch.float64) for part in "BA")
        return Product(up, down)
    return None


def expanded(shared: Opened, member: Opened, target: str, device: torch.device) -> Product:
    """ΔW of a target."""
    parts = []
    for cluster in member.clusters.get(target, ()):
        if cluster == OWN:
            up, down = (member.load(target, OWN, part, device=device, dtype=torch.float64) for part in "BA")
            parts.append(Product(up, down))
        elif (core := core_of(member, target, cluster, device)) is not None:
            u, v = (shared.load(target, cluster, part, device=device, dtype=torch.float64) for part in "UV")
            parts.append(Product(u @ core.up, core.down @ v))
    return side_by_side(parts)
