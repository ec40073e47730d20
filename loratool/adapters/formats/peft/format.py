"""`Peft`: the format as others see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapters.formats.format import Format
from loratool.adapters.formats.peft import counting, files, keys, lora, scaling
from loratool.adapters.formats.peft.reading import read_leniently, read_saved
from loratool.adapters.formats.peft.training import training_of
from loratool.errors import printable
from loratool.files.heads import HasNames, kinds_of

if TYPE_CHECKING:
    from loratool.adapters.adapter import Adapter
    from loratool.adapters.formats.peft.spelling import Names
    from loratool.adapters.layers import Contents, Kind
    from loratool.adapters.reading import Reading
    from loratool.adapters.training import Training
    from loratool.files.checkpoint import Checkpoint
    from loratool.notes import Note
    from loratool.provenance.cards import Subject
    from loratool.results.findings import Finding


class Peft(Format):
    """Adapters as PEFT saves them.

    What only some commands ask for is imported there: a merge reads adapters and does no more with them.
    """

    name = "peft"
    config_name = files.CONFIG
    weights_name = files.WEIGHTS
    file_names = files.NAMES
    newest = "0.21.2"
    dialects = ("peft", "peft-fused", "peft-split")

    recognises = staticmethod(files.recognises)
    needed = staticmethod(files.needed)
    read_leniently = staticmethod(read_leniently)
    read_saved = staticmethod(read_saved)  # a file of tensors that were trained whole
    training_of = staticmethod(training_of)
    parameters = staticmethod(counting.count_parameters)
    scales = staticmethod(scaling.scales_in)  # of a config that another format holds

    @property
    def repairs(self) -> Mapping[str, str]:
        from loratool.adapters.formats.peft.health import REPAIRS

        return REPAIRS

    def findings(self, adapter: Adapter, path: Path) -> Iterator[Finding]:
        from loratool.adapters.formats.peft.health import findings

        return findings(adapter, path)

    def subject(self, config: Mapping[str, Any]) -> Subject:
        from loratool.adapters.formats.peft.card import subject

        return subject(config)

    def was_inside(self, adapter: Adapter, target: str) -> bool:
        from loratool.adapters.formats.peft.spelling import was_inside

        return was_inside(adapter, target)

    def one_rank_experts(self, targets: Iterable[str]) -> tuple[str, ...]:
        from loratool.adapters.formats.peft.experts import stacked_by_peft

        return stacked_by_peft(targets)

    def rank_notes(self, own: Mapping[str, int], ranks: Mapping[str, int]) -> Iterator[Note]:
        from loratool.adapters.formats.peft.experts import rank_notes

        return rank_notes(own, ranks)

    def plain_config(
        self, training: Training, layers: Mapping[str, tuple[int, float]], *, whole_paths: bool = False
    ) -> dict[str, Any]:
        """The config of LoRA, with (rank, α) of each layer by its path."""
        from loratool.adapters.formats.peft.describing import plain_config

        return plain_config(training, layers, whole_paths=whole_paths)

    def claims(self, file: HasNames) -> frozenset[str]:
        names = frozenset(kinds_of(file).values())
        found = frozenset(name for name in names if keys.has_slot(name, lora.SLOTS))
        if found == names:
            return found
        from loratool.adapters.formats.peft import unmerged  # which needs every method

        return frozenset(name for name in names if keys.has_slot(name, unmerged.SLOTS))

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
        from loratool.adapters.formats.peft.spelling import Names

        return Names(self, kinds, release)

    def losses(self, adapter: Adapter, dialect: str = "") -> tuple[Note, ...]:  # noqa: ARG002 (all have one config)
        from loratool.adapters.formats.peft.spelling import losses

        return losses(adapter)

    def task_heads(self, task: str) -> tuple[str, ...]:
        return keys.HEADS.get(task, ())

    def tells_apart(self, parameters: set[str]) -> bool:
        from loratool.adapters.formats.peft.parameters import REGISTERED

        return any(parameters <= set(row) for row in REGISTERED)

    def divisors(self, contents: Contents) -> Mapping[str, float]:
        from loratool.adapters.formats.peft import strength

        return strength.divisors(contents, self.names_of(contents))

    def alphas(self, contents: Contents) -> Mapping[str, float]:
        from loratool.adapters.formats.peft import strength

        return strength.alphas(contents, self.divisors(contents))

    def rescaled(self, contents: Contents, factors: Mapping[str, float | None], one_alpha: bool) -> dict[str, Any]:
        from loratool.adapters.formats.peft import strength

        return strength.rescaled(contents, self.names_of(contents), factors, one_alpha)

    def renamed_base(self, config: Mapping[str, Any], base: str) -> dict[str, Any]:
        named = {"base_model_name_or_path": base, "revision": None} if "base_model_name_or_path" in config else {}
        return {**config, **named}

    def names_of(self, contents: Contents) -> Names:
        """The names of an adapter's own layers."""
        return self.spelling({t: layer.kind for t, layer in contents.layers.items()}, contents.training.release)
