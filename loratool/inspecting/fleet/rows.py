"""The row of one adapter in a table, from its headers; from its values too where they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import format_at, format_of, is_adapter, not_an_adapter
from loratool.adapters.kinds import image_models, kinds_of_adapter
from loratool.adapters.reading import Reading
from loratool.errors import FitError, InputError, LoratoolError, code_of, escaped, folded, printable
from loratool.fetching import place_of
from loratool.files.checkpoint import Checkpoint
from loratool.files.containers import foreign_file
from loratool.files.heads import read_head
from loratool.files.hub_names import slashed
from loratool.inspecting.fleet.alike import likeness
from loratool.inspecting.fleet.members import Member, is_model, names_in
from loratool.inspecting.health import examine, tell_unreadable, with_record
from loratool.inspecting.inspect import exit_code_of, layer_in, leaf, located, told_format
from loratool.inspecting.options import InspectOptions
from loratool.results.findings import Finding
from loratool.results.fleet import OK, FleetRow

if TYPE_CHECKING:
    from loratool.bases.adapter_fit import Fit
    from loratool.reworking.sketches import Sketch

UNTRAINED = "untrained"  # codes of what values show, as a check has them
NOT_SKETCHED = "not-sketched"

PAGES = frozenset({".html", ".svg"})  # what `--html` and `--svg` write, which may lie next to adapters


@dataclass
class Reader:
    """Reads the adapters of a table; `way` is how each of them is read."""

    options: InspectOptions
    way: Reading
    base: Path | None = None
    known: dict[bytes, FleetRow] = field(default_factory=dict)  # rows of adapters that are alike, by their likeness

    @property
    def reads_values(self) -> bool:
        return self.options.values or self.options.near is not None

    @property
    def plain(self) -> bool:
        """Whether a row says no more than headers do."""
        return not (self.reads_values or self.options.check or self.base or self.way != Reading())

    def read(self, member: Member) -> tuple[FleetRow, Sketch | None] | None:
        """The row of a member, with a sketch where values are read; None for what is no adapter."""
        try:
            return self.read_or_raise(member)
        except LoratoolError as error:
            return self.failed(member, error)

    def read_or_raise(self, member: Member) -> tuple[FleetRow, Sketch | None] | None:
        """The same; raises `LoratoolError` for one that cannot be read."""
        like = likeness(member.path) if self.plain else None
        if like is not None and (same := self.known.get(like)) is not None:
            return replace(
                same, name=printable(member.name), path=printable(slashed(member.path)), date=date_of(member.path)
            ), None
        with ExitStack() as stack:
            here = place_of(member.path) is None
            place = member.path if here else located(member.path, "adapter", self.options, stack)
            if is_adapter(place):
                row, sketch = self.of_adapter(member, place)
            elif place.suffix in PAGES or (not foreign_file(place) and holds_other(place)):
                return None
            else:
                raise not_an_adapter(place)
        if like is not None and not row.exit_code:
            self.known[like] = row
        return row, sketch

    def of_adapter(self, member: Member, location: Path) -> tuple[FleetRow, Sketch | None]:
        """The row of an adapter. Raises `LoratoolError` where not even its header can be read."""
        adapter, problems = format_at(location).read_leniently(location, self.way)
        row = replace(
            row_of(adapter), name=printable(member.name), path=printable(slashed(member.path)), date=date_of(location)
        )
        fit: Fit | None = None
        checkpoint: Checkpoint | None = None
        if problems and not adapter.unsupported:
            text, _ = folded(problems)[0]
            row = replace(row, health=code_of(text), reason=text, exit_code=InputError.exit_code)
        if self.base is not None:
            from loratool.bases.adapter_fit import fit_of
            from loratool.bases.opening import open_checkpoint

            checkpoint = open_checkpoint(self.base)
            fit = fit_of(adapter, self.base, checkpoint, self.options.maps, self.options.fan_in_fan_out)
            if fit.base.problems and not row.exit_code:
                row = replace(row, health="does-not-fit", reason=fit.base.problems[0], exit_code=FitError.exit_code)
        if self.options.check:
            row = checked(row, examine(adapter, problems, Path(member.path), fit, adapter.notes), location)
        elif row.health == OK:
            row = with_findings(row, format_of(adapter).findings(adapter, Path(member.path)))
        if not self.reads_values or row.exit_code:
            return row, None
        return measured(row, adapter, checkpoint)

    def failed(self, member: Member, error: LoratoolError) -> tuple[FleetRow, None]:
        """The row of an adapter that cannot be read."""
        texts = [text for text, _ in folded(error.problems)]
        return FleetRow(
            printable(member.name),
            printable(member.path),
            health=next((code_of(problem, "") for problem in error.problems), "") or "unreadable",
            reason=without_path(error.message + (f" {texts[0]}" if texts else ""), member.path),
            exit_code=error.exit_code,
            date=date_of(member.path),
            findings=tell_unreadable(error, member.path) if self.options.check else None,
        ), None


def without_path(reason: str, path: Path) -> str:
    """A reason without the path that the row's name says already."""
    return reason.removeprefix(f"{printable(path)}: ").removeprefix(f"{printable(path)}/")


def holds_other(path: Path) -> bool:
    """Whether a file or folder that is no adapter is a model, or another sound file of weights."""
    if path.is_dir():
        return is_model(names_in(path))
    if not path.exists():
        return False
    read_head(path)  # raises where it is damaged
    return True


def date_of(path: Path) -> str:
    """When the weights were written, by the file system."""
    try:
        files = [path] if path.is_file() else [p for p in path.iterdir() if p.suffix in (".safetensors", ".gguf")]
        latest = max(file.stat().st_mtime for file in files)
        return datetime.fromtimestamp(latest, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OSError, ValueError, OverflowError):
        return ""


def row_of(adapter: Adapter) -> FleetRow:
    """What headers and config tell of an adapter."""
    training = adapter.training
    layers = [layer for target, update in adapter.updates.items() if (layer := layer_in(target, update))]
    dialect = told_format(adapter)
    ranks = sorted({layer.rank for layer in layers})
    alphas = {layer.scale * (layer.rank**0.5 if training.rslora else layer.rank) for layer in layers}
    return FleetRow(
        name="",
        path="",
        dialect=(dialect,) if isinstance(dialect, str) else tuple(dialect),
        method=printable(" ".join([training.method, *training.variants])),
        base=printable(training.base),
        rank=tuple(ranks),
        alpha=tuple(sorted({float(f"{alpha:.6g}") for alpha in alphas})),
        scale=tuple(sorted({float(f"{layer.scale:.6g}") for layer in layers})),
        targets=distinct(sorted(leaf(target) for target in adapter.updates)),
        modules=len(adapter.updates),
        parameters=adapter.parameters,
        bytes=adapter.file.layout.size,
        dtype=distinct(info.dtype for info in adapter.file.tensors.values()),
        reason=escaped(adapter.unsupported[0]) if adapter.unsupported else "",
        health="not-mergeable" if adapter.unsupported else OK,
        model=image_models(kinds_of_adapter(adapter)),
    )


def distinct(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(printable, words)))


def with_findings(row: FleetRow, findings: Iterable[Finding]) -> FleetRow:
    """The row with the first problem that names and config show."""
    first = next((finding for finding in findings if finding.level == "problem"), None)
    return replace(row, health=first.code, reason=first.message) if first else row


def checked(row: FleetRow, findings: tuple[Finding, ...], location: Path) -> FleetRow:
    """The row with all that a check found, and the files compared with what loratool wrote, where it did."""
    findings = with_record(findings, location)
    return replace(with_findings(row, findings), findings=findings, exit_code=exit_code_of(findings) or row.exit_code)


def measured(row: FleetRow, adapter: Adapter, base: Checkpoint | None) -> tuple[FleetRow, Sketch | None]:
    """The row with its norm and sketch, and the sketch itself."""
    from loratool.reworking.sketches import NOT_FINITE, sketch_of

    try:
        sketch = sketch_of(adapter, base)
    except (InputError, FitError) as error:
        if any(code_of(problem) == NOT_FINITE for problem in error.problems):
            return replace(row, health=NOT_FINITE, reason=error.problems[0], exit_code=error.exit_code), None
        reason = error.problems[0] if error.problems else error.message
        return (replace(row, health=NOT_SKETCHED, reason=f"no sketch: {reason}") if row.health == OK else row), None
    row = replace(row, norm=sketch.norm, sketch=sketch.numbers, sketched=sketch.facts)
    if not sketch.norm and row.health == OK:
        row = replace(row, health=UNTRAINED, reason="every update is zero (B = 0, or alpha is 0)")
    return row, sketch
