"""The plan that the engine works by: `loratool.plan` returns what people and scripts are shown of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratool.adapters.formats import read_adapter
from loratool.bases.opening import open_checkpoint
from loratool.merging.merge_options import PlanOptions
from loratool.merging.planning import plan_merge
from loratool.options.described import made_of

if TYPE_CHECKING:
    from pathlib import Path

    from loratool.merging.plan import Plan


def working_plan(base: Path, adapter: Path, **settings: Any) -> Plan:
    """The plan of a merge of one adapter."""
    options = made_of(PlanOptions, settings, "plan_merge")
    return plan_merge(open_checkpoint(base), [read_adapter(adapter)], options)
