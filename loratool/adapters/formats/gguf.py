"""llama.cpp's adapters: a GGUF file with `X.lora_a` (rank, in) and `X.lora_b` (out, rank) for a tensor X of the base.

α is one number for all, and the scale is α / rank; where it is 0 or missing llama.cpp multiplies by 1. Names and the order
of rows are those of the base's GGUF file, so that rows of queries and keys of some models are put back into transformers'
order, which takes the number of heads. A table of embeddings is a @ bᵀ. Facts: llama.cpp's `llama-adapter.cpp` and
`convert_lora_to_gguf.py`, 2026-11.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapters.formats.format import Config, Format, Restated
from loratool.adapters.formats.known import GgufFiles
from loratool.adapters.gguf_names import REPOSITORY, base_in
from loratool.adapters.reading import AS_STORED, Reading
from loratool.adapters.unsettled import settled
from loratool.errors import InputError, Problem, printable
from loratool.files.gguf import KEY_OF_TYPE, GgufFile, read_gguf
from loratool.provenance.cards import Subject

if TYPE_CHECKING:
    from loratool.adapters.adapter import Adapter
    from loratool.adapters.formats.gguf_writing import GgufNames, Model
    from loratool.adapters.layers import Kind
    from loratool.adapters.training import Training
    from loratool.files.heads import HasNames
    from loratool.files.tensor_writer import TensorFile, Triple
    from loratool.notes import Note


class GgufAdapter(GgufFiles, Format):
    """Adapters as llama.cpp reads them."""

    takes_model = True

    def __init__(self, model: Model | None = None) -> None:
        """`model` is the one for which adapters are written, and read back."""
        self.model = model

    def for_model(self, config: Mapping[str, Any]) -> GgufAdapter:
        """The same format, to write adapters of a model with this config; raises `InputError` for an unknown one."""
        from loratool.adapters.formats.gguf_writing import Model

        return GgufAdapter(Model.of(config))

    def spelling(self, kinds: Mapping[str, Kind], release: str = "", dialect: str = "") -> GgufNames:  # noqa: ARG002 (there is one)
        from loratool.adapters.formats.gguf_writing import GgufNames, Model

        return GgufNames(self, kinds, self.model or Model.of({}))

    def container(
        self,
        path: Path,
        announced: Iterable[Triple],  # noqa: ARG002 (the data wait for the header)
        metadata: Mapping[str, str],
    ) -> AbstractContextManager[TensorFile]:
        from loratool.adapters.formats.gguf_writing import Model
        from loratool.files.gguf_writer import gguf_tensor_file

        model = self.model or Model.of({})
        return gguf_tensor_file(path, metadata, model.values, model.order)

    def stack_of(self, target: str, config: Config) -> tuple[str, int] | None:  # noqa: ARG002 (all have one name for it)
        from loratool.adapters.formats.gguf_writing import stack_of

        return stack_of(target)

    def losses(self, adapter: Adapter, dialect: str = "") -> tuple[Note, ...]:  # noqa: ARG002 (there is one)
        from loratool.adapters.formats.gguf_writing import losses

        return losses(adapter)

    def claims(self, file: HasNames) -> frozenset[str]:
        own = file.path.suffix == ".gguf" and file.metadata.get(KEY_OF_TYPE) == "adapter"
        return frozenset(file.tensors) if own else frozenset()

    def file_at(self, path: Path) -> GgufFile:
        """The file at a place, with its header read. Raises `InputError` for one that is no adapter."""
        file = read_gguf((self.file_in(path) or path / self.weights_name) if path.is_dir() else path)
        if (kind := file.text(KEY_OF_TYPE)) != "adapter":
            told = f"{KEY_OF_TYPE} is {printable(repr(kind))}" if kind else f"it has no {KEY_OF_TYPE}"
            raise InputError(f"{printable(file.path)}: not an adapter: {told}, so it is a model")
        return file

    def training_at(self, path: Path) -> Training:
        from loratool.adapters.formats.gguf_reading import training_of

        return training_of(self.file_at(path), set())

    def read_leniently(self, path: Path, reading: Reading = AS_STORED) -> tuple[Adapter, tuple[Problem, ...]]:
        from loratool.adapters.formats.gguf_reading import adapter_in

        adapter, problems = adapter_in(self.file_at(path), path, reading, self.name)
        adapter = settled(adapter, self.model.config) if self.model is not None else adapter
        return adapter, tuple(problems)

    def restated(self, adapter: Adapter, factor: float) -> Restated | None:
        from loratool.adapters.formats.gguf_reading import restated

        return restated(adapter, factor)

    def card_config(self, folder: Path) -> Config | None:
        """What the metadata tell of the base."""
        return {REPOSITORY: self.file_at(folder).text(REPOSITORY)} if self.recognises(folder) else None

    def subject(self, config: Config) -> Subject:
        return Subject(
            title="LoRA adapter",
            trained_with="a tool for llama.cpp",
            library="",
            tags=("lora", "gguf", "llama-cpp"),
            base=base_in(str(config.get(REPOSITORY, ""))),
            ranks=(),
            snippet=lambda base, where: [],  # noqa: ARG005
        )


GGUF = GgufAdapter()
