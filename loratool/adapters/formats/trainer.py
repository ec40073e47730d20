"""`TrainerFormat`: adapters as LLM trainers save them, with a file of settings in their folder. They are read, not written.

The formats differ in names and layouts. What they have in common stands here: how their files are found and read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Config, Format, Restated
from loratool.adapters.formats.found import Found
from loratool.adapters.formats.known import WithSettings
from loratool.adapters.formats.yaml_lines import read_settings, with_number
from loratool.adapters.reading import AS_STORED, Reading
from loratool.adapters.training import Training
from loratool.adapters.unsettled import settled
from loratool.adapters.weight_files import MODEL_CONFIG, weight_files
from loratool.errors import InputError, Problem, printable
from loratool.files.folders import sort_side_files
from loratool.files.hub_cache import name_of
from loratool.files.safefile import SafeFile, read_safefile
from loratool.files.untrusted import read_json
from loratool.provenance.cards import Subject


class TrainerFormat(WithSettings, Format):
    """A subclass names the tensors and settings of one trainer."""

    title: str  # of the trainer, in sentences

    @abstractmethod
    def take(self, found: Found, config: Config) -> None:
        """Make updates of the tensors of a file, under the settings of its trainer."""

    @abstractmethod
    def training_of(self, config: Config) -> Training:
        """What the settings say of the training."""

    def needed(self, location: Path) -> tuple[list[str], list[str]]:
        weights = [path.relative_to(location).as_posix() for path in self.weights_at(location)]
        own = [name for name in (*self.config_names, MODEL_CONFIG) if (location / name).is_file()]
        return weights, list(dict.fromkeys([*own, *sort_side_files(location, {*weights})[0]]))

    def settings_in(self, folder: Path) -> tuple[Path | None, Config]:
        """The file of settings in a folder, and what it holds; None, and nothing, where there is none."""
        path = next((folder / name for name in self.settings if (folder / name).is_file()), None)
        return path, self.read_config(path) if path else {}

    def read_config(self, path: Path) -> Config:
        return read_settings(path) if path.suffix == ".yaml" else read_json(path, lenient=True)

    def training_at(self, path: Path) -> Training:
        return self.training_of(self.settings_in(path if path.is_dir() else path.parent)[1])

    def read_leniently(self, path: Path, reading: Reading = AS_STORED) -> tuple[Adapter, tuple[Problem, ...]]:
        folder = path if path.is_dir() else path.parent
        file = self.weights_in(path) if path.is_dir() else read_safefile(path)
        settings, config = self.settings_in(folder)
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
            unused=tuple(found.left_over()),
            notes=tuple(found.notes),
            beside=weight_files(folder, file, {part.path.relative_to(folder).as_posix() for part in file.files})
            if path.is_dir()
            else (),
            alone=not path.is_dir(),
        )
        return settled(adapter, self.model_at(folder, config)), tuple(found.problems)

    # Where settings may have the α of all modules; at the top where they are JSON.
    alpha_paths: tuple[tuple[str, ...], ...] = ()

    def restated(self, adapter: Adapter, factor: float) -> Restated | None:
        path = next((path for path in self.alpha_paths if value_in(adapter.config, *path)), None)
        if path is None or adapter.config_file == adapter.file.path or adapter.file.files != (adapter.file,):
            return None
        alpha = tidy(value_in(adapter.config, *path) * factor)
        if adapter.config_file.suffix == ".yaml":
            settings = with_number(adapter.config_file.read_bytes(), path, alpha)
            return None if settings is None else Restated(settings=settings)
        from loratool.files.outputs import as_json

        return Restated(settings=as_json({**adapter.config, path[0]: alpha}))

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
