"""What the files of formats are called, by which adapters are recognised; all else of a format is in its own module.

That is imported when one of its adapters is met: most adapters are PEFT's, and a command that reads them need not wait for
the others.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from loratool.adapters.formats.format import Format, FormatFiles
from loratool.errors import LoratoolError
from loratool.files.folders import NUMBERED

PEFT_CONFIG = "adapter_config.json"  # which mlx-lm and torchtune write, too
RANK = re.compile(
    r"(?:mp_rank|tp_rank)_(\d{1,4})(?:_pp_rank_(\d{1,4}))?"
)  # folders of processes that saved a part each


class OneFile(FormatFiles):
    """Files of a format of which any file of weights may be one."""

    config_name = ""  # none by default

    @property
    def format(self) -> Format:
        found: Format = getattr(import_module(f"loratool.adapters.formats.{self.name}"), self.name.upper())
        return found

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".safetensors" and path.is_file() and not NUMBERED.match(path.name)


class WithSettings(OneFile):
    """Those of a trainer, with a file of settings in their folder."""

    settings: tuple[str, ...] = ()  # the files that may tell how an adapter was trained, the first one first
    models: tuple[str, ...] = ()  # those that may tell what model was trained, besides its config

    @property
    def config_names(self) -> tuple[str, ...]:
        return (*self.settings, *self.models)

    def recognises(self, path: Path) -> bool:
        if path.is_dir():
            return any((path / name).is_file() for name in self.settings) and bool(self.weights_at(path))
        return super().recognises(path)

    def weights_at(self, folder: Path) -> list[Path]:
        """The files of a folder that may hold its tensors."""
        return sorted(folder.glob("*.safetensors"))


class GgufFiles(OneFile):
    name = "gguf"
    weights_name = "adapter.gguf"
    dialects = ("gguf",)

    def recognises(self, path: Path) -> bool:
        if path.suffix == ".gguf":
            return path.is_file()
        return path.is_dir() and self.file_in(path) is not None

    def file_in(self, folder: Path) -> Path | None:
        """The one adapter among the GGUF files of a folder."""
        found = [path for path in sorted(folder.glob("*.gguf")) if is_gguf_adapter(path)]
        return found[0] if len(found) == 1 else None


class LitgptFiles(WithSettings):
    name = "litgpt"
    config_name = "hyperparameters.yaml"
    weights_name = "lit_model.lora.safetensors"
    settings = (config_name,)
    models = ("model_config.yaml",)


class LoralibFiles(WithSettings):
    name = "loralib"
    weights_name = "lora.safetensors"

    def recognises(self, path: Path) -> bool:
        return super().recognises(path) and not (path.parent / PEFT_CONFIG).exists()  # else such names are PEFT's


class MegatronFiles(WithSettings):
    name = "megatron"
    config_name = "run_config.yaml"
    weights_name = "adapter.safetensors"
    settings = (config_name, "model_config.yaml")

    def weights_at(self, folder: Path) -> list[Path]:
        return super().weights_at(folder) or paths_of_ranks(folder)


class MlxFiles(OneFile):
    name = "mlx"
    config_name = PEFT_CONFIG
    weights_name = "adapters.safetensors"
    checkpoints = "*_adapters.safetensors"  # which training leaves every so many steps: 0000100_adapters.safetensors
    dialects = ("mlx",)

    def recognises(self, path: Path) -> bool:
        if path.suffix == ".safetensors":
            return super().recognises(path)
        return (path / self.weights_name).is_file() or any(path.glob(self.checkpoints))


class TorchtuneFiles(WithSettings):
    name = "torchtune"
    config_name = PEFT_CONFIG
    weights_name = "adapter_model.safetensors"
    settings = (config_name,)
    dialects = ("torchtune",)


def is_gguf_adapter(path: Path) -> bool:
    """Whether a GGUF file says of itself that it is one; an empty one, as on the Hub, says nothing."""
    from loratool.files.gguf import KEY_OF_TYPE, read_gguf

    try:
        return path.stat().st_size > 0 and read_gguf(path).text(KEY_OF_TYPE) == "adapter"
    except (LoratoolError, OSError):
        return False


def paths_of_ranks(folder: Path) -> list[Path]:
    """The file of every rank, stage by stage in their order; none in a folder without folders of ranks."""
    found = [
        (int(match[2] or 0), int(match[1]), path) for path in folder.iterdir() if (match := RANK.fullmatch(path.name))
    ]
    return [file for _, _, path in sorted(found) for file in sorted(path.glob("*.safetensors"))]
