"""What people type where an operand is due: read as the only thing it can mean, and said; else proposed.

A word that is an operand as it stands is taken as it stands, and what exists locally wins. Nothing here raises: what is
wrong with an operand says who reads it, and `proposals` has what may have been meant.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loratool.adapters.formats import is_adapter
from loratool.errors import LoratoolError, printable
from loratool.fetching.bases import AUTO
from loratool.files.folders import INDEX_SUFFIX, MODEL_INDEX, NUMBERED, WEIGHT_FILES
from loratool.files.hub_names import SCHEME, parse
from loratool.files.names import at_home
from loratool.notes import Note
from loratool.stores.names import is_in_store

# What an operand is read as: "any" is an adapter or a model, "folder" one of them here, "repository" a name on the Hub.
Role = Literal["model", "adapter", "any", "folder", "repository"]
Kind = Literal["model", "adapter", "unknown", ""]
FITTING: dict[Role, tuple[Kind, ...]] = {
    "model": ("model",),
    "adapter": ("adapter",),
    "any": ("model", "adapter"),
    "folder": ("model", "adapter"),
    "repository": (),
}
EXCHANGEABLE: tuple[tuple[Role, Role], ...] = (("model", "adapter"), ("model", "any"), ("folder", "repository"))
# Files by which a folder is somebody's model or adapter, whether it can be read or not: weights, and what describes them.
WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.npz", MODEL_INDEX)
DESCRIPTIONS = ("config.json", "*_config.json", f"*{INDEX_SUFFIX}", MODEL_INDEX)
TELLING = (*WEIGHTS, "config.json", "*_config.json")
WILD = re.compile(r"[*?\[]")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # a folder that transformers' Trainer writes
LONGEST_LINE = 4096  # bytes
MOST_ENTRIES = 10_000  # of a folder that is searched for near names


@dataclass(frozen=True)
class Operand:
    """A word, what it is read as, and which parameter of the command it belongs to."""

    word: str
    role: Role
    parameter: str = ""

    @property
    def kind(self) -> Kind:
        """What is there; "unknown" for a place on the Hub, which is not asked for this."""
        return kind_of(self.word)

    @property
    def is_wrong(self) -> bool:
        """Whether it is certainly not what it is read as."""
        if self.role == "repository":
            return at_home(self.word).is_dir()
        if self.role == "folder":
            return not os.path.lexists(at_home(self.word))
        return self.word != AUTO and self.kind in ("model", "adapter") and self.kind not in FITTING[self.role]


def kind_of(word: str) -> Kind:
    """What a word is the name of, as far as this disk knows."""
    if word == AUTO:
        return "model"
    path = at_home(word)
    if not os.path.lexists(path):
        return "unknown" if on_the_hub(word) else ""
    return kind_at(path)


def on_the_hub(word: str) -> bool:
    """Whether a word can be a place on the Hub, or in a store."""
    try:
        return is_in_store(word) or parse(word) is not None
    except LoratoolError:
        return False


def kind_at(path: Path) -> Kind:
    """What is at a place, by the names of files and their heads; nothing where it is neither adapter nor model."""
    with suppress(OSError, LoratoolError):
        if path.is_dir():
            if is_adapter(path):
                return "adapter"
            return "model" if not is_bare(path) else ""
        if path.suffix in WEIGHT_FILES:
            return "adapter" if is_adapter(path) else "model"
        return "model" if path.name.endswith(INDEX_SUFFIX) else ""
    return ""


def is_bare(folder: Path) -> bool:
    """Whether a folder has no file by which it would be a model or an adapter."""
    return not any(any(folder.glob(pattern)) for pattern in TELLING)


def is_described(folder: Path) -> bool:
    """Whether a folder has a config or an index, so that it is one model or adapter and not a place for many files."""
    return any(any(folder.glob(pattern)) for pattern in DESCRIPTIONS)


def has_weights(folder: Path) -> bool:
    """Whether a folder has a file of weights itself, or is a pipeline."""
    return any(path.is_file() for pattern in WEIGHTS for path in folder.glob(pattern))


def understood(operands: Sequence[Operand]) -> tuple[list[Operand], list[Note]]:
    """The operands of a command as they are meant, in order, and a note of each that was typed as something else."""
    meant = [read_as(operand) for operand in operands]
    found, notes = exchanged([operand for operand, _ in meant], [note for _, note in meant if note])
    return found, [*notes, *(note for each in found for note in namesakes(each))]


def expanded(word: str) -> list[str]:
    """The paths that a pattern matches, which not every shell looks for; the word itself where it is none."""
    home = os.path.expanduser(word)
    if os.path.lexists(word) or os.path.lexists(home) or not WILD.search(word):
        return [word]
    return sorted(glob.glob(home) or glob.glob(home.replace("\\", "/"))) or [word]


def read_as(operand: Operand) -> tuple[Operand, Note | None]:
    """An operand as the one thing that it can mean, and what is said of it where that is not what was typed."""
    word = operand.word
    if operand.role == "repository" or word == AUTO:
        return operand, None
    spelled, why = spelled_here(word)
    path = Path(spelled)
    if not os.path.lexists(path):
        return operand, None
    meant = replace(operand, word=spelled)
    for place, said in nearby(path, operand.role):
        return replace(meant, word=str(place)), Note("operand-near", f"{printable(word)}: {said}")
    return meant, Note("operand-spelling", f"{printable(word)}: {why}") if why else None


def spelled_here(word: str) -> tuple[str, str]:
    """The path here that a word spells, and what is said of it where it is spelled in another way."""
    if os.path.lexists(word):
        return word, ""
    home = os.path.expanduser(word)
    if os.path.lexists(home):
        return home, ""
    turned = home.replace("\\", "/")
    if turned != home and os.path.lexists(turned):
        return turned, f"read as {printable(turned)}"
    if not on_the_hub(word) and os.path.isfile(f"{home}.safetensors"):
        return f"{home}.safetensors", "the file that ends in .safetensors is read"
    return word, ""


def nearby(path: Path, role: Role) -> Iterator[tuple[Path, str]]:
    """The place next to `path` that is meant in its stead, and what is said of it; nothing where `path` is right."""
    if role == "any" or kind_of_its_own(path, role):
        return
    if not path.is_dir():
        if path.is_file() and is_described(path.parent) and fits(path.parent, role):
            yield path.parent, f"a file of the {kind_at(path.parent)} in {printable(path.parent)}, which is read"
        return
    if len(inside := below(path, role)) == 1:
        yield inside[0], f"the {kind_at(inside[0])} is in its subfolder {printable(inside[0].name)}, which is read"
        return
    above = Path(os.path.abspath(path)).parent
    if not inside and is_bare(path) and has_weights(above) and is_described(above) and fits(above, role):
        yield above, f"holds no weights; the {kind_at(above)} in the parent folder is read"


def kind_of_its_own(path: Path, role: Role) -> bool:
    """Whether a place is something by itself: what is due, or what is refused with a reason."""
    if path.is_dir():
        return not is_bare(path) or kind_at(path) == "adapter"
    if role == "folder":
        return False
    match = NUMBERED.match(path.name)
    return path.suffix not in ("", ".json", ".md", ".txt") and not (match and int(match["count"]) > 1)


def fits(path: Path, role: Role) -> bool:
    return kind_at(path) in FITTING[role]


def below(folder: Path, role: Role) -> list[Path]:
    """The subfolders that hold what is due, the last checkpoint last; of a repository in the Hub's cache its commits."""
    home = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
    with suppress(OSError):
        found = [each for each in sorted(home.iterdir())[:MOST_ENTRIES] if each.is_dir() and fits(each, role)]
        if home is not folder and len(found) > 1:
            found = [each for each in found if each.name == commit_of_main(folder)] or found
        return sorted(found, key=step_of)
    return []


def commit_of_main(repository: Path) -> str:
    """The commit that `main` was when a repository in the Hub's cache was last asked for it; empty where it never was."""
    with suppress(OSError, UnicodeDecodeError):
        return (repository / "refs" / "main").read_text(encoding="ascii").strip()
    return ""


def step_of(folder: Path) -> int:
    """The step of a checkpoint of transformers' Trainer; -1 for any other folder."""
    match = CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else -1


def namesakes(operand: Operand) -> list[Note]:
    """That a name on the Hub is that of a folder here, too, which is not read, or of something in a folder that lacks it."""
    if (folder := same_name(operand)) is not None:
        why = f"the local folder ./{printable(folder)} is not used"
    elif (folder := parent_here(operand)) is not None:
        why = f"it is not in the local folder ./{printable(folder)}"
    else:
        return []
    return [Note("operand-on-hub", f"{printable(operand.word)} is read from the Hub; {why}")]


def same_name(operand: Operand) -> str | None:
    """The folder here that is called as a repository is, and holds what is due."""
    if operand.role in ("repository", "folder") or operand.kind != "unknown" or (place := parse(operand.word)) is None:
        return None
    name = place.repo.rpartition("/")[2]
    return name if fits(Path(name), operand.role) else None


def parent_here(operand: Operand) -> str | None:
    """The folder here that a name on the Hub would be in, if it were a path."""
    if operand.role in ("repository", "folder") or operand.kind != "unknown" or is_in_store(operand.word):
        return None
    place = parse(operand.word)
    folder = place.repo.partition("/")[0] if place and not SCHEME.match(operand.word) else ""
    return folder if folder and os.path.isdir(folder) else None


def exchanged(operands: list[Operand], notes: list[Note]) -> tuple[list[Operand], list[Note]]:
    """The operands, two of them exchanged where each is what the other is read as, and nothing else can be meant."""
    for one, other in EXCHANGEABLE:
        ones = [at for at, each in enumerate(operands) if each.role == one]
        others = [at for at, each in enumerate(operands) if each.role == other]
        if not ones or not others:
            continue
        wrong = [at for at in ones if operands[at].is_wrong]
        astray = [at for at in others if is_astray(operands[at], one)]
        if other == "adapter" and len(wrong) + len(astray) == 1:  # the other one may be on the Hub, which is not asked
            wrong = wrong or [at for at in ones if operands[at].kind == "unknown"]
            astray = astray or [at for at in others if operands[at].kind == "unknown"]
        if len(wrong) == len(astray) == 1:
            first, second = operands[wrong[0]], operands[astray[0]]
            operands[wrong[0]], operands[astray[0]] = (
                replace(first, word=second.word),
                replace(second, word=first.word),
            )
            said = f"{printable(second.word)} is read as the {said_of(one)} and {printable(first.word)} as the {said_of(other)}"
            return operands, [*notes, Note("operands-swapped", f"the operands are swapped: {said}")]
    return operands, notes


def is_astray(operand: Operand, role: Role) -> bool:
    """Whether an operand is certainly what another one is read as."""
    return operand.is_wrong or (operand.role == "any" and role == "model" and operand.kind == "model")


def said_of(role: Role) -> str:
    return {"model": "base", "adapter": "adapter", "any": "adapter", "folder": "path", "repository": "repository"}[role]


def is_list(word: str) -> bool:
    """Whether a word is a text file with a path in its first line."""
    path = at_home(word)
    with suppress(OSError, UnicodeDecodeError, ValueError):
        if path.is_file():
            with open(path, "rb") as stream:
                first = stream.readline(LONGEST_LINE).decode().strip()
            return bool(first) and os.path.lexists(at_home(first))
    return False


def proposals(operand: Operand) -> list[str]:
    """What may have been meant by an operand that could not be read, the likeliest first."""
    word, role = operand.word, operand.role
    if role == "repository" or word == AUTO:
        return []
    path = at_home(word)
    if os.path.lexists(path):
        if path.is_dir() and is_bare(path):
            if not (inside := below(path, role)):
                return [f"hf://{word}"] if on_the_hub(word) and role != "folder" else []
            return [str(each) for each in reversed(inside) if has_weights(each)]
        return []
    if (folder := same_name(operand)) is not None:
        return [f"./{folder}"]
    return near_names(path, role)


def near_names(path: Path, role: Role) -> list[str]:
    """Paths in the same folder whose names are like this one's, those that hold what is due first."""
    from difflib import get_close_matches

    with suppress(OSError):
        names = sorted(os.listdir(path.parent))[:MOST_ENTRIES]
        lower = {name.lower(): name for name in reversed(names)}
        found = [path.parent / lower[name] for name in get_close_matches(path.name.lower(), lower, 5, 0.6)]
        return [str(each) for each in sorted(found, key=lambda each: not fits(each, role))]
    return []
