"""`combine()`: several adapters into one, on their factors."""

from __future__ import annotations

import dataclasses
import filecmp
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from loratool.adapters.blocks import BlockWeights
from loratool.adapters.formats.format import Parts
from loratool.adapters.layers import ROUNDING_ONLY, Contents, Form, Kind
from loratool.adapters.ranks import evened, told_of_cuts
from loratool.adapters.writer import (
    Output,
    carried_over,
    check_adapter_target,
    files_beside,
    kept_dtype,
    told_beside,
)
from loratool.algebra.lowrank.joint import Joint, joint
from loratool.algebra.lowrank.noise import silenced
from loratool.algebra.lowrank.products import Product, change, decompose, gram, inner, length, negligible, padded
from loratool.algebra.methods.coefficients import LEAST_ALIKE, cancel, mean_cosine
from loratool.algebra.methods.mixture import UNSCALED, ZERO, Combination, Mixture, mix, mix_factors
from loratool.algebra.methods.table import FACTORWISE, GRAM, METHODS
from loratool.arguments import PathLike, Progress, several
from loratool.errors import FitError, InputError, UsageError, printable
from loratool.fetching import local
from loratool.lazy import torch
from loratool.measuring.session import Session, session
from loratool.notes import Note
from loratool.results.combine import CombinedLayer, CombinedTotals, CombineReport, Part
from loratool.reworking.aligned_layers import (
    AlignedLayer,
    Beside,
    align_layers,
    check_kinds,
    contents_apart,
    told_bases,
)
from loratool.reworking.combine_options import CombineOptions, combination_of, told
from loratool.reworking.compare import meetings
from loratool.reworking.dialects import Manner, in_manner
from loratool.reworking.runner import Draft, Made, Maker, Rest, run, together
from loratool.templates import listed


def combine(
    adapters: Sequence[PathLike] | PathLike, out: PathLike, options: CombineOptions, progress: Progress | None = None
) -> CombineReport:
    """Write several adapters of one base as one adapter; `loratool.commands.combine` says all of it."""
    started = time.monotonic()
    operands = several(adapters)
    combination = combination_of(options, len(operands))
    weights = options.adapter_weights(len(operands))
    ways = options.readings(len(operands))
    paths = [local(operand, "adapter") for operand in operands]
    base = options.model()
    found = contents_apart(paths, ways, "combine", base)
    check_kinds(found, "combine")
    sources, manner = in_manner(found, options.to, base)
    target = check_adapter_target(out, paths, options, manner.form)
    layers, blocks = align_layers(sources, weights), BlockWeights.of(options.block_weights)
    blocks.check(layers)
    refuse(sources, layers, combination, blocks)
    with session(options.device, sources) as at_work:
        combiner = Combiner(sources, manner, layers, combination, blocks, at_work, options)
        rest = run(combiner, target, paths, options, progress)
    return CombineReport(
        out=target,
        written=not options.dry_run,
        method=combination.name,
        settings=told(combination, weights, blocks),
        adapters=tuple(source.name for source in sources),
        totals=rest.totals,
        modules=dict(sorted(combiner.modules.items())),
        dtype=str(combiner.dtype).removeprefix("torch."),
        notes=rest.notes,
        **at_work.told(started),
    )


def refuse(
    sources: Sequence[Contents],
    layers: Mapping[str, Sequence[AlignedLayer]],
    combination: Combination,
    blocks: BlockWeights,
) -> None:
    """Raise for adapters that this cannot be done to."""
    if not layers:
        raise InputError("these adapters contain no low-rank update")
    weighted = any(aligned.weight != 1 for found in layers.values() for aligned in found)
    if dora := [source.name for source in sources if source.dora]:
        stays = (
            len(sources) == 1
            and METHODS[combination.method].family == GRAM
            and (combination.factor, combination.match, combination.svc) == (1, "none", False)
            and all(combination.rank is None or f[0].layer.rank <= combination.rank for f in layers.values())
            and all(blocks.factor(t) == 1 for t in layers)
            and not weighted
        )
        if not stays:
            raise FitError(
                f"{', '.join(dora)}: DoRA divides by the norm of W + ΔW, so its update depends on the base and cannot "
                "be summed. Instead, run `loratool merge` to apply several DoRA adapters to a base, and `loratool "
                "extract` to get plain LoRA from the result"
            )
    if whole := [f"{source.name}: {printable(target)}" for source in sources for target in source.changes]:
        raise FitError(
            "changes that are stored in full (diff, diff_b, w_norm, b_norm) are not products, and combine supports "
            "only those; run `loratool merge` on the adapters instead:",
            whole,
        )
    if combination.method == "model_stock" and weighted:
        raise UsageError("model_stock averages runs of one task and takes no weights")
    if combination.divides:
        sums = {t: cancel([aligned.weight for aligned in f]) for t, f in layers.items()}
        if cancelling := [t for t, f in layers.items() if sums[t] and (len(f) > 1 or f[0].weight)]:
            raise UsageError(
                f"{combination.method} divides by the sum of the weights, which is 0 for:", map(printable, cancelling)
            )
    uneven = [t for t, found in layers.items() if len({aligned.layer.rank for aligned in found}) > 1]
    if uneven and METHODS[combination.method].family == FACTORWISE:
        raise FitError(
            f"{combination.method} adds A to A and B to B, which needs equal ranks; --method linear takes any ranks:",
            (f"{printable(t)}: ranks {', '.join(str(aligned.layer.rank) for aligned in layers[t])}" for t in uneven),
        )


class Combiner(Maker[str, tuple[str, CombinedLayer, "torch.Tensor"]]):
    """The layers of several adapters, combined one after the other."""

    command = "combine"

    def __init__(
        self,
        sources: Sequence[Contents],
        manner: Manner,
        layers: Mapping[str, Sequence[AlignedLayer]],
        combination: Combination,
        blocks: BlockWeights,
        at_work: Session,
        options: CombineOptions,
    ) -> None:
        self.sources, self.layers, self.combination, self.at_work, self.options = (
            sources,
            layers,
            combination,
            at_work,
            options,
        )
        self.manner, self.blocks = manner, blocks
        self.dtype = kept_dtype(sources, options.dtype)
        self.weights = options.adapter_weights(len(sources))
        self.together = torch.zeros(
            len(sources), len(sources), dtype=torch.float64
        )  # ⟨ΔWᵢ, ΔWⱼ⟩ over all layers so far
        self.modules: dict[str, CombinedLayer] = {}
        self.own: dict[str, int] = {}  # the largest rank that each layer may have by itself
        self.ranks: dict[str, int] = {}  # and with those that have one rank with it
        self.grouped: set[str] = set()  # targets that have one rank with others
        self.beside_notes: Sequence[Note] = ()

    def draft(self) -> Draft:
        names = self.manner.spelling({t: found[0].layer.kind for t, found in self.layers.items()}, self.sources[0])
        mean = self.combination.setting.normalize and METHODS[self.combination.method].family == GRAM
        beside = Beside(self.sources, self.weights, names, self.options.saved, self.factor, mean)
        carried = beside.collect()
        self.beside_notes = beside.notes
        if self.sources[0].dora:  # it is the only one
            carried.tensors.update(carried_over(self.sources[0], names).tensors)
        groups = names.of_one_rank()
        self.own = {t: self.most(t) for t in self.layers}
        self.ranks = evened(self.own, groups)
        self.grouped = {target for group in groups for target in group}
        forms = {t: Form.of(found[0].layer, self.ranks[t]) for t, found in self.layers.items()}
        return self.manner.draft(forms, names, self.dtype, carried, self.sources)

    def tasks(self) -> Iterable[str]:
        return self.layers

    def work(self, output: Output, task: str) -> list[Made[tuple[str, CombinedLayer, torch.Tensor]]]:
        try:
            whole, shared = self.combined(task)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # which finite numbers do not bring about
            raise FitError(f"{printable(task)}: the updates are too large to be combined in float32") from None
        if task in self.grouped:
            whole = dataclasses.replace(whole, product=padded(whole.product, self.ranks[task]))
        rounded = output.rounded(task, whole.product)
        real = silenced(shared)
        table = gram(real.small)
        return [Made((rounded,), (task, self.measure(task, whole, rounded.read_back, real, table), table))]

    def take(self, made: Made[tuple[str, CombinedLayer, torch.Tensor]]) -> None:
        target, layer, table = made.told
        self.modules[target] = layer
        which = torch.tensor([aligned.adapter for aligned in self.layers[target]])
        self.together[which[:, None], which] += table.to(self.together)

    def rest(self, draft: Draft) -> Rest:
        self.check()
        parts = Parts(
            {t: m.rank for t, m in self.modules.items()},
            dora=self.sources[0].dora,
            lora_bias=any(source.biases for source in self.sources),
            tokens=draft.carried.tokens,
        )
        asked = self.options.rank if METHODS[self.combination.method].family != FACTORWISE else None
        return Rest(
            config=draft.names.describe([source.adapter for source in self.sources], parts),
            facts={"adapters": list(self.at_work.origins), **told(self.combination, self.weights, self.blocks)},
            notes=(
                *remarks(self.sources, self.layers, self.modules, self.beside_notes),
                *told_of_cuts(asked, {t: found[0].layer.most for t, found in self.layers.items()}, self.layers),
                *self.manner.form.rank_notes(self.own, self.ranks),
                *self.manner.notes,
            ),
            files=common_files(self.sources),
            folders=[source.adapter.folder for source in self.sources],
            totals=self.totals(self.modules, self.dtype),
        )

    def factor(self, target: str) -> float:
        """What the result for a layer is multiplied by."""
        return self.combination.factor * self.blocks.factor(target)

    def most(self, target: str) -> int:
        """The largest rank that the result of a layer may have."""
        if METHODS[self.combination.method].family == FACTORWISE:
            return self.combination.rank or self.layers[target][0].layer.rank
        return self.cut(target) or max(1, sum(aligned.layer.rank for aligned in self.layers[target]))

    def cut(self, target: str) -> int | None:
        """The rank that was asked for, as far as the layer's shape allows; of `svd` by default the adapters' largest."""
        ranks = [aligned.layer.rank for aligned in self.layers[target]]
        asked = self.combination.rank or (max(ranks) if self.combination.method == "svd" else None)
        return asked and min(asked, self.layers[target][0].layer.most)

    def combined(self, target: str) -> tuple[Mixture, Joint]:
        """The result for a layer, and the adapters' own updates."""
        found = self.layers[target]
        shared = joint([aligned.load(self.sources, self.at_work.device, self.at_work.dtype) for aligned in found])
        combination = dataclasses.replace(keyed(self.combination, target), factor=self.factor(target))
        if METHODS[combination.method].family != FACTORWISE:
            combination = dataclasses.replace(combination, rank=self.cut(target))
        if len(found) < METHODS[combination.method].least:  # of those that have the layer
            mean = dataclasses.replace(combination.setting, normalize=METHODS[combination.method].family == GRAM)
            combination = dataclasses.replace(combination, method="linear", setting=mean)
        if found[0].layer.kind is not Kind.PARAMETER:
            return self.one(combination, found, shared), shared
        every = [self.one(keyed(combination, at), found, shared[at]) for at in range(found[0].layer.experts)]
        return stacked(every), shared

    def one(self, combination: Combination, found: Sequence[AlignedLayer], shared: Joint) -> Mixture:
        products = shared.products
        if METHODS[combination.method].family == FACTORWISE:
            scales = [aligned.layer.scale for aligned in found]
            ups = [p.up / s if s else p.up for p, s in zip(products, scales, strict=True)]
            strengths = [aligned.weight * s for aligned, s in zip(found, scales, strict=True)]
            downs = [p.down for p in products]
            if found[0].layer.kind is not Kind.EMBEDDING:
                return mix_factors(ups, downs, strengths, combination)
            mixture = mix_factors([d.mT for d in downs], [u.mT for u in ups], strengths, combination)  # its A is `up`
            return dataclasses.replace(mixture, product=Product(mixture.product.down.mT, mixture.product.up.mT))
        return mix(shared, [aligned.weight for aligned in found], combination)

    def measure(
        self, target: str, whole: Mixture, stored: Product, shared: Joint, table: torch.Tensor
    ) -> CombinedLayer:
        """What became of a layer and of each adapter in it, from what is stored and the inner products `table`."""
        found = self.layers[target]
        stored = stored.to(whole.product.up.dtype)
        size = length(whole.product)
        apart = change(whole.product, stored)
        rounding = math.sqrt(max(0.0, float(inner(apart, apart).sum()))) / size if size else 0.0
        result = decompose(stored)
        there = result.values > negligible(result.values) * result.values[..., :1]  # others point anywhere
        left, right = result.left * there[..., None, :], result.right * there[..., :, None]
        sizes = [math.sqrt(max(0.0, float(table[i, i]))) for i in range(len(found))]
        names = [self.sources[aligned.adapter].name for aligned in found]
        reached = length(stored)
        return CombinedLayer(
            rank=whole.product.rank,
            norm=reached,
            whole=whole.whole,
            truncated=whole.lost,
            stored=rounding,
            error=math.hypot(whole.lost, rounding * size / whole.whole) if whole.whole else 0.0,
            parts={
                name: Part(
                    weight=aligned.weight,
                    norm=own,
                    energy_kept=kept(product, left, right, own) if not whole.cancels or not own else 0.0,
                    norm_ratio=reached / (abs(aligned.weight) * own) if aligned.weight * own else None,
                )
                for name, aligned, product, own in zip(names, found, shared.products, sizes, strict=True)
            },
            meetings=meetings(names, shared),
            cancels=whole.cancels,
        )

    def check(self) -> None:
        """What can be said only when all layers have been seen."""
        if not bool(self.together.diagonal().any()):
            raise FitError(
                "nothing to combine: every update is zero (an untrained adapter has B = 0, another α = 0) or "
                f"{ROUNDING_ONLY}"
            )
        if not any(aligned.weight for every in self.layers.values() for aligned in every):
            raise FitError("nothing to combine: every adapter has the weight 0")
        if self.combination.method == "model_stock":
            cosine = mean_cosine(self.together)
            if cosine < LEAST_ALIKE:
                raise FitError(
                    "model_stock averages several runs of one task; the mean cosine of these adapters is "
                    f"{cosine:.3f}, below {LEAST_ALIKE}, so the result would be almost zero; use --method linear to "
                    "add them"
                )

    def totals(self, modules: Mapping[str, CombinedLayer], dtype: torch.dtype) -> CombinedTotals:
        names = [source.name for source in self.sources]
        energy: dict[str, float | None] = {}
        ratio: dict[str, float | None] = {}
        for name in names:
            own = [(m.parts[name], m) for m in modules.values() if name in m.parts]
            mass = math.fsum(part.norm**2 for part, _ in own)
            weighed = math.fsum((part.weight * part.norm) ** 2 for part, _ in own)
            energy[name] = math.fsum((p.energy_kept or 0.0) * p.norm**2 for p, _ in own) / mass if mass else None
            ratio[name] = math.sqrt(math.fsum(m.norm**2 for _, m in own) / weighed) if weighed else None
        norms = self.together.diagonal().clamp_min(0).sqrt()
        parameters = sum(self.layers[t][0].layer.parameters * m.rank for t, m in modules.items())
        return CombinedTotals(
            norm=math.sqrt(math.fsum(m.norm**2 for m in modules.values())),
            truncated=together([(m.whole, m.truncated) for m in modules.values()]),
            stored=together([(m.norm, m.stored) for m in modules.values()]),
            error=together([(m.whole, m.error) for m in modules.values()]),
            energy_kept=energy,
            norm_ratio=ratio,
            cosine={
                f"{names[i]} × {names[j]}": float(self.together[i, j] / (norms[i] * norms[j]))
                if norms[i] * norms[j]
                else None
                for i in range(len(names))
                for j in range(i + 1, len(names))
            },
            parameters=parameters,
            bytes=parameters * dtype.itemsize,
        )


def keyed(combination: Combination, of: object) -> Combination:
    """The same for one layer, or for one expert, whose random numbers are its own."""
    return dataclasses.replace(
        combination, setting=dataclasses.replace(combination.setting, key=f"{combination.setting.key}/{of}")
    )


def stacked(every: Sequence[Mixture]) -> Mixture:
    """The results of all experts as one, at the largest of their ranks."""
    rank = max(mixture.product.rank for mixture in every)
    even = [padded(mixture.product, rank) for mixture in every]
    product = Product(torch.stack([p.up for p in even]), torch.stack([p.down for p in even]))
    total = math.fsum(m.whole**2 for m in every)
    lost = math.fsum((m.whole * m.lost) ** 2 for m in every)
    return Mixture(product, math.sqrt(lost / total) if total else 0.0, math.sqrt(total), max(m.cancels for m in every))


def kept(product: Product, left: torch.Tensor, right: torch.Tensor, size: float) -> float | None:
    """The part of ‖ΔW‖² that lies in the spaces of the result."""
    if not size:
        return None
    inside = (left.mT @ product.up) @ (product.down @ right.mT)
    return min(1.0, float(inside.double().square().sum()) / size**2)


def common_files(sources: Sequence[Contents]) -> dict[str, Path]:
    """Files beside the adapters, such as a tokenizer, that all which have one have the same."""
    every = [files_beside(source) for source in sources]
    found: dict[str, Path] = {}
    for files in every:
        for name, path in files.items():
            if all(name not in other or filecmp.cmp(other[name], path, shallow=False) for other in every):
                found.setdefault(name, path)
    return found


def remarks(
    sources: Sequence[Contents],
    layers: Mapping[str, Sequence[AlignedLayer]],
    modules: Mapping[str, CombinedLayer],
    found: Sequence[Note],
) -> Iterator[Note]:
    """What a user of the result should know."""
    carried = common_files(sources)
    yield from (note.under(source.name) for source in sources for note in told_beside(source, carried))
    if len(sources) == 1:
        yield Note("single-adapter", "only one adapter was given, so it is not combined with another")
    yield from told_bases(sources)
    for at, source in enumerate(sources):
        if not any(aligned.adapter == at for every in layers.values() for aligned in every):
            yield Note("no-low-rank-update", f"{source.name} has no low-rank update")
            continue
        parts = {t: m.parts[source.name] for t, m in modules.items() if source.name in m.parts}
        still = [target for target, part in parts.items() if not part.norm * part.weight]
        if still and len(still) == len(parts):
            yield Note(
                "adapter-without-effect",
                f"{source.name}: every update is zero (an untrained adapter has B = 0), has the weight 0 or is "
                f"{ROUNDING_ONLY}, so it adds nothing",
            )
        elif still:
            yield Note(
                "modules-without-effect",
                f"{source.name}: {len(still)} of {len(parts)} updates are zero: {listed(still)}",
            )
    for became, code, said in (
        (ZERO, "layers-cancel-to-zero", "come out as zero"),
        ("", "layers-zero", "come out as zero"),
        (UNSCALED, "layers-cancel-unscaled", "keep the norm and the directions of their plain sum"),
    ):
        if which := [t for t, m in modules.items() if m.cancels == became and (became or not m.norm)]:
            why = ": the updates cancel, and the rest is no larger than the rounding of the stored factors"
            yield Note(
                code,
                f"{len(which)} of {len(modules)} layers {said}, such as {printable(which[0])}{why if became else ''}",
            )
    if partial := [t for t, every in layers.items() if len(every) < len(sources)]:
        yield Note(
            "layers-partial",
            f"{len(partial)} of {len(layers)} layers are not in all adapters, such as {printable(partial[0])}; each "
            "is combined from the adapters that have it",
        )
    yield from found
    for source in sources:
        yield from (note.under(source.name) for note in source.remarks)
