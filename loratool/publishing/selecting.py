"""Which files of a folder are a model or an adapter, and may be shown to others. All that is not known stays here."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Literal

from loratool.adapters.formats import format_at, heads_at, is_adapter, read_adapter, subject_at
from loratool.adapters.training_data import training_data_in
from loratool.adapters.weight_files import WeightFile, fates
from loratool.bases.opening import open_checkpoint
from loratool.errors import InputError, UsageError, printable
from loratool.fetching import check_there
from loratool.fetching.bases import named_base
from loratool.files.digests import digest_of_bytes
from loratool.files.folders import (
    CARD,
    INDEX_SUFFIX,
    PROVENANCE,
    TRAINING_FOLDERS,
    LeftOut,
    leaves,
    sidecar_of,
    sort_side_files,
)
from loratool.files.journal import MODEL, is_stage
from loratool.files.outputs import as_json
from loratool.files.safefile import PREFIX
from loratool.files.source import PIECE
from loratool.files.system import shell_word
from loratool.files.untrusted import LARGEST_RECORD, json_or_empty, open_regular, read_bounded
from loratool.notes import Note
from loratool.provenance.cards import addressed, card_of, is_template
from loratool.provenance.secrets import secrets_in
from loratool.publishing.committing import Upload
from loratool.publishing.illustrating import PICTURE, NoPictureError, illustrated, picture_of
from loratool.templates import some

# What a model or an adapter is made of beside its weights; anything else is sent only where --include names it.
KNOWN = (
    *("*.json", "*.txt", "*.md", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.spm", "*.vocab", "*.yaml", "*.yml"),
    *("*.safetensors", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
# What is never sent, whatever is included: secrets, what training left, and what is not finished.
SECRET = (
    *("*.env", "env", "token", "tokens", "*.token", "*_token", "*token.txt", "netrc", "_netrc", "id_rsa*", "id_dsa*"),
    *("id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*credential*", "*secret*", "*password*"),
    *("token.*", "*[_-]token.json", "hf[_-]token*", "*api[_-]key*", "*private[_-]key*", "kaggle.json"),
)
TRAINING = (
    *(
        "optimizer*",
        "*optim_states*",
        "scheduler.pt",
        "rng_state*",
        "scaler.pt",
        "trainer_state.json",
        "training_args.*",
    ),
    *("events.out.tfevents*", "*.distcp", "*.pyc", "latest", "zero_to_fp32.py", "*[_-]checkpoint", "*-checkpoint-*"),
    "pytorch_model_fsdp*",
)
UNFINISHED = (
    "*.partial",
    "*.streaming",
    "*.incomplete",
    "*.lock",
    "*.tmp",
    "*.part",
    "*.crdownload",
    "*.swp",
    "*~",
    "cache",
    "*.cache",
    "*[_-]cache",
    "venv",
    "site-packages",
    "node_modules",
)
NEVER = {
    "may contain a secret": SECRET,
    "left by training": (*TRAINING, *TRAINING_FOLDERS),
    "unfinished, or a cache": UNFINISHED,
}
UNKNOWN = "not a model file"
MOST_LINES = 5  # of one file with secrets that a message names


@dataclass(frozen=True)
class Selection:
    """What would be sent."""

    kind: Literal["model", "adapter"]
    uploads: tuple[Upload, ...]
    left_out: tuple[str, ...]  # with the reason
    notes: tuple[Note, ...]


def select(
    root: Path,
    include: Sequence[str],
    exclude: Sequence[str],
    card: bool,
    place: str,
    allow_secret: Sequence[str] = (),
    picture: Callable[[], bytes] | None = None,
) -> Selection:
    """The files of a finished model or adapter.

    Args:
        root: its folder.
        include: patterns of more files, as in `fnmatch`; secrets and training states are not to be had.
        exclude: patterns of files to leave out.
        card: whether README.md is made from provenance though there is one.
        place: the repository, for a card that is made.
        allow_secret: patterns of files that hold no secret although it looks so.
        picture: makes the picture of a card that is made; `picture_of` the folder where it is not given.

    Raises:
        UsageError: what makes it a model is excluded.
        InputError: no folder, neither a model nor an adapter, unfinished, or a file holds a secret.
    """
    if root.is_file() and root.suffix in (".safetensors", ".gguf"):
        raise InputError(
            f"{printable(root)}: a repository holds a folder; put the file into one of its own", hint=alone(root, place)
        )
    check_there(root)
    if not root.is_dir():
        raise InputError(f"{printable(root)}: not a folder; PATH must be a model or adapter folder")
    if is_stage(root) or (root.name == MODEL and is_stage(root.parent)):
        raise InputError(f"{printable(root)}: the output of an unfinished merge; run that merge again first")
    kind, needed, others, left_out, beside = contents(root)
    names = list(dict.fromkeys([*needed, *others]))
    extra = [name for name in walk(root) if matches(name, include) and name not in names]
    reasons = {name: why_not(root, name, include, exclude, name in needed) for name in (*names, *extra)}
    for name in needed:
        if reasons[name]:
            raise UsageError(f"{printable(name)}: left out ({reasons[name]}), but a {kind} needs it")
    chosen = [name for name, reason in reasons.items() if not reason]
    left_out += [LeftOut(name, reason) for name, reason in reasons.items() if reason]
    known = [*names, *extra, *(file.name for file in left_out)]
    left_out = [file for file in left_out if file.name not in {*extra} & {*chosen}]
    uploads = {name: Upload(name, root / name) for name in chosen}
    notes = [*fates(beside, carried=chosen, otherwise="not sent"), *told_of_training(root, chosen)]
    notes += idle_patterns("--include", include, known)
    notes += idle_patterns("--exclude", exclude, [*known, CARD, PICTURE])  # which may be made
    generate = CARD not in uploads or card or is_template(root / CARD)
    if not matches(CARD, exclude) and (made := card_for(root, place, generate, notes)) is not None:
        uploads[CARD] = Upload(CARD, content=made)
        if kind == "adapter" and not matches(PICTURE, exclude) and may_be_replaced(root / PICTURE):
            draw = picture or partial(picture_of, root)
            uploads |= {file.name: file for file in with_picture(made, draw, notes)}
    written = {name: file.content for name, file in uploads.items() if file.content is not None}
    if written and PROVENANCE in uploads:
        uploads[PROVENANCE] = Upload(PROVENANCE, content=listing(root / PROVENANCE, written))
    notes += check_secrets(printable(root), uploads.values(), allow_secret)
    notes += told_of_values(root) if kind == "adapter" else ()
    if kind == "adapter" and os.path.isabs(base := named_base(root)):
        notes.append(
            Note(
                "local-base-path",
                f"{format_at(root).config_name} names the base by a local folder, which everyone can see but nobody "
                f"can load: {printable(base)}; replace it with the base's Hub id",
            )
        )
    lines = {str(file) for file in (*left_out, *(LeftOut(name, "hidden") for name in hidden_files(root)))}
    return Selection(kind, tuple(uploads[n] for n in sorted(uploads)), (*sorted(lines),), tuple(notes))


def card_for(root: Path, place: str, generate: bool, notes: list[Note]) -> bytes | None:
    """The card that is uploaded in place of the one in the folder; None where that one is."""
    if generate:
        source = f"generated from {PROVENANCE}" if (root / PROVENANCE).is_file() else "generated"
        notes.append(Note("card-made", f"{CARD} is {source}"))
        return card_of(root, place, subject_at(root))
    if there := addressed(root / CARD, place):
        notes.append(Note("card-made", f"{CARD} is generated, with code that loads {printable(place)}"))
        return there
    notes.append(Note("card-kept", f"{CARD} is kept unchanged; pass --card to upload one made from {PROVENANCE}"))
    return None


def may_be_replaced(path: Path) -> bool:
    """Whether a file is a picture made here, or there is none of its name."""
    from loratool.pictures.writing import is_figure

    return not os.path.lexists(path) or is_figure(path)


def with_picture(card: bytes, picture: Callable[[], bytes], notes: list[Note]) -> Iterator[Upload]:
    """A card with its picture, where there can be one."""
    try:
        drawn = picture()
    except NoPictureError as reason:
        notes.append(Note("no-picture", f"{CARD} has no figure of the singular values: {reason}"))
        return
    notes.append(Note("picture-made", f"{PICTURE} is generated from the adapter's values, and {CARD} shows it"))
    yield Upload(CARD, content=illustrated(card))
    yield Upload(PICTURE, content=drawn)


def alone(file: Path, place: str) -> str:
    """The commands that push a file in a folder of its own, with its record if it has one."""
    folder = file.with_suffix("")
    record = sidecar_of(file)
    new, *sent = (shell_word(printable(p)) for p in (folder, file, *([record] if record.is_file() else [])))
    return f"mkdir {new} && cp {' '.join(sent)} {new} && loratool push {new} {place}"


def listing(path: Path, written: Mapping[str, bytes]) -> bytes:
    """A `loratool.json` that lists files with other content; as it is where it is none, or lists no side files."""
    raw = read_bounded(path, LARGEST_RECORD)
    table = json_or_empty(raw, lenient=True)
    if not isinstance(table.get("files"), dict):
        return raw
    files = table["files"] | {name: digest_of_bytes(content).record() for name, content in written.items()}
    return as_json({**table, "files": dict(sorted(files.items()))})


def told_of_values(root: Path) -> Iterator[Note]:
    """A note of an adapter that nobody can use, as it has values that are not finite."""
    try:
        read_adapter(root).check_values()
    except InputError as error:
        yield Note("adapter-not-finite", f"nothing can be merged or computed with it: {some(error.problems)}")


def told_of_training(root: Path, names: Iterable[str]) -> Iterator[Note]:
    """A note for each file whose header holds captions, paths or names of data sets."""
    heads = ((name, head) for name in names if name.endswith(".safetensors") for head in heads_at(root / name))
    for name, head in heads:
        if held := training_data_in(head.metadata):
            yield Note(
                "training-data-in-header",
                f"{printable(name)}: the header contains {', '.join(held)}, with captions, paths or names of data sets; "
                "`loratool convert --strip-metadata` removes them",
            )


def contents(
    root: Path,
) -> tuple[Literal["model", "adapter"], list[str], list[str], list[LeftOut], tuple[WeightFile, ...]]:
    """The kind, what it cannot do without, what belongs to it, what does not, and other weights."""
    beside: tuple[WeightFile, ...] = ()
    if is_adapter(root):
        adapter = read_adapter(root)
        if adapter.folder != root:
            raise UsageError(f"{printable(root)}: the adapter is in a subfolder; push {printable(adapter.folder)}")
        weights = [part.path.relative_to(root).as_posix() for part in adapter.file.files]
        weights += [adapter.file.path.name] if adapter.file.path.name.endswith(INDEX_SUFFIX) else []
        config = adapter.config_file.name
        others, left_out = sort_side_files(root, {*weights})
        beside = adapter.beside
        trained = [file.name for file in beside if file.counts and file.is_safetensors and file.name not in others]
        kept, needed = [*others, *trained, PROVENANCE], [*weights, config]
        kind: Literal["model", "adapter"] = "adapter"
    else:
        checkpoint = open_checkpoint(root)
        needed = [shard.path.relative_to(root).as_posix() for shard in checkpoint.shards]
        indexes = [model.index for model in (checkpoint, *checkpoint.components.values()) if model.index]
        needed += [index.relative_to(root).as_posix() for index in indexes]
        kept, left_out, kind = [*checkpoint.side_files, PROVENANCE], list(checkpoint.left_out), "model"
    left_out = [file for file in left_out if file.name not in (*needed, *kept)]
    return kind, needed, [name for name in kept if (root / name).is_file()], left_out, beside


def why_not(root: Path, name: str, include: Sequence[str], exclude: Sequence[str], weights: bool = False) -> str:
    """Empty for a file that may be sent; else the reason it is not. `weights`, of any kind, have been read through links."""
    if reason := never(name):
        return reason
    if not (root / name).is_file() or (leaves(root, name) and not weights):
        return "not a file of this folder"
    if matches(name, exclude):
        return "excluded"
    return "" if weights or matches(name, (*include, *KNOWN)) else f"{UNKNOWN}; pass --include to upload it"


def never(name: str) -> str:
    """Empty for a file that may be sent where it is asked for; else the reason why it never is."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts):
        return "hidden"
    for reason, patterns in NEVER.items():
        if any(fnmatch(part.lower(), pattern) for part in parts for pattern in patterns):
            return reason
    return ""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the path or its last part."""
    return any(fnmatch(name, pattern) or fnmatch(name.rpartition("/")[2], pattern) for pattern in patterns)


def walk(root: Path) -> Iterator[str]:
    for folder, _, files in os.walk(root):
        for name in sorted(files):
            yield Path(folder, name).relative_to(root).as_posix()


def hidden_files(root: Path) -> Iterator[str]:
    """Hidden files and folders, not those inside hidden folders."""
    for folder, folders, files in os.walk(root):
        yield from (Path(folder, n).relative_to(root).as_posix() for n in (*folders, *files) if n.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]


def idle_patterns(flag: str, patterns: Sequence[str], names: Sequence[str]) -> Iterator[Note]:
    """A note for each pattern that matches none of some files."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            yield Note("pattern-without-file", f"{flag} {printable(pattern)}: matches no file")


def check_secrets(shown: str, uploads: Iterable[Upload], allowed: Sequence[str]) -> list[Note]:
    """A note for each secret in files that the user allows; raises `InputError` naming file and line of all others.

    Of weights the header is looked at, which holds what training wrote into it; of any other file everything.
    """
    problems: list[str] = []
    uploads = list(uploads)
    notes = [
        Note("pattern-without-file", f"--allow-secret {printable(pattern)}: matches no file that would be uploaded")
        for pattern in allowed
        if not any(matches(upload.name, [pattern]) for upload in uploads)
    ]
    for upload in uploads:
        found = list(
            dict.fromkeys(secrets_in(header_parts(upload) if upload.name.endswith(".safetensors") else upload.parts()))
        )
        told = [f"{printable(upload.name)}, line {line}: {title}" for line, title in found[:MOST_LINES]]
        if more := Counter(title for _, title in found[MOST_LINES:]):
            listed = ", ".join(f"{title} ×{count}" for title, count in more.items())
            told.append(f"{printable(upload.name)}, further lines: {listed}")
        if matches(upload.name, allowed):
            notes += [Note("secret-allowed", f"{line} is uploaded, as --allow-secret permits") for line in told]
        else:
            problems += told
    if problems:
        raise InputError(
            f"{shown}: files contain what looks like a secret; remove it, leave the file out with --exclude FILE, or "
            "pass --allow-secret FILE if it is not a secret:",
            problems,
            hint=f"loratool push {shell_word(shown)} REPO --exclude FILE",
        )
    return notes


def check_message(message: str | None) -> None:
    """Raise `UsageError` where a commit's message holds a secret."""
    for _, title in secrets_in([(message or "").encode(errors="surrogateescape")]):
        raise UsageError(f"the commit message contains what looks like {title}")


def header_parts(upload: Upload) -> Iterator[bytes]:
    """The header of a safetensors file, which one that stands for an object has: its first 8 bytes tell how long it is."""
    content = io.BytesIO(upload.content or b"")
    with content if upload.path is None else open(open_regular(upload.path), "rb") as stream:
        prefix = stream.read(PREFIX)
        yield prefix
        left = int.from_bytes(prefix, "little")
        while part := stream.read(min(left, PIECE)):
            yield part
            left -= len(part)
