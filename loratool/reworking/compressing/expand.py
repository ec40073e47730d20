"""`expand()`: one adapter out of a folder that `compress` made, as plain LoRA."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import StoredTensor
from loratool.adapters.formats import DIALECTS
from loratool.adapters.layers import Form
from loratool.adapters.writer import Carried, Output, check_adapter_target
from loratool.algebra.lowrank.joint import truncated
from loratool.algebra.lowrank.products import Product, padded
from loratool.arguments import PathLike, Progress
from loratool.errors import InputError, printable
from loratool.fetching import local
from loratool.files.containers import SHARED
from loratool.files.digests import sha256_of
from loratool.files.hub_cache import name_of
from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import torch
from loratool.measuring.session import Session, session
from loratool.notes import Note
from loratool.provenance.inputs import told_input
from loratool.provenance.recorded import made_of
from loratool.results.compress import ExpandReport
from loratool.reworking.compressing.files import (
    OTHER,
    OWN,
    Opened,
    expanded,
    form_of,
    member_name,
    open_member,
    open_shared,
)
from loratool.reworking.compressing.options import ExpandOptions
from loratool.reworking.runner import Draft, Made, Maker, Rest, run


def expand(
    shared: PathLike, name: str, out: PathLike, options: ExpandOptions, progress: Progress | None = None
) -> ExpandReport:
    """Write one of the adapters; `loratool.commands.expand` says all of it."""
    started = time.monotonic()
    folder = local(shared, "any")
    bases = open_shared(folder)
    folder = folder.parent if folder.name == SHARED else folder
    name = member_name(name)
    member = open_member(folder, name, bases)
    about = member.about
    try:
        forms = {str(target): form_of(record) for target, record in about["layers"].items()}
        form = DIALECTS[about["dialect"]].format
        names = form.spelling({t: f.kind for t, f in forms.items()}, about["release"], about["dialect"])
        config, header = dict(about["config"]), {str(k): str(v) for k, v in about["header"].items()}
        stored_dtype = str(about["dtype"])
        if stored_dtype not in FLOAT_NAMES.values():
            raise ValueError(f"dtype {stored_dtype!r}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise broken(member, f"{type(error).__name__}: {error}") from None
    check_sizes(bases, member, forms)
    target = check_adapter_target(out, [folder], options, form)
    dtype = stored_dtype if options.dtype == "keep" else options.dtype
    draft = Stored(forms, names, dtype, carried_by(member), known=header)
    with session("cpu", ()) as at_work:
        rest = run(Expander(at_work, folder, bases, member, draft, config), target, [folder, name], options, progress)
        cost = at_work.told(started)
    return ExpandReport(
        out=target,
        written=not options.dry_run,
        name=str(about.get("name", name)),
        dialect=about["dialect"],
        ranks={layer: shape.rank for layer, shape in sorted(forms.items())},
        dtype=dtype,
        notes=rest.notes,
        **cost,
    )


@dataclass(frozen=True)
class Stored(Draft):
    """What is to be written where the header of the file of tensors was stored."""

    known: Mapping[str, str] = field(default_factory=dict)

    def header(self, ranks: Mapping[str, int]) -> dict[str, str]:  # noqa: ARG002 (they are those that it tells)
        return dict(self.known)


@dataclass
class Expander(Maker[str, None]):
    """Makes layers of what is shared and what is their own."""

    command = "expand"

    at_work: Session
    folder: Path
    bases: Opened
    member: Opened
    stored: Stored
    config: Mapping[str, Any]

    def draft(self) -> Draft:
        return self.stored

    def inputs(self) -> dict[str, Any]:
        return self.shared

    @cached_property
    def shared(self) -> dict[str, Any]:
        """The folder as provenance names it, with the files that an adapter is made of."""
        digests = {each.file.path.name: sha256_of(each.file.path) for each in (self.bases, self.member)}
        made = made_of(self.folder, digests)
        return {"shared": {"name": name_of(self.folder), **told_input(self.folder), "sha256": digests, **made}}

    def tasks(self) -> Iterable[str]:
        return self.stored.forms

    def work(self, output: Output, task: str) -> list[Made[None]]:
        found = at_rank(self.bases, self.member, task, self.stored.forms[task])
        return [Made((output.rounded(task, found),), None)]

    def rest(self, draft: Draft) -> Rest:  # noqa: ARG002 (everything was stored)
        return Rest(self.config, self.shared, tuple(notes(self.member)), {}, [])


def carried_by(member: Opened) -> Carried:
    """The tensors that stand beside the factors, as they are."""
    names = {name: name.removeprefix(OTHER) for name in member.file.tensors if name.startswith(OTHER)}
    return Carried({name: StoredTensor(member.file, member.file.tensors[there]) for there, name in names.items()})


def check_sizes(bases: Opened, member: Opened, forms: Mapping[str, Form]) -> None:
    """Raise `InputError` where layers are of other sizes than what is stored for them, which decide how much is written.

    Layers that a dialect gives one rank have the largest of theirs, so that of any layer may be as large as another's.
    """
    stored = {layer: sizes_of(bases, member, layer) for layer in forms}
    most = max((rank for *_, rank in stored.values()), default=0)
    for layer, form in forms.items():
        *sizes, _ = stored[layer]
        stated, kernel = [form.experts, form.rows, form.columns], math.prod(form.kernel)
        if stated != sizes:
            raise broken(member, f"{printable(layer)} is {told(sizes)}, and its header says {told(stated)}")
        if min(form.kernel, default=1) < 1 or form.columns % kernel:
            raise broken(
                member, f"{printable(layer)} has {form.columns} columns, and its header says kernels of {kernel}"
            )
        if not 1 <= form.rank <= most:
            raise broken(
                member, f"{printable(layer)}: its header says rank {form.rank}, and {most} is the largest stored"
            )


def sizes_of(bases: Opened, member: Opened, layer: str) -> tuple[int, int, int, int]:
    """(experts, rows, columns, largest rank) of what is stored for a layer."""
    if layer not in member.clusters:
        raise broken(member, f"nothing is stored for {printable(layer)}")
    sizes: tuple[int, ...] = ()
    rank = 0
    for cluster in member.clusters[layer]:
        where, left = (member, "B") if cluster == OWN else (bases, "U")
        if not where.has(layer, cluster, left):
            raise broken(member, f"{printable(layer)}: what is its own is not two factors")
        sizes = where.shapes[layer, cluster]
        rank += where.file.tensors[f"{layer}/{cluster}/{left}"].shape[-1]
    experts, rows, columns = (1, *sizes)[-3:]
    return experts, rows, columns, rank


def told(sizes: Sequence[int]) -> str:
    """Sizes of a layer, without the number of experts where there is one."""
    return " × ".join(map(str, sizes if sizes[0] != 1 else sizes[1:]))


def at_rank(bases: Opened, member: Opened, layer: str, shape: Form) -> Product:
    """ΔW of a layer at the rank that its file states, the singular values shared by both factors."""
    found = expanded(bases, member, layer, torch.device("cpu"))
    return padded(truncated(found, min(shape.rank, found.rank))[0], shape.rank)


def broken(member: Opened, why: str) -> InputError:
    return InputError(f"{printable(member.file.path)}: its metadata do not describe an adapter ({printable(why)})")


def notes(member: Opened) -> list[Note]:
    """What a user of the adapter should know."""
    base = member.about.get("base")
    return [] if base else [Note("base-unknown", "the adapter does not name its base")]
