"""What is in the folder of a merged model besides its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.bases.side_files import OutputFile
from loratool.errors import VerificationError, printable
from loratool.files.digests import recorded
from loratool.files.folders import CARD, PROVENANCE
from loratool.files.outputs import as_json
from loratool.files.staging import Stage
from loratool.files.stopwatch import lap
from loratool.files.system import forget_cached
from loratool.merging.plan import Plan
from loratool.provenance import record
from loratool.provenance.cards import card, is_nobodys, terms_of


def output_names(plan: Plan) -> set[str]:
    """Every file that the output may have."""
    return {PROVENANCE, CARD, *(shard.name for shard in plan.shards), *(file.name for file in plan.side_files)}


def write_small_files(
    stage: Stage,
    plan: Plan,
    files: Sequence[OutputFile],
    table: Mapping[str, Any],
    place: str = ".",
    card: bool = True,
) -> None:
    """Everything but the weights: some of the plan's side files, a card where nobody wrote one, and the record of it all."""
    for file in files:
        if file.source is not None:
            stage.copy(file.name, file.source)
        else:
            stage.write(file.name, file.content or b"")
    if card and all(file.name != CARD or is_nobodys(file.source) for file in files):
        stage.write(CARD, merged_card(plan, table, place))
    write_record(stage, table)


def write_record(stage: Stage, table: Mapping[str, Any]) -> None:
    """The record of all other files of a stage, in place of one that was written before."""
    files = {name: digest for name, digest in stage.files.items() if name != PROVENANCE}
    stage.write(PROVENANCE, as_json({**table, "files": recorded(files)}))


def merged_card(plan: Plan, table: Mapping[str, Any], place: str) -> bytes:
    """README.md of the merged model; licence and task are those of the cards of base and adapters."""
    terms = terms_of(plan.base.root, *(adapter.folder for adapter in plan.adapters))
    edited = next((file.content for file in plan.side_files if file.name == "config.json" and file.content), None)
    return card(table, json.loads(edited) if edited else plan.base.config, terms, place)


def read_again(stage: Stage) -> None:
    """Read every file of a stage from the disk, and compare it with what its record says was written.

    Raises `VerificationError` naming every file and tensor that differs.
    """
    for name in stage.files:
        forget_cached(stage.folder / name)
    if problems := record.compare(stage.folder).problems:
        raise VerificationError(
            f"{printable(stage.out)}: not written, because what was read back is not what was written; the disk or the "
            "memory of this machine may be faulty:",
            problems,
        )
    lap("verify")
