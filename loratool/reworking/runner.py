"""One runner for the commands that make an adapter: layers in, each worked on by a thread a core, an adapter out.

A command's module is a `Maker`: what is particular to it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Parts, Spelling
from loratool.adapters.layers import Form
from loratool.adapters.writer import Carried, Copied, FactorOptions, Output, Rounded, adapter_output
from loratool.arguments import PathLike, Progress
from loratool.files.model_files import RECORD_KEY
from loratool.measuring.session import Session
from loratool.notes import Note, as_records
from loratool.options.described import Options
from loratool.provenance.invocations import invocation

Task = TypeVar("Task")
Told = TypeVar("Told")


@dataclass(frozen=True)
class Draft:
    """What is to be written, as far as it is known before a layer is worked on."""

    forms: Mapping[str, Form]  # by target
    names: Spelling
    dtype: str  # of the factors, as torch calls it
    carried: Carried  # what stands beside the factors
    scales: Mapping[str, float] = field(default_factory=dict)  # what the output says multiplies factors, where not 1
    sources: Sequence[Adapter] = ()  # whose headers are kept, as far as they stay true
    architecture: str = ""  # of an image model, where it is known

    def header(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """What the header of the file of tensors says besides."""
        return dict(self.names.header(self.sources, Parts(ranks, self.scales, self.architecture)))


@dataclass(frozen=True)
class Made(Generic[Told]):
    """A layer that was worked on: its factors, none where it gets none, and what is told of it."""

    factors: tuple[Rounded | Copied, ...]
    told: Told


@dataclass(frozen=True)
class Rest:
    """What is written behind the layers."""

    config: Mapping[str, Any]
    facts: Mapping[str, Any]  # of the record: inputs and settings
    notes: tuple[Note, ...]
    files: Mapping[str, Path]  # to copy, by name
    folders: Sequence[Path]  # inputs whose cards tell licence and task
    totals: Any = None  # a dataclass of numbers, for the record


class Maker(ABC, Generic[Task, Told]):
    """What is particular to a command that makes an adapter."""

    command: str  # its name
    at_work: Session
    models: Mapping[str, Any] = MappingProxyType({})  # that options name, by keyword, as a record has them

    @abstractmethod
    def draft(self) -> Draft:
        """What will be written; everything that can be refused without looking at every layer is refused here."""

    def inputs(self) -> dict[str, Any]:
        """What it is made of, as a record has that before there is anything else to tell."""
        return {"inputs": list(self.at_work.origins)}

    @abstractmethod
    def tasks(self) -> Iterable[Task]:
        """What the threads take one by one."""

    def large_tasks(self) -> Iterable[Task]:
        """What all threads work on together, before the others."""
        return ()

    @abstractmethod
    def work(self, output: Output, task: Task) -> list[Made[Told]]:
        """Load, transform and round the layers of a task; on any thread."""

    def take(self, made: Made[Told]) -> None:
        """Account for a layer; one call at a time, in the order of the tasks."""

    @abstractmethod
    def rest(self, draft: Draft) -> Rest:
        """What is known when all layers are done; refuses a result that is nothing."""

    def prove(self, place: Path, rest: Rest) -> Rest:  # noqa: ARG002 (most are measured as they are made)
        """Look at the adapter that was written to a place, before it is published; what it shows goes into the record."""
        return rest


def run(
    maker: Maker[Task, Told],
    target: Path,
    inputs: Sequence[PathLike],
    options: FactorOptions,
    progress: Progress | None = None,
) -> Rest:
    """Write what `maker` makes of `inputs` under `target`; after a dry run nothing is written. `progress` counts layers."""
    draft = maker.draft()
    models = {"models": dict(maker.models)} if maker.models else {}
    header = draft.header({target: form.rank for target, form in draft.forms.items()})
    if not draft.names.form.config_name:
        header[RECORD_KEY] = json.dumps(record_of(maker.command, inputs, options, {**maker.inputs(), **models}, ()))
    with adapter_output(
        target, draft.forms, draft.carried, draft.dtype, draft.names, options, header, draft.scales
    ) as output:
        work, count = partial(maker.work, output), len(draft.forms)
        for one in maker.at_work.through(work, maker.tasks(), count, progress, maker.large_tasks()):
            maker.take(one)
            for factors in one.factors:
                output.add(factors)
        output.carry(draft.carried)
        output.tell(draft.header(output.ranks))
        rest = maker.rest(draft)
        if place := output.complete(rest.config):
            rest = maker.prove(place, rest)
        measured = {"measured": dataclasses.asdict(rest.totals)} if rest.totals is not None else {}
        record = record_of(maker.command, inputs, options, {**rest.facts, **models, **measured}, rest.notes)
        output.finish(rest.config, record, rest.files, rest.folders)
    return rest


def together(errors: Sequence[tuple[float, float]], dropped: float = 0.0) -> float:
    """The relative error of layers with a norm and a relative error each; `dropped` is ‖ΔW‖² of those that are left out."""
    squared = math.fsum(size**2 for size, _ in errors) + dropped
    lost = math.fsum((size * error) ** 2 for size, error in errors) + dropped
    return math.sqrt(lost / squared) if squared else 0.0


def record_of(
    name: str, inputs: Sequence[PathLike], options: Options, facts: Mapping[str, Any], notes: Sequence[Note]
) -> dict[str, Any]:
    """What `loratool.json` tells of a command that made an adapter."""
    return {
        "made_by": f"loratool {name}",
        **invocation(name, inputs, options),
        **facts,
        "notes": as_records(notes),
    }
