"""What the small file of an adapter says and carries besides its cores, so that `expand` needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.adapters.formats import format_of
from loratool.adapters.formats.format import Parts
from loratool.adapters.layers import Contents, Form
from loratool.adapters.ranks import evened
from loratool.adapters.writer import Carried, append, carried_over, files_beside
from loratool.errors import printable
from loratool.files.tensor_writer import TensorFile, Triple
from loratool.grouping import by_key
from loratool.lazy import torch
from loratool.notes import Note
from loratool.results.text import plural
from loratool.reworking.compressing.files import ABOUT, DIGEST, MARK, OTHER, VERSION, form_record
from loratool.reworking.dialects import Manner
from loratool.reworking.renaming import dialect_of
from loratool.templates import listed

NO_DIGEST = "0" * 64  # until that of the shared file is known


@dataclass(frozen=True)
class Member:
    """An adapter on its way into its small file."""

    source: Contents
    about: Mapping[str, Any]
    carried: Carried
    notes: tuple[Note, ...]
    dropped: tuple[str, ...]  # layers that get nothing

    @classmethod
    def of(
        cls, source: Contents, before: Contents, manner: Manner, ranks: Mapping[str, int], dtype: torch.dtype
    ) -> Member:
        """The adapter `source`, as `before` it took the names of its fleet, with layers of these ranks, 0 for none."""
        dropped = tuple(target for target, rank in ranks.items() if not rank)
        kinds = {target: source.layers[target].kind for target, rank in ranks.items() if rank}
        names = manner.spelling(kinds, source)
        kept = evened({target: ranks[target] for target in kinds}, names.of_one_rank())
        carried = carried_over(source, names)
        forms = {target: Form.of(source.layers[target], rank) for target, rank in kept.items()}
        parts = Parts(
            kept,
            whole_names=bool(dropped),
            dropped=dropped,
            dora=source.dora,
            lora_bias=bool(source.biases),
            tokens=carried.tokens,
        )
        about = {
            "name": source.name,
            "base": source.training.base,
            "dialect": manner.dialect,
            "release": source.training.release if manner.form is format_of(source.adapter) else "",
            "dtype": str(dtype).removeprefix("torch."),
            "layers": {target: form_record(form) for target, form in forms.items()},
            "config": names.describe([source.adapter], parts),
            "header": manner.draft(forms, names, dtype, carried, [source]).header(kept),
        }
        return cls(source, about, carried, tuple(remarks(source, before, manner)), dropped)

    def announced(self) -> Iterator[Triple]:
        for name, dtype, shape in self.carried.announced():
            yield OTHER + name, dtype, shape

    def metadata(self) -> dict[str, str]:
        return {MARK: VERSION, DIGEST: NO_DIGEST, ABOUT: json.dumps(self.about)}

    def carry(self, file: TensorFile) -> None:
        """Write all that is not a factor."""
        for name, tensor in self.carried.tensors.items():
            append(file, OTHER + name, tensor)


def remarks(source: Contents, before: Contents, manner: Manner) -> Iterator[Note]:
    """What is not in the small file as it was."""
    yield from source.remarks
    if source.dora:
        text = "DoRA: the error of ΔW does not bound that of the merged weight; its magnitudes are kept"
        yield Note("dora-error-unbounded", text)
    if (own := dialect_of(before) or before.adapter.format) != manner.dialect:
        text = f"is {own}, and expand writes it as {manner.dialect}, the dialect of the fleet"
        yield Note("expands-in-another-dialect", text)
    if files := files_beside(source):
        yield Note("files-not-kept", f"files next to the weights are not kept: {listed(sorted(files))}")


def told(members: Sequence[Member]) -> Iterator[Note]:
    """The notes of all members: one for those that say the same, and one for all layers that are left out."""
    alike = by_key((note, member.source.name) for member in members for note in member.notes)
    for note, names in alike.items():
        yield note.under(names[0]) if len(names) == 1 else Note(note.code, f"{len(names)} adapters: {note.text}")
    if dropped := [(member.source.name, target) for member in members for target in member.dropped]:
        (name, target), count = dropped[0], len({of for of, _ in dropped})
        yield Note(
            "layers-left-out",
            f"{plural(len(dropped), 'layer')} of {plural(count, 'adapter')} {'gets' if len(dropped) == 1 else 'get'} no "
            f"directions and {'is' if len(dropped) == 1 else 'are'} left out, such as {printable(target)} of {name}",
        )
