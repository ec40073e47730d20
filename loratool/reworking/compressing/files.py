"""The files of compressed adapters, read and written: `shared.safetensors`, and NAME.safetensors for each of them.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import StoredTensor
from loratool.adapters.formats import format_of
from loratool.adapters.formats.format import Parts
from loratool.adapters.layers import Contents, Form, Kind
from loratool.adapters.ranks import evened
from loratool.adapters.writer import Carried, append, carried_over, files_beside
from loratool.algebra.lowrank.products import Product, side_by_side
from loratool.errors import InputError, UsageError, printable
from loratool.files.containers import COMPRESSED, ENDING, SHARED
from loratool.files.safefile import SafeFile, read_safefile
from loratool.files.tensor_writer import TensorFile, Triple
from loratool.grouping import by_key
from loratool.lazy import Tensor, torch
from loratool.notes import Note
from loratool.results.text import plural
from loratool.reworking.dialects import Manner
from loratool.reworking.renaming import dialect_of
from loratool.templates import listed

MARK, ABOUT, DIGEST = COMPRESSED, "about", "sha256_of_shared"
VERSION = "1"
OTHER = "other/"
OWN = "own"
WHOLE = ("UV", "BA", "M")  # which parts a cluster has; of two the product counts
NO_DIGEST = "0" * 64  # until that of the shared file is known


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
        parts = (name.rsplit("/", 2) for name in self.file.tensors if not name.startswith(OTHER))
        found = by_key((target, cluster) for target, cluster, _ in parts)
        return {target: tuple(dict.fromkeys(every)) for target, every in found.items()}

    @cached_property
    def shapes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(target, cluster) → (rows, columns) of what is stored, of a stack (experts, rows, columns).

        Raises `InputError` where that is neither a matrix nor a product.
        """
        stored = (name.rsplit("/", 2) for name in self.file.tensors if not name.startswith(OTHER))
        found, wrong = {}, []
        for (target, cluster), parts in by_key(((target, cluster), part) for target, cluster, part in stored).items():
            names = next((names for names in WHOLE if {*names} == {*parts}), "")
            sizes = [self.file.tensors[f"{target}/{cluster}/{part}"].shape for part in names]
            left, right = (sizes[0], sizes[-1]) if sizes else ((), ())
            if len(left) in (2, 3) and (names == "M" or (*left[:-2], left[-1]) == right[:-1]):
                found[target, cluster] = (*left[:-1], right[-1])
            else:
                wrong.append(f"{printable(f'{target}/{cluster}')}: neither a matrix nor two factors")
        if wrong:
            raise InputError(f"{printable(self.file.path)}: it is damaged:", wrong)
        return found


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
    found = Opened(file, about)
    _ = found.shapes  # which are those of matrices
    return found


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
    if wrong := [*misfits(found, shared)]:
        raise InputError(f"{printable(path)}: it does not fit {SHARED}:", wrong)
    return found


def misfits(member: Opened, shared: Opened) -> Iterator[str]:
    """What an adapter's file has that is not of the shapes of the shared directions."""
    for (target, cluster), shape in member.shapes.items():
        where = printable(f"{target}/{cluster}")
        if cluster == OWN:
            if unlike := {shared.shapes[target, each] for each in shared.clusters.get(target, ())} - {shape}:
                yield f"{where}: {' × '.join(map(str, shape))}, and the layer is {' × '.join(map(str, min(unlike)))}"
        elif not shared.has(target, cluster, "U"):
            yield f"{where}: there are no such directions"
        elif {*shape} != {count := shared.file.tensors[f"{target}/{cluster}/U"].shape[1]}:
            yield f"{where}: {' × '.join(map(str, shape))}, and there are {count} directions"


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


@dataclass(frozen=True)
class Member:
    """An adapter on its way into its small file."""

    source: Contents
    about: Mapping[str, Any]
    carried: Carried
    notes: tuple[Note, ...]
    dropped: tuple[str, ...]  # layers that get nothing

    @classmethod
    def of(
        cls, source: Contents, before: Contents, manner: Manner, ranks: Mapping[str, int], dtype: torch.dtype
    ) -> Member:
        """The adapter `source`, as `before` it took the names of its fleet, with layers of these ranks, 0 for none."""
        dropped = tuple(target for target, rank in ranks.items() if not rank)
        kinds = {target: source.layers[target].kind for target, rank in ranks.items() if rank}
        names = manner.spelling(kinds, source)
        kept = evened({target: ranks[target] for target in kinds}, names.of_one_rank())
        carried = carried_over(source, names)
        forms = {target: Form.of(source.layers[target], rank) for target, rank in kept.items()}
        parts = Parts(
            kept,
            whole_names=bool(dropped),
            dropped=dropped,
            dora=source.dora,
            lora_bias=bool(source.biases),
            tokens=carried.tokens,
        )
        about = {
            "name": source.name,
            "base": source.training.base,
            "dialect": manner.dialect,
            "release": source.training.release if manner.form is format_of(source.adapter) else "",
            "dtype": str(dtype).removeprefix("torch."),
            "layers": {target: form_record(form) for target, form in forms.items()},
            "config": names.describe([source.adapter], parts),
            "header": manner.draft(forms, names, dtype, carried, [source]).header(kept),
        }
        return cls(source, about, carried, tuple(remarks(source, before, manner)), dropped)

    def announced(self) -> Iterator[Triple]:
        for name, dtype, shape in self.carried.announced():
            yield OTHER + name, dtype, shape

    def metadata(self) -> dict[str, str]:
        return {MARK: VERSION, DIGEST: NO_DIGEST, ABOUT: json.dumps(self.about)}

    def carry(self, file: TensorFile) -> None:
        """Write all that is not a factor."""
        for name, tensor in self.carried.tensors.items():
            append(file, OTHER + name, tensor)


def remarks(source: Contents, before: Contents, manner: Manner) -> Iterator[Note]:
    """What is not in the small file as it was."""
    yield from source.remarks
    if source.dora:
        text = "DoRA: the error of ΔW does not bound that of the merged weight; its magnitudes are kept"
        yield Note("dora-error-unbounded", text)
    if (own := dialect_of(before) or before.adapter.format) != manner.dialect:
        text = f"is {own}, and expand writes it as {manner.dialect}, the dialect of the fleet"
        yield Note("expands-in-another-dialect", text)
    if files := files_beside(source):
        yield Note("files-not-kept", f"files next to the weights are not kept: {listed(sorted(files))}")


def told(members: Sequence[Member]) -> Iterator[Note]:
    """The notes of all members: one for those that say the same, and one for all layers that are left out."""
    alike = by_key((note, member.source.name) for member in members for note in member.notes)
    for note, names in alike.items():
        yield note.under(names[0]) if len(names) == 1 else Note(note.code, f"{len(names)} adapters: {note.text}")
    if dropped := [(member.source.name, target) for member in members for target in member.dropped]:
        (name, target), count = dropped[0], len({of for of, _ in dropped})
        yield Note(
            "layers-left-out",
            f"{plural(len(dropped), 'layer')} of {plural(count, 'adapter')} {'gets' if len(dropped) == 1 else 'get'} no "
            f"directions and {'is' if len(dropped) == 1 else 'are'} left out, such as {printable(target)} of {name}",
        )
