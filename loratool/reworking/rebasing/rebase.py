"""`rebase()`: an adapter for another base than the one that it was trained on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import format_of, read_adapter
from loratool.adapters.formats.format import Config, Scaled
from loratool.adapters.layers import Contents, contents_of
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.unsettled import settled
from loratool.adapters.writer import check_adapter_target, copied_output, scaled_output, told_beside
from loratool.arguments import PathLike, Progress
from loratool.bases.adapter_fit import Fit, fit_of
from loratool.bases.binding import Place
from loratool.bases.opening import open_checkpoint
from loratool.errors import BAKE, FitError, InputError, UsageError, printable
from loratool.fetching import local
from loratool.files.checkpoint import Checkpoint
from loratool.files.digests import sha256_of
from loratool.files.hub_cache import origin_of, sha256_of_link
from loratool.files.system import shell_word
from loratool.measuring.session import session
from loratool.notes import Note
from loratool.options.described import FLAG, PlaceKind, option
from loratool.options.shared import DeviceOption, NamingOptions
from loratool.options.writing import PublishOptions, WritingOptions
from loratool.provenance.inputs import ModelDigests, told_model
from loratool.results.rebase import BasePair, RebasedBase, RebaseReport
from loratool.reworking.rebasing.drift import Drift, changed_beside, drift_of
from loratool.reworking.runner import record_of

# Figures at which something is said or refused. They come from toy models; no pair of released bases was tried.
NO_SIBLINGS, DISTANT = 0.8, 0.95  # cosine of the bases' weights
MOSTLY_THERE, PARTLY_THERE = 0.5, 0.1  # c
NOISE = 3.0  # |z| up to which c is chance


@dataclass(frozen=True, kw_only=True)
class RebaseOptions(NamingOptions, WritingOptions, ReadingOptions, DeviceOption, PublishOptions):
    """Of `rebase`."""

    base: str | None = option(
        "--from", help="Base that the adapter was trained on.", kind=PlaceKind(), metavar="BASE1", required=True
    )
    onto: str | None = option(help="Base to transfer it to.", kind=PlaceKind(), metavar="BASE2", required=True)
    force: bool = option(
        help="Write the adapter even if the bases are not siblings, or if the new one already contains most of it.",
        default=False,
        kind=FLAG,
    )


def rebase(adapter: PathLike, out: PathLike, options: RebaseOptions, progress: Progress | None = None) -> RebaseReport:
    """Write the adapter for another base; `loratool.commands.rebase` says all of it."""
    started = time.monotonic()
    (way,) = options.readings(1)
    if options.base is None or options.onto is None:
        raise UsageError("rebase needs the old base, --from, and the new one, --onto")
    path, first, second = local(adapter, "adapter"), local(options.base, "model"), local(options.onto, "model")
    options = replace(options, base=os.fspath(first), onto=os.fspath(second))  # a record names their commits
    given = settled(read_adapter(path, way), open_checkpoint(first).config)
    form = format_of(given)
    contents = contents_of(given, "rebase", as_products=bool(given.dialects))
    target = check_adapter_target(out, [path, first, second], options, form)
    fits = [fit_of(given, place, open_checkpoint(place), options.maps) for place in (first, second)]
    pairs = paired(given, fits)
    given.check_values()
    with session(options.device, [contents]) as at_work:
        bases = checkpoints(fits)

        def work(name: str) -> list[tuple[str, Drift]]:
            return [(name, drift_of(pairs[name], bases, at_work.device))]

        drifts = dict(at_work.through(work, pairs, len(pairs), progress))
        check_finite(drifts, bases)
        total = sum(drifts.values(), Drift())
        differing = sum((drift for drift in drifts.values() if not drift.equal), Drift())
        refuse(total, differing, options.force)
        factor = factor_of(differing)
        factors = {name: 1.0 if drift.equal else factor for name, drift in drifts.items()}
        names = [printable(base_name(base)) for base in bases]
        told = tuple(RebasedBase(name, digests(base)) for name, base in zip(names, bases, strict=True))
        notes = tuple(remarks(contents, fits, total, differing, factor))
        entries = [
            recorded(open_checkpoint(place), one.sha256) for place, one in zip((first, second), told, strict=True)
        ]
        facts = {
            "adapter": at_work.origins[0],
            "models": {"base": entries[0], "onto": entries[1]},
            "measured": {"c": differing.c, "z": differing.z, "cosine": total.cosine, "factor": factor},
        }
        record = record_of("rebase", [path], options, facts, notes)
        write(target, contents, factors, base_name(bases[1]), record, options)
        cost = at_work.told(started)
    return RebaseReport(
        out=target,
        written=not options.dry_run,
        bases=(told[0], told[1]),
        total=shown(total, factor, differing),
        modules={name: shown(drift, factors[name]) for name, drift in sorted(drifts.items())},
        notes=notes,
        **cost,
    )


def checkpoints(fits: Sequence[Fit]) -> tuple[Checkpoint, Checkpoint]:
    """The bases, packed weights decoded."""
    old, new = (fit.checkpoint for fit in fits)
    assert old is not None, "it is read from a checkpoint"
    assert new is not None, "it is read from a checkpoint"
    return old, new


def paired(adapter: Adapter, fits: Sequence[Fit]) -> dict[str, list[tuple[Place, Place]]]:
    """Target → where both bases have each part of its weight; raises `FitError` naming all that differ in shape."""
    for fit in fits:
        fit.require()
    bases = checkpoints(fits)
    problems: list[str] = []
    found: dict[str, list[tuple[Place, Place]]] = {}
    for target, update in adapter.updates.items():
        sides = [fit.places.get(target, ()) for fit in fits]
        if update.replaces or not (sides[0] or sides[1]):
            continue
        shapes = [
            [
                (tuple(base.tensors[p.tensor].shape), p.first_row, p.rows, p.update_row)
                for p in side
                if p.tensor in base.tensors
            ]
            for side, base in zip(sides, bases, strict=True)
        ]
        if shapes[0] != shapes[1]:
            told = [" and ".join(" × ".join(map(str, shape)) for shape, *_ in side) or "absent" for side in shapes]
            problems.append(f"{printable(target)}: {told[0]} in one base, {told[1]} in the other")
        elif shapes[0]:
            found[target] = list(zip(*sides, strict=True))
    if problems:
        raise FitError(
            "the bases do not have the same shapes, and rebase only transfers adapters between siblings:", problems
        )
    if not found:
        raise InputError(f"{printable(adapter.file.path)}: changes no weight that the bases have")
    return found


def factor_of(differing: Drift) -> float:
    """1 − c, c clipped to [0, 1]; 1 where c may be chance."""
    c, z = differing.c, differing.z
    if c is None or z is None or z <= NOISE:
        return 1.0
    return 1 - min(1.0, max(0.0, c))


def check_finite(drifts: Mapping[str, Drift], bases: tuple[Checkpoint, Checkpoint]) -> None:
    """Raise `InputError` naming weights of the bases that are not finite: no limit holds for what comes of them."""
    sizes = [(base, name, size) for name, each in drifts.items() for base, size in zip(bases, (each.old, each.new), strict=True)]  # fmt: skip
    if broken := [
        f"{printable(base_name(base))}: {printable(name)} contains NaN or infinite values"
        for base, name, size in sizes
        if not math.isfinite(size)
    ]:
        raise InputError("the bases cannot be compared, as they have values that are not finite:", broken)


def refuse(total: Drift, differing: Drift, force: bool) -> None:
    """Raise `FitError` for bases that are no siblings, and where most of the update is there already."""
    problems = []
    if total.cosine is not None and total.cosine < NO_SIBLINGS:
        problems.append(
            f"the cosine of the bases' weights is {total.cosine:.3f}, below {NO_SIBLINGS}: they are not siblings, or "
            "one is permuted"
        )
    if differing.c is not None and differing.c >= MOSTLY_THERE and (differing.z or 0.0) > NOISE:
        problems.append(f"the new base already contains {100 * differing.c:.0f} % of the update")
    if problems and not force:
        raise FitError(
            "this adapter cannot be rebased well (these limits come from toy models):", problems, hint="--force"
        )


def shown(drift: Drift, factor: float, differing: Drift | None = None) -> BasePair:
    """The figures of a module; those of c, in a total, are of the modules that differ."""
    own = differing or drift
    return BasePair(
        drift.equal,
        drift.relative,
        drift.over_update,
        drift.cosine,
        own.c,
        own.z,
        drift.seen,
        drift.in_core,
        factor,
    )


def base_name(base: Checkpoint) -> str:
    """What a config calls a base: its repository, its own word, or the name of its folder."""
    origin, named = origin_of(base.root), base.config.get("_name_or_path")
    return origin.repo if origin else named if isinstance(named, str) and named else base.root.resolve().name


def digests(base: Checkpoint) -> dict[str, str]:
    """The SHA-256 of every weight file of a base."""
    return {shard.path.name: sha256_of_link(shard.path) or sha256_of(shard.path) for shard in base.shards}


def recorded(base: Checkpoint, sha256: Mapping[str, str]) -> dict[str, Any]:
    """A base as provenance names it, with the digests of its weight files, which were computed."""
    entry = told_model(base, ModelDigests.of(base, compute=False))
    sizes = {name: facts["size"] for name, facts in entry["files"].items()}
    whole = {name: {"size": sizes[name], "sha256": digest} for name, digest in sha256.items() if name in sizes}
    return {**entry, "files": {**entry["files"], **whole}}


def write(
    out: Path,
    contents: Contents,
    factors: Mapping[str, float],
    base: str,
    record: Mapping[str, object],
    options: RebaseOptions,
) -> None:
    """Write the adapter with its tensors as they are, under another strength and the name of another base.

    After a dry run nothing is there.
    """
    adapter = contents.adapter
    form = format_of(adapter)
    every = {target: factors.get(target, 1.0) for target in contents.layers}
    scaled = any(factor != 1 for factor in every.values())
    if form.rescales_tensors:
        after = {t: layer.scale * every[t] for t, layer in contents.layers.items()}
        strengths = {**every, **dict.fromkeys(contents.changes, 1.0)}
        made = form.scaled(contents, strengths, after) if scaled else Scaled({}, {}, dict(adapter.file.metadata))
        scaled_output(out, contents, made, record, options)
        return
    if not form.config_name or adapter.packing:
        raise InputError(
            f"{printable(adapter.file.path)}: rebase writes only what has a config of its own",
            hint="loratool convert ADAPTER -o ADAPTER-peft --to peft",
        )
    config = rescaled(contents, every) if scaled else adapter.config
    if not options.dry_run:
        copied_output(out, contents, dict(form.renamed_base(config, base)), record, options)


def rescaled(contents: Contents, factors: Mapping[str, float]) -> Config:
    """The config with other strengths; raises `InputError` with a way on where none says that."""
    adapter = contents.adapter
    try:
        return format_of(adapter).rescaled(contents, factors, False)
    except InputError as error:
        if error.own_hint != BAKE:
            raise
        numbers = " or ".join(f"{factor:.4g}" for factor in sorted(set(factors.values())))
        raise InputError(
            f"{printable(adapter.file.path)}: its update has to be multiplied by {numbers}, which no config of this "
            "kind can store; write it as plain LoRA first, and rebase that",
            error.problems,
            hint=f"loratool rescale {shell_word(os.fspath(adapter.folder))} -o LORA --bake",
        ) from None


def remarks(contents: Contents, fits: Sequence[Fit], total: Drift, differing: Drift, factor: float) -> Iterator[Note]:
    """What a user of the adapter should know."""
    yield Note(
        "thresholds-from-toys",
        "rebase's limits for cosine, c and z come from toy models; no pair of released bases was tried, so "
        "test the adapter on its new base",
    )
    if total.cosine is not None and total.cosine < DISTANT:
        yield Note("bases-far-apart", f"the cosine of the bases' weights is {total.cosine:.3f}, below {DISTANT}")
    if differing.c is not None and differing.c > PARTLY_THERE and factor != 1:
        text = f"the new base already contains {100 * differing.c:.0f} % of the update, so only the rest is kept"
        yield Note("update-partly-in-base", text)
    if differing.c is not None and differing.c < -PARTLY_THERE and (differing.z or 0.0) < -NOISE:
        yield Note("base-moved-against-update", f"the new base moved against the update (c = {differing.c:.3g})")
    if contents.dora:
        yield Note("dora-of-another-base", "DoRA: its magnitudes belong to the rows of the old base, and are kept")
    if whole := [*contents.saved, *contents.bases, *contents.rows]:
        text = (
            f"{len(whole)} tensors that were saved whole replace those of the new base, such as {printable(whole[0])}"
        )
        yield Note("saved-for-another-base", text)
    yield from contents.remarks
    yield from changed_beside(*checkpoints(fits))
    yield from told_beside(contents)
    for fit in fits:
        yield from (note for note in fit.notes if note.code != "base-mismatch")
