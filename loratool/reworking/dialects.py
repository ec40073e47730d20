"""In which dialect a command writes an adapter that it makes of others: that of the first, unless another is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapters.formats import DIALECTS, WRITTEN, format_of
from loratool.adapters.formats.format import Format, Spelling
from loratool.adapters.layers import Contents, Form, Kind
from loratool.adapters.writer import Carried, called
from loratool.bases.opening import open_checkpoint
from loratool.errors import FitError, InputError, printable
from loratool.fetching import local
from loratool.files.checkpoint import Checkpoint
from loratool.lazy import torch
from loratool.notes import Note
from loratool.options.described import Choice, Options, PathKind, option
from loratool.reworking.converting.losing import check_has_names
from loratool.reworking.converting.naming import hint_of, respelled
from loratool.reworking.converting.wholes import outlines
from loratool.reworking.renaming import dialect_of, named_alike, renamed
from loratool.reworking.runner import Draft


@dataclass(frozen=True, kw_only=True)
class DialectOption(Options):
    """Of a command that makes adapters of adapters."""

    to: str | None = option(
        help="Dialect of OUT, as for `loratool convert` [default: that of the first adapter; for `extract`, "
        "diffusers' for a pipeline, llama.cpp's for a GGUF model, else PEFT's].",
        kind=Choice(lambda: tuple(DIALECTS)),
    )


BASE_UNUSED = Note("base-not-used", "--base is ignored, as nothing here depends on the model of the adapters")


@dataclass(frozen=True)
class Manner:
    """The dialect in which an adapter is written."""

    form: Format
    dialect: str
    architecture: str = ""
    notes: tuple[Note, ...] = ()

    def spelling(self, kinds: Mapping[str, Kind], source: Contents) -> Spelling:
        """How layers are written that come from an adapter."""
        release = source.training.release if self.form is format_of(source.adapter) else ""
        return self.form.spelling(kinds, release, self.dialect)

    def draft(
        self,
        forms: Mapping[str, Form],
        names: Spelling,
        dtype: torch.dtype,
        carried: Carried,
        sources: Sequence[Contents],
    ) -> Draft:
        """What is written of layers whose scale is in their factors."""
        adapters = [source.adapter for source in sources]
        return Draft(forms, names, called(dtype), carried, sources=adapters, architecture=self.architecture)

    def told_of_ranks(self, ranks: Collection[int], way: str) -> Iterator[Note]:
        """What servers of language models make of several ranks, and the way to one; files of image models have several."""
        if self.form is WRITTEN and len(set(ranks)) > 1:
            yield Note(
                "ranks-differ",
                "ranks differ between layers (rank_pattern); for servers that support a single rank, "
                f"{way}, which pads every layer to rank {max(ranks)}",
            )


@dataclass(frozen=True, kw_only=True)
class ModelOption(Options):
    """Of a command on adapters of which some dialects leave to the model what they change."""

    base: str | None = option(
        help="Base model of the adapters, whose config decides names and rows in some dialects (gguf, torchtune).",
        kind=PathKind("BASE"),
    )

    def model(self) -> Checkpoint | None:
        """The base; None where none is given."""
        return open_checkpoint(local(self.base, "model")) if self.base is not None else None


@dataclass(frozen=True, kw_only=True)
class OutputDialect(DialectOption, ModelOption):
    """Of a command whose adapters may be those of a model that the dialect of OUT depends on."""


def manner_of(source: Contents, asked: str | None, config: Mapping[str, Any]) -> Manner:
    """The dialect that is asked for, else that of an adapter, else PEFT's.

    Raises `InputError` where the one that is asked for takes a model with another config.
    """
    if asked is not None:
        return Manner(DIALECTS[asked].format.for_model(config), asked)
    own = next(iter(source.adapter.dialects), source.adapter.format)
    plain, why = Manner(WRITTEN, WRITTEN.dialects[0]), "which is read and not written"
    if dialect := dialect_of(source):
        with suppress(InputError):
            manner = Manner(DIALECTS[dialect].format.for_model(config), dialect)
            manner.form.spelling({}, dialect=dialect)
            if dialect == own:
                return manner
            text = f"the output is in the dialect {dialect}, as {own} is read and not written"
            return replace(manner, notes=(Note("layout-changed", text),))
        why = "which needs the model to write (pass --base)"
    text = f"the output is in PEFT's layout; {source.name} is in that of {own}, {why}"
    return replace(plain, notes=(Note("layout-changed", text),))


def in_manner(
    sources: Sequence[Contents], asked: str | None, base: Checkpoint | None = None
) -> tuple[list[Contents], Manner]:
    """Adapters with their layers as one dialect has them, so that they can be compared and written.

    Raises `FitError` where that dialect cannot express one of them.
    """
    manner = manner_of(sources[0], asked, base.config if base is not None else {})
    form, dialect = manner.form, manner.dialect
    found: list[Contents] = []
    for source in named_alike(sources, dialect):
        own = {target: layer.magnitude or layer.update for target, layer in source.layers.items()}
        plain = replace(source.adapter, updates={**source.adapter.updates, **own})
        check_has_names(plain, dialect)
        if lost := form.losses(plain, dialect) if source.adapter.format != form.name or asked else ():
            raise FitError(
                f"{printable(source.adapter.file.path)}: {dialect} cannot express all of it:", [x.text for x in lost]
            )
        if source.adapter.dialects == (dialect,):
            found.append(source)
            continue
        wanted = respelled(source.layers, dialect, manner.architecture, hint_of(source), base, outlines(source))
        manner = replace(manner, architecture=wanted.architecture, notes=(*manner.notes, *wanted.notes))
        found.append(renamed(source, wanted.targets, wanted.beside))
    if base is not None:
        manner = replace(manner, notes=(*manner.notes, *unused_base(sources, dialect)))
    return found, manner


def unused_base(sources: Sequence[Contents], dialect: str) -> tuple[Note, ...]:
    """What to say of a base that was given for adapters which are read, and written, in a dialect that depends on none."""
    alike = bool(dialect) and all(dialect_of(source) == dialect for source in sources)
    return (BASE_UNUSED,) if alike and not DIALECTS[dialect].format.takes_model else ()
