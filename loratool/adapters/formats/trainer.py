"""`TrainerFormat`: adapters as LLM trainers save them, with a file of settings in their folder. They are read, not written.

The formats differ in names and layouts. What they have in common stands here: how their files are found, which pairs
of factors fit together, and where α comes from.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import FACTOR_NAMES, Adapter, StoredTensor, is_scale
from loratool.adapters.formats.format import Config, Format, Restated
from loratool.adapters.formats.known import WithSettings
from loratool.adapters.reading import AS_STORED, Reading
from loratool.adapters.training import Training
from loratool.adapters.unsettled import settled
from loratool.adapters.weight_files import MODEL_CONFIG, weight_files
from loratool.algebra.updates.base import Update
from loratool.errors import InputError, Problem, printable
from loratool.files.folders import sort_side_files
from loratool.files.heads import HasNames
from loratool.files.hub_cache import name_of
from loratool.files.safefile import SafeFile, read_safefile
from loratool.files.untrusted import read_json
from loratool.notes import Note
from loratool.provenance.cards import Subject

MISSING_PARTNER, NO_ALPHA = "missing-partner", "alpha-missing"  # codes of problems


@dataclass
class Found:
    """What has been read of one file."""

    file: SafeFile
    reading: Reading = AS_STORED
    notes: list[Note] = field(default_factory=list)
    updates: dict[str, Update] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    told: set[str] = field(default_factory=set)  # tensors that a problem, or a reason, is about

    def stored(self, name: str) -> StoredTensor:
        home = self.file.home(name)
        return StoredTensor(home, home.tensors[name])

    def pair(self, module: str, a: str, b: str, dimensions: int = 2) -> tuple[StoredTensor, StoredTensor] | None:
        """(A, B) of a module by the ends of their names, both of floats; None where a problem was told.

        Args:
            module: the beginning of both names.
            a: the end of the name of A, (…, rank, in); it may hold several such, one below the other.
            b: the end of the name of B, (…, out, rank).
            dimensions: of both.
        """
        names = (module + a, module + b)
        there = [name for name in names if name in self.file.tensors]
        self.told.update(there)
        if len(there) < 2:
            missing = next(name for name in names if name not in there)
            self.refuse(module, f"{printable(missing)} is missing", MISSING_PARTNER)
            return None
        first, last = map(self.stored, names)
        shapes = f"{a.strip('.')} is {list(first.shape)}, {b.strip('.')} is {list(last.shape)}"
        if {first.info.dtype, last.info.dtype} - FACTOR_NAMES.keys():
            self.refuse(module, f"stored as {first.info.dtype} and {last.info.dtype}; expected floats")
        elif {len(first.shape), len(last.shape)} != {dimensions} or 0 in first.shape + last.shape:
            self.refuse(module, f"{shapes}; expected {dimensions} dimensions")
        elif first.shape[-2] % last.shape[-1]:
            self.refuse(module, f"{shapes}; expected one rank")
        else:
            return first, last
        return None

    def lengths(self, name: str, rows: int) -> StoredTensor | None:
        """DoRA's lengths of `rows` rows; None where there are none, or a problem was told."""
        if name not in self.file.tensors:
            return None
        self.told.add(name)
        stored = self.stored(name)
        if stored.shape != (rows,) or stored.info.dtype not in FACTOR_NAMES:
            found = f"is {stored.info.dtype} {list(stored.shape)}"
            self.refuse(name, f"{found}; expected {rows} floats")
            return None
        return stored

    def refuse(self, name: str, why: str, code: str = "malformed") -> None:
        self.problems.append(Problem(f"{printable(name)}: {why}", code))

    def add(self, target: str, update: Any, names: Sequence[str]) -> None:
        """Take up the update of a target."""
        if target in self.updates:
            self.refuse(names[0], f"{printable(target)} has a second update")
            return
        self.updates[target] = update
        self.sources[target] = tuple(names)

    def alpha(self, own: object, where: str) -> float:
        """α of all modules: the one the settings hold, else the caller's; 0 where a problem was told."""
        given = self.reading.input_alpha
        if own is not None:
            if not is_scale(own):
                self.problems.append(Problem(f"{where} is {printable(repr(own))}; expected a finite number"))
                return 0.0
            if given is not None:
                text = f"{where} is {own:g}, so --input-alpha {given:g} is ignored"
                self.notes.append(Note("input-alpha-not-used", text))
            return float(own)
        if given is None:
            text = f"alpha is not recorded ({where} is missing); pass --input-alpha with the alpha it was trained with"
            self.problems.append(Problem(text, NO_ALPHA))
            return 0.0
        return given

    @property
    def unused(self) -> tuple[str, ...]:
        used = self.told.union(*self.sources.values())
        return tuple(name for name in self.file.tensors if name not in used)


class TrainerFormat(WithSettings, Format):
    """A subclass names the tensors and settings of one trainer."""

    title: str  # of the trainer, in sentences

    @abstractmethod
    def take(self, found: Found, config: Config) -> None:
        """Make updates of the tensors of a file, under the settings of its trainer."""

    @abstractmethod
    def training_of(self, config: Config) -> Training:
        """What the settings say of the training."""

    def is_config(self, config: Config) -> bool:  # noqa: ARG002 (no JSON of its own)
        return False

    def needed(self, location: Path) -> tuple[list[str], list[str]]:
        weights = [path.relative_to(location).as_posix() for path in self.weights_at(location)]
        own = [name for name in (*self.config_names, MODEL_CONFIG) if (location / name).is_file()]
        return weights, list(dict.fromkeys([*own, *sort_side_files(location, {*weights})[0]]))

    def config_at(self, folder: Path) -> Path | None:
        """The file of settings in a folder."""
        return next((folder / name for name in self.settings if (folder / name).is_file()), None)

    def read_config(self, path: Path) -> Config:
        """A file of settings as a table."""
        return read_json(path, lenient=True)

    def training_at(self, path: Path) -> Training:
        settings = self.config_at(path if path.is_dir() else path.parent)
        return self.training_of(self.read_config(settings) if settings else {})

    def read_leniently(self, path: Path, reading: Reading = AS_STORED) -> tuple[Adapter, tuple[Problem, ...]]:
        folder = path if path.is_dir() else path.parent
        file = self.weights_in(path) if path.is_dir() else read_safefile(path)
        settings = self.config_at(folder)
        config = self.read_config(settings) if settings else {}
        found = Found(file, reading, list(reading.unused()))
        self.take(found, config)
        adapter = Adapter(
            name=name_of(folder) if path.is_dir() or settings else path.stem,
            format=self.name,
            folder=folder,
            file=file,
            config=config,
            config_file=settings or file.path,
            updates=found.updates,
            sources=found.sources,
            training=self.training_of(config),
            unsupported=tuple(found.unsupported),
            unused=found.unused,
            notes=tuple(found.notes),
            beside=weight_files(folder, file, {part.path.relative_to(folder).as_posix() for part in file.files})
            if path.is_dir()
            else (),
            alone=not path.is_dir(),
        )
        return settled(adapter, self.model_at(folder, config)), tuple(found.problems)

    alphas: tuple[tuple[str, ...], ...] = ()  # where settings may have the α of all modules

    def restated(self, adapter: Adapter, factor: float) -> Restated | None:
        path = next((path for path in self.alphas if value_in(adapter.config, *path)), None)
        if path is None or adapter.config_file == adapter.file.path or adapter.file.files != (adapter.file,):
            return None
        alpha = tidy(value_in(adapter.config, *path) * factor)
        settings = self.with_setting(adapter, path, alpha)
        return None if settings is None else Restated(settings=settings)

    def with_setting(self, adapter: Adapter, path: tuple[str, ...], number: float) -> bytes | None:
        """The file of an adapter's settings with another number at the top; None where it cannot be put there."""
        from loratool.files.outputs import as_json

        return as_json({**adapter.config, path[0]: number}) if len(path) == 1 else None

    def model_at(self, folder: Path, config: Config) -> Mapping[str, Any]:  # noqa: ARG002
        """The config of the model that was trained, as far as an adapter's folder tells it."""
        path = folder / MODEL_CONFIG
        return read_json(path, lenient=True) if path.is_file() else {}

    def weights_in(self, folder: Path) -> SafeFile:
        """The one file of a folder whose tensors are named as this format names them."""
        files = [read_safefile(path) for path in self.weights_at(folder) if path.is_file()]
        found = [file for file in files if self.claims(file)]
        if len(found) != 1:
            names = ", ".join(printable(file.path.name) for file in found or files)
            raise InputError(f"{printable(folder)}: expected one file of a {self.title} adapter among {names}")
        return found[0]

    def subject(self, config: Config) -> Subject:
        training = self.training_of(config)
        return Subject(
            title="LoRA adapter",
            trained_with=self.title,
            library="",
            tags=("lora", self.name),
            base=training.base,
            ranks=(training.rank,) if training.rank else (),
            snippet=lambda base, where: [],  # noqa: ARG005 (it is not loaded by a call)
        )


def tidy(alpha: float) -> float | int:
    """α as settings have it: a whole number where it is one."""
    return round(alpha) if alpha == round(alpha) else alpha


def text_in(config: Config, *path: str) -> str:
    """A text of nested settings; empty where there is none."""
    value = value_in(config, *path)
    return value if isinstance(value, str) else ""


def value_in(config: Config, *path: str) -> Any:
    """A value of nested settings; None where there is none."""
    table: Any = config
    for name in path:
        table = table.get(name) if isinstance(table, Mapping) else None
    return table


def whole_in(config: Config, *path: str) -> int | None:
    """A positive whole number of nested settings; None where there is none."""
    value = value_in(config, *path)
    return value if type(value) is int and value > 0 else None


def modules_with(file: HasNames, ends: Sequence[str]) -> Iterator[str]:
    """The modules that have a tensor whose name ends so, sorted."""
    yield from sorted({name.removesuffix(end) for name in file.tensors for end in ends if name.endswith(end)})
