"""`extract()`: what fine-tuning did to a checkpoint, as an adapter: the leading part of every difference."""

from __future__ import annotations

import filecmp
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from loratool.adapters.formats import WRITTEN
from loratool.adapters.formats.format import Config, Parts, Spelling
from loratool.adapters.layers import ATTENTION, Form, Kind, adapted_module
from loratool.adapters.ranks import told_of_cuts
from loratool.adapters.training import Targets, Training
from loratool.adapters.weight_files import weight_files
from loratool.adapters.writer import Output, Rounded, called, check_adapter_target, factor_name
from loratool.algebra.lowrank.products import Product, change as change_of, inner, padded
from loratool.arguments import PathLike, Progress
from loratool.bases.binding.orientation import module_of
from loratool.bases.decoded import Decoded
from loratool.bases.packed import Packed
from loratool.bases.weights import Held, Slice
from loratool.errors import FitError, InputError, printable
from loratool.fetching import local
from loratool.files.checkpoint import Checkpoint
from loratool.files.hub_cache import origin_of
from loratool.grouping import by_key
from loratool.lazy import torch
from loratool.measuring.session import Session, session
from loratool.notes import Note
from loratool.provenance.inputs import ModelDigests, told_model
from loratool.results.extract import ExtractedLayer, ExtractedTotals, ExtractReport
from loratool.reworking.dialects import Manner
from loratool.reworking.extracting.checking import (
    broken_tensors,
    check_alike,
    check_packed,
    check_saved,
    open_model,
    refuse_nothing,
)
from loratool.reworking.extracting.differences import (
    HELD,
    Difference,
    NotFiniteError,
    Part,
    Rule,
    decomposed,
)
from loratool.reworking.extracting.naming import manner_of, named_as
from loratool.reworking.extracting.options import ExtractOptions
from loratool.reworking.extracting.pairing import Change, Pairing, is_table, pair
from loratool.reworking.runner import Draft, Made, Maker, Rest, run, together

HELD_ON_GPU = 4 << 30
TERMS = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*", re.ASCII)  # of a base, at its top


Gathered = Callable[[tuple["Change", ...]], list["Outcome"]]  # what was made of some layers before


def extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    options: ExtractOptions,
    progress: Progress | None = None,
    gathered: Callable[[Extractor], Gathered] | None = None,
) -> ExtractReport:
    """Write the adapter that makes `tuned` of `base`; `loratool.commands.extract` says all of it.

    `gathered` gives what was made of layers by other processes.
    """
    started = time.monotonic()
    models = Models.of(base, tuned, out, options)
    with session(options.device, []) as at_work:
        extractor = models.extractor(options, at_work)
        extractor.gathered = gathered(extractor) if gathered is not None else None
        rest = run(extractor, models.target, models.paths, options, progress)
    found, rule = extractor.pairing, extractor.rule
    return ExtractReport(
        out=models.target,
        written=not options.dry_run,
        rule=rule.told,
        totals=rest.totals,
        modules=dict(sorted(extractor.layers.items())),
        noise=dict(sorted(extractor.noise.items())),
        identical=found.identical + extractor.identical,
        excluded=found.excluded,
        saved=(*found.whole, *found.biases),
        left_out=dict(sorted(found.left_out.items())),
        dtype=str(extractor.dtype).removeprefix("torch."),
        notes=rest.notes,
        **at_work.told(started),
    )


@dataclass(frozen=True)
class Models:
    """Two models that are to be compared, and where the output goes."""

    paths: tuple[Path, Path]
    before: Checkpoint
    after: Checkpoint
    rule: Rule
    manner: Manner
    target: Path
    doubts: list[Note]

    @classmethod
    def of(cls, base: PathLike, tuned: PathLike, out: PathLike, options: ExtractOptions) -> Models:
        rule = Rule.of(options.rank, options.energy, options.max_rank)
        paths = local(base, "model"), local(tuned, "model")
        before, after = (open_model(path, role) for path, role in zip(paths, ("BASE", "TUNED"), strict=True))
        check_alike(before, after)
        manner = manner_of(options.to, before)
        target = check_adapter_target(out, paths, options, manner.form)
        return cls(paths, before, after, rule, manner, target, check_packed((before, after)))

    def extractor(self, options: ExtractOptions, at_work: Session) -> Extractor:
        """What goes through the layers that differ."""
        found = pair(self.before, self.after, options.include, options.exclude, options.fan_in_fan_out)
        found.doubts += self.doubts
        check_saved(found)
        refuse_nothing(found)
        manner = named_as(self.manner, found)
        return Extractor(found, self.rule, options, at_work, manner)


@dataclass(frozen=True)
class Outcome:
    """A layer that has been worked on."""

    change: Change
    rank: int  # of the factors
    told: ExtractedLayer | None  # none where nothing differs
    factors: tuple[Rounded, ...]  # of it, and of heads that are tied to it


@dataclass
class Extractor(Maker[tuple[Change, ...], Outcome]):
    """Goes through the layers that differ."""

    command = "extract"

    pairing: Pairing
    rule: Rule
    options: ExtractOptions
    at_work: Session
    manner: Manner
    layers: dict[str, ExtractedLayer] = field(default_factory=dict)
    noise: dict[str, ExtractedLayer] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)  # of all that is written
    stacked_rank: int = 0  # of all experts that PEFT stacks
    mirrored: list[str] = field(default_factory=list)
    identical: int = 0  # which differ in the sign of zeros, say
    gathered: Gathered | None = None

    @property
    def room(self) -> int:
        """Bytes of a difference that may stay in memory."""
        return HELD_ON_GPU if self.at_work.on_gpu else HELD // self.at_work.workers

    def limit(self, change: Change) -> int:
        """The largest rank that a layer may have."""
        return min(self.rule.most, *change.shape)

    @cached_property
    def stacked(self) -> frozenset[str]:
        """The changes that get one rank: experts that PEFT stacks, and routers beside them; in some dialects all."""
        if self.manner.form is WRITTEN:
            return frozenset(WRITTEN.one_rank_experts(self.pairing.changes))
        names = self.names({target: change.kind for target, change in self.pairing.changes.items()}, "")
        return frozenset(target for group in names.of_one_rank() for target in group)

    def names(self, kinds: Mapping[str, Kind], release: str) -> Spelling:
        """How some layers are written."""
        return self.manner.form.spelling(kinds, release, self.manner.dialect)

    def find_stacked_rank(self) -> None:
        """Decide the rank of the experts: the largest that one of them wants, for which all are looked at first."""
        together = [self.pairing.changes[target] for target in self.stacked]
        if not self.rule.by_value:
            self.stacked_rank = max((self.limit(change) for change in together), default=0)
            return

        def work(change: Change) -> int:
            parts = self.parts(change)
            return self.rule.choose(parts, self.limit(change)) if any(part.squared for part in parts) else 0

        self.stacked_rank = max(self.at_work.spread(work, [c for c in together if not c.same]), default=0)

    def forms(self) -> dict[str, Form]:
        """What is known of every layer that may be written."""
        found: dict[str, Form] = {}
        for group in self.pairing.groups:
            most = max(self.limit(change) for change in group)
            if not self.stacked.isdisjoint(change.target for change in group):
                most = max(self.limit(self.pairing.changes[target]) for target in self.stacked)
            for change in group:
                for target in (change.target, *self.pairing.mirrors.get(change.target, ())):
                    kind = change.kind if target == change.target else kind_of_tied(target)
                    found[target] = Form(kind, *change.layer, most, change.experts, change.kernel)
        return found

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the factors: as asked, or the one that holds those of the tuned layers."""
        names = {change.tuned.dtype for change in self.pairing.changes.values()}
        dtype: torch.dtype = getattr(torch, factor_name(names, self.options.dtype))
        return dtype

    def draft(self) -> Draft:
        self.find_stacked_rank()
        forms = self.forms()
        names = self.names({t: form.kind for t, form in forms.items()}, self.release(forms))
        carried = self.pairing.carried(self.manner.form, self.manner.dialect)
        return Draft(forms, names, called(self.dtype), carried, architecture=self.manner.architecture)

    def release(self, forms: Mapping[str, Form]) -> str:
        """Whose way round the factors of experts are written; empty where there are none."""
        return self.manner.form.newest if any(form.kind is Kind.PARAMETER for form in forms.values()) else ""

    def inputs(self) -> dict[str, Any]:
        """Both models, as briefly as a header that others read may tell them."""
        models = {"base": self.pairing.base, "tuned": self.pairing.tuned}
        return {role: told_model(each, ModelDigests.of(each, compute=False)) for role, each in models.items()}

    def large_tasks(self) -> list[tuple[Change, ...]]:
        return [g for g in self.pairing.groups if any(4 * math.prod(change.shape) > self.room for change in g)]

    def tasks(self) -> list[tuple[Change, ...]]:
        large = self.large_tasks()
        return [group for group in self.pairing.groups if group not in large]

    def work(self, output: Output, task: tuple[Change, ...]) -> list[Made[Outcome]]:
        outcomes = self.outcomes(output, task) if self.gathered is None else self.gathered(task)
        return [Made(outcome.factors, outcome) for outcome in outcomes]

    def rest(self, draft: Draft) -> Rest:
        if not self.layers and not self.noise:
            raise FitError("the two models are identical")
        if not self.layers:
            raise FitError(
                f"all {len(self.noise)} matrices differ by no more than rounding to their dtype can explain; pass --rank "
                f"{self.rule.most} to extract them anyway"
            )
        before, after = self.pairing.base, self.pairing.tuned
        written = {target: draft.forms[target] for target in self.ranks}
        kinds = {t: form.kind for t, form in written.items()}
        return Rest(
            config=config_of(self.pairing, kinds, self.ranks, self.release(draft.forms), self.manner),
            facts={
                "base": {**told_model(before), **({"quantised": before.title} if isinstance(before, Decoded) else {})},
                "tuned": told_model(after),
                "rule": self.rule.told,
                "exact": self.options.exact,
                "seed": self.options.seed,
            },
            notes=tuple(remarks(self.pairing, self, self.rule)),
            files=terms(before),
            folders=[before.root, after.root],
            totals=total(self, written, self.dtype.itemsize),
        )

    def take(self, made: Made[Outcome]) -> None:
        outcome = made.told
        target, told = outcome.change.target, outcome.told
        if told is None:
            self.identical += not outcome.change.same
        elif told.rank:
            self.layers[target] = told
            self.mirrored += [factors.target for factors in outcome.factors if factors.target != target]
        else:
            self.noise[target] = told
        self.ranks |= {factors.target: outcome.rank for factors in outcome.factors}

    def outcomes(self, output: Output, group: tuple[Change, ...]) -> Iterator[Outcome]:
        """Layers that have one rank, decomposed and rounded."""
        every = [self.parts(change) for change in group]
        wanted = [self.rule.choose(p, self.limit(change)) for p, change in zip(every, group, strict=True)]
        stacked = not self.stacked.isdisjoint(change.target for change in group)
        rank = self.stacked_rank if stacked else max(1, *wanted)
        for change, parts, own in zip(group, every, wanted, strict=True):
            differs = any(part.squared for part in parts)
            if not rank or (not (differs and own) and not self.pairing.pinned(change)):
                yield Outcome(change, 0, told(parts, 0, 0.0) if differs else None, ())
                continue
            product = padded(joined(change, parts, own), rank)
            rounded = output.rounded(change.target, product)
            layer = told(parts, own, rounding_of(product, rounded)) if differs else None
            heads = (output.rounded(head, product) for head in self.pairing.mirrors.get(change.target, ()))
            yield Outcome(change, rank, layer, (rounded, *heads))

    def parts(self, change: Change) -> list[Part]:
        """The matrices of a layer, decomposed."""
        rows, columns = change.shape
        shared = Held(), Held()
        matrices = (
            Difference(
                Slice(change.base.matrix(columns), at * rows, rows),
                Slice(change.tuned.matrix(columns), at * rows, rows),
                self.at_work.device,
                self.room,
                shared,
            )
            for at in range(change.experts)
        )
        try:
            return [
                decomposed(matrix, self.limit(change), self.options.exact, self.options.seed) for matrix in matrices
            ]
        except NotFiniteError:
            raise InputError(
                f"{self.pairing.base.name} and {self.pairing.tuned.name}: cannot subtract all values:",
                broken_tensors(self.pairing) or [f"{printable(change.target)}: the difference overflows"],
            ) from None


def kind_of_tied(target: str) -> Kind:
    return Kind.EMBEDDING if is_table(target.rpartition(".")[0]) else Kind.LINEAR


def joined(change: Change, parts: Sequence[Part], rank: int) -> Product:
    """The update of a layer by its leading singular values, the way round in which PEFT has it."""
    products = [part.found.truncated(rank).product() for part in parts]
    if change.turned:
        products = [Product(p.down.mT, p.up.mT) for p in products]
    if change.kind is not Kind.PARAMETER:
        return products[0]
    return Product(torch.stack([p.up for p in products]), torch.stack([p.down for p in products]))


def rounding_of(product: Product, rounded: Rounded) -> float:
    """‖·‖² of what rounding changes."""
    off = change_of(product, rounded.read_back)
    return max(0.0, float(inner(off, off).sum()))


def told(parts: Sequence[Part], rank: int, rounding: float) -> ExtractedLayer:
    """What became of a layer; `rounding` is the square of what rounding the factors adds."""
    squared = math.fsum(part.squared for part in parts)
    lost = math.fsum(part.lost(rank) for part in parts)
    weight = math.fsum(part.weight for part in parts)
    return ExtractedLayer(
        rank,
        math.sqrt(squared),
        math.sqrt(squared / weight) if weight else math.inf,
        math.sqrt(lost / squared),
        math.sqrt((lost + rounding) / squared),  # the one lies in the space that is kept, the other outside of it
        max(part.above_noise for part in parts),
    )


def config_of(
    found: Pairing, kinds: Mapping[str, Kind], ranks: Mapping[str, int], release: str, manner: Manner
) -> Config:
    """The config, for a release of the library that will read it."""
    base = found.base
    origin, named = origin_of(base.root), base.config.get("_name_or_path")
    written = named if isinstance(named, str) and named else base.root.resolve().name
    names = manner.form.spelling(kinds, release, manner.dialect)
    training = Training(
        base=origin.repo if origin else written,
        task=found.task or "",
        in_out=any(change.turned and change.kind is Kind.LINEAR for change in found.changes.values()),
        bias="lora_only" if found.biases else "none",
        saved_modules=tuple(dict.fromkeys(found.modules)),
        targets=Targets(target_words(found, names)),
        release=release,
    )
    return names.describe_new(training, Parts(ranks))


def target_words(found: Pairing, names: Spelling) -> tuple[str, ...]:
    """What is adapted: the last part of a name where it means just these modules of the base, else whole names."""
    inside = {f"{t.removesuffix(ATTENTION)}.out_proj.weight" for t in names.kinds if t.endswith(ATTENTION)}
    layers = {
        adapted_module(t, kind) for t, kind in names.kinds.items() if kind is not Kind.PARAMETER and t not in inside
    }
    tensors = (*found.base.tensors, *(f"{layer}.weight" for layer in layers))
    modules = {module for name in tensors for module in accumulate(name.split(".")[:-1], "{}.{}".format)}
    known = by_key((module.rpartition(".")[2], module) for module in modules)
    leaves = {layer: module_of(f"{layer}.weight") for layer in layers}
    means_these = {leaf for leaf in leaves.values() if layers.issuperset(known[leaf]) and not leaf.isdigit()}
    return tuple(sorted({leaf if leaf in means_these else layer for layer, leaf in leaves.items()}))


def terms(base: Checkpoint) -> dict[str, Path]:
    """The files with the base's licence, which hold for its adapters too and which their cards may link."""
    return {name: base.root / name for name in base.side_files if TERMS.fullmatch(name)}


def not_compared(base: Checkpoint, tuned: Checkpoint) -> Iterator[Note]:
    """A note for each file of weights of the tuned model that is no part of the model proper, and not the base's as it is."""
    if not tuned.root.is_dir():
        return
    own = {shard.path.relative_to(tuned.root).as_posix() for shard in tuned.shards}
    for file in weight_files(tuned.root, None, own):
        before, after = base.root / file.name, tuned.root / file.name
        if file.counts and file.is_safetensors and not (before.is_file() and filecmp.cmp(before, after, shallow=False)):
            yield Note("file-not-used", f"{tuned.name}: {file}: not compared, and not part of the adapter")


def of_packing(found: Pairing) -> Iterator[Note]:
    """A note where what differs may be the error of quantisation."""
    every = [weight for change in found.changes.values() if not change.same for weight in (change.base, change.tuned)]
    if packed := [weight.scheme for weight in every if isinstance(weight, Packed)]:
        kinds = ", ".join(dict.fromkeys(packed))
        yield Note(
            "quantised-difference",
            f"{len(packed)} of the {len(every)} weights compared are stored quantised ({kinds}); unless TUNED was made "
            "from BASE as it is stored, the differences contain the error of quantisation",
        )


def total(extractor: Extractor, forms: Mapping[str, Form], itemsize: int) -> ExtractedTotals:
    """All layers together."""
    every = [*extractor.layers.values(), *extractor.noise.values()]
    parameters = sum(f.experts * (f.rows + f.columns) * extractor.ranks[t] for t, f in forms.items())
    return ExtractedTotals(
        norm=math.sqrt(math.fsum(layer.norm**2 for layer in every)),
        predicted=together([(layer.norm, layer.predicted) for layer in every]),
        achieved=together([(layer.norm, layer.achieved) for layer in every]),
        parameters=parameters,
        bytes=parameters * itemsize,
    )


def remarks(found: Pairing, extractor: Extractor, rule: Rule) -> Iterator[Note]:
    """What a user of the result should know."""
    yield from (note for checkpoint in (found.base, found.tuned) for note in checkpoint.notes[1:])
    yield from extractor.manner.notes
    yield from (*not_compared(found.base, found.tuned), *found.told_guesses(), *found.doubts, *of_packing(found))
    if extractor.noise:
        yield Note(
            "below-rounding",
            f"{len(extractor.noise)} layers differ by no more than rounding to their dtype can explain and are left out; "
            "pass --rank with a number to include them",
        )
    full = [t for t, layer in extractor.layers.items() if layer.rank == layer.above_noise == rule.most]
    if rule.noise and full:
        yield Note(
            "rank-limit",
            f"{len(full)} layers reach the rank limit: they have at least {rule.most} singular values above the noise",
        )
    if extractor.mirrored:
        yield Note(
            "tied-weight-changed",
            f"tied to its embedding and changed with it: {', '.join(map(printable, extractor.mirrored))}",
        )
    yield from extractor.manner.told_of_ranks(extractor.ranks.values(), "run loratool resize --uniform")
    limits = {target: min(change.shape) for target, change in found.changes.items()}
    yield from told_of_cuts(None if rule.by_value else rule.most, limits, extractor.layers)
    yield from extractor.manner.form.rank_notes(
        {target: layer.rank for target, layer in extractor.layers.items()}, extractor.ranks
    )
