"""`Peft`: the format as others see it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Format, uneven_dora
from loratool.adapters.formats.peft import counting, experts, files, health, keys, scaling, strength
from loratool.adapters.formats.peft.card import subject
from loratool.adapters.formats.peft.describing import plain_config
from loratool.adapters.formats.peft.parameters import REGISTERED
from loratool.adapters.formats.peft.reading import read_leniently, read_saved
from loratool.adapters.formats.peft.spelling import Names, was_inside
from loratool.adapters.formats.peft.training import training_of
from loratool.adapters.formats.roles.names import of_factors
from loratool.adapters.layers import Contents, Kind, Layer
from loratool.adapters.reading import Reading
from loratool.adapters.training import Training
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.heads import HasNames, kinds_of
from loratool.notes import Note
from loratool.results.repairs import some


class Peft(Format):
    """Adapters as PEFT saves them."""

    name = "peft"
    config_name = files.CONFIG
    weights_name = files.WEIGHTS
    file_names = files.NAMES
    newest = "0.21.2"
    dialects = ("peft", "peft-fused", "peft-split")
    repairs = health.REPAIRS

    recognises = staticmethod(files.recognises)
    needed = staticmethod(files.needed)
    read_leniently = staticmethod(read_leniently)
    read_saved = staticmethod(read_saved)  # a file of tensors that were trained whole
    parameters = staticmethod(counting.count_parameters)
    findings = staticmethod(health.findings)
    was_inside = staticmethod(was_inside)
    one_rank_experts = staticmethod(experts.stacked_by_peft)
    rank_notes = staticmethod(experts.rank_notes)
    subject = staticmethod(subject)
    plain_config = staticmethod(plain_config)
    training_of = staticmethod(training_of)
    scales = staticmethod(scaling.scales_in)  # of a config that another format holds

    def claims(self, file: HasNames) -> frozenset[str]:
        from loratool.adapters.formats.peft import unmerged  # which needs every method

        found = {name: keys.split(name, unmerged.SLOTS) for name in kinds_of(file).values()}
        return frozenset(name for name, key in found.items() if key is not None and key.slot)

    def is_config(self, config: Mapping[str, Any]) -> bool:
        return bool({"peft_type", "lora_alpha"} & config.keys())

    def training_at(self, path: Path) -> Training:
        return training_of(files.read_config(files.config_at(path)))

    def taken_apart(self, checkpoint: Checkpoint, reading: Reading) -> tuple[Checkpoint, Adapter]:
        """The base and one adapter of a model that was saved unmerged; raises `UsageError` or `InputError`."""
        from loratool.adapters.formats.peft import unmerged

        return unmerged.taken_apart(checkpoint, reading)

    def unmerged_in(self, names: Iterable[str]) -> str:
        """What a model holds that was saved unmerged, from the names of its tensors; empty for any other."""
        wrapped = keys.wrapped_modules(names)
        return (
            f"{len(wrapped)} modules contain PEFT's base_layer and factors, such as {printable(wrapped[0])}"
            if wrapped
            else ""
        )

    def spelling(self, kinds: Mapping[str, Kind], release: str = "", dialect: str = "") -> Names:  # noqa: ARG002
        return Names(self, kinds, release)

    def losses(self, adapter: Adapter, dialect: str = "") -> tuple[Note, ...]:  # noqa: ARG002 (all have one config)
        columns = [target for target, update in adapter.updates.items() if is_by_column(update)]
        full = [t for t, u in adapter.updates.items() if isinstance(u, Add) and not of_factors(t, adapter.sources)]
        lost = {"DoRA of input columns": columns, "changes stored in full": full}
        ways_out = {"changes stored in full": " (--base writes the new values)"}
        notes = (
            Note("not-in-peft", f"PEFT cannot store {what}{ways_out.get(what, '')}: {some(t)}")
            for what, t in lost.items()
            if t
        )
        return (*notes, *uneven_dora(adapter, "PEFT"))

    def task_heads(self, task: str) -> tuple[str, ...]:
        return keys.HEADS.get(task, ())

    def tells_apart(self, parameters: set[str]) -> bool:
        return any(parameters <= set(row) for row in REGISTERED)

    def alpha_of(self, contents: Contents, target: str) -> float:
        return strength.alpha_of(contents, self.names_of(contents), target)

    def with_alpha(self, contents: Contents, layer: Layer, alpha: float) -> LowRank | ExpertFactors:
        return strength.with_alpha(contents, self.names_of(contents), layer, alpha)

    def rescaled(self, contents: Contents, factors: Mapping[str, float | None], one_alpha: bool) -> dict[str, Any]:
        return strength.rescaled(contents, self.names_of(contents), factors, one_alpha)

    def renamed_base(self, config: Mapping[str, Any], base: str) -> dict[str, Any]:
        named = {"base_model_name_or_path": base, "revision": None} if "base_model_name_or_path" in config else {}
        return {**config, **named}

    def names_of(self, contents: Contents) -> Names:
        """The names of an adapter's own layers."""
        return self.spelling({t: layer.kind for t, layer in contents.layers.items()}, contents.training.release)


def is_by_column(update: Update) -> bool:
    """Whether DoRA has the lengths of columns, as PEFT has them of an embedding alone."""
    if not (isinstance(update, Magnitude) and update.by_column):
        return False
    return not (isinstance(update.inner, LowRank) and update.inner.table)
