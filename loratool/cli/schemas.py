"""The JSON Schema of every command: of what its function of the library returns, or of what it prints itself."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from loratool.cli.options import LibraryCommand
from loratool.results.abort import AbortReport
from loratool.results.demo import DemoResult
from loratool.results.extract import ExtractReport
from loratool.results.fleet import InspectTable
from loratool.results.lesson import Lesson
from loratool.results.merge import MergeReport
from loratool.results.merge_many import OutputsTable
from loratool.results.partial import PartialReport
from loratool.results.parts import FinishReport, PartReport, PartsStatus
from loratool.results.plan import PlanTable
from loratool.results.schemas import schema_of
from loratool.results.stream import StreamReport
from loratool.results.verify import Verification

if TYPE_CHECKING:
    import click

# Of the commands that are more than one function.
PRINTED: dict[str, tuple[Any, ...]] = {
    "merge": (MergeReport, PlanTable, OutputsTable, StreamReport, PartReport, PartsStatus, FinishReport, AbortReport),
    "plan": (PlanTable,),
    "inspect": (InspectTable, PartialReport),
    "verify": (Verification, PartialReport),
    "extract": (ExtractReport, PartialReport),
    "demo": (DemoResult, Lesson),
}


def schema_of_command(name: str, command: click.Command) -> dict[str, Any]:
    """The schema of what a command prints with `--json`."""
    return schema_of(name, printed_by(name, command))


def printed_by(name: str, command: click.Command) -> tuple[Any, ...]:
    """The types of what a command prints: in general, what the function of the library that it calls returns."""
    if name in PRINTED:
        return PRINTED[name]
    if isinstance(command, LibraryCommand):
        function = command.function
    else:
        function = getattr(import_module(f"loratool.commands.{name}"), name)
    said = function.__annotations__["return"]
    kind = eval(said, vars(sys.modules[function.__module__])) if isinstance(said, str) else said  # noqa: S307 (ours)
    return get_args(kind) if get_origin(kind) is Union else (kind,)
