"""A plan without a merge: with the gain that is to be expected, or with the time that workers would take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from loratool.arguments import PathLike, several
from loratool.errors import UsageError
from loratool.merging.describing import described
from loratool.merging.forecasting import with_forecast
from loratool.merging.inputs import opened_inputs, planned
from loratool.merging.merge import prepare
from loratool.merging.merge_options import MergeOptions
from loratool.merging.one_file import as_one_file
from loratool.merging.parted_merge import checked_place
from loratool.merging.simulating import Rates, SimulationOptions, simulate
from loratool.results.base import Cost
from loratool.results.plan import MergePlan
from loratool.stores.names import is_in_store


@dataclass(frozen=True, kw_only=True)
class DryRunOptions(MergeOptions, SimulationOptions):
    """Of `plan`: those of the merge, and of its simulation."""


def dry_run(
    base: PathLike, adapters: Sequence[PathLike] | PathLike, out: PathLike | None, options: MergeOptions
) -> MergePlan:
    """What a merge would do; with `simulate`, from headers alone. Raises as `merge` does, and writes nothing."""
    started = time.monotonic()
    simulated = options if isinstance(options, DryRunOptions) else DryRunOptions()
    rates = Rates.of(simulated)
    if rates != Rates() and not simulated.simulate:
        raise UsageError("--bandwidth and the other options of a simulation need --simulate", hint="--simulate 1,8,64")
    with ExitStack() as stack:
        stored = checked_place(out) if out is not None and is_in_store(out) else None
        if out is None or stored is not None:
            model, read, _ = opened_inputs(base, several(adapters), options, stack)
            plan = planned(model, read, options)
            plan = plan if stored is None else as_one_file(plan, Path(str(stored)))
        else:
            plan, _, _ = prepare(base, adapters, out, options, stack)
        found = described(plan, options)
        if simulated.simulate:
            found = dataclasses.replace(found, simulations=simulate(plan, simulated.simulate, rates))
        else:
            found = with_forecast(found, plan)
    return dataclasses.replace(found, cost=Cost.since(started))
