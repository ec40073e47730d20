"""`extract` by many workers: each decomposes some layers, and what they found is written as one adapter in the end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loratool.adapters.writer import Output, Rounded
from loratool.algebra.lowrank.products import Product
from loratool.arguments import PathLike, Progress
from loratool.errors import UsageError
from loratool.lazy import torch
from loratool.measuring.session import session
from loratool.measuring.shared_work import do_share, partials_in
from loratool.merging.fingerprints import sampled
from loratool.results.extract import ExtractedLayer
from loratool.reworking.extracting.extract import Extractor, Models, Outcome, extract

if TYPE_CHECKING:
    from loratool.files.partials import Partials
    from loratool.options.sharing import Share
    from loratool.results.extract import ExtractReport
    from loratool.results.partial import PartialReport
    from loratool.reworking.extracting.options import ExtractOptions
    from loratool.reworking.extracting.pairing import Change

COMMAND = "extract"
TOGETHER = 8  # small layers that are one unit of work
Task = tuple["Change", ...]


def extract_part(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    options: ExtractOptions,
    share: Share,
    into: PathLike,
    progress: Progress | None = None,
) -> PartialReport:
    """Do one worker's share; `loratool.commands.partial` says all of it."""
    started = time.monotonic()
    models = Models.of(base, tuned, out, options)
    with session(options.device, []) as at_work:
        extractor = models.extractor(options, at_work)
        if extractor.stacked and extractor.rule.by_value:
            raise UsageError(
                f"--part needs --rank N here: {len(extractor.stacked)} layers must have one rank, and to choose it every worker "
                "would have to decompose all of them"
            )
        draft = extractor.draft()
        output = Output(None, None, draft.names, draft.forms, draft.dtype, draft.scales)
        units, partials = units_of(extractor, options, into)

        def work(unit: int) -> tuple[Mapping[str, Any], bytes]:
            def outcomes(task: Task) -> list[Outcome]:
                return list(extractor.outcomes(output, task))

            tasks = units[unit]
            every = map(outcomes, tasks) if len(tasks) == 1 else at_work.spread(outcomes, tasks)
            return packed([outcome for each in every for outcome in each])

        return do_share(partials, share, work, progress, started, ", ".join(map(str, at_work.devices)))


def finish_extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    options: ExtractOptions,
    progress: Progress | None = None,
    *,
    into: PathLike,
) -> ExtractReport:
    """Write what all workers found; `loratool.commands.partial` says all of it."""

    def gathered(extractor: Extractor) -> Callable[[Task], list[Outcome]]:
        units, partials = units_of(extractor, options, into)
        partials.every()
        unit_of = {change.target: n for n, unit in enumerate(units) for task in unit for change in task}

        @lru_cache(maxsize=4)
        def read(unit: int) -> dict[str, tuple[dict[str, Any], bytes]]:
            table, content = partials.read(unit) or ({"layers": []}, b"")
            return {each["target"]: (each, content) for each in table["layers"]}

        return lambda task: [outcome_of(each, *read(unit_of[each.target])[each.target]) for each in task]

    return extract(base, tuned, out, options, progress, gathered)


def units_of(extractor: Extractor, options: ExtractOptions, into: PathLike) -> tuple[list[list[Task]], Partials]:
    """The layers in units of work, and where what is found of them goes."""
    small = list(extractor.tasks())
    units = [[task] for task in extractor.large_tasks()]
    units += [small[at : at + TOGETHER] for at in range(0, len(small), TOGETHER)]
    pairing = extractor.pairing
    facts = [
        *([sampled(shard) for shard in model.shards] for model in (pairing.base, pairing.tuned)),
        dataclasses.replace(options, device="auto").words(),
        [change.target for unit in units for task in unit for change in task],
    ]
    costs = [float(sum(math.prod(c.shape) * c.experts for task in unit for c in task)) for unit in units]
    return units, partials_in(into, COMMAND, facts, costs)


def packed(outcomes: Sequence[Outcome]) -> tuple[dict[str, Any], bytes]:
    """What came out for some layers: as JSON, and the bytes of its tensors."""
    content: list[bytes] = []
    at = 0

    def kept(tensor: torch.Tensor) -> dict[str, Any]:
        nonlocal at
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        content.append(raw)
        at += len(raw)
        return {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "bytes": [at - len(raw), at],
        }

    layers = [
        {
            "target": outcome.change.target,
            "rank": outcome.rank,
            "told": None if outcome.told is None else dataclasses.asdict(outcome.told),
            "factors": [
                {"target": each.target, "up": kept(each.factors.up), "down": kept(each.factors.down)}
                for each in outcome.factors
            ],
        }
        for outcome in outcomes
    ]
    return {"layers": layers}, b"".join(content)


def outcome_of(change: Change, table: Mapping[str, Any], content: bytes) -> Outcome:
    """What came out for a layer."""

    def tensor(entry: Mapping[str, Any]) -> torch.Tensor:
        start, stop = entry["bytes"]
        dtype: torch.dtype = getattr(torch, entry["dtype"])
        return torch.frombuffer(bytearray(content[start:stop]), dtype=dtype).reshape(entry["shape"])

    products = ((each["target"], Product(tensor(each["up"]), tensor(each["down"]))) for each in table["factors"])
    factors = tuple(Rounded(target, product, product) for target, product in products)
    told = None if table["told"] is None else ExtractedLayer(**table["told"])
    return Outcome(change, table["rank"], told, factors)
