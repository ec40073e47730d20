"""What the values of an adapter are: sizes, ranks and spectra of its updates, alone and against the base.

Of ΔW = s·BA everything comes from QR of the factors; the (out, in) product is formed for sampled rows of a base only.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratool.adapters.as_lora import as_product
from loratool.adapters.layers import ROUNDING_ONLY, Kind, Layer, layer_of
from loratool.adapters.ranks import RankRule
from loratool.adapters.unsettled import Unsettled, open_question
from loratool.adapters.writer import factor_tensors, torch_dtype
from loratool.algebra.lowrank.noise import floor_of
from loratool.algebra.lowrank.products import singular_values
from loratool.algebra.updates.additive import Add
from loratool.arguments import Progress
from loratool.bases.decoded import Decoded
from loratool.errors import printable
from loratool.measuring.delta_statistics import measure_on_base
from loratool.measuring.large_updates import LARGEST_RATIO, larger
from loratool.measuring.session import Session, session
from loratool.notes import Note
from loratool.results.values import Measured, Suggestion, Values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from loratool.adapters.adapter import Adapter
    from loratool.bases.adapter_fit import Fit

ENERGIES = (0.90, 0.95, 0.99)  # parts of ‖ΔW‖² that ranks are told for
DEAD = 1e-6  # a component whose singular value is less than this part of the largest one
ROUNDING = 1e-12  # one that is nothing but rounding
UNKNOWN = ("norm", "spectral", "stable_rank", "entropy_rank", "condition", "energy_ranks", "dead", "balance")
SPECTRUM = 1024  # singular values of a module that a report keeps


Look = tuple[Measured, list[float], bool]  # at one module: what is told of it, its energies, whether it is rounding


def measure(
    adapter: Adapter,
    fit: Fit | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    known: Mapping[str, Look] | None = None,
) -> Values:
    """Measure every low-rank update, a module at a time on each core; with a `fit` also the base's weights.

    Decompositions are in float64 (float32 on GPUs without it). `progress` is called with (modules done, modules in all).
    `known` has what was measured of all modules before.
    """
    started = time.monotonic()
    layers, skipped = layers_in(adapter)
    doubts = check_packed(fit) if fit else []
    found: list[Measured] = []
    energies: dict[str, list[float]] = {}
    rounded: list[str] = []  # targets whose update is rounding
    with session(device, ()) as at_work:
        looks = known.values() if known is not None else looked_at(layers, layers, fit, at_work, progress)
        for target, (told, squares, noise) in zip(layers, looks, strict=True):
            if noise:
                rounded.append(told.target)
            energies[target] = squares
            found.append(told)
        base_squared = [m.weight.norm**2 for m in found if m.weight]
        return Values(
            norm=math.sqrt(math.fsum(m.norm**2 for m in found if m.norm)),
            modules=tuple(found),
            suggestions=tuple(suggest(layers, energies, bytes_per_number(layers))),
            norm_base=math.sqrt(math.fsum(base_squared)) if base_squared else None,
            skipped={printable(target): why for target, why in skipped.items()},
            notes=(*doubts, *remarks(layers, found, rounded)),
            **at_work.told(started),
        )


def layers_in(adapter: Adapter) -> tuple[dict[str, Layer], dict[str, str]]:
    """The updates of an adapter that can be measured, and why others cannot."""
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    for target, update in adapter.updates.items():
        if layer := layer_of(target, as_product(update, target)):
            layers[target] = layer
        elif not update.replaces and not isinstance(update, Add) and target not in adapter.optional:
            why = open_question(update, {}) if isinstance(update, Unsettled) else ""
            skipped[target] = why or f"{type(update).__name__}: not a product of two factors"
    return layers, skipped


def looked_at(
    layers: Mapping[str, Layer],
    targets: Iterable[str],
    fit: Fit | None,
    at_work: Session,
    progress: Progress | None = None,
) -> Iterator[Look]:
    """What is measured of some of the layers, in their order."""
    groups = fit.ties.groups if fit and fit.ties else ()
    tied = {name: group.names[0] for group in groups for name in group.missing}  # held under another name

    def work(target: str) -> list[Look]:
        told, squares, noise = look_at(layers[target], at_work)
        if fit and fit.checkpoint and told.norm is not None:
            places = [replace(p, tensor=tied.get(p.tensor, p.tensor)) for p in fit.places.get(target, ())]
            told = replace(told, weight=measure_on_base(told.norm, places, fit.checkpoint, at_work.device))
            if noise and told.weight:  # it points anywhere
                told = replace(told, weight=replace(told.weight, amplification=None))
        return [(told, squares, noise)]

    chosen = list(targets)
    return at_work.through(work, chosen, len(chosen), progress)


def check_packed(fit: Fit) -> list[Note]:
    """Notes on packed weights under an adapter. Raises `InputError` naming those that cannot be decoded."""
    base = fit.checkpoint
    if not isinstance(base, Decoded):
        return []
    changed = dict.fromkeys(place.tensor for places in fit.places.values() for place in places)
    return base.check(name for name in changed if name in base.weights)


def look_at(layer: Layer, at_work: Session) -> Look:
    """One module: what is told of it, σ² of its components, and whether all of it is rounding."""
    import torch

    up, down = (factor.load(at_work.device, at_work.dtype) for factor in layer.factors)
    tiny = min(torch.finfo(torch_dtype(t.info.dtype)).tiny for t in factor_tensors(layer))
    counts: dict[str, Any] = {
        "target": printable(layer.target),
        "rank": layer.rank,
        "nonfinite": sum(int((~factor.isfinite()).sum()) for factor in (up, down)),
        "subnormal": sum(int(((factor != 0) & (factor.abs() < tiny)).sum()) for factor in (up, down)),
        "zero_rows": int((down == 0).all(1).sum()),
        "zero_columns": int((up == 0).all(0).sum()),
    }
    product = layer.unscaled(up, down).scaled(layer.scale)
    finite = bool(product.up.isfinite().all()) and not counts["nonfinite"]
    if not finite:
        nothing: dict[str, Any] = dict.fromkeys(UNKNOWN)
        return Measured(**nothing, singular_values=(), **counts), [], False
    sizes = [float(torch.linalg.vector_norm(factor)) for factor in (up, down)]
    values = singular_values(product).double().cpu()
    spectra = values if values.dim() == 2 else values[None]  # (experts, k)
    squares = spectra.square().sum(0)
    noise = 0 < float(squares.sum().sqrt()) <= float(floor_of(product).square().sum().sqrt())
    facts = describe(spectra, squares.tolist(), layer.rank)
    if noise:  # of which no rank can be told
        facts |= dict.fromkeys(("stable_rank", "entropy_rank", "condition", "energy_ranks")) | {"dead": layer.rank}
    told = Measured(
        **counts,
        **facts,
        balance=sizes[0] / sizes[1] if sizes[1] else None,
        singular_values=tuple(squares.sqrt()[:SPECTRUM].tolist()),
    )
    return told, squares.tolist(), noise


def describe(spectra: Tensor, squares: Sequence[float], rank: int) -> dict[str, Any]:
    """Numbers of (experts, k) falling singular values; `squares` are their energies, added up over experts."""
    total = math.fsum(squares)
    largest = float(spectra[:, 0].max()) if spectra.shape[1] else 0.0
    if not total:
        nothing = dict.fromkeys(("stable_rank", "entropy_rank", "condition", "energy_ranks"))
        return {"norm": 0.0, "spectral": 0.0, "dead": rank, **nothing}
    live = spectra[spectra[:, 0] > 0]
    smallest = float(spectra[:, -1].min()) if spectra.shape[1] >= rank else 0.0
    return {
        "norm": math.sqrt(total),
        "spectral": largest,
        "stable_rank": float((live.square().sum(1) / live[:, 0].square()).mean()),
        "entropy_rank": float(torch_entropy(live).exp().mean()),
        "condition": largest / smallest if smallest > ROUNDING * largest else None,
        "energy_ranks": tuple(RankRule("energy", part).enough(squares) for part in ENERGIES),
        "dead": rank - min(int((each > DEAD * each[0]).sum()) for each in spectra),
    }


def torch_entropy(spectra: Tensor) -> Tensor:
    """−Σ p ln p of each row, p = σ/Σσ."""
    import torch

    shares = spectra / spectra.sum(1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(1)
    return entropy


def suggest(
    layers: Mapping[str, Layer], energies: Mapping[str, Sequence[float]], itemsize: float
) -> Iterator[Suggestion]:
    """Ranks that keep parts of the energy of all modules together, and what `resize` would write."""
    known = {target: squares for target, squares in energies.items() if math.fsum(squares)}
    if not known:
        return
    longest = max(map(len, known.values()))
    by_rank = [math.fsum(s[at] for s in known.values() if at < len(s)) for at in range(longest)]
    now = sum(layer.parameters * layer.rank for layer in layers.values())
    for part in ENERGIES:
        rank = RankRule("energy", part).enough(by_rank)
        by_layer = {t: max(1, RankRule("energy", part).enough(known[t])) if t in known else 1 for t in layers}
        yield Suggestion(
            energy=part,
            rank=rank,
            bytes=round(itemsize * sum(rank * layer.parameters for layer in layers.values())),
            bytes_by_layer=round(itemsize * sum(r * layers[t].parameters for t, r in by_layer.items())),
            bytes_now=round(itemsize * now),
        )


def bytes_per_number(layers: Mapping[str, Layer]) -> float:
    """Of the factors as they are stored, on average."""
    infos = [tensor.info for layer in layers.values() for tensor in factor_tensors(layer)]
    numbers = sum(info.elements for info in infos)
    return sum(info.nbytes for info in infos) / numbers if numbers else 0.0


def remarks(layers: Mapping[str, Layer], found: Sequence[Measured], rounded: Sequence[str]) -> Iterator[Note]:
    """What a reader of the numbers should know; `rounded` are targets whose update is rounding."""
    if rounded:
        text = (
            f"of {len(rounded)} of {len(layers)} updates only the norm is reported, such as {rounded[0]}: each is "
            f"{ROUNDING_ONLY}"
        )
        yield Note("update-is-rounding", text)
    if any(layer.magnitude for layer in layers.values()):
        yield Note("dora-magnitudes-left-out", "DoRA: ΔW is s·BA, without the magnitudes")
    if any(layer.kind is Kind.PARAMETER for layer in layers.values()):
        yield Note(
            "experts-together",
            "experts: norms of all experts together, stable and entropy rank as means, energies summed",
        )
    ratios = {m.target: m.weight.ratio or 0.0 for m in found if m.weight}
    if large := {target: ratio for target, ratio in ratios.items() if ratio > LARGEST_RATIO}:
        yield Note("update-larger-than-weight", larger(large))
    sampled = [m.weight for m in found if m.weight and m.weight.sampled_rows < m.weight.rows]
    if sampled:
        most = max(weight.sampled_rows for weight in sampled)
        yield Note(
            "rows-sampled", f"survival after rounding is measured on up to {most} evenly spaced rows of each weight"
        )
