"""What a checkpoint's configs say of how its weights are packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratool.files.checkpoint import Checkpoint
from loratool.files.untrusted import read_json

# Where a checkpoint says how its weights are packed: entries of config.json, and files that are about nothing else.
ENTRIES = (
    ("quantization_config",),
    ("compression_config",),
    ("text_config", "quantization_config"),
    ("text_config", "compression_config"),
)
TWINS = ("quantize_config.json", "hf_quant_config.json", "quant_config.json", "quanto_qmap.json")


@dataclass(frozen=True)
class Setting:
    """One of the places in which a checkpoint says how its weights are packed."""

    file: str
    path: tuple[str, ...]  # keys that lead to `values` in the file; none where it is all of it
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """All that a checkpoint's configs say of how its weights are packed; the first place is the one that counts."""

    places: tuple[Setting, ...]

    @property
    def values(self) -> Mapping[str, Any]:
        """What counts; empty where nothing is said."""
        return self.places[0].values if self.places else {}

    @property
    def method(self) -> str:
        """`quant_method`; empty where none is named."""
        value = self.values.get("quant_method")
        return value if isinstance(value, str) else ""


def settings_in(base: Checkpoint) -> Iterator[Setting]:
    """The places in which the config of one model says how its weights are packed."""
    for path in ENTRIES:
        values: Any = base.config
        for key in path:
            values = values.get(key) if isinstance(values, Mapping) else None
        if isinstance(values, Mapping):
            yield Setting("config.json", path, values)
    for name in TWINS:
        if name in base.side_files:
            yield Setting(name, (), read_json(base.root / name, repeated=True, lenient=True))
