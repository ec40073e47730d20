"""`verify` by many workers: what each measures of its tensors is added up in the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import InputError, UsageError, printable
from loratool.files.digests import sha256_of
from loratool.files.folders import record_for
from loratool.files.partials import Partials
from loratool.measuring.shared_work import do_share, partials_in
from loratool.provenance import record
from loratool.verifying.records import fetched, verify_record
from loratool.verifying.verify import by_record

if TYPE_CHECKING:
    from loratool.arguments import PathLike, Progress
    from loratool.options.sharing import Share
    from loratool.results.partial import PartialReport
    from loratool.results.verify import Verification
    from loratool.verifying.options import VerifyOptions
    from loratool.verifying.pairing import Pair
    from loratool.verifying.verifier import Verifier

COMMAND = "verify"
UNIT = 256 << 20  # bytes that are read for tensors that are compared together, at least


def verify_part(
    merged: PathLike,
    base: PathLike | None,
    adapters: Sequence[PathLike] | PathLike,
    options: VerifyOptions,
    share: Share,
    into: PathLike,
    progress: Progress | None = None,
) -> PartialReport:
    """Do one worker's share; `loratool.commands.partial` says all of it."""
    started = time.monotonic()
    if by_record(base, adapters, options):
        folder, names, partials = of_record(merged, into)

        def work(unit: int) -> tuple[Mapping[str, Any], bytes]:
            return {"reason": record.why_other_file(folder, names[unit])}, b""
    else:
        verifier, units, partials = of_tensors(merged, base, adapters, options, into)

        def work(unit: int) -> tuple[Mapping[str, Any], bytes]:
            before = verifier.bytes_read
            found = verifier.prove(units[unit], verifier.rounding)
            told = {n: {key: v for key, v in vars(each).items() if key != "lock"} for n, each in found.items()}
            return {"distances": told, "bytes_read": verifier.bytes_read - before}, b""

    return do_share(partials, share, work, progress, started)


def finish_verify(
    merged: PathLike,
    base: PathLike | None,
    adapters: Sequence[PathLike] | PathLike,
    options: VerifyOptions,
    into: PathLike,
    progress: Progress | None = None,
) -> Verification:
    """What all workers found; `loratool.commands.partial` says all of it."""
    started = time.monotonic()
    if by_record(base, adapters, options):
        _, names, partials = of_record(merged, into)
        return verify_record(merged, {n: t["reason"] for n, (t, _) in zip(names, partials.every(), strict=True)})
    from loratool.verifying.distances import Distances  # with all that computes

    verifier, _, partials = of_tensors(merged, base, adapters, options, into)
    verifier.progress = progress
    tables = [table for table, _ in partials.every()]
    verifier.known = {name: Distances(**each) for table in tables for name, each in table["distances"].items()}
    verifier.bytes_read = sum(table["bytes_read"] for table in tables)
    return verifier.run(started)


def of_record(merged: PathLike, into: PathLike) -> tuple[Path, list[str], Partials]:
    """The folder of a model, the files that its record lists, and where what is found of them goes."""
    folder = Path(merged) if Path(merged).exists() else fetched(merged)
    if not folder.is_dir() or not record_for(folder).is_file():
        raise UsageError(
            f"{printable(folder)}: only a folder with a loratool.json is verified in parts by its record; name what was "
            "merged, or leave out --part"
        )
    try:
        listed = record.listed_files(folder)
    except InputError:
        listed = {}  # which `--finish` tells
    names = sorted(listed)
    fingerprint = sha256_of(record_for(folder))
    return folder, names, Partials(into, COMMAND, fingerprint, [listed[name].size for name in names])


def of_tensors(
    merged: PathLike,
    base: PathLike | None,
    adapters: Sequence[PathLike] | PathLike,
    options: VerifyOptions,
    into: PathLike,
) -> tuple[Verifier, list[list[Pair]], Partials]:
    """What compares a model, its tensors in units, and where what is found of them goes."""
    from loratool.merging.fingerprints import content_fingerprint, sampled
    from loratool.verifying.verifier import verifier_of

    verifier = verifier_of(merged, base, adapters, options, None)
    plan = verifier.plan
    verifier.check()
    units = units_of(verifier.pairing.pairs)
    facts = [
        content_fingerprint(plan, [adapter.digests() for adapter in plan.adapters]),
        [sampled(shard) for shard in verifier.merged.shards],
        dataclasses.replace(options, device="auto").words(),
    ]
    return verifier, units, partials_in(into, COMMAND, facts, [sum(p.nbytes for p in unit) for unit in units])


def units_of(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Tensors in the order of the plan, in units of some size; a large one is a unit by itself."""
    units: list[list[Pair]] = []
    size = UNIT
    for pair in pairs:
        if size >= UNIT:
            units.append([])
            size = 0
        units[-1].append(pair)
        size += pair.nbytes
    return units
