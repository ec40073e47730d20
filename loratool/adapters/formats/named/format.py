"""`Named`: the format as others see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Config, Format, Scaled
from loratool.adapters.reading import AS_STORED, Reading
from loratool.adapters.training import Training
from loratool.adapters.weight_files import weight_files
from loratool.errors import InputError, LoratoolError, Problem, printable
from loratool.files.folders import NUMBERED, sort_side_files
from loratool.files.heads import HasNames, kinds_of, read_head
from loratool.files.hub_cache import name_of
from loratool.files.safefile import SafeFile, read_safefile

if TYPE_CHECKING:
    from loratool.adapters.formats.named.dialects import ModuleSpelling
    from loratool.adapters.formats.named.header import Header
    from loratool.adapters.formats.named.reading import Configs, Reader
    from loratool.adapters.formats.named.writing import NamedNames
    from loratool.adapters.layers import Contents, Kind
    from loratool.notes import Note
    from loratool.provenance.cards import Subject

WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers saves them
OF_MODELS = ("config.json", "model_index.json")  # with one of them a folder is a model


class Named(Format):
    """Adapters that are read by the names of their tensors, and by nothing else.

    What it takes to read and to write them is imported there: most adapters and models are none of these.
    """

    name = "named"
    config_name = ""  # there is none
    weights_name = WEIGHTS
    dialects = ("diffusers", "kohya", "comfy", "lycoris")

    def __init__(self, configs: Configs) -> None:
        """`configs` reads what diffusers puts into headers; a file of its own in the same folder comes before the names."""
        self.configs = configs

    def recognises(self, path: Path) -> bool:
        if path.suffix == ".safetensors":
            return path.is_file() and not NUMBERED.match(path.name)
        if not path.is_dir() or any((path / name).is_file() for name in (*OF_MODELS, self.configs.config_name)):
            return False
        return (path / WEIGHTS).is_file() or any(self.adapters_in(path))

    def claims(self, file: HasNames) -> frozenset[str]:
        from loratool.adapters.formats.named import header, refused

        beside = (file.path.parent / self.configs.config_name).is_file()
        sure = not beside or header.CONFIGS in file.metadata
        found, rest = set[str](), list[str]()
        for name in kinds_of(file).values():
            own = spelling_in(name)
            if own is not None and (sure or own[0].alone):
                found.add(name)
            else:
                rest.append(name)
        return frozenset(found).union(name for name, row in refused.refused(rest, file.metadata) if row.alone or found)

    def adapters_in(self, folder: Path) -> Iterator[Path]:
        """The files of a folder that are such adapters, by their heads."""
        for path in sorted(folder.glob("*.safetensors")):
            with suppress(LoratoolError):
                if not NUMBERED.match(path.name) and self.claims(read_head(path)):
                    yield path

    def file_at(self, path: Path) -> SafeFile:
        """The file of the adapter at a place."""
        if not path.is_dir():
            return read_safefile(path)
        if (path / WEIGHTS).is_file():
            return read_safefile(path / WEIGHTS)
        match list(self.adapters_in(path)):
            case [only]:
                return read_safefile(only)
            case several:
                names = ", ".join(printable(found.name) for found in several)
                raise InputError(f"{printable(path)}: contains several adapters ({names}); pass the path of one")

    def training_at(self, path: Path) -> Training:
        from loratool.adapters.formats.named.header import Header

        return self.training_in(Header.of(self.file_at(path)))

    def training_in(self, found: Header) -> Training:
        """What the header of a file says of the training; of several configs in it the denoiser's."""
        configs = found.configs([])
        config = next((configs[word] for word in ("unet", "transformer", "prior", "") if word in configs), None)
        training = self.configs.training_of(config) if config is not None else Training()
        return replace(training, base=training.base or found.base, rank=training.rank or found.rank)

    def needed(self, location: Path) -> tuple[list[str], list[str]]:
        return [WEIGHTS], sort_side_files(location, {WEIGHTS})[0]  # other names are told apart by heads alone

    def read_leniently(self, path: Path, reading: Reading = AS_STORED) -> tuple[Adapter, tuple[Problem, ...]]:
        from loratool.adapters.formats.named.reading import Reader

        file = self.file_at(path)
        found = Reader(file, reading, configs=self.configs)
        found.read()
        folder, alone = file.path.parent, path.is_file()
        if not (found.updates or found.problems or found.unsupported):
            found.problems.append(Problem("it contains no adapter tensors"))
        return Adapter(
            name=name_of(path).removesuffix(".safetensors") if alone else name_of(folder),
            format=self.name,
            folder=folder,
            file=file,
            config=file.layout.metadata or {},
            config_file=file.path,
            updates=found.updates,
            sources=found.sources,
            training=with_methods(self.training_in(found.header), found),
            dialects=tuple(found.dialects),
            unsupported=tuple(dict.fromkeys(found.unsupported)),
            unused=tuple(found.unused),
            notes=(*found.notes, *reading.unused()),
            beside=() if alone else weight_files(folder, file, {file.path.name}),
            alone=alone,
        ), tuple(found.problems)

    def spelling(self, kinds: Mapping[str, Kind], release: str = "", dialect: str = "") -> NamedNames:  # noqa: ARG002
        from loratool.adapters.formats.named.writing import NamedNames

        return NamedNames(self, kinds, dialect)

    rescales_tensors: bool = True

    def alphas(self, contents: Contents) -> Mapping[str, float]:
        from loratool.adapters.formats.named.strength import alpha_of

        return {target: alpha_of(contents, target) for target in contents.layers}

    def scaled(self, contents: Contents, factors: Mapping[str, float], scales: Mapping[str, float]) -> Scaled:
        from loratool.adapters.formats.named.strength import scaled

        return scaled(contents, factors, scales)

    def losses(self, adapter: Adapter, dialect: str = "") -> tuple[Note, ...]:
        from loratool.adapters.formats.named.writing import losses

        return losses(adapter, dialect)

    def subject(self, config: Config) -> Subject:
        from loratool.adapters.formats.named.card import subject
        from loratool.adapters.formats.named.header import Header

        return subject(config, self.training_in(Header(config)))

    def with_weights(self, config: Config, folder: Path) -> Config:
        from loratool.adapters.formats.named.card import told_of

        return told_of([config], read_head(folder / WEIGHTS).tensors)

    def card_config(self, folder: Path) -> Config | None:
        """The header of the file; of several files what all headers say."""
        if not self.recognises(folder):
            return None
        from loratool.adapters.formats.named.card import told_of

        files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else list(self.adapters_in(folder))
        heads = [read_head(path) for path in files]
        return told_of([head.metadata for head in heads], (name for head in heads for name in head.tensors))


def with_methods(training: Training, found: Reader) -> Training:
    """What was trained, by the tensors that there are."""
    from loratool.adapters.formats.named.reading import FULL

    method = " + ".join(sorted(found.methods)) or (FULL if found.updates else training.method)
    return replace(training, method=method, dora=found.dora, variants=("DoRA",) if found.dora else training.variants)


@lru_cache(maxsize=2048)  # files of one architecture have the same names
def spelling_in(name: str) -> tuple[ModuleSpelling, str] | None:
    """How the name of a tensor is spelled, and its role; None for one of no dialect."""
    from loratool.adapters.formats.named.dialects import spelling_of
    from loratool.adapters.formats.roles.names import split

    parts = split(name)
    spelled = spelling_of(parts[0]) if parts else None
    return (spelled[0], parts[1]) if parts and spelled else None
