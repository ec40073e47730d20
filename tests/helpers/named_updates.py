"""A format for tests whose tensors have the names of targets, so that binding can be tested without a dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from loratool.adapters.adapter import Adapter, Flattened, StoredTensor
from loratool.adapters.formats.format import Format
from loratool.adapters.training import Training
from loratool.algebra.updates.additive import LowRank
from loratool.files.safefile import read_safefile
from loratool.provenance.cards import Subject

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from loratool.adapters.formats.format import Config
    from loratool.adapters.reading import Reading
    from loratool.errors import Problem
    from loratool.files.heads import HasNames

SCALE = 0.5


class Targets(Format):
    """`targets.safetensors`: `MODULE.up` and `MODULE.down`; a module without a dot in its name is flattened."""

    name = "targets"
    config_name = "targets.json"
    weights_name = "targets.safetensors"

    def recognises(self, path: Path) -> bool:
        return (path / self.weights_name).is_file()

    def claims(self, file: HasNames) -> frozenset[str]:
        return frozenset(name for name in file.tensors if name.endswith((".up", ".down")))

    def is_config(self, config: Config) -> bool:
        return not config

    def training_at(self, path: Path) -> Training:
        return Training()

    def read_leniently(self, path: Path, reading: Reading) -> tuple[Adapter, tuple[Problem, ...]]:
        file = read_safefile(path / self.weights_name)
        modules = sorted({name.rpartition(".")[0] for name in file.tensors})
        targets = {m: f"{m}.weight" if "." in m else Flattened(f"{m}.weight") for m in modules}
        stored: Any = {name: StoredTensor(file, info) for name, info in file.tensors.items()}
        updates = {
            targets[m]: LowRank(stored[f"{m}.up"], stored[f"{m}.down"], scale=SCALE, turnable=True) for m in modules
        }
        sources = {targets[m]: (f"{m}.up", f"{m}.down") for m in modules}
        return Adapter(path.name, self.name, path, file, {}, path / self.config_name, updates, sources), ()

    def subject(self, config: Config) -> Subject:
        return Subject("LoRA adapter", "a test", "", ("lora",), "", (), lambda *_: [])


def save_targets(folder: Path, shapes: Mapping[str, tuple[int, int]], seed: int = 1) -> dict[str, Tensor]:
    """An adapter of rank 2 for modules of these shapes; ΔW of each in float64."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for module, (rows, columns) in shapes.items():
        up, down = (torch.randint(-8, 9, size, generator=generator) / 8 for size in ((rows, 2), (2, columns)))
        tensors |= {f"{module}.up": up, f"{module}.down": down}
        changes[module] = SCALE * up.double() @ down.double()
    folder.mkdir()
    save_file(tensors, folder / Targets.weights_name)
    (folder / Targets.config_name).write_text("{}")
    return changes
