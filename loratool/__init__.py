"""loratool: merge, inspect and manage LoRA adapters on checkpoint files.

    import loratool

    report = loratool.merge("base", ["adapter"], "merged")
    print(report)

Names are imported on first use, so that `import loratool` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

EXPORTS = {
    "AbortReport": "results.abort",
    "Adapter": "adapters.adapter",
    "AdapterFacts": "results.facts",
    "Checkpoint": "files.checkpoint",
    "CheckpointFacts": "results.facts",
    "CombineReport": "results.combine",
    "CompareReport": "results.compare",
    "CompressReport": "results.compress",
    "ConvertReport": "results.convert",
    "ExpandReport": "results.compress",
    "ExtractReport": "results.extract",
    "FinishReport": "results.parts",
    "FitError": "errors",
    "FleetFacts": "results.fleet",
    "HubError": "errors",
    "IndexReport": "results.index",
    "InputError": "errors",
    "LoratoolError": "errors",
    "MergeManyReport": "results.merge_many",
    "MergePlan": "results.plan",
    "MergeReport": "results.merge",
    "MergedWeights": "merging.in_memory",
    "Note": "notes",
    "PartReport": "results.parts",
    "PartialReport": "results.partial",
    "PartsStatus": "results.parts",
    "PushReport": "results.push",
    "RebaseReport": "results.rebase",
    "Record": "results.record",
    "ReproduceReport": "results.reproduce",
    "RescaleReport": "results.rescale",
    "ResizeReport": "results.resize",
    "RunReport": "results.run",
    "StorageError": "errors",
    "StoreError": "errors",
    "StreamReport": "results.stream",
    "UsageError": "errors",
    "Verification": "results.verify",
    "VerificationError": "errors",
    "abort_merge": "commands.merge",
    "combine": "commands.combine",
    "compare": "commands.compare",
    "compress": "commands.compress",
    "convert": "commands.convert",
    "estimate": "commands.estimate",
    "expand": "commands.expand",
    "extract": "commands.extract",
    "extract_part": "commands.partial",
    "finish_extract": "commands.partial",
    "finish_inspect": "commands.partial",
    "finish_merge": "commands.parts",
    "finish_verify": "commands.partial",
    "html_page": "pictures.page",
    "index": "commands.index",
    "inspect": "commands.inspect",
    "inspect_part": "commands.partial",
    "iter_merged": "commands.in_memory",
    "merge": "commands.merge",
    "merge_many": "commands.merge",
    "merge_part": "commands.parts",
    "merge_status": "commands.parts",
    "merged": "commands.in_memory",
    "open_checkpoint": "bases.opening",
    "plan": "commands.plan",
    "plan_merge": "commands.plan",
    "push": "commands.push",
    "read_adapter": "adapters.formats",
    "rebase": "commands.rebase",
    "record": "commands.record",
    "reproduce": "commands.reproduce",
    "rescale": "commands.rescale",
    "resize": "commands.resize",
    "run": "commands.run",
    "stream": "commands.stream",
    "verify": "commands.verify",
    "verify_part": "commands.partial",
    "write_page": "pictures.writing",
    "write_svgs": "pictures.writing",
}
__all__ = [*EXPORTS, "__version__"]  # noqa: PLE0604 (every name of EXPORTS is resolved below)

if TYPE_CHECKING:
    from loratool.adapters.adapter import Adapter as Adapter
    from loratool.adapters.formats import read_adapter as read_adapter
    from loratool.bases.opening import open_checkpoint as open_checkpoint
    from loratool.commands.combine import combine as combine
    from loratool.commands.compare import compare as compare
    from loratool.commands.compress import compress as compress
    from loratool.commands.convert import convert as convert
    from loratool.commands.estimate import estimate as estimate
    from loratool.commands.expand import expand as expand
    from loratool.commands.extract import extract as extract
    from loratool.commands.in_memory import iter_merged as iter_merged, merged as merged
    from loratool.commands.index import index as index
    from loratool.commands.inspect import inspect as inspect
    from loratool.commands.merge import (
        abort_merge as abort_merge,
        merge as merge,
        merge_many as merge_many,
    )
    from loratool.commands.partial import (
        extract_part as extract_part,
        finish_extract as finish_extract,
        finish_inspect as finish_inspect,
        finish_verify as finish_verify,
        inspect_part as inspect_part,
        verify_part as verify_part,
    )
    from loratool.commands.parts import (
        finish_merge as finish_merge,
        merge_part as merge_part,
        merge_status as merge_status,
    )
    from loratool.commands.plan import plan as plan, plan_merge as plan_merge
    from loratool.commands.push import push as push
    from loratool.commands.rebase import rebase as rebase
    from loratool.commands.record import record as record
    from loratool.commands.reproduce import reproduce as reproduce
    from loratool.commands.rescale import rescale as rescale
    from loratool.commands.resize import resize as resize
    from loratool.commands.run import run as run
    from loratool.commands.stream import stream as stream
    from loratool.commands.verify import verify as verify
    from loratool.errors import (
        FitError as FitError,
        HubError as HubError,
        InputError as InputError,
        LoratoolError as LoratoolError,
        StorageError as StorageError,
        StoreError as StoreError,
        UsageError as UsageError,
        VerificationError as VerificationError,
    )
    from loratool.files.checkpoint import Checkpoint as Checkpoint
    from loratool.merging.in_memory import MergedWeights as MergedWeights
    from loratool.notes import Note as Note
    from loratool.pictures.page import html_page as html_page
    from loratool.pictures.writing import write_page as write_page, write_svgs as write_svgs
    from loratool.results.abort import AbortReport as AbortReport
    from loratool.results.combine import CombineReport as CombineReport
    from loratool.results.compare import CompareReport as CompareReport
    from loratool.results.compress import CompressReport as CompressReport, ExpandReport as ExpandReport
    from loratool.results.convert import ConvertReport as ConvertReport
    from loratool.results.extract import ExtractReport as ExtractReport
    from loratool.results.facts import AdapterFacts as AdapterFacts, CheckpointFacts as CheckpointFacts
    from loratool.results.fleet import FleetFacts as FleetFacts
    from loratool.results.index import IndexReport as IndexReport
    from loratool.results.merge import MergeReport as MergeReport
    from loratool.results.merge_many import MergeManyReport as MergeManyReport
    from loratool.results.partial import PartialReport as PartialReport
    from loratool.results.parts import (
        FinishReport as FinishReport,
        PartReport as PartReport,
        PartsStatus as PartsStatus,
    )
    from loratool.results.plan import MergePlan as MergePlan
    from loratool.results.push import PushReport as PushReport
    from loratool.results.rebase import RebaseReport as RebaseReport
    from loratool.results.record import Record as Record
    from loratool.results.reproduce import ReproduceReport as ReproduceReport
    from loratool.results.rescale import RescaleReport as RescaleReport
    from loratool.results.resize import ResizeReport as ResizeReport
    from loratool.results.run import RunReport as RunReport
    from loratool.results.stream import StreamReport as StreamReport
    from loratool.results.verify import Verification as Verification


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(import_module(f"loratool.{EXPORTS[name]}"), name)
    if name == "nn":  # a module of its own, as torch.nn is
        return import_module("loratool.nn")
    raise AttributeError(f"module 'loratool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
