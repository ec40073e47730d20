"""`resize()`: an adapter at other ranks, by the singular values of its updates."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.adapters.adapter import StoredTensor
from loratool.adapters.formats.format import Parts
from loratool.adapters.layers import ROUNDING_ONLY, Contents, Form, Kind, Layer
from loratool.adapters.ranks import RULES, Amount, RankRule, evened, told_of_cuts
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.writer import (
    FactorOptions,
    Output,
    carried_over,
    check_adapter_target,
    factor_tensors,
    files_beside,
    kept_dtype,
    told_beside,
)
from loratool.algebra.lowrank.joint import joint, truncated
from loratool.algebra.lowrank.noise import floor_of
from loratool.algebra.lowrank.products import (
    Product,
    change,
    decompose,
    difference,
    inner,
    length,
    negligible,
    padded,
    singular_values,
)
from loratool.arguments import PathLike, Progress
from loratool.errors import FitError, InputError, printable
from loratool.fetching import local
from loratool.files.safefile import FLOAT_NAMES, read_safefile
from loratool.lazy import Tensor, torch
from loratool.measuring.session import Batch, Session, batches, session
from loratool.notes import Note
from loratool.options.described import FLAG, JsonFile, Number, PathKind, option
from loratool.options.shared import DeviceOption
from loratool.options.writing import PublishOptions
from loratool.results.resize import ResizedLayer, ResizedTotals, ResizeReport
from loratool.reworking.aligned_layers import contents_apart
from loratool.reworking.dialects import Manner, OutputDialect, in_manner
from loratool.reworking.runner import Draft, Made, Maker, Rest, run, together
from loratool.templates import listed

ZERO = (
    "nothing to resize: every update is zero (an untrained adapter has B = 0); if only alpha is 0, set it with "
    "loratool rescale --alpha"
)


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(FactorOptions, OutputDialect, ReadingOptions, DeviceOption, PublishOptions):
    """Of `resize`."""

    rank: int | None = option(
        help="Rank of every layer, limited by its shape; layers of a lower rank are padded with zeros.",
        kind=Number(whole=True, low=1),
    )
    energy: float | None = option(
        help="Fraction of ‖ΔW‖² that each layer keeps, such as 0.99 (kohya's sv_fro P is P²).",
        kind=Number(above=0, high=1),
    )
    error: float | None = option(help="Largest relative error of each layer, such as 0.05.", kind=Number(low=0))
    ratio: float | None = option(
        help="Keep singular values larger than the largest one divided by this (kohya's sv_ratio).",
        kind=Number(above=1),
    )
    cumulative: float | None = option(
        help="Fraction of the sum of singular values that each layer keeps, such as 0.9 (kohya's sv_cumulative).",
        kind=Number(above=0, high=1),
    )
    budget: str | None = option(
        help="Limit on the parameters (4M) or bytes (16MB) of all factors together.", kind=Amount(), metavar="SIZE"
    )
    layer_weights: Mapping[str, float] | None = option(
        help="With --budget: weight of each layer's error, by pattern.", kind=JsonFile(dict)
    )
    calibration: str | None = option(
        help="Minimise the error of ΔW·x instead of ΔW, using a .safetensors file with E[zzᵀ], z = A·x, for each "
        "module.",
        kind=PathKind(),
    )
    uniform: bool = option(
        help="Pad all layers to the largest rank, for servers that support a single rank.", default=False, kind=FLAG
    )

    def rule(self) -> RankRule:
        """How ranks are chosen; raises `UsageError` where that is not said, or said twice."""
        return RankRule.of({kind: getattr(self, kind) for kind in RULES}, self.layer_weights, self.uniform)


def resize(adapter: PathLike, out: PathLike, options: ResizeOptions, progress: Progress | None = None) -> ResizeReport:
    """Write the adapter at other ranks; `loratool.commands.resize` says all of it."""
    started = time.monotonic()
    rule = options.rule()
    ways = options.readings(1)
    calibration = [Path(options.calibration)] if options.calibration is not None else []
    inputs = [local(adapter, "adapter"), *calibration]
    base = options.model()
    (contents,), manner = in_manner(contents_apart(inputs[:1], ways, "resize", base), options.to, base)
    target = check_adapter_target(out, inputs, options, manner.form)
    if not contents.layers:
        raise InputError(f"{printable(contents.adapter.file.path)}: contains no low-rank update")
    grams = read_calibration(calibration[0], contents) if calibration else {}
    with session(options.device, [contents]) as at_work:
        resizer = Resizer(contents, manner, grams, at_work, rule, options)
        rest = run(resizer, target, inputs[:1], options, progress)
    return ResizeReport(
        out=target,
        written=not options.dry_run,
        rule=rule.told,
        totals=rest.totals,
        modules=dict(sorted(resizer.modules.items())),
        dropped=resizer.dropped,
        dtype=str(resizer.dtype).removeprefix("torch."),
        notes=rest.notes,
        **at_work.told(started),
    )


@dataclass(frozen=True)
class Resized:
    """A layer at its new rank, and the squares of all its singular values; those of its output, where calibrated."""

    product: Product
    energies: Tensor
    rank: int

    @property
    def lost(self) -> float:
        """Relative error of the truncation."""
        total = float(self.energies.sum())
        return math.sqrt(float(self.energies[self.rank :].sum()) / total) if total else 0.0


class Resizer(Maker[Batch, tuple[str, ResizedLayer]]):
    """The layers of one adapter, decomposed batch by batch."""

    command = "resize"

    def __init__(
        self,
        contents: Contents,
        manner: Manner,
        grams: Mapping[str, Tensor],  # target → E[zzᵀ]
        at_work: Session,
        rule: RankRule,
        options: ResizeOptions,
    ) -> None:
        self.contents, self.grams, self.at_work, self.rule, self.options = contents, grams, at_work, rule, options
        self.manner = manner
        self.dtype = kept_dtype([contents], options.dtype)
        self.modules: dict[str, ResizedLayer] = {}
        self.own: Mapping[str, int] = {}  # the rank that the rule gives each layer
        self.ranks: dict[str, int] = {}  # target → the rank that it gets
        self.dropped: tuple[str, ...] = ()  # those that get none

    def draft(self) -> Draft:
        layers = self.contents.layers
        energies = self.energies() if self.rule.needs_values else {}
        if energies and not self.grams and not any(map(any, energies.values())):
            raise FitError(ZERO)
        groups = self.manner.spelling({t: layer.kind for t, layer in layers.items()}, self.contents).of_one_rank()
        self.own = self.rule.choose(layers, energies, self.dtype.itemsize, groups)
        chosen = evened(self.own, groups)
        self.ranks = {t: r for t, r in chosen.items() if r}
        self.dropped = tuple(t for t, r in chosen.items() if not r)
        names = self.manner.spelling({t: layers[t].kind for t in self.ranks}, self.contents)
        forms = {t: Form.of(layers[t], r) for t, r in self.ranks.items()}
        return self.manner.draft(forms, names, self.dtype, carried_over(self.contents, names), [self.contents])

    def tasks(self) -> Iterator[Batch]:
        return batches({t: self.contents.layers[t] for t in self.ranks}, self.at_work.device)

    def work(self, output: Output, task: Batch) -> list[Made[tuple[str, ResizedLayer]]]:
        found = []
        for name, before, layer in self.resized(task, self.load(task), self.ranks):
            rounded = output.rounded(name, layer.product)
            told = measure(self.contents.layers[name], before, layer, rounded.read_back, bool(self.grams))
            found.append(Made((rounded,), (name, told)))
        return found

    def take(self, made: Made[tuple[str, ResizedLayer]]) -> None:
        target, told = made.told
        self.modules[target] = told

    def rest(self, draft: Draft) -> Rest:
        if not any(layer.norm for layer in self.modules.values()):
            raise FitError(ZERO)
        contents, ranks = self.contents, self.ranks
        parts = Parts(
            ranks,
            whole_names=bool(self.dropped),
            dropped=self.dropped,
            dora=contents.dora,
            lora_bias=bool(contents.biases),
            tokens=draft.carried.tokens,
        )
        # of ΔW itself, which energies are not under a calibration
        lost = sum(length(contents.load(t, self.at_work.device, self.at_work.dtype)) ** 2 for t in self.dropped)
        asked = None if self.options.uniform else self.options.rank
        totals = total(contents, self.modules, lost, self.dtype.itemsize)
        return Rest(
            config=draft.names.describe([contents.adapter], parts),
            facts={"adapter": self.at_work.origins[0], "rule": self.rule.told},
            notes=(
                *remarks(contents, self.modules, self.dropped, totals),
                *self.manner.told_of_ranks([m.rank for m in self.modules.values()], "pass --uniform"),
                *told_of_cuts(asked, {t: contents.layers[t].most for t in ranks}, ranks),
                *self.manner.form.rank_notes(self.own, ranks),
                *self.manner.notes,
            ),
            files=files_beside(contents),
            folders=[contents.adapter.folder],
            totals=totals,
        )

    def load(self, batch: Batch) -> Product:
        """The products of a batch of layers, stacked."""
        loaded = [self.contents.load(target, self.at_work.device, self.at_work.dtype) for target in batch]
        rounding = max(p.rounding for p in loaded)
        return Product(torch.stack([p.up for p in loaded]), torch.stack([p.down for p in loaded]), rounding)

    def energies(self) -> dict[str, list[float]]:
        """The squares of each layer's singular values, without its singular vectors; rounding counts as zero."""

        def work(batch: Batch) -> list[tuple[str, list[float]]]:
            values = singular_values(self.weighed(batch, self.load(batch)))
            values = values * (values > negligible(values) * values[..., :1])
            return list(zip(batch, added_up(values).tolist(), strict=True))

        found = self.at_work.spread(work, batches(self.contents.layers, self.at_work.device))
        return {target: energies for some in found for target, energies in some}

    def weighed(self, batch: Batch, whole: Product) -> Product:
        """What is to be kept: ΔW, or ΔW·x in mean square over the inputs of a calibration, which is up G^½.

        SVD-LLM (arXiv:2403.07378) whitens with the (in, in) second moment of x; that of z = A·x gives the same.
        """
        if not self.grams:
            return whole
        return Product(whole.up, torch.stack([root_of(self.grams[target].to(whole.up)) for target in batch]))

    def resized(self, batch: Batch, whole: Product, ranks: Mapping[str, int]) -> Iterator[tuple[str, Product, Resized]]:
        """Each layer of a batch, before and at its rank."""
        found = joint([self.weighed(batch, whole)]).sum([1.0])
        energies = added_up(found.values)
        cut = found.product(max(ranks[target] for target in batch))
        for at, target in enumerate(batch):
            rank, one = ranks[target], whole[at]
            kept = Product(cut.up[at][..., :rank], cut.down[at][..., :rank, :])
            if self.grams:  # the outputs that matter most, and what ΔW has of them
                basis = decompose(kept).left
                kept = truncated(Product(basis, (basis.mT @ one.up) @ one.down), rank)[0]
            yield target, one, Resized(padded(kept, rank), energies[at], rank)


def root_of(gram: Tensor) -> Tensor:
    """G^½ of a positive semidefinite matrix, or of a batch."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = (
        vectors * torch.maximum(values, values[..., -1:].clamp_min(0) * 1e-16).sqrt()[..., None, :]
    ) @ vectors.mT
    return root


def added_up(values: Tensor) -> Tensor:
    """Squares of (layers, k) or (layers, experts, k) singular values, those of a layer's experts added up."""
    squares = values.double().square()
    return squares if squares.dim() == 2 else squares.sum(1)


def measure(layer: Layer, before: Product, found: Resized, stored: Product, calibrated: bool) -> ResizedLayer:
    """What became of a layer, from what is stored of it."""
    squared = summed(before, before) if calibrated else float(found.energies.sum())
    size = math.sqrt(squared)
    floor = float(floor_of(before).square().sum().sqrt())
    if not size:
        return ResizedLayer(layer.rank, found.rank, 0.0, 0.0, 0.0, 0.0 if calibrated else None)
    predicted = length(difference(before, found.product)) / size if calibrated else found.lost
    # ‖ΔW − ΔW'‖² = ‖tail‖² + ‖rounding‖² − 2⟨tail, rounding⟩
    rounding = change(found.product, stored.to(before.up.dtype))
    between = summed(before, rounding) - summed(found.product, rounding)
    return ResizedLayer(
        layer.rank,
        found.rank,
        size,
        predicted,
        math.sqrt(max(0.0, predicted**2 + (summed(rounding, rounding) - 2 * between) / squared)),
        found.lost if calibrated else None,
        floor,
    )


def summed(one: Product, other: Product) -> float:
    """⟨one, other⟩, of a batch together."""
    return float(inner(one, other).sum())


def total(contents: Contents, modules: Mapping[str, ResizedLayer], dropped: float, itemsize: int) -> ResizedTotals:
    """All layers together; `dropped` is ‖ΔW‖² of those that are left out."""
    squared = math.fsum(m.norm**2 for m in modules.values()) + dropped
    after = sum(contents.layers[t].parameters * m.rank for t, m in modules.items())
    stored = {tensor.info for layer in contents.layers.values() for tensor in factor_tensors(layer)}  # some are shared
    return ResizedTotals(
        norm=math.sqrt(squared),
        predicted=together([(m.norm, m.predicted) for m in modules.values()], dropped),
        achieved=together([(m.norm, m.achieved) for m in modules.values()], dropped),
        parameters_before=sum(info.elements for info in stored),
        parameters=after,
        bytes_before=sum(info.nbytes for info in stored),
        bytes=after * itemsize,
    )


def read_calibration(path: Path, contents: Contents) -> dict[str, Tensor]:
    """E[zzᵀ] of every layer, by target; raises `InputError` telling all that is wrong with the file."""
    file = read_safefile(path)
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    known = set[str]()
    for target, layer in contents.layers.items():
        name = next((n for n in (layer.module, target) if n in file.tensors), None)
        if name is None:
            problems.append(f"{printable(layer.module)}: missing")
            continue
        known.add(name)
        info = file.tensors[name]
        shapes = ((layer.rank, layer.rank), (layer.experts, layer.rank, layer.rank))
        if info.dtype not in FLOAT_NAMES or info.shape not in shapes[: 1 + (layer.kind is Kind.PARAMETER)]:
            wanted = " × ".join(map(str, shapes[layer.kind is Kind.PARAMETER]))
            problems.append(f"{printable(name)}: is {info.dtype} {list(info.shape)}; expected floats of shape {wanted}")
            continue
        gram = StoredTensor(file, info).load(torch.device("cpu"), torch.float64)
        if not bool(gram.isfinite().all()):
            problems.append(f"{printable(name)}: contains NaN or infinite values")
        elif float((gram - gram.mT).abs().max()) > 1e-3 * float(gram.abs().max()):
            problems.append(f"{printable(name)}: is not symmetric, as E[zzᵀ] is")
        found[target] = (gram + gram.mT) / 2
    problems += [f"{printable(name)}: the adapter has no such module" for name in set(file.tensors) - known]
    if problems:
        raise InputError(f"{printable(path)}: not a calibration file for this adapter:", sorted(problems))
    return {
        t: g.expand(layer.experts, *g.shape[-2:]) if (layer := contents.layers[t]).kind is Kind.PARAMETER else g
        for t, g in found.items()
    }


def remarks(
    contents: Contents, modules: Mapping[str, ResizedLayer], dropped: Sequence[str], totals: ResizedTotals
) -> Iterator[Note]:
    """What a user of the result should know."""
    yield from contents.remarks
    yield from told_beside(contents)
    if contents.dora:
        yield Note(
            "dora-error-unbounded",
            "DoRA: ΔW is truncated and the magnitudes are kept. Because the rows are normalised, the error of ΔW does not "
            "bound the error of the merged weight",
        )
    if zero := [t for t, m in modules.items() if not m.norm]:
        yield Note("modules-without-effect", f"{len(zero)} of {len(modules)} updates are zero: {listed(zero)}")
    if noise := [t for t, m in modules.items() if 0 < m.norm <= m.floor]:
        yield Note(
            "update-is-rounding",
            f"ranks and errors of {len(noise)} of {len(modules)} updates are meaningless, such as "
            f"{printable(noise[0])}: each is {ROUNDING_ONLY}",
        )
    if modules and all(m.rank > m.rank_before for m in modules.values()):
        yield Note(
            "rank-not-needed",
            "every layer has a higher rank than before, which changes no update and makes the file larger",
        )
    if totals.parameters > totals.parameters_before and any(note.code == "taken-as-lora" for note in contents.remarks):
        yield Note(
            "larger-than-before",
            f"the output has more parameters ({totals.parameters:,}) than the input ({totals.parameters_before:,}), "
            "because LoHa and LoKr need fewer than the same update as LoRA",
        )
    for target in dropped:
        if f"{target.removesuffix('weight')}bias" in contents.biases:
            yield Note("bias-left-out", f"{printable(target)} is left out, including its lora_B bias")
