"""`compress --into`: adapters added to bases that are there, which stay as they are.

A new adapter gets a core in the cluster that holds most of it, and triples of the rest as long as each keeps what the
shared file says that a byte must keep; or triples alone, where that is worth more.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratool.adapters.formats import DIALECTS, replaceable
from loratool.adapters.layers import Contents, Kind
from loratool.adapters.writer import append, dtype_name, factor_tensors
from loratool.algebra.lowrank.joint import truncated
from loratool.algebra.lowrank.products import Product, difference, length, side_by_side, singular_values
from loratool.algebra.lowrank.shared_bases import Fitter
from loratool.algebra.lowrank.spending import Curve, spend
from loratool.arguments import PathLike, Progress
from loratool.errors import ANOTHER_OUT, FitError, InputError, UsageError, printable
from loratool.fetching import local, place_of
from loratool.files.containers import ENDING, SHARED
from loratool.files.digests import digest_of
from loratool.files.folders import PROVENANCE
from loratool.files.journal import Journal
from loratool.files.outputs import as_json, write_file
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.staging import staged
from loratool.files.tensor_writer import tensor_file
from loratool.files.untrusted import LARGEST_RECORD, read_json
from loratool.lazy import Tensor, torch
from loratool.measuring.session import Session, session
from loratool.notes import Note
from loratool.provenance.record import versions
from loratool.results.compress import CompressedAdapter, CompressedModule, CompressedTotals, CompressReport
from loratool.reworking.aligned_layers import contents_apart
from loratool.reworking.compressing.compress import adapters_at, as_typed, file_name, file_names, stored_core
from loratool.reworking.compressing.files import DIGEST, OWN, Member, Opened, open_shared, told
from loratool.reworking.compressing.options import CompressOptions
from loratool.reworking.compressing.planning import alone_curve
from loratool.reworking.dialects import Manner, in_manner


def add_to(
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike | None,
    options: CompressOptions,
    progress: Progress | None = None,
) -> CompressReport:
    """Add adapters to a folder that `compress` made; `loratool.commands.compress` says all of it."""
    started = time.monotonic()
    if options.into is None:
        raise UsageError("Missing option '-o' / '--output', or --into SHARED, so nothing was written", hint=ANOTHER_OUT)
    if out is not None:
        raise UsageError("-o and --into are mutually exclusive")
    if place_of(options.into) is not None:
        raise UsageError(
            f"--into {printable(options.into)}: adapters can be added to a local folder only; copy it here first, or "
            "compress all of them again with -o"
        )
    paths = adapters_at(adapters)
    folder = local(options.into, "any")
    bases = open_shared(folder)
    folder = folder.parent if folder.name == SHARED else folder
    prices = Stated.of(bases)
    base = options.model()
    before = contents_apart(paths, options.readings(len(paths)), "compress", base)
    sources, manner = in_manner(before, prices.dialect, base)
    check(sources, bases, folder, options)
    with session(options.device, sources) as at_work:
        newcomers = [Newcomer(source, own, bases, prices, at_work) for source, own in zip(sources, before, strict=True)]
        for done, newcomer in enumerate(newcomers):
            newcomer.work()
            if not options.dry_run:
                write(folder, newcomer, newcomer.member(manner), options)
            if progress:
                progress(done + 1, len(newcomers))
        if not options.dry_run:
            list_files(folder, newcomers, as_typed(adapters, options)["command"])
        return reported(folder, newcomers, manner, options, at_work.told(started))


@dataclass(frozen=True)
class Stated:
    """What the shared file says of those that are added to it."""

    dialect: str
    dtype_name: str
    price: float  # of a byte

    @property
    def dtype(self) -> torch.dtype:
        """Of the cores; asked for once torch is there."""
        found: torch.dtype = getattr(torch, self.dtype_name)
        return found

    @classmethod
    def of(cls, bases: Opened) -> Stated:
        about = bases.about
        try:
            dtype, price = str(about["dtype"]), float(about["price"])
            if about["dialect"] not in DIALECTS or dtype not in FLOAT_NAMES.values() or not math.isfinite(price):
                raise ValueError
            return cls(about["dialect"], dtype, price)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"{printable(bases.file.path)}: its metadata do not say dialect, dtype and price"
            ) from None


def check(sources: Sequence[Contents], bases: Opened, folder: Path, options: CompressOptions) -> None:
    """Raise for adapters that cannot be added."""
    there = [name for name in file_names(sources) if os.path.lexists(folder / f"{name}{ENDING}")]
    if there and not (options.overwrite or options.dry_run):
        raise UsageError(
            f"{printable(folder)} has these adapters already; pass --overwrite to replace them:", map(printable, there)
        )
    problems = []
    for source in sources:
        for target, layer in source.layers.items():
            for cluster in bases.clusters.get(target, ()):
                shape = bases.shapes[target, cluster]
                if shape != (layer.rows, layer.columns):
                    problems.append(
                        f"{printable(target)}: {layer.rows} × {layer.columns} in {source.name}, {shape[0]} × {shape[1]} "
                        "in the shared file"
                    )
    if problems:
        raise FitError("these adapters do not have the base of the shared file:", dict.fromkeys(problems))


@dataclass(frozen=True)
class Stored:
    """A layer of a new adapter, as it is stored."""

    cluster: str  # empty where it has no core
    core: Mapping[str, Tensor]
    own: Product | None
    rank: int
    error: float  # ‖ΔW − ΔW'‖²

    @property
    def bytes(self) -> int:
        factors = [self.own.up, self.own.down] if self.own else []
        return sum(tensor.nbytes for tensor in (*self.core.values(), *factors))

    def named(self, target: str) -> Iterator[tuple[str, Tensor]]:
        for part, tensor in self.core.items():
            yield f"{target}/{self.cluster}/{part}", tensor
        if self.own is not None:
            yield f"{target}/{OWN}/B", self.own.up
            yield f"{target}/{OWN}/A", self.own.down


@dataclass
class Newcomer:
    """An adapter that is added."""

    source: Contents
    before: Contents
    bases: Opened
    stated: Stated
    at_work: Session
    layers: dict[str, Stored] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)  # of truncation

    @property
    def name(self) -> str:
        return file_name(self.source.name)

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers.values())

    def work(self) -> None:
        """Find what is stored of every layer."""
        self.norms = {target: length(self.load(target)) for target in self.source.layers}
        squared = math.fsum(norm**2 for norm in self.norms.values())
        if not squared:
            raise FitError(f"{self.name}: every update is zero (an untrained adapter has B = 0)")
        for target, layer in self.source.layers.items():
            product = self.load(target)
            if layer.kind is Kind.PARAMETER:
                self.layers[target] = Stored("", {}, product.to(self.stated.dtype), layer.rank, 0.0)
                continue
            self.curves[target] = alone_curve(product, 1 / squared, self.side(product))
            clusters = ("", *self.bases.clusters.get(target, ()))  # an empty word for none
            tried = [self.stored(product, target, cluster, squared) for cluster in clusters]
            self.layers[target] = max(tried, key=lambda found: self.worth(found, self.norms[target] ** 2, squared))

    def load(self, target: str) -> Product:
        return self.source.load(target, self.at_work.device, self.at_work.dtype).to(torch.float64)

    def side(self, product: Product) -> float:
        """Bytes of a triple."""
        return sum(product.shape) * self.stated.dtype.itemsize

    def worth(self, found: Stored, whole: float, squared: float) -> float:
        """ω kept − μ bytes."""
        return (whole - found.error) / squared - self.stated.price * found.bytes

    def stored(self, product: Product, target: str, cluster: str, squared: float) -> Stored:
        """A layer with the bases of a cluster, or without any; `squared` is ‖ΔW‖² of all layers."""
        core: Mapping[str, Tensor] = {}
        parts: list[Product] = []
        rank, rest = 0, product
        if cluster:
            device = product.up.device
            u, v = (self.bases.load(target, cluster, part, device=device, dtype=torch.float64) for part in "UV")
            core, small = stored_core(Fitter.of(u, v).core(product))
            parts.append(Product(u @ small.up, small.down @ v))
            rank, rest = min(product.rank, u.shape[1], v.shape[0]), difference(product, parts[0])
        size = length(product)
        least = max(self.stated.price * self.side(product) * squared, (product.precision * size) ** 2)
        count = int((singular_values(rest).double().square() > least).sum())
        own = truncated(rest, count)[0].to(self.stated.dtype) if count else None
        if own is not None:
            parts.append(own.to(torch.float64))
        lost = length(difference(product, side_by_side(parts))) ** 2 if parts else size**2
        return Stored(cluster, core, own, min(*product.shape, rank + count), lost)

    def member(self, manner: Manner) -> Member:
        """What its file says besides."""
        source = replace(self.source, adapter=replace(self.source.adapter, name=self.name))
        ranks = {target: layer.rank for target, layer in self.layers.items()}
        return Member.of(source, self.before, manner, ranks, self.stated.dtype)


def write(folder: Path, newcomer: Newcomer, member: Member, options: CompressOptions) -> None:
    """The file of an adapter, beside those that are there."""
    name = newcomer.name + ENDING
    tensors = [one for target, layer in newcomer.layers.items() for one in layer.named(target)]
    announced = [(tensor, dtype_name(values), tuple(values.shape)) for tensor, values in tensors]
    announced += list(member.announced())
    wanted = Journal(os.urandom(16).hex(), files={name})
    needed = newcomer.bytes + sum(8 * math.prod(shape) for _, _, shape in member.announced())
    metadata = {**member.metadata(), DIGEST: newcomer.bases.digest}
    with staged(folder / name, wanted, needed, replaceable(options.overwrite), single=name) as stage:
        with tensor_file(stage.folder / name, announced, metadata) as file:
            for tensor, values in tensors:
                append(file, tensor, values)
            member.carry(file)
            file.finish()
        stage.add(name)


def list_files(folder: Path, newcomers: Sequence[Newcomer], command: str) -> None:
    """Add the new files to the folder's record, with the command that made them."""
    place = folder / PROVENANCE
    record = dict(read_json(place, LARGEST_RECORD, lenient=True)) if place.is_file() else {}
    names = [newcomer.name + ENDING for newcomer in newcomers]
    files = record.get("files", {}) | {name: digest_of(folder / name).record() for name in names}
    record |= {
        "files": dict(sorted(files.items())),
        "added": [*record.get("added", []), command],
        "versions": versions(),
    }
    write_file(place, as_json(record))


def reported(
    folder: Path,
    newcomers: Sequence[Newcomer],
    manner: Manner,
    options: CompressOptions,
    cost: Mapping[str, Any],
) -> CompressReport:
    """What became of the new adapters."""
    modules: dict[str, CompressedModule] = {}
    adapters: dict[str, CompressedAdapter] = {}
    for newcomer in newcomers:
        cut, sizes = truncation(newcomer), newcomer.norms
        errors = {t: math.sqrt(one.error) / sizes[t] if sizes[t] else 0.0 for t, one in newcomer.layers.items()}
        for target, layer in newcomer.layers.items():
            known = modules.get(target, CompressedModule((), (), {}, {}))
            modules[target] = CompressedModule(
                (*known.clusters, (newcomer.name,)),
                (*known.directions, layer.rank),
                {**known.errors, newcomer.name: errors[target]},
                {**known.truncated, newcomer.name: cut.get(target, 0.0)},
            )
        whole = math.fsum(norm**2 for norm in newcomer.norms.values())
        lost = math.fsum(layer.error for layer in newcomer.layers.values())
        cut_lost = math.fsum((cut.get(t, 0.0) * norm) ** 2 for t, norm in newcomer.norms.items())
        worst = max(errors, key=errors.__getitem__)
        stored = {t.info for layer in newcomer.source.layers.values() for t in factor_tensors(layer)}
        adapters[newcomer.name] = CompressedAdapter(
            newcomer.name + ENDING,
            sum(info.nbytes for info in stored),
            newcomer.bytes,
            math.sqrt(whole),
            math.sqrt(lost / whole),
            math.sqrt(cut_lost / whole),
            worst,
            errors[worst],
        )
    count = len(adapters)
    return CompressReport(
        out=Path(os.path.realpath(folder)),
        written=not options.dry_run,
        rule=options.rule,
        totals=CompressedTotals(
            bytes_before=sum(one.bytes_before for one in adapters.values()),
            bytes_shared=0,
            bytes=sum(one.bytes for one in adapters.values()),
            error=math.sqrt(math.fsum(one.error**2 for one in adapters.values()) / count),
            truncated=math.sqrt(math.fsum(one.truncated**2 for one in adapters.values()) / count),
            pays=any(layer.cluster for newcomer in newcomers for layer in newcomer.layers.values()),
            price=newcomers[0].stated.price,
        ),
        adapters=adapters,
        modules=dict(sorted(modules.items())),
        dtype=str(newcomers[0].stated.dtype).removeprefix("torch."),
        notes=(*told([each.member(manner) for each in newcomers]), *strangers(newcomers), *manner.notes),
        **cost,
    )


def strangers(newcomers: Iterable[Newcomer]) -> Iterator[Note]:
    """A note of each new adapter that changes nothing which the shared file has directions of."""
    for newcomer in newcomers:
        if newcomer.bases.clusters and not any(
            newcomer.bases.clusters.get(target) for target in newcomer.source.layers
        ):
            yield Note(
                "no-common-layer",
                f"{printable(newcomer.name)}: has no layer in common with the shared file, so it may be of another "
                "model; it is stored alone, truncated",
            )


def truncation(newcomer: Newcomer) -> dict[str, float]:
    """The relative error of each layer by truncation that spends as many bytes."""
    choices, _ = spend([((curve,),) for curve in newcomer.curves.values()], newcomer.bytes)
    ends = (
        (curve.kept[choice.ranks[0]], curve.kept[-1])
        for curve, choice in zip(newcomer.curves.values(), choices, strict=True)
    )
    errors = (math.sqrt(max(0.0, 1 - kept / whole)) if whole else 0.0 for kept, whole in ends)
    return dict(zip(newcomer.curves, errors, strict=True))
