"""What tells that two adapters have the same row in a table, but for name, place and date: far cheaper than to read both.

A row depends on the header of the file of weights, on configs, on values of single numbers such as α, and on the names of other
files. Adapters that were trained alike have all of these in common, so of a thousand few have to be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from loratool.adapters.formats import CONFIGS
from loratool.adapters.training_data import TRAINING_DATA
from loratool.errors import LoratoolError
from loratool.files.heads import METADATA
from loratool.files.safefile import PREFIX
from loratool.files.untrusted import read_bounded

MOST_FILES = 64  # of a folder: one with more is read as it is
LARGEST_HEADER = 8 << 20
SMALL = 8  # bytes of a tensor that holds one number
ONE = (b'"shape":[]', b'"shape":[1]', b'"shape":[1,1]')  # of tensors that hold one number
NUMBER = re.compile(rb'"shape":\[(?:1(?:,1)?)?\],"data_offsets":\[(\d+),(\d+)\]')
ENTRY, USUAL = b'"data_offsets"', b'],"data_offsets":['  # once in the entry of each tensor; as the reference writes it
INDICES = (b'"dtype":"I', b'"dtype":"U', b'"dtype":"BOOL"')  # of tensors whose values may be looked at
# Entries of a header that differ from run to run and say nothing of how the file is read, besides those of training data.
OF_ONE_RUN = (TRAINING_DATA - {"ss_sd_model_name"}) | {
    *("ss_training_started_at", "ss_training_finished_at", "ss_seed", "ss_steps", "ss_epoch", "ss_num_epochs"),
    *("ss_max_train_steps", "ss_num_train_images", "ss_num_reg_images", "ss_num_batches_per_epoch"),
    *("sshs_model_hash", "sshs_legacy_hash", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_learning_rate"),
    *("modelspec.date", "modelspec.title", "modelspec.hash_sha256", "modelspec.thumbnail", "modelspec.description"),
}


def likeness(location: Path) -> bytes | None:
    """The same for adapters whose rows are the same; None where that takes a look at more than this."""
    try:
        if location.is_dir():
            names = sorted(os.listdir(location))
            weights = [name for name in names if name.endswith(".safetensors")]
            if len(names) > MOST_FILES or len(weights) != 1:
                return None
            folder, path = location, location / weights[0]
        else:
            names, folder, path = [], location.parent, location
        if path.suffix != ".safetensors":
            return None
        digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogatepass"), digest_size=32)
        for name in CONFIGS:
            if (folder / name).is_file():
                digest.update(f"\0{name}\0".encode() + read_bounded(folder / name))
        return digest.digest() if look_at(path, digest) else None
    except (OSError, ValueError, LoratoolError):
        return None


def look_at(path: Path, digest: hashlib.blake2b) -> bool:
    """Take in the file's header and its single numbers; False where it holds what this does not look at."""
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(PREFIX), "little")
        if not 0 < length <= LARGEST_HEADER or PREFIX + length > size:
            return False
        tensors = without_metadata(stream.read(length), digest)
        if tensors.count(ENTRY) != tensors.count(USUAL) or any(mark in tensors for mark in INDICES):
            return False
        digest.update(b"%d\0" % size + tensors)
        for match in NUMBER.finditer(tensors) if any(mark in tensors for mark in ONE) else ():
            start, stop = int(match[1]), int(match[2])
            if 0 <= stop - start <= SMALL:
                stream.seek(PREFIX + length + start)
                digest.update(stream.read(stop - start))
    return True


def without_metadata(raw: bytes, digest: hashlib.blake2b) -> bytes:
    """The part of a header that describes tensors; what is said besides is taken in, but for entries of one run."""
    if not raw.startswith(METADATA):
        return raw
    text = raw.decode()
    found, end = json.JSONDecoder().raw_decode(text, len(METADATA))
    if not isinstance(found, dict):
        return raw
    kept = {key: "" if key in OF_ONE_RUN and value else value for key, value in found.items()}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return text[end:].encode()
