"""What a dialect cannot say, or has no names for, or a server refuses: told by name, or left out where that is accepted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import DIALECTS, NAMED, WRITTEN, format_of
from loratool.adapters.formats.format import UNEVEN, Format, targets_by
from loratool.adapters.layers import innermost
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.errors import FitError, InputError, printable
from loratool.layouts.diffusion.known import ARCHITECTURES
from loratool.notes import Note
from loratool.reworking.converting.naming import DIFFUSERS, LAYOUTS, ORIGINAL, found_in, image_architecture, same_layout
from loratool.reworking.converting.servers import Server
from loratool.templates import grouped, some

REFUSED = "server-refuses"  # the code of a note


def losses_of(adapter: Adapter, form: Format, dialect: str, server: Server | None) -> tuple[Note, ...]:
    """What of an adapter a dialect cannot say, or a server refuses."""
    refused = targets_by(adapter, lambda _, update: server.refused(update) if server is not None else "")
    notes = (Note(REFUSED, f"{server} does not take {what}: {some(t)}") for what, t in refused.items())
    return (*form.losses(adapter, dialect), *notes)


def doubts(server: Server | None, targets: Collection[str]) -> Iterator[Note]:
    """A note on layers of an image model, where nobody has seen whether a server serves such models."""
    if server is not None and not server.images and (architecture := image_architecture(targets)):
        yield Note(
            "server-support-unknown",
            f"{server} accepts LoRA on linear layers of the models that it serves; whether it serves {architecture} "
            "is not known",
        )


def lengths_lost(adapter: Adapter, form: Format, dialect: str, server: Server | None) -> tuple[str, ...]:
    """The targets with DoRA that would be taken without it."""

    def is_lost(target: str, update: Update) -> bool:
        return bool(losses_of(replace(adapter, updates={target: update}, bases={}), form, dialect, server))

    uneven = any(note.code == UNEVEN for note in form.losses(adapter, dialect))
    return tuple(
        target
        for target, update in adapter.updates.items()
        if isinstance(update, Magnitude) and (uneven or is_lost(target, update)) and not is_lost(target, update.inner)
    )


def who(dialect: str, server: Server | None, lost: Sequence[Note]) -> str:
    """The tool that takes less than all."""
    if server is not None and any(note.code == REFUSED for note in lost):
        return f"{server} does not take all"
    return f"{dialect} cannot express all"


def without_losses(
    adapter: Adapter, form: Format, dialect: str, server: Server | None, accepted: bool
) -> tuple[Adapter, tuple[Note, ...]]:
    """The adapter without all of that, and what it was; raises `FitError` where it is not accepted."""
    lost = losses_of(adapter, form, dialect, server)
    if not lost:
        return adapter, ()
    if not accepted:
        dora = lengths_lost(adapter, form, dialect, server)
        way_out = "; --base with --rank or --energy approximates DoRA by LoRA" if dora else ""
        raise FitError(
            f"{printable(adapter.file.path)}: {who(dialect, server, lost)} of this adapter; pass --accept-loss to leave "
            f"out the rest, or merge it into its base with `loratool merge`{way_out}:",
            [note.text for note in lost],
        )
    kept: dict[str, Update] = {}
    for target, update in adapter.updates.items():
        for each in (update, innermost(update)):
            if not losses_of(replace(adapter, updates={target: each}, bases={}), form, dialect, server):
                kept[target] = each
                break
    if losses_of(replace(adapter, updates=kept, bases={}), form, dialect, server):  # DoRA of some of the layers
        kept = {target: innermost(update) for target, update in kept.items()}
    training = replace(adapter.training, dora=any(isinstance(update, Magnitude) for update in kept.values()))
    return replace(adapter, updates=kept, bases={}, training=training), lost


def check_has_names(adapter: Adapter, dialect: str) -> None:
    """Raise `InputError` where a dialect of image models has no name for any module of an adapter.

    Files that tools for image models wrote are left to the tables of names, which say more.
    """
    if dialect not in LAYOUTS or DIALECTS[dialect] is WRITTEN or format_of(adapter) is NAMED:
        return
    targets = [*adapter.updates, *adapter.bases]
    if not targets or any(is_known(target, dialect) for target in targets):
        return
    words = [word for word, form in DIALECTS.items() if form is not NAMED and word in form.dialects[:1]]
    raise InputError(
        f"{printable(adapter.file.path)}: {dialect} is a dialect of image and video models ({', '.join(ARCHITECTURES)}), "
        f"and no module of this adapter is one of theirs. Adapters of language models are written with --to "
        f"{', '.join(words[:-1])} or {words[-1]}. Its modules are:",
        grouped(map(printable, targets)),
        hint="loratool help dialects",
    )


def is_known(target: str, dialect: str) -> bool:
    """Whether a module is one of a known architecture, or has the layout of a dialect anyway."""
    layouts = (DIFFUSERS, ORIGINAL)
    return same_layout(target, dialect) is not None or any(
        found_in(target, architecture, layout) is not None for architecture in ARCHITECTURES for layout in layouts
    )
