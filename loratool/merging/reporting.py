"""What is to be said of a merge whose weights are made: in its record, and in its report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratool.adapters.told import as_input
from loratool.devices import Runtime
from loratool.errors import FitError, printable
from loratool.files.hub_cache import is_hub_id
from loratool.files.journal import FinishedShard
from loratool.files.seen import Seen, together
from loratool.files.staging import Stage
from loratool.merging.effects import effect_notes, effects_of, size_notes
from loratool.merging.gain import Errors, Gains, check_loss, gain_notes, gains_of
from loratool.notes import BASE_NAMED, Note, as_records
from loratool.provenance import record
from loratool.provenance.inputs import told_input
from loratool.results.base import Cost
from loratool.results.merge import AdapterEffect, MergeReport

if TYPE_CHECKING:
    from concurrent.futures import Future

    from loratool.merging.plan import Plan

GAIN_DIGITS = 3  # of it in a record: it is measured on a sample, and threads add in any order


@dataclass(frozen=True)
class Merged:
    """The weights of a merge are made; this is what is to be said of them."""

    plan: Plan
    seen: Seen
    effects: tuple[AdapterEffect, ...]
    gains: Gains
    errors: Errors
    notes: tuple[Note, ...]  # besides those of the plan
    table: dict[str, Any]  # `loratool.json`, but for "files"

    @property
    def device(self) -> str:
        """The kind that edited weights were computed on."""
        return self.seen.device or "cpu"


def describe(
    plan: Plan,
    finished: Mapping[str, FinishedShard],
    digests: Sequence[Mapping[str, str]],
    invoked: Mapping[str, Any],
    unchanged: str,
) -> Merged:
    """What is to be said of weight files that are all made.

    Args:
        plan: of the merge.
        finished: its weight files, by name.
        digests: of each adapter's files, for the record.
        invoked: what repeats the merge, for the record.
        unchanged: the text of the `FitError` that is raised where no weight differs from the base's.
    """
    seen = together(finished[shard.name].seen for shard in plan.shards)
    if plan.adapters and not (plan.replaces or seen.changed):
        raise FitError(unchanged)
    effects, gains, errors = effects_of(plan, seen), gains_of(plan, seen), Errors.of(seen.lost)
    check_loss(plan, gains, errors)
    notes = (*effect_notes(effects), *gain_notes(plan, gains))
    table = provenance(
        dataclasses.replace(plan, notes=(*plan.notes, *notes)), digests, effects, seen.device or "cpu", invoked
    )
    table |= {"gain": round(gains.total, GAIN_DIGITS)} if gains.total is not None else {}
    return Merged(plan, seen, effects, gains, errors, (*notes, *size_notes(plan, seen.ratios)), table)


def provenance(
    plan: Plan,
    digests: Sequence[Mapping[str, str]],
    effects: Sequence[AdapterEffect],
    device: str,
    invoked: Mapping[str, Any],
) -> dict[str, Any]:
    """`loratool.json`, but for "files": what made this model. The same inputs and settings give the same bytes."""
    trained_on = {adapter.training.base for adapter in plan.adapters}
    named = {"id": name} if len(trained_on) == 1 and is_hub_id(name := trained_on.pop()) else {}
    return {
        "made_by": "loratool merge",
        **invoked,
        "versions": record.versions(),
        "base": {"name": plan.base.name, **told_input(plan.base.root), **named},
        "adapters": [
            {
                **as_input(adapter, adapter.name, files),
                "weight": weight,
                "rank": adapter.training.rank,
                "modules": effect.modules,
                "unchanged": len(effect.unchanged),
            }
            for adapter, weight, files, effect in zip(plan.adapters, plan.weights, digests, effects, strict=True)
        ],
        "dtype": plan.dtype,
        "dtypes": dict(Counter(span.placed.dtype for span in plan.spans)),
        "device": device,
        "tensors": {"edited": len(plan.edited), "copied": plan.copied, "all": len(plan.spans)},
        "notes": as_records(note for note in plan.notes if note.code != BASE_NAMED),  # `command` names the base
    }


def make_report(merged: Merged, stage: Stage, cost: Cost) -> MergeReport:
    """What is to be said of a merge that is published, but for how it was run."""
    plan = merged.plan
    redone = [  # in the report only: the output is the same
        Note("written-again", f"{printable(name)}: finished by an interrupted run, but {reason}; written again")
        for name, reason in sorted(stage.redone.items())
    ]
    return MergeReport(
        out=stage.out,
        edited=len(plan.edited),
        adapters=merged.effects,
        copied=plan.copied,
        converted=plan.converted,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        workers=0,
        relative_norms=merged.seen.ratios,
        gain=merged.gains.total,
        gains=merged.gains.modules,
        error_added=merged.errors.total,
        errors_added=merged.errors.tensors,
        nonfinite={**merged.seen.nonfinite},
        left_out=plan.left_out,
        notes=(*plan.notes, *merged.notes, *redone),
        digests={s.name: str(s.digest) for _, s in sorted(stage.finished.items())},
        cost=cost,
    )


def cost(runtime: Future[Runtime], started: float) -> Cost:
    """What a merge that began at that second has cost so far."""
    ready = runtime.result()
    return Cost.since(started, ", ".join(ready.devices), ready.seconds)
