"""`convert()`: the same adapter as another tool spells it, read back and compared before it is published."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapters.formats import DIALECTS, format_of, read_adapter
from loratool.adapters.formats.format import Format, Parts, Spelling
from loratool.adapters.layers import Contents, Form, Layer, contents_of
from loratool.adapters.ranks import evened
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.writer import (
    FactorOptions,
    Output,
    Rounded,
    carried_over,
    check_adapter_target,
    files_beside,
    kept_dtype,
    told_beside,
)
from loratool.algebra.lowrank.products import Product
from loratool.errors import FitError, InputError, LoratoolError, UsageError, printable
from loratool.fetching import local
from loratool.files.outputs import MADE_HERE
from loratool.lazy import torch
from loratool.measuring.session import PathLike, Progress, Session, session
from loratool.notes import Note
from loratool.options.described import FLAG, Choice, option
from loratool.options.shared import PublishOptions
from loratool.results.convert import ConvertedLayer, ConvertReport
from loratool.reworking.converting.losing import without_losses
from loratool.reworking.converting.proof import Compared, Comparison, places_of
from loratool.reworking.converting.rows import Target, complete
from loratool.reworking.runner import Draft, Made, Maker, Rest, record_of, run

SAME = 1e-7  # a factor that differs from 1 by less is none: α is stored as a float32


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(FactorOptions, ReadingOptions, PublishOptions):
    """Of `convert`."""

    to: str | None = option(help="Dialect to write.", kind=Choice(lambda: tuple(DIALECTS)))
    accept_loss: bool = option(
        help="Leave out what the dialect cannot express; the report names it.", default=False, kind=FLAG
    )


def convert(
    adapter: PathLike, out: PathLike, options: ConvertOptions, progress: Progress | None = None
) -> ConvertReport:
    """Write the adapter in another dialect; `loratool.commands.convert` says all of it."""
    started = time.monotonic()
    if options.to is None:
        raise UsageError(f"pass --to with one of {', '.join(DIALECTS)}")
    form = DIALECTS[options.to]
    (way,) = options.readings(1)
    path = local(adapter, "adapter")
    target = check_adapter_target(out, [path], options, form)
    found, lost = without_losses(read_adapter(path, way), form, options.to, options.accept_loss)
    contents = contents_of(found, "convert")
    if not contents.layers:
        raise InputError(f"{printable(contents.adapter.file.path)}: contains no low-rank update")
    with session("cpu", [contents]) as at_work:
        targets = {name: Target.same(layer) for name, layer in contents.layers.items()}
        made = Converter(contents, targets, at_work, form, options, lost, path)
        rest = run(made, target, [path], options, progress)
    return made.report(target, rest, at_work.told(started))


class Converter(Maker[str, str]):
    """The layers of one adapter, as those of another."""

    command = "convert"

    def __init__(
        self,
        contents: Contents,
        targets: Mapping[str, Target],
        at_work: Session,
        form: Format,
        options: ConvertOptions,
        lost: tuple[Note, ...],
        path: Path,
    ) -> None:
        self.contents, self.targets, self.at_work, self.form, self.options = contents, targets, at_work, form, options
        self.lost, self.path = lost, path
        self.dtype = kept_dtype([contents], options.dtype)
        self.ranks: dict[str, int] = {}
        self.factors: dict[str, dict[str, float]] = {}  # target of the output → of the input → what its rows take
        self.compared: dict[str, Compared] = {}
        assert not complete(targets.values(), contents.layers), "each row has one place"

    def draft(self) -> Draft:
        layers, kinds = self.contents.layers, {name: target.kind for name, target in self.targets.items()}
        release = self.contents.training.release if self.form is format_of(self.contents.adapter) else ""
        names = self.form.spelling(kinds, release, self.options.to or "")
        own = {name: target.rank(layers) for name, target in self.targets.items()}
        self.ranks = evened(own, names.of_one_rank())
        scales = self.scales(names)
        carried = carried_over(self.contents, names)
        parts = Parts(
            self.ranks,
            scales,
            dora=self.contents.dora,
            lora_bias=bool(self.contents.biases),
            tokens=carried.tokens,
        )
        carried.tensors.update(names.strengths(parts))
        self.config = dict(names.describe([self.contents.adapter], parts))
        header = dict(names.header([self.contents.adapter], parts))
        if not self.form.config_name:
            facts = {"adapter": self.at_work.origins[0], "to": self.options.to}
            header[MADE_HERE] = json.dumps(record_of(self.command, [self.path], self.options, facts, ()))
        self.notes = (
            *self.contents.adapter.notes,
            *self.form.rank_notes(own, self.ranks),
            *told_beside(self.contents),
        )
        return Draft(self.forms(), names, self.dtype, carried, header)

    def forms(self) -> dict[str, Form]:
        return {name: target.form(self.contents.layers, self.ranks[name]) for name, target in self.targets.items()}

    def scales(self, names: Spelling) -> dict[str, float]:
        """What the output says that its layers are multiplied by; the rest of each scale goes into its rows."""
        own = {target: layer.scale for target, layer in self.contents.layers.items()}
        wanted = {name: own[target.sources[0]] / names.times(name) for name, target in self.targets.items()}
        said = names.scales(wanted)
        self.factors = {
            name: {t: settled(own[t], said[name] * names.times(name)) for t in target.sources}
            for name, target in self.targets.items()
        }
        return dict(said)

    def tasks(self) -> Iterable[str]:
        return self.targets

    def work(self, output: Output, task: str) -> list[Made[str]]:
        product = self.targets[task].product(self.load, self.factors[task], self.ranks[task]).to(output.dtype)
        if not (bool(product.up.isfinite().all()) and bool(product.down.isfinite().all())):
            self.contents.adapter.check_values()
            dtype = str(output.dtype).removeprefix("torch.")
            raise FitError(f"{printable(task)}: the factors overflow {dtype}; pass another --dtype")
        return [Made((Rounded(task, product, product),), task)]

    def load(self, target: str) -> Product:
        """The factors of a layer of the input, in their own dtype or a wider one."""
        dtype = torch.promote_types(self.dtype, kept_dtype([self.contents], "keep"))
        return self.contents.layers[target].load_factors(torch.device("cpu"), dtype)

    def take(self, made: Made[str]) -> None:
        """Nothing is measured of a layer before all are written."""

    def rest(self, draft: Draft) -> Rest:  # noqa: ARG002 (known before)
        return Rest(
            config=self.config,
            facts={"adapter": self.at_work.origins[0], "to": self.options.to},
            notes=(*self.lost, *self.notes),
            files=files_beside(self.contents),
            folders=[self.contents.adapter.folder],
        )

    def prove(self, place: Path, rest: Rest) -> Rest:
        """Compare every layer with what its dialect's reader makes of the output. Raises `LoratoolError`: a bug."""
        written = contents_of(self.form.read(place), "convert")
        self.check_layers(written.layers)
        comparison = Comparison(self.contents.layers, written.layers, places_of(self.targets), self.dtype)

        def work(target: str) -> tuple[str, Compared]:
            return target, comparison.compare(target)

        self.compared = dict(self.at_work.spread(work, self.contents.layers))
        wrong = [
            f"{printable(target)}: the error is {found.error:.3g}, and rounding makes {found.limit:.1g} at most"
            for target, found in self.compared.items()
            if not found.error <= found.limit
        ]
        if comparison.zeros():
            wrong.append("rows that the input does not change are not zero")
        if wrong:
            raise LoratoolError("this is a bug in loratool: what was written differs from what was read:", wrong)
        return replace(rest, totals=Proof(max((x.error for x in self.compared.values()), default=0.0)))

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        """Raise `LoratoolError` where other layers were read back than were written."""
        if odd := sorted(layers.keys() ^ self.targets.keys()):
            raise LoratoolError("this is a bug in loratool: these layers are not read back:", map(printable, odd))

    def report(self, out: Path, rest: Rest, told: Mapping[str, Any]) -> ConvertReport:
        """What was done."""
        places = {t: tuple(dict.fromkeys(h.target for h in held)) for t, held in places_of(self.targets).items()}
        modules = {
            target: ConvertedLayer(
                written=places[target],
                scale=layer.scale,
                factor=self.factors[places[target][0]][target],
                norm=self.compared[target].norm if target in self.compared else None,
                error=self.compared[target].error if target in self.compared else None,
            )
            for target, layer in sorted(self.contents.layers.items())
        }
        return ConvertReport(
            out=out,
            written=not self.options.dry_run,
            source=self.contents.adapter.format,
            dialect=self.options.to or "",
            server="",
            modules=modules,
            layers=len(self.targets),
            ranks=self.ranks,
            dtype=str(self.dtype).removeprefix("torch."),
            worst=max(self.compared, key=lambda target: self.compared[target].error, default=""),
            lost=self.lost,
            notes=tuple(note for note in rest.notes if note not in self.lost),
            **told,
        )


@dataclass(frozen=True)
class Proof:
    """What the record of an output says of it."""

    worst_error: float  # ‖ΔW − ΔW'‖ / ‖ΔW‖ of the worst layer, as read back


def settled(wanted: float, said: float) -> float:
    """What rows are multiplied by, where a file says one scale and another is wanted: 1 where they mean the same."""
    if not said:
        return 1.0 if not wanted else math.nan
    factor = wanted / said
    return 1.0 if abs(factor - 1) <= SAME else factor
