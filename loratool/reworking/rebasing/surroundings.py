"""What differs between two bases where an adapter changes nothing: tokenizers, norms, embeddings."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterator, Mapping

from loratool.bases.weights import Plain, plain_of
from loratool.files.checkpoint import Checkpoint
from loratool.files.model_files import TOKENIZER_FILES, VOCABULARIES
from loratool.files.safefile import TensorInfo
from loratool.notes import Note
from loratool.templates import listed

NORMS = re.compile(r"(?:^|[._])(?:\w*norm\w*|ln_\w+)\.(?:weight|bias)$", re.IGNORECASE)
EMBEDDINGS = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe|word_embeddings|tok_embeddings)\.weight$", re.IGNORECASE)
SAMPLE = 1 << 16  # bytes of a tensor that are compared at a time
PARTS = 16  # places of a large one


def changed_beside(old: Checkpoint, new: Checkpoint) -> Iterator[Note]:
    """A note for each kind of thing that differs."""
    names = sorted(TOKENIZER_FILES | VOCABULARIES)
    both = [name for name in names if (old.root / name).is_file() or (new.root / name).is_file()]
    files = [name for name in both if not same_files(old, new, name)]
    if files:
        yield Note("tokenizer-changed", f"the bases have different tokenizers: {listed(files)}")
    for pattern, code, what in ((NORMS, "norms-changed", "norms"), (EMBEDDINGS, "embeddings-changed", "embeddings")):
        mine = {name: info for name, info in old.stored.items() if pattern.search(name)}
        if differing := [name for name, info in mine.items() if not same(old, new, name, info, new.stored)]:
            yield Note(
                code,
                f"{len(differing)} of {len(mine)} {what} differ between the bases, such as {listed(differing[:1])}",
            )


def same_files(old: Checkpoint, new: Checkpoint, name: str) -> bool:
    one, other = old.root / name, new.root / name
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def same(old: Checkpoint, new: Checkpoint, name: str, info: TensorInfo, others: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is the same in both: all of a small one, evenly spread parts of a large one."""
    other = others.get(name)
    if other is None or (other.dtype, other.shape) != (info.dtype, info.shape):
        return False
    count = info.nbytes
    if count <= PARTS * SAMPLE:
        places = [(0, count)]
    else:
        places = [(part * (count - SAMPLE) // (PARTS - 1), SAMPLE) for part in range(PARTS)]
    one, two = plain_of(old, name), plain_of(new, name)
    return all(bytes_of(one, start, size) == bytes_of(two, start, size) for start, size in places)


def bytes_of(tensor: Plain, start: int, size: int) -> bytes:
    found = bytearray(size)
    tensor.read(start, memoryview(found))
    return bytes(found)
