"""`convert()`: the same adapter as another tool spells it, read back and compared before it is published."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.as_lora import kind_unknown
from loratool.adapters.formats import DIALECTS, NAMED, WRITTEN, format_of, read_adapter
from loratool.adapters.formats.format import Parts, Spelling
from loratool.adapters.layers import Contents, check_read, contents_of, innermost
from loratool.adapters.ranks import RankRule, evened
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.training_data import without_training_data
from loratool.adapters.unsettled import settled as on_model
from loratool.adapters.writer import (
    Copied,
    FactorOptions,
    Output,
    Rounded,
    check_adapter_target,
    files_beside,
    kept_name,
    told_beside,
)
from loratool.algebra.lowrank.joint import truncated
from loratool.algebra.lowrank.products import Product, negligible, padded, singular_values
from loratool.algebra.updates.replacing import Replace
from loratool.arguments import PathLike, Progress
from loratool.bases.opening import open_checkpoint
from loratool.errors import FitError, InputError, LoratoolError, UsageError, printable
from loratool.fetching import local
from loratool.layouts.diffusion.known import ARCHITECTURES
from loratool.lazy import torch
from loratool.measuring.session import Session, copying, hashing, session
from loratool.notes import Note
from loratool.options.described import FLAG, Choice, Number, PlaceKind, option
from loratool.options.writing import PublishOptions
from loratool.provenance.inputs import ModelDigests, told_model
from loratool.results.convert import ConvertedLayer, ConvertReport
from loratool.reworking.converting.carrying import carried
from loratool.reworking.converting.dora import Moved, as_lora, moved_by
from loratool.reworking.converting.forms import baked, check_baked, in_their_form, kernels_in, projections
from loratool.reworking.converting.keeping import (
    can_keep,
    carry,
    copies,
    is_same,
    kept,
    may_be_copied,
    only_low_rank,
    others_in,
    whole,
)
from loratool.reworking.converting.losing import check_has_names, doubts, lengths_lost, without_losses
from loratool.reworking.converting.naming import (
    LAYOUTS,
    Wanted,
    hint_of,
    refuse_image_modules,
    respelled,
    with_experts_apart,
)
from loratool.reworking.converting.proof import Compared, Comparison, places_of, read_back
from loratool.reworking.converting.rows import Target, narrowed, settled
from loratool.reworking.converting.servers import SERVERS, Server, server_for
from loratool.reworking.converting.wholes import (
    added_up,
    check_norms,
    outlines,
    stored_in_full,
    with_biases_apart,
    with_values,
)
from loratool.reworking.dialects import Manner
from loratool.reworking.runner import Draft, Made, Maker, Rest, run


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(FactorOptions, ReadingOptions, PublishOptions):
    """Of `convert`."""

    to: str | None = option(help="Dialect to write.", kind=Choice(lambda: tuple(DIALECTS)))
    server: str | None = option(
        "--for",
        help=f"Write what a server accepts: {', '.join(SERVERS)}, or one of them with @RELEASE.",
        metavar="SERVER",
        values=lambda _operands: SERVERS,
    )
    architecture: str | None = option(
        help="Architecture of an image or video model, where the names of modules fit several.",
        kind=Choice(lambda: tuple(ARCHITECTURES)),
    )
    base: str | None = option(
        help="Base model of the adapter, for what the adapter does not record.",
        kind=PlaceKind(),
    )
    rank: int | None = option(
        help="Approximate layers of a larger rank by this one; the report states the error.",
        kind=Number(whole=True, low=1),
    )
    energy: float | None = option(
        help="Approximate each layer by the smallest rank that keeps this fraction of ‖ΔW‖².",
        kind=Number(above=0, high=1),
    )
    accept_loss: bool = option(
        help="Leave out what the dialect cannot express; the report names it.", default=False, kind=FLAG
    )

    strip_metadata: bool = option(
        help="Remove captions, paths and names of data sets from the header.", default=False, kind=FLAG
    )

    @property
    def shortens(self) -> bool:
        """Whether layers may be approximated."""
        return self.rank is not None or self.energy is not None


@dataclass(frozen=True)
class Goal(Manner):
    """What is asked for."""

    server: Server | None = None

    @classmethod
    def of(cls, options: ConvertOptions) -> Goal:
        """Raises `UsageError` where it is nothing, or two things."""
        if (options.to is None) == (options.server is None):
            raise UsageError(
                f"pass either --to with one of {', '.join(DIALECTS)}, or --for with one of {', '.join(SERVERS)}"
            )
        server = server_for(options.server) if options.server is not None else None
        dialect = server.dialect if server is not None else options.to or ""
        if options.architecture and dialect not in LAYOUTS:
            raise UsageError(f"--architecture is for image and video models, and {dialect} is for language models")
        return cls(DIALECTS[dialect].format, dialect, server=server)


def convert(
    adapter: PathLike, out: PathLike, options: ConvertOptions, progress: Progress | None = None
) -> ConvertReport:
    """Write the adapter in another dialect; `loratool.commands.convert` says all of it."""
    started = time.monotonic()
    goal = Goal.of(options)
    (way,) = options.readings(1)
    path = local(adapter, "adapter")
    home = local(options.base, "model") if options.base is not None else None
    options = replace(options, base=os.fspath(home) if home else None)  # a record names its commit
    target = check_adapter_target(out, [path, *([home] if home else [])], options, goal.form)
    base = open_checkpoint(home) if home else None
    config = base.config if base is not None else {}
    read = read_adapter(path, way)
    refuse_image_modules(read.updates, goal.dialect)  # before a dialect asks for a config, which image models have not
    goal = replace(goal, form=goal.form.for_model(config))
    given = added_up(on_model(read, config), goal.dialect)
    check_has_names(given, goal.dialect)
    check_read(given, "convert")  # before it is said what else would be lost
    if base is not None and goal.dialect == "peft":
        given = with_values(given, base)
    keeps = can_keep(given, goal.dialect) and not options.shortens
    kernels = kernels_in(given, base) if base is not None else {}
    others = others_in(given, goal.dialect) if keeps else {}
    rest = replace(given, updates={t: update for t, update in given.updates.items() if t not in others})
    plain, kinds = baked(rest, options.shortens or keeps, kernels)
    lengths = lengths_lost(plain, goal.form, goal.dialect, goal.server) if options.shortens and base else ()
    moved, told = moved_by(plain, lengths, base) if base and lengths else ({}, ())
    simple = replace(plain, updates={t: innermost(u) if t in moved else u for t, u in plain.updates.items()})
    found, lost = without_losses(simple, goal.form, goal.dialect, goal.server, options.accept_loss)
    contents = contents_of(replace(found, notes=(*found.notes, *told)), "convert")
    contents = with_biases_apart(contents, kinds if keeps else ())
    if not contents.layers and not others and (goal.form is not NAMED or not stored_in_full(contents)):
        raise InputError(f"{printable(contents.adapter.file.path)}: contains no low-rank update")
    origins = hashing([contents])
    hint = options.architecture or hint_of(contents)
    beside = outlines(contents, others)
    wanted = respelled(contents.layers, goal.dialect, options.architecture or "", hint, base, beside)
    forms = projections(contents, kernels, "" if wanted.is_assumed else wanted.architecture)
    if (shaped := in_their_form(contents, forms)) is not contents:
        contents = shaped
        wanted = respelled(contents.layers, goal.dialect, options.architecture or "", hint, base, beside)
    if options.architecture and not wanted.architecture:
        raise InputError(
            f"--architecture is for image and video models; these are not modules of {options.architecture}"
        )
    check_norms(contents, goal.dialect, wanted.architecture)
    if goal.server is not None and goal.server.splits(config):
        wanted = with_experts_apart(wanted, contents.layers, config, str(goal.server))
    made = Converter(contents, wanted, goal, options, kinds, moved, {**kernels, **forms}, lost)
    made.models = {"base": told_model(base, ModelDigests.of(base, compute=False))} if base is not None else {}
    if keeps:
        made.keep(given, whole(wanted.beside, others))
    with session("cpu", [contents], origins) if made.computes else copying(origins) as at_work:
        made.begin(at_work)
        for _ in at_work.spread(partial(check_baked, given, plain), made.kinds):
            pass
        done = run(made, target, [path], options, progress)
    return made.report(target, done, at_work.told(started))


class Converter(Maker[str, str]):
    """The layers of one adapter, as those of another."""

    command = "convert"
    given: Adapter  # with LoHa and LoKr as they are

    def __init__(
        self,
        contents: Contents,
        wanted: Wanted,
        goal: Goal,
        options: ConvertOptions,
        kinds: Mapping[str, str],  # of layers that were LoHa or LoKr
        moved: Mapping[str, Moved],  # what DoRA makes of layers that are written as LoRA
        kernels: Mapping[str, tuple[int, ...]],  # of the base's layers
        lost: tuple[Note, ...],
    ) -> None:
        self.contents, self.wanted, self.goal, self.options = contents, wanted, goal, options
        self.kinds, self.moved, self.kernels, self.lost = kinds, moved, kernels, lost
        self.dtype = kept_name([contents], options.dtype)
        self.most = options.rank if options.rank is None or goal.server is None else goal.server.raised(options.rank)
        self.own: dict[str, int] = {}  # the ranks that layers of the output have by themselves
        self.cut: dict[str, int] = {}  # those to which they are approximated
        self.ranks: dict[str, int] = {}  # those that they get
        self.factors: dict[str, dict[str, float]] = {}  # target of the output → of the input → what its rows take
        self.as_read: Mapping[str, Target] = {}  # the targets as the dialect's reader calls them
        self.compared: dict[str, Compared] = {}
        self.beside: dict[str, float] = {}  # the errors of what is no layer
        self.targets = wanted.targets
        self.kept: dict[str, str] = {}  # layers of the output whose tensors are those of a layer of the input
        self.copied: dict[str, Copied] = {}  # layers of the output whose factors are those of a layer of the input

    @property
    def computes(self) -> bool:
        """Whether any number of the output is not one of the input, so that torch is needed."""
        if self.kinds or self.moved or self.options.shortens or not only_low_rank(self.contents):
            return True
        layers = self.contents.layers
        if not all(may_be_copied(target, layers, self.dtype) for target in self.targets.values()):
            return True
        self.draft()
        return self.copied.keys() != self.targets.keys()

    def begin(self, at_work: Session) -> None:
        """What has to be computed before a layer is written."""
        self.at_work = at_work
        self.contents = as_lora(self.contents, self.moved, self.most, self.options.energy, at_work)
        self.targets = narrowed(self.targets, self.contents.layers, self.load)

    def keep(self, given: Adapter, others: Mapping[str, str]) -> None:
        """Write LoHa and LoKr as they are, where a layer stays one, and `others` by the target that each gets."""
        self.given, layers = given, self.contents.layers
        self.kept = kept(self.targets, self.kinds, layers)
        self.targets = {name: target for name, target in self.targets.items() if name not in self.kept}
        rest = {target: layer for target, layer in layers.items() if target not in self.kept.values()}
        self.kinds = {target: kind for target, kind in self.kinds.items() if target in rest}
        self.contents = replace(self.contents, layers=rest)
        self.kept |= others
        beside = {name: target for name, target in self.wanted.beside.items() if name not in others}
        self.wanted = replace(self.wanted, beside=beside)

    def draft(self) -> Draft:
        return self.drafted

    @cached_property
    def drafted(self) -> Draft:
        layers = self.contents.layers
        names = self.goal.spelling({name: target.kind for name, target in self.targets.items()}, self.contents)
        self.as_read = read_back(self.targets, names)
        scales = self.scales(names)
        self.choose_ranks(names)
        forms = {name: target.form(layers, self.ranks[name]) for name, target in self.targets.items()}
        self.copied = dict(copies(self.targets, layers, forms, self.factors, names, self.dtype))
        beside = carried(self.contents, self.targets, names, forms, scales, self.wanted.beside)
        parts = Parts(
            self.ranks,
            scales,
            self.wanted.architecture,
            dora=self.contents.dora,
            lora_bias=bool(self.contents.biases),
            tokens=beside.tokens,
            saved=tuple(self.newly_saved()),
        )
        adapter = self.contents.adapter
        if self.options.strip_metadata:
            adapter = replace(adapter, config=without_training_data(adapter.config))
        self.config = dict(names.describe([adapter], parts))
        self.notes = tuple(self.remarks())
        if self.kept:
            carry(beside, self.given, names, self.kept)
        return Draft(forms, names, self.dtype, beside, scales, [adapter], self.wanted.architecture)

    def newly_saved(self) -> Iterator[str]:
        """Modules that are saved whole, which a config of PEFT's does not name already."""
        named = format_of(self.contents.adapter) is WRITTEN
        every = stored_in_full(self.contents)
        yield from (
            name.rpartition(".")[0]
            for name, target in self.wanted.beside.items()
            if not named and isinstance(every[target.sources[0]], Replace)
        )

    def remarks(self) -> Iterator[Note]:
        """What a user of the output should know."""
        yield from self.wanted.notes
        yield from self.contents.adapter.notes
        for kind in dict.fromkeys(self.kinds.values()):
            count = sum(each == kind for each in self.kinds.values())
            yield Note("written-as-lora", f"{count} layer{'s' * (count != 1)} of {kind} written as LoRA")
        yield from kind_unknown({target: self.contents.layers[target].update for target in self.kinds}, self.kernels)
        if self.most != self.options.rank:
            yield Note(
                "rank-raised",
                f"rank {self.options.rank} was raised to {self.most}, the next that {self.goal.server} takes",
            )
        yield from doubts(self.goal.server, self.targets)
        yield from self.goal.form.rank_notes(self.own, self.ranks)
        yield from told_beside(self.contents)

    def choose_ranks(self, names: Spelling) -> None:
        """The rank of every layer that is written: its own, or one to which it is approximated, padded where asked for."""
        self.own = {name: target.rank(self.contents.layers) for name, target in self.targets.items()}
        if self.most is not None:
            self.cut = {name: self.most for name, rank in self.own.items() if rank > self.most}
        if self.options.energy is not None:
            rule = RankRule.of({"energy": self.options.energy})
            given = [name for name, target in self.targets.items() if not set(target.sources) <= self.moved.keys()]
            enough = self.at_work.spread(lambda name: (name, max(1, rule.enough(self.energies(name)))), given)
            self.cut |= {name: rank for name, rank in enough if rank < self.cut.get(name, self.own[name])}
        kept = {**self.own, **self.cut}
        self.ranks = evened(kept, names.of_one_rank())
        if self.goal.server is not None and self.goal.server.uniform:
            self.ranks = dict.fromkeys(kept, self.goal.server.rank(max(kept.values())))
        self.cut = {name: self.ranks[name] for name in self.cut if self.ranks[name] < self.own[name]}

    def energies(self, name: str) -> list[float]:
        """Squares of the singular values of a layer of the output."""
        values = singular_values(self.targets[name].product(self.load, self.factors[name], self.own[name]))
        values = values * (values > negligible(values) * values[..., :1])
        squares = values.square()
        return (squares if squares.dim() == 1 else squares.sum(0)).tolist()

    def scales(self, names: Spelling) -> dict[str, float]:
        """What the output says that its layers are multiplied by; the rest of each scale goes into its rows."""
        own = {target: layer.scale for target, layer in self.contents.layers.items()}
        wanted = {name: own[target.sources[0]] / names.times(name) for name, target in self.targets.items()}
        plain = self.goal.server is not None and self.goal.server.plain
        said = names.scales(dict.fromkeys(wanted, 1.0) if plain else wanted)
        self.factors = {
            name: {t: settled(own[t], said[name] * names.times(name)) for t in target.sources}
            for name, target in self.targets.items()
        }
        return dict(said)

    def tasks(self) -> Iterable[str]:
        return self.targets

    def work(self, output: Output, task: str) -> list[Made[str]]:
        if task in self.copied:
            if not all(tensor.finite() for tensor in self.copied[task].stored):
                self.contents.adapter.check_values()  # which tells all of them
            return [Made((self.copied[task],), task)]
        target, dtype = self.targets[task], getattr(torch, output.dtype)
        if task in self.cut:
            whole = target.product(self.load, self.factors[task], self.own[task])
            product = padded(truncated(whole, self.cut[task])[0], self.ranks[task]).to(dtype)
        else:
            product = target.product(self.load, self.factors[task], self.ranks[task]).to(dtype)
        if not product.is_finite:
            self.contents.adapter.check_values()
            raise FitError(f"{printable(task)}: the factors overflow {output.dtype}; pass another --dtype")
        return [Made((Rounded(task, product, product),), task)]

    def load(self, target: str) -> Product:
        """The factors of a layer of the input, in float64: what is made of them is rounded once."""
        return self.contents.layers[target].load_factors(torch.device("cpu"), torch.float64)

    def rest(self, draft: Draft) -> Rest:  # noqa: ARG002 (known before)
        server = {"for": str(self.goal.server)} if self.goal.server else {}
        return Rest(
            config=self.config,
            facts={"adapter": self.at_work.origins[0], "to": self.goal.dialect, **server},
            notes=(*self.lost, *self.notes),
            files=files_beside(self.contents),
            folders=[self.contents.adapter.folder],
        )

    def prove(self, place: Path, rest: Rest) -> Rest:
        """Compare every layer with what its dialect's reader makes of the output. Raises `LoratoolError`: a bug."""
        found = self.goal.form.read(place)
        same = [
            name for name, source in self.kept.items() if is_same(self.given.updates[source], found.updates.get(name))
        ]
        others = {target: update for target, update in found.updates.items() if target not in same}
        written = contents_of(replace(found, updates=others), "convert")
        if odd := sorted({*written.layers, *same} ^ {*self.as_read, *self.kept}):
            raise LoratoolError("this is a bug in loratool: these layers are not read back:", map(printable, odd))
        places = places_of(self.as_read)
        comparison = Comparison(self.contents, written, places, self.dtype, self.moved, self.wanted.beside, self.copied)

        def work(target: str) -> tuple[str, Compared]:
            return target, comparison.compare(target)

        self.compared = dict(self.at_work.spread(work, self.contents.layers))
        why = self.approximated(places_of(self.targets))
        wrong = [
            f"{printable(target)}: the error is {found.error:.3g}, and rounding makes {found.limit:.1g} at most"
            for target, found in self.compared.items()
            if not found.error <= found.limit and target not in why
        ]
        self.beside = comparison.beside()
        wrong += [
            f"{printable(t)}: the error is {error:.3g}"
            for t, error in self.beside.items()
            if not error <= comparison.limit(t)
        ]
        if comparison.zeros():
            wrong.append("rows that the input does not change are not zero")
        if wrong:
            raise LoratoolError("this is a bug in loratool: what was written differs from what was read:", wrong)
        return replace(
            rest, totals=Proof(max((*(x.error for x in self.compared.values()), *self.beside.values()), default=0.0))
        )

    def approximated(self, places: Mapping[str, Any]) -> dict[str, str]:
        """Layers of the input of which any row was approximated → how."""
        cut = {
            target: f"rank {self.own[name]} → {self.cut[name]}"
            for target, held in places.items()
            for name in {each.target for each in held}
            if name in self.cut
        }
        return cut | {target: f"DoRA → rank {self.contents.layers[target].rank}" for target in self.moved}

    def report(self, out: Path, rest: Rest, told: Mapping[str, Any]) -> ConvertReport:
        """What was done."""
        held = places_of(self.targets)
        places = {t: tuple(dict.fromkeys(h.target for h in held.get(t, ()))) for t in self.contents.layers}
        why = self.approximated(held)
        modules = {
            target: ConvertedLayer(
                written=places[target],
                scale=layer.scale,
                factor=next((self.factors[name][target] for name in places[target]), 1.0),
                norm=self.compared[target].norm if target in self.compared else None,
                error=self.compared[target].error if target in self.compared else None,
                approximated=why.get(target, ""),
            )
            for target, layer in sorted(self.contents.layers.items())
        }
        for name, source in self.kept.items():
            modules[source] = ConvertedLayer(
                (name,),
                getattr(innermost(self.given.updates[source]), "scale", 1.0),
                1.0,
                None,
                None if self.options.dry_run else 0.0,
            )
        errors = {t: found.error for t, found in self.compared.items() if t not in why} | self.beside
        errors = errors or {target: found.error for target, found in self.compared.items()}
        adapter = self.contents.adapter
        return ConvertReport(
            out=out,
            written=not self.options.dry_run,
            source=", ".join(adapter.dialects) or adapter.format,
            dialect=self.goal.dialect,
            server=str(self.goal.server or ""),
            modules=modules,
            layers=len(self.targets) + len(self.kept),
            ranks=self.ranks,
            dtype=self.dtype,
            beside=dict(sorted(self.beside.items())),
            worst=max(
                errors,
                key=errors.__getitem__,
                default="" if self.options.dry_run else next(iter(self.kept.values()), ""),
            ),
            lost=self.lost,
            notes=tuple(note for note in rest.notes if note not in self.lost),
            **told,
        )


@dataclass(frozen=True)
class Proof:
    """What the record of an output says of it."""

    worst_error: float  # ‖ΔW − ΔW'‖ / ‖ΔW‖ of the worst layer, as read back
