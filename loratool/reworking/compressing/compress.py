"""`compress()`: many adapters of one base as one file of shared directions and a small file each."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratool.adapters.formats import DIALECTS, WRITTEN, has_adapter, is_adapter, replaceable
from loratool.adapters.layers import Contents
from loratool.adapters.writer import append, kept_dtype
from loratool.algebra.lowrank.joint import truncated
from loratool.algebra.lowrank.products import Product, inner
from loratool.algebra.lowrank.shared_bases import Fitter, frame, shared_bases
from loratool.arguments import PathLike, Progress, several
from loratool.errors import FitError, InputError, UsageError, printable
from loratool.fetching import local
from loratool.files.containers import ENDING, SHARED
from loratool.files.digests import recorded
from loratool.files.folders import PROVENANCE
from loratool.files.journal import Journal
from loratool.files.outputs import as_json, check_target
from loratool.files.staging import Stage, clearing_spent, staged
from loratool.files.tensor_writer import OF_DATA, TensorFile, Triple, tensor_file
from loratool.lazy import Tensor, torch
from loratool.measuring.session import session
from loratool.notes import Note
from loratool.provenance.invocations import command
from loratool.provenance.record import versions
from loratool.results.compress import CompressReport
from loratool.reworking.aligned_layers import align_layers, check_kinds, contents_apart, told_bases
from loratool.reworking.compressing.files import ABOUT, DIGEST, MARK, OWN, VERSION, Member, told
from loratool.reworking.compressing.options import CompressOptions
from loratool.reworking.compressing.planning import CORE, Fleet, Module, Plan, Prices, look_at, plan, widest_of
from loratool.reworking.compressing.reporting import Named, Outcome, reported
from loratool.reworking.dialects import Manner, in_manner
from loratool.reworking.renaming import dialect_of
from loratool.reworking.runner import record_of
from loratool.templates import listed

MOST_ADAPTERS = 500  # each has a file that is open while modules are worked on


def compress(
    adapters: Sequence[PathLike] | PathLike, out: PathLike, options: CompressOptions, progress: Progress | None = None
) -> CompressReport:
    """Write the adapters compressed together; `loratool.commands.compress` says all of it."""
    started = time.monotonic()
    paths = adapters_at(adapters)
    sources, before, manner = fleet_of(paths, options)
    layers = align_layers(sources, [1.0] * len(sources))
    if not layers:
        raise InputError("these adapters contain no low-rank update")
    with clearing_spent(out, options.dry_run):
        target = check_target(Path(out), paths, replaceable(options.overwrite or options.dry_run))
    with session(options.device, sources) as at_work:
        fleet = Fleet(sources, layers, at_work)
        fleet.measure()
        adapted = {aligned.adapter for found in layers.values() for aligned in found}
        kept = {aligned.adapter for target in fleet.kept for aligned in layers[target]}
        if idle := [sources[at].name for at in sorted(adapted - kept) if not fleet.norms[at]]:
            raise FitError(
                "every update of these adapters is zero (an untrained adapter has B = 0); leave them out:", idle
            )
        compressor = Compressor(fleet, before, manner, options, progress)
        compressor.prepare()
        facts = {**as_typed(adapters, options), "adapters": list(at_work.origins)}
        compressor.write(target, record_of("compress", paths, options, facts, compressor.notes))
        return compressor.report(target, at_work.told(started))


def as_typed(operands: Sequence[PathLike] | PathLike, options: CompressOptions) -> dict[str, str]:
    """The entry "command" of a record: with a folder of adapters as that folder, of which "operands" has each adapter."""
    paths = [local(operand, "any") for operand in several(operands)]
    return {"command": command("compress", paths, options, options.into is None)}


def adapters_at(operands: Sequence[PathLike] | PathLike) -> list[Path]:
    """The adapters that some operands mean: each itself, or those in a folder of them."""
    found: list[Path] = []
    for operand in several(operands):
        path = local(operand, "any")
        inside = sorted(path.iterdir()) if path.is_dir() and not has_adapter(path) else []
        found += [entry for entry in inside if is_adapter(entry)] or [path]
    if not found:
        raise UsageError("pass at least one adapter, or a folder of them")
    if len(found) > MOST_ADAPTERS:
        raise UsageError(
            f"compress takes at most {MOST_ADAPTERS} adapters at once (got {len(found)}); add more by --into"
        )
    return found


def fleet_of(paths: Sequence[Path], options: CompressOptions) -> tuple[list[Contents], list[Contents], Manner]:
    """The adapters under names that they have in common, as they were before that, and their dialect."""
    base = options.model()
    before = contents_apart(paths, options.readings(len(paths)), "compress", base)
    check_kinds(before, "compress")
    plain = base is not None and DIALECTS.get(dialect_of(before[0]), WRITTEN).format.takes_model
    sources, manner = in_manner(before, WRITTEN.dialects[0] if plain else None, base)  # expand takes no model
    named = zip(sources, file_names(sources), strict=True)
    return [replace(source, adapter=replace(source.adapter, name=name)) for source, name in named], before, manner


def file_name(name: str) -> str:
    """The name of an adapter as that of a file, without its ending."""
    return name.removesuffix(ENDING).replace("/", "-")


def file_names(sources: Sequence[Contents]) -> list[str]:
    """The names of adapters as those of files, without their ending. Raises `UsageError` where two are the same."""
    names = [file_name(source.name) for source in sources]
    if again := sorted({name for name in names if names.count(name) > 1 or name + ENDING == SHARED}):
        raise UsageError("adapters need names that tell their files apart:", map(printable, again))
    return names


@dataclass
class Compressor:
    """The modules of a fleet, looked at, then written."""

    fleet: Fleet
    before: Sequence[Contents]
    manner: Manner
    options: CompressOptions
    progress: Progress | None
    members: list[Member] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def prepare(self) -> None:
        """Decide what every module gets, and what every small file says."""
        fleet, options = self.fleet, self.options
        self.dtype = kept_dtype(fleet.sources, options.dtype)
        prices = Prices(self.dtype.itemsize, CORE) if options.limit[1] else Prices(1, 1)
        fixed = sum(a.layer.parameters * a.layer.rank for t in fleet.kept for a in fleet.layers[t])
        self.plan: Plan = plan(self.looked_at(prices), options, fixed * prices.factor)
        ranks = self.ranks()
        self.members = [
            Member.of(source, before, self.manner, own, self.dtype)
            for source, before, own in zip(fleet.sources, self.before, ranks, strict=True)
        ]
        if nothing := [s.name for s, own in zip(fleet.sources, ranks, strict=True) if own and not any(own.values())]:
            raise UsageError(
                f"{options.rule} is too small: no directions are left for these adapters:", map(printable, nothing)
            )

    def looked_at(self, prices: Prices) -> dict[str, Module]:
        """What can be done with every module."""
        large, small = self.fleet.by_size()
        widest = widest_of(self.fleet, self.options, prices)

        def work(target: str) -> list[tuple[str, Module]]:
            return [(target, look_at(self.fleet, target, prices, widest))]

        found = dict(self.fleet.at_work.through(work, small, len(self.fleet.targets), self.part(0), large))
        return {target: found[target] for target in self.fleet.targets}

    def part(self, which: int) -> Progress | None:
        """Progress of one of the two passes."""
        if (progress := self.progress) is None:
            return None
        count = len(self.fleet.targets)
        return lambda done, _: progress(which * count + done, 2 * count)

    def ranks(self) -> list[dict[str, int]]:
        """Of each adapter the rank at which each of its layers comes back."""
        found: list[dict[str, int]] = [{} for _ in self.fleet.sources]
        for target in self.fleet.targets:
            layers = self.fleet.layers[target]
            for cluster, directions in self.plan.clusters(target):
                for at in cluster:
                    found[layers[at].adapter][target] = min(directions, layers[at].layer.rank)
        for target in self.fleet.kept:
            for aligned in self.fleet.layers[target]:
                found[aligned.adapter][target] = aligned.layer.rank
        return found

    def announced(self) -> tuple[list[Triple], list[list[Triple]]]:
        """The tensors of the shared file and of each small one, none smaller than it will be."""
        shared: list[Triple] = []
        own: list[list[Triple]] = [list(member.announced()) for member in self.members]
        factor = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}[
            str(self.dtype).removeprefix("torch.")
        ]
        for target in self.fleet.targets:
            layers = self.fleet.layers[target]
            rows, columns = layers[0].layer.rows, layers[0].layer.columns
            for number, (cluster, count) in enumerate(self.plan.clusters(target)):
                if count and len(cluster) > 1:
                    place = f"{target}/{number}"
                    shared += [(f"{place}/U", factor, (rows, count)), (f"{place}/V", factor, (count, columns))]
                    for at in cluster:
                        rank = min(count, layers[at].layer.rank)
                        own[layers[at].adapter] += [
                            (f"{place}/B", "F32", (count, max(rank, count // 2 + 1))),
                            (f"{place}/A", "F32", (max(rank, count // 2 + 1), count)),
                        ]
                elif count:
                    (at,) = cluster
                    rank = min(count, layers[at].layer.rank)
                    place = f"{target}/{OWN}"
                    own[layers[at].adapter] += [
                        (f"{place}/B", factor, (rows, rank)),
                        (f"{place}/A", factor, (rank, columns)),
                    ]
        for target in self.fleet.kept:
            for aligned in self.fleet.layers[target]:
                layer, place = aligned.layer, f"{target}/{OWN}"
                sizes = (layer.experts, layer.rows, layer.rank), (layer.experts, layer.rank, layer.columns)
                own[aligned.adapter] += [(f"{place}/B", factor, sizes[0]), (f"{place}/A", factor, sizes[1])]
        return shared, own

    def worked(self, target: str) -> list[Outcome]:
        """A module at what the plan gives it."""
        layers = self.fleet.layers[target]
        products, weights = self.fleet.load(target), self.fleet.weights(target)
        shared: list[Named] = []
        own: list[tuple[int, Named]] = []
        errors: dict[str, tuple[float, float]] = {}

        def tell(at: int, stored: Product) -> None:
            before = products[at].to(torch.float64)
            squares = [float(inner(*pair).sum()) for pair in ((before, before), (before, stored), (stored, stored))]
            lost = max(0.0, squares[0] - 2 * squares[1] + squares[2])
            errors[self.fleet.sources[layers[at].adapter].name] = (squares[0], lost)

        for number, (cluster, count) in enumerate(self.plan.clusters(target)):
            place = f"{target}/{number}"
            if count and len(cluster) > 1:
                bases = shared_bases(frame([products[a] for a in cluster], [weights[a] for a in cluster], count), count)
                u, v = self.stored(target, bases.left), self.stored(target, bases.right)
                shared += [(f"{place}/U", u), (f"{place}/V", v)]
                fitter = Fitter.of(u, v)
                for at in cluster:
                    parts, read_back = stored_core(fitter.core(products[at]))
                    own += [(layers[at].adapter, (f"{place}/{part}", tensor)) for part, tensor in parts.items()]
                    tell(at, Product(u.double() @ read_back.up, read_back.down @ v.double()))
                continue
            for at in cluster:
                found = truncated(products[at], min(count, products[at].rank))[0]
                up, down = self.stored(target, found.up), self.stored(target, found.down)
                if count:
                    own += [(layers[at].adapter, (f"{target}/{OWN}/{part}", t)) for part, t in (("B", up), ("A", down))]
                tell(at, Product(up.double(), down.double()))
        return [Outcome(target, tuple(shared), tuple(own), errors)]

    def stored(self, target: str, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of the files; raises `FitError` where that cannot hold it."""
        found = tensor.to(self.dtype)
        if not bool(found.isfinite().all()):
            name = str(self.dtype).removeprefix("torch.")
            raise FitError(f"{printable(target)}: the factors overflow {name}; pass another --dtype")
        return found

    def as_it_is(self, target: str) -> Outcome:
        """A stack of experts, which each adapter keeps."""
        own: list[tuple[int, Named]] = []
        errors: dict[str, tuple[float, float]] = {}
        for aligned, product in zip(self.fleet.layers[target], self.fleet.load(target), strict=True):
            up, down = self.stored(target, product.up), self.stored(target, product.down)
            own += [(aligned.adapter, (f"{target}/{OWN}/B", up)), (aligned.adapter, (f"{target}/{OWN}/A", down))]
        return Outcome(target, (), tuple(own), errors)

    def through(self) -> Iterator[Outcome]:
        """All modules, worked on."""
        large, small = self.fleet.by_size()
        yield from self.fleet.at_work.through(self.worked, small, len(self.fleet.targets), self.part(1), large)
        yield from map(self.as_it_is, self.fleet.kept)

    def write(self, target: Path, record: Mapping[str, Any]) -> None:
        """All files; after a dry run none."""
        if self.options.dry_run:
            for outcome in self.through():
                self.outcomes[outcome.target] = outcome
            return
        shared, own = self.announced()
        names = [SHARED, *(member.source.name + ENDING for member in self.members)]
        needed = sum(math.prod(shape) * 4 for triples in (shared, *own) for _, _, shape in triples)
        wanted = Journal(os.urandom(16).hex(), files=set(names))
        with staged(target, wanted, needed, replaceable(self.options.overwrite)) as stage:
            with ExitStack() as stack:
                metadata = [self.about(), *(member.metadata() for member in self.members)]
                files = [
                    stack.enter_context(tensor_file(stage.folder / name, triples, header))
                    for name, triples, header in zip(names, (shared, *own), metadata, strict=True)
                ]
                self.fill(files)
            finish(stage, names, record)

    def fill(self, files: Sequence[TensorFile]) -> None:
        """Write the tensors, then what the headers say."""
        first, *others = files
        for outcome in self.through():
            for name, tensor in outcome.shared:
                append(first, name, tensor)
            for at, (name, tensor) in outcome.own:
                append(others[at], name, tensor)
            self.outcomes[outcome.target] = replace(
                outcome, shared=sizes_of(outcome.shared), own=tuple((at, sizes_of([one])[0]) for at, one in outcome.own)
            )
        digest = first.digest()
        first.metadata = {**first.metadata, DIGEST: digest}
        first.finish()
        for member, file in zip(self.members, others, strict=True):
            member.carry(file)
            file.metadata = {**file.metadata, DIGEST: digest}
            file.finish()

    def about(self) -> dict[str, str]:
        """The metadata of the shared file."""
        layers = {
            target: {"rows": found[0].layer.rows, "columns": found[0].layer.columns}
            for target, found in self.fleet.layers.items()
        }
        table = {
            "dialect": self.manner.dialect,
            "dtype": str(self.dtype).removeprefix("torch."),
            "price": self.plan.price / (1 if self.options.limit[1] else self.dtype.itemsize),
            "rule": self.options.rule,
            "layers": layers,
        }
        return {MARK: VERSION, DIGEST: OF_DATA, ABOUT: json.dumps(table)}

    @property
    def notes(self) -> tuple[Note, ...]:
        """What a user of the files should know."""
        found = list(told(self.members))
        if not self.plan.pays:
            text = "sharing directions does not pay for these adapters: each is stored alone, truncated"
            found.append(Note("sharing-does-not-pay", text))
        if kept := self.fleet.kept:
            found.append(Note("experts-kept", f"{len(kept)} stacks of experts are kept as they are: {listed(kept)}"))
        return (*found, *told_bases(self.fleet.sources), *self.manner.notes)

    def report(self, target: Path, cost: Mapping[str, Any]) -> CompressReport:
        """What became of every module and adapter."""
        return CompressReport(
            out=target,
            written=not self.options.dry_run,
            rule=self.options.rule,
            **reported(self.fleet, self.plan, self.outcomes),
            dtype=str(self.dtype).removeprefix("torch."),
            notes=self.notes,
            **cost,
        )


def finish(stage: Stage, names: Sequence[str], record: Mapping[str, Any]) -> None:
    """Count the files as written, and write what made them."""
    for name in names:
        stage.add(name)
    stage.expect([PROVENANCE])
    stage.write(PROVENANCE, as_json({**record, "versions": versions(), "files": recorded(stage.files)}))


def stored_core(core: Product) -> tuple[dict[str, Tensor], Product]:
    """A core in float32, whole or by factors, whichever has fewer numbers, and what it then is."""
    rank, (rows, columns) = core.rank, core.shape
    if rows * columns < rank * (rows + columns):
        whole = core.matrix().float()
        return {"M": whole}, Product(whole.double(), torch.eye(columns, dtype=torch.float64, device=whole.device))
    up, down = core.up.float(), core.down.float()
    return {"B": up, "A": down}, Product(up.double(), down.double())


def sizes_of(named: Sequence[Named]) -> tuple[Named, ...]:
    """The same tensors without their values."""
    return tuple((name, tensor.to("meta")) for name, tensor in named)
