"""`Format`: what a dialect of adapters is to everybody else. `docs/extending/format.md` shows how to add one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loratool.adapters.reading import AS_STORED, Reading
from loratool.algebra.updates.additive import LowRank
from loratool.errors import BAKE, FitError, InputError, Problem, UsageError, printable
from loratool.files.folders import sort_side_files
from loratool.files.model_files import FileNames
from loratool.files.untrusted import read_json
from loratool.grouping import by_key
from loratool.notes import Note
from loratool.templates import some

if TYPE_CHECKING:
    from loratool.adapters.adapter import Adapter, StoredTensor
    from loratool.adapters.layers import Contents, Form, Kind
    from loratool.adapters.training import Training
    from loratool.algebra.lowrank.products import Product
    from loratool.algebra.updates.base import Update
    from loratool.files.heads import HasNames
    from loratool.files.tensor_writer import TensorFile, Triple
    from loratool.lazy import Tensor
    from loratool.provenance.cards import Subject
    from loratool.results.findings import Finding

Shape = tuple[int, ...]
Config = Mapping[str, Any]  # opaque to all but the format that made it
UNEVEN = "dora-of-some"  # the code of a note


@dataclass(frozen=True)
class Parts:
    """What an adapter that is made here consists of, for its config."""

    ranks: Mapping[str, int]  # by target
    scales: Mapping[str, float] = field(default_factory=dict)  # by target: what multiplies the factors, where not 1
    architecture: str = ""  # of an image model, where it is known
    whole_names: bool = False  # whether the sources' own words for what is adapted mean more than that
    dropped: tuple[str, ...] = ()  # targets of the sources that are not in it
    dora: bool = False
    lora_bias: bool = False
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)  # target → rows that are replaced
    saved: tuple[str, ...] = ()  # modules saved whole, besides those that the sources name


def targets_by(adapter: Adapter, said: Callable[[str, Update], str]) -> dict[str, list[str]]:
    """The targets of an adapter by what is `said` of each and its update; those of which nothing is said are left out."""
    every = (*adapter.updates.items(), *adapter.bases.items())
    return by_key((what, target) for target, update in every if (what := said(target, update)))


def told_losses(adapter: Adapter, code: str, reader: str, said: Callable[[str, Update], str]) -> tuple[Note, ...]:
    """A note with a code on everything of an adapter that a `reader` lacks a place for, as it is `said` by target and update."""
    return tuple(Note(code, f"{reader} {what}: {some(targets)}") for what, targets in targets_by(adapter, said).items())


def unrecognised(adapter: Adapter) -> Iterator[Finding]:
    """The finding of tensors that no layer is made of, if there are any."""
    from loratool.results.findings import Finding

    if adapter.unused:
        unknown = tuple(map(printable, adapter.unused))
        yield Finding("problem", "unknown-tensor", f"unrecognised tensors: {some(adapter.unused)}", "", unknown)


def most_common(scales: Iterable[float]) -> float:
    """The scale that most layers have, 1 where there is none; of several the first."""
    return next((scale for scale, _ in Counter(scales).most_common(1)), 1.0)


def uneven_dora(adapter: Adapter, reader: str) -> tuple[Note, ...]:
    """What to say of DoRA in some layers where `reader` takes it in all of them or in none."""
    from loratool.algebra.updates.dora import Magnitude
    from loratool.algebra.updates.experts import ExpertFactors

    lengths = [target for target, update in adapter.updates.items() if isinstance(update, Magnitude)]
    plain = [target for target, update in adapter.updates.items() if isinstance(update, (LowRank, ExpertFactors))]
    if not lengths or not plain:
        return ()
    return (Note(UNEVEN, f"{reader} cannot store DoRA of some layers only: {some(lengths)}"),)


@dataclass(frozen=True)
class Scaled:
    """What of a file changes where its updates become stronger."""

    factors: Mapping[str, float]  # what multiplies a tensor
    numbers: Mapping[str, float]  # tensors of one number, whether they are there or not
    header: Mapping[str, str]


@dataclass(frozen=True)
class Restated:
    """The one number of a file that says how strong all updates are, at another strength."""

    values: Mapping[str, float] = field(default_factory=dict)  # of a GGUF file's metadata
    settings: bytes = b""  # the file of the adapter's settings, where it is there


class Spelling(ABC):
    """How the tensors of a new adapter are named and laid out, which all of its layers together may decide.

    Nothing but factors and lengths of rows has a place by default, as in most formats: all else is refused.
    """

    reader: str  # what reads it, for messages
    form: Format  # that it is of
    kinds: Mapping[str, Kind]  # its layers by target
    flattens = False  # whether names of modules have no dots, so that targets need none either
    scales_biases = False  # whether its reader multiplies what B adds to the output by the scale of the layer

    @abstractmethod
    def factors(self, target: str) -> tuple[str, str]:
        """The names of A and B."""

    @abstractmethod
    def shapes(self, form: Form) -> tuple[Shape, Shape]:
        """The shapes in which A and B of a layer are stored, at its largest rank."""

    @abstractmethod
    def stored(self, form: Form, found: Product) -> tuple[Tensor, Tensor]:
        """A and B of a product, as they are stored."""

    def keeps(self, form: Form) -> bool:  # noqa: ARG002 (as in most)
        """Whether A and B of a layer are stored row by row, as (rank, in) and (out, rank), so that bytes can be copied."""
        return False

    def bias(self, target: str) -> str:
        """The name of what B adds to the output, for the target of the weight."""
        raise FitError(f"{printable(target)}: {self.reader} does not read factor biases")

    def magnitude(self, target: str) -> str:
        """The name of the lengths of rows that DoRA trains."""
        raise FitError(f"{printable(target)}: {self.reader} does not read DoRA")

    def lengths(self, form: Form, columns: int = 0) -> Shape:
        """The shape in which those of a layer's rows are stored, or of so many `columns`."""
        if columns:
            raise FitError(f"{self.reader} does not read DoRA of input columns")
        return (form.rows,)

    def whole(self, target: str, inside: bool) -> str:  # noqa: ARG002 (neither has a place)
        """The name of a tensor that is saved whole; `inside` a layer that is adapted too."""
        raise FitError(f"{printable(target)}: {self.reader} does not read tensors that are saved whole")

    def rows(self, target: str) -> str:
        """The name of the trained rows of an embedding."""
        raise FitError(f"{printable(target)}: {self.reader} does not read token rows")

    def widened(self, target: str) -> str:  # noqa: ARG002 (none has a place)
        """The name of the shape that a weight is filled up to with zeros before; empty where its reader sees that itself."""
        return ""

    def change(self, target: str, norm: bool = False) -> str:  # noqa: ARG002 (none has a place)
        """The name of a change that is stored in full, of a norm or of any other layer."""
        raise FitError(f"{printable(target)}: {self.reader} does not read weight changes stored in full")

    def read_as(self, target: str) -> Callable[[int], str] | None:  # noqa: ARG002 (as it is)
        """What its reader calls each expert of a layer of all, by its number; None where it reads one layer."""
        return None

    def second_copies(
        self,
        adapters: Iterable[Adapter],  # noqa: ARG002 (none is asked for)
        tensors: Mapping[str, StoredTensor | Tensor],  # noqa: ARG002
    ) -> dict[str, StoredTensor | Tensor]:
        """What its reader asks for once more, of the tensors of these adapters that are carried over."""
        return {}

    def times(self, target: str) -> float:  # noqa: ARG002 (all are applied once)
        """How often its reader applies the update of a target, whose factors hold that much less."""
        return 1.0

    def of_one_rank(self) -> Sequence[tuple[str, ...]]:
        """Groups of targets to which it gives one rank: all layers, where one config or header is for all."""
        return [tuple(self.kinds)]

    def scales(self, wanted: Mapping[str, float]) -> Mapping[str, float]:
        """What its files can say that the factors of each target are multiplied by; the factors take the rest."""
        return dict.fromkeys(wanted, most_common(wanted.values()))

    def strengths(self, parts: Parts) -> Mapping[str, float]:  # noqa: ARG002 (the config or header says it)
        """The numbers that say it, each a tensor of its own, as float32; none where something else says it."""
        return {}

    def header(self, sources: Sequence[Adapter], parts: Parts) -> Mapping[str, str]:  # noqa: ARG002 (nothing)
        """What the header of the file of tensors says besides."""
        return {}

    def describe(self, sources: Sequence[Adapter], parts: Parts) -> Config:
        """The config of an adapter that is made of others."""
        return self.describe_new(sources[0].training, parts)

    def describe_new(self, training: Training, parts: Parts) -> Config:  # noqa: ARG002 (it has no config)
        """The config of an adapter that is made of none."""
        return {}


class FormatFiles(Protocol):
    """What the files of a format are called: all that it takes to recognise its adapters."""

    @property
    def name(self) -> str:
        """What an adapter's `format` says."""

    @property
    def config_name(self) -> str:
        """The file that says how the adapter was trained."""

    @property
    def weights_name(self) -> str:
        """The file of its tensors."""

    @property
    def config_names(self) -> tuple[str, ...]:
        """All files beside the weights that say how an adapter is to be read; on the Hub they are looked at first."""
        return (self.config_name,) if self.config_name else ()

    @property
    def file_names(self) -> FileNames:
        """What its files may be called where `--overwrite` replaces an adapter that no `loratool.json` lists; none by default."""
        return FileNames()

    def recognises(self, path: Path) -> bool:
        """Whether a folder or file may hold such an adapter, by the names of files alone: on the Hub they are empty."""

    dialects: Sequence[str] = ()  # the words that name how it spells adapters that it writes

    @property
    def format(self) -> Format:
        """The format itself, for adapters of any model; where only its files are known so far, its module is imported."""


class Format(FormatFiles, Protocol):
    """One way to write adapters down. Only it knows what its files and the keys of its config are called.

    A subclass says how adapters are recognised and read; the rest has defaults, under which nothing is written.
    """

    @property
    def format(self) -> Format:
        return self

    def claims(self, file: HasNames) -> frozenset[str]:
        """The tensors of a file that are spelled as this format spells them; of those that differ in numbers one will do."""

    def is_config(self, config: Config) -> bool:  # noqa: ARG002
        """Whether a table is one of its configs; by default it has none that another format could take for its own."""
        return False

    def read_config(self, path: Path) -> Config:
        """The config in a file. Raises `InputError` where it cannot be read."""
        return read_json(path, repeated=True, lenient=True)

    def training_at(self, path: Path) -> Training:
        """What its config says, without a look at the weights. Raises `InputError` where it cannot be read."""

    def read_leniently(self, path: Path, reading: Reading) -> tuple[Adapter, tuple[Problem, ...]]:
        """What can be read of an adapter, and what is wrong with the rest. Raises `InputError` where nothing can be."""

    def subject(self, config: Config) -> Subject:
        """What a card says of an adapter with a config."""

    def card_config(self, folder: Path) -> Config | None:
        """The config of the adapter in a folder, as `subject` takes it; None where none is known to be there."""
        path = folder / self.config_name
        return self.read_config(path) if path.is_file() else None

    def read(self, path: Path, reading: Reading = AS_STORED) -> Adapter:
        """The adapter, its values still on disk. Raises `InputError` telling all that is wrong with it at once."""
        adapter, problems = self.read_leniently(path, reading)
        if problems and not adapter.unsupported:  # else it is no wonder that the tensors look odd
            raise InputError(f"{printable(adapter.file.path)}: malformed adapter:", problems)
        return adapter

    def needed(self, location: Path) -> tuple[list[str], list[str]]:
        """The files of a folder that reading it takes, as paths in it: weights, and others. Its names alone are there."""
        return [self.weights_name], [self.config_name, *sort_side_files(location, {self.weights_name})[0]]

    def parameters(self, adapter: Adapter, in_base: set[str]) -> tuple[int, int]:  # noqa: ARG002 (none of the base's)
        """Parameters that were trained, and those that stand beside the base's (`in_base`, by name) while they are."""
        used = {name for names in adapter.sources.values() for name in names}
        trained = sum(adapter.file.tensors[name].elements for name in used)
        return trained, trained

    def findings(self, adapter: Adapter, path: Path) -> Iterator[Finding]:  # noqa: ARG002 (no command repairs these)
        """What is wrong with how it is written down; `path` is what commands are told with."""
        from loratool.results.findings import Finding

        yield from unrecognised(adapter)
        for reason in adapter.unsupported:
            yield Finding("note", "not-mergeable", reason)

    @property
    def repairs(self) -> Mapping[str, str]:
        """What to do about problems of reading, by their codes."""
        return {}

    # What of its adapters can be changed, tensors staying as they are.

    def divisors(self, contents: Contents) -> Mapping[str, float]:
        """What α of each layer is divided by, which gives its scale."""
        return {target: layer.rank for target, layer in contents.layers.items()}

    def alphas(self, contents: Contents) -> Mapping[str, float]:
        """α of each layer, as the config of an adapter of this format has it."""
        return {target: contents.layers[target].scale * each for target, each in self.divisors(contents).items()}

    def rescaled(self, contents: Contents, factors: Mapping[str, float | None], one_alpha: bool) -> Config:  # noqa: ARG002
        """A config under which the same tensors are stronger by `factors`, None where they had no strength.

        With `one_alpha` all layers get one α. Raises `InputError` where no config does that.
        """
        shown = printable(contents.adapter.file.path)
        raise InputError(
            f"{shown}: {self.name} has no alpha per module; pass --bake to write it as plain LoRA", hint=BAKE
        )

    def renamed_base(self, config: Config, base: str) -> Config:  # noqa: ARG002 (most name none)
        """A config that names another base, of no known commit, where it names one."""
        return config

    def with_weights(self, config: Config, folder: Path) -> Config:  # noqa: ARG002 (most configs tell all)
        """A config, with what a card needs to know of the weights that are in a folder."""
        return config

    def restated(self, adapter: Adapter, factor: float) -> Restated | None:  # noqa: ARG002 (most have several numbers)
        """The same tensors `factor` times as strong, which one number says; None where none does.

        It takes neither the names of layers nor a model, so that factors may be `Unsettled`.
        """
        return None

    rescales_tensors: bool = False  # whether strengths are in its tensors, where those of others are in a config

    def scaled(self, contents: Contents, factors: Mapping[str, float], scales: Mapping[str, float]) -> Scaled:  # noqa: ARG002
        """The tensors under which updates are stronger by `factors` and layers have the scaling `scales`."""
        raise InputError(f"{printable(contents.adapter.file.path)}: {self.name} has its strength in a config")

    # What it can write.

    takes_model: bool = False  # whether names or rows depend on the model for which adapters are written

    def for_model(self, config: Mapping[str, Any]) -> Format:  # noqa: ARG002 (most are the same for all models)
        """The format for adapters of a model with this config. Raises `InputError` where it takes another one."""
        return self

    def container(
        self, path: Path, announced: Iterable[Triple], metadata: Mapping[str, str]
    ) -> AbstractContextManager[TensorFile]:
        """The file of its tensors, to be written tensor by tensor; `announced` are all that may come."""
        from loratool.files.tensor_writer import tensor_file

        return tensor_file(path, announced, metadata)

    @property
    def newest(self) -> str:
        """The release of its library that adapters are written for that are made of no other."""
        return ""

    def spelling(self, kinds: Mapping[str, Kind], release: str = "", dialect: str = "") -> Spelling:  # noqa: ARG002
        """How an adapter of some layers is written, for a release of the library that reads it; by default the oldest.

        `dialect` is one of `dialects`, the first by default.
        """
        raise UsageError(f"{self.name} adapters can be read but not written")

    def stack_of(self, target: str, config: Config) -> tuple[str, int] | None:  # noqa: ARG002 (most have experts apart)
        """The layer of all experts that it has for that of one, and the number of that one; None where it has none."""
        return None

    def losses(self, adapter: Adapter, dialect: str = "") -> tuple[Note, ...]:  # noqa: ARG002
        """What of an adapter this format cannot say in a dialect."""
        return ()

    def was_inside(self, adapter: Adapter, target: str) -> bool:  # noqa: ARG002
        """Whether what an adapter of this format saved whole for a target stood in a layer that it adapts."""
        return False

    def rank_notes(self, own: Mapping[str, int], ranks: Mapping[str, int]) -> Iterator[Note]:  # noqa: ARG002
        """What to say where layers whose `own` ranks differ were made one of rank."""
        return iter(())
