"""What a merge is: one fingerprint of its content, alike on every machine, and the state of its inputs on this one.

The fingerprint covers everything that decides a byte of the weights: which tensors go where, from which source, with
which edits at which strength and which way round; the adapters' bytes, and of the base the headers and a sample of every
tensor. No path and no time is in it. A sample cannot tell every change, so a stage's journal keeps besides how each input
file was found on this machine, and both have to agree before a stage is continued.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.adapters.adapter import Derived, StoredTensor
from loratool.bases.edits import Edit
from loratool.bases.weights import Plain
from loratool.files.digests import sha256_of
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import Identity, SafeFile
from loratool.files.stand_ins import stand_in, told_identity
from loratool.lazy import installed

if TYPE_CHECKING:
    from loratool.merging.plan import Plan

SAMPLE = 4096  # bytes of each tensor that are looked at
UNTOLD = ("rule",)  # fields of an edit that say why it is there, not what it does


def content_fingerprint(plan: Plan, digests: Sequence[Mapping[str, str]], base: Sequence[str] = ()) -> str:
    """SHA-256 of all that the content of the output's weights depends on.

    Args:
        plan: the merge.
        digests: those of each adapter's files.
        base: what tells the content of the base's weight files, in order; a sample of each tensor where it is not given.
    """
    roles = roles_of(plan)
    state = hashlib.sha256()

    def add(fact: object) -> None:
        state.update(json.dumps(fact, sort_keys=True).encode() + b"\n")

    add(["loratool", __version__, plan.dtype, plan.weights, plan.naming, plan.rounding])
    add(["base", list(base) or [sampled(shard) for shard in plan.base.shards], plan.base.config])
    add(["adapters", [sorted(files.values()) for files in digests], [adapter.config for adapter in plan.adapters]])
    for shard in plan.shards:
        add([shard.name, hashlib.sha256(shard.layout.header).hexdigest()])
        for span in shard.spans:
            edits = [described(edit, roles) for edit in span.edits]
            stored = [(role(t.file, roles), t.info.name, t.info.dtype) for t in span.weight.tensors]
            add([span.placed.name, *chain(*stored), edits, *([span.packed] if span.packed else [])])
    return state.hexdigest()


def local_state(plan: Plan, device: str) -> dict[str, Any]:
    """How the inputs are on this machine, and what else of it decides bytes: for a stage's journal and nothing else."""
    base = plan.base
    files = [shard.path for shard in base.shards]
    for model in (base, *base.components.values()):
        files += [path for path in (model.index, model.root / "config.json") if path is not None and path.is_file()]
    weights = [file for adapter in plan.adapters for file in adapter.file.files]
    files += [*(file.path for file in weights), *(adapter.config_file for adapter in plan.adapters)]
    planned = {file.path: file.identity for file in (*base.shards, *weights)}
    states = [
        dataclasses.astuple(planned.get(path) or told_identity(path) or Identity.of(path.stat()))
        for path in files
        if path.exists()
    ]
    return {"files": [list(state) for state in states], "device": device, "torch": installed("torch")}


def sampled(file: SafeFile) -> str:
    """SHA-256 of a weight file's size, header, and a piece of every tensor at a place that header and name decide.

    Of an object in a store what the store itself says of its content is taken, and nothing is read.
    """
    header = hashlib.sha256(file.layout.header).digest()
    if (there := stand_in(file.path)) is not None:
        return hashlib.sha256(header + there.state.encode()).hexdigest()
    state = hashlib.sha256(header + file.layout.size.to_bytes(8, "little"))
    buffer = memoryview(bytearray(SAMPLE))
    with OpenSources() as sources:
        for info in file.tensors.values():
            piece = buffer[: min(SAMPLE, info.nbytes)]
            place = hashlib.sha256(header + info.name.encode(errors="surrogatepass")).digest()
            at = int.from_bytes(place[:8], "little") % (info.nbytes - len(piece) + 1)
            Plain(file, info).read(at, piece, sources)
            state.update(piece)
    return state.hexdigest()


def roles_of(plan: Plan) -> dict[Path, str]:
    """What the files of a plan are called in its fingerprint."""
    roles = {shard.path: f"base {number}" for number, shard in enumerate(plan.base.shards)}
    for number, adapter in enumerate(plan.adapters):
        for part, file in enumerate(adapter.file.files):
            roles.setdefault(file.path, f"adapter {number} {part}")
    return roles


def role(file: SafeFile, roles: dict[Path, str]) -> str:
    """The name of a source file; one that is neither the base's nor an adapter's is named by all of its content."""
    if file.path not in roles:
        roles[file.path] = sha256_of(file.path)
    return roles[file.path]


def described(node: object, roles: dict[Path, str]) -> Any:
    """An edit, or a part of one, as JSON in which nothing depends on the machine.

    Raises `TypeError` for a kind of value that is not known here: what a fingerprint leaves out could be mixed up.
    """
    match node:
        case None | bool() | int() | str():
            return node
        case float():
            return node.hex()
        case StoredTensor():
            info = node.info
            place = [info.name, info.dtype, list(info.shape), info.start]  # a part of a tensor may be one of its own
            return [role(node.file, roles), *place, node.transposed]
        case Derived():
            return [list(node.shape), described(node.formula, roles), described(node.parts, roles)]
        case slice():
            return ["slice", *(described(part, roles) for part in (node.start, node.stop, node.step))]
        case partial():
            return [described(part, roles) for part in (node.func, node.args, node.keywords)]
        case tuple() | list():
            return [described(part, roles) for part in node]
        case Mapping():
            return [[described(key, roles), described(value, roles)] for key, value in node.items()]
    if dataclasses.is_dataclass(node):
        names = [each.name for each in dataclasses.fields(node)]
        told = [name for name in names if not (isinstance(node, Edit) and name in UNTOLD)]
        return [type(node).__name__, {name: described(getattr(node, name), roles) for name in told}]
    if callable(node) and hasattr(node, "__qualname__"):  # a formula: its name, and the values that it was made with
        cells = getattr(node, "__closure__", None) or ()
        return [node.__module__, node.__qualname__, [described(cell.cell_contents, roles) for cell in cells]]
    raise TypeError(f"{type(node).__name__} cannot be part of a fingerprint")
