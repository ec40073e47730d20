"""llama.cpp's adapters: a GGUF file with `X.lora_a` (rank, in) and `X.lora_b` (out, rank) for a tensor X of the base.

α is one number for all, and the scale is α / rank; where it is 0 or missing llama.cpp multiplies by 1. Names and the order
of rows are those of the base's GGUF file, so that rows of queries and keys of some models are put back into transformers'
order, which takes the number of heads. A table of embeddings is a @ bᵀ. Facts: llama.cpp's `llama-adapter.cpp` and
`convert_lora_to_gguf.py`, 2026-11.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import Adapter, StoredTensor, unloaded
from loratool.adapters.formats.format import Config, Format, Restated
from loratool.adapters.formats.found import Found, modules_with
from loratool.adapters.formats.known import GgufFiles
from loratool.adapters.formats.rows import entry_of, of_rows
from loratool.adapters.gguf_names import ALPHA, REPOSITORY, A, B, Back, InModel, base_in, in_model, order_of
from loratool.adapters.model_settings import attention_heads
from loratool.adapters.reading import AS_STORED, Reading
from loratool.adapters.training import Training
from loratool.adapters.unsettled import WAY_OUT, Unsettled, settled
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.errors import InputError, Problem, printable
from loratool.files.gguf import KEY_OF_TYPE, GgufFile, read_gguf
from loratool.files.hub_cache import name_of
from loratool.files.safefile import FLOAT_NAMES
from loratool.layouts.gguf import ARCHITECTURES, Architecture, Rows
from loratool.notes import Note
from loratool.provenance.cards import Subject
from loratool.templates import some

if TYPE_CHECKING:
    from loratool.adapters.formats.gguf_writing import GgufNames, Model
    from loratool.adapters.layers import Kind
    from loratool.files.heads import HasNames
    from loratool.files.tensor_writer import TensorFile, Triple

NORM = "_norm.weight"
INVOCATION = "adapter.alora.invocation_tokens"
ARCHITECTURE, KIND = "general.architecture", "adapter.type"


@dataclass(frozen=True)
class Placed:
    """What becomes of factors on a model: their rows in its order."""

    target: str
    rows: Rows
    update: LowRank

    def __call__(self, config: Mapping[str, Any]) -> Mapping[str, Update]:
        heads = attention_heads(config)
        if heads is None:
            text = "llama.cpp orders these rows by heads, so the model's config is needed"
            raise ValueError(f"{text}; {WAY_OUT}")
        order, up = order_of(self.rows, heads), self.update.up
        out = up.shape[0]
        if not order.fits(out):
            raise ValueError(f"its {out} rows are not those of {order.groups} heads")
        rows = of_rows(out, unloaded(up), Back(order))
        return {self.target: LowRank(rows, self.update.down, self.update.scale, turnable=True)}


@dataclass
class Reader(Found):
    """One file on its way to an adapter."""

    architecture: Architecture = field(kw_only=True)
    trained: float = 0.0  # α, 0 for a scale of 1
    ranks: set[int] = field(default_factory=set)

    def read(self) -> None:
        """Take up every pair of factors."""
        for name in modules_with(self.file, (A, B)):
            if (pair := self.partners(name, A, B)) is None:
                continue
            found = in_model(name, self.architecture)
            if found.known:
                self.take(name, found, *pair)
            else:
                self.unsupported.append(f"{printable(name)} has no known name in transformers")

    def take(self, name: str, found: InModel, a: StoredTensor, b: StoredTensor) -> None:
        """The update of one tensor, or what is wrong with it."""
        names, shapes = (name + A, name + B), f"lora_a is {list(a.shape)}, lora_b is {list(b.shape)}"
        if odd := {a.info.dtype, b.info.dtype} - FLOAT_NAMES.keys():
            self.unsupported.append(
                f"{printable(name)} has factors in {', '.join(sorted(odd))}; convert it in f32 or f16"
            )
        elif 0 in a.shape + b.shape:
            self.refuse(name, f"{shapes}; expected factors with values")
        elif name == "token_embd.weight" and len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1]:
            self.add(found.name, LowRank(a, b.T, self.scale(a.shape[1]), table=True), names)  # type: ignore[arg-type]  # loaded later
        elif len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]:
            update = LowRank(b, a, self.scale(a.shape[0]), turnable=True)  # type: ignore[arg-type]  # the same
            if found.rows is None:
                self.add(found.name, update, names)
            else:
                self.add(found.name, Unsettled(b, a, update.scale, Placed(found.name, found.rows, update)), names)
        elif len(a.shape) == len(b.shape) == 3 and (a.shape[0], a.shape[1]) == (b.shape[0], b.shape[2]):
            layer, _, part = found.name.rpartition(".")
            for expert in range(a.shape[0]):
                up, down = entry_of(b, expert), entry_of(a, expert)
                update = LowRank(up, down, self.scale(a.shape[1]), turnable=True)  # type: ignore[arg-type]  # the same
                self.add(f"{layer}.{expert}.{part}.weight", update, names)
        else:
            self.refuse(name, f"{shapes}; expected (rank, in) and (out, rank)")

    def scale(self, rank: int) -> float:
        self.ranks.add(rank)
        return self.trained / rank if self.trained else 1.0


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
        return self.training_of(self.file_at(path), set())

    def training_of(self, file: GgufFile, ranks: Collection[int]) -> Training:
        """What the metadata tell of the training, and the ranks of its factors."""
        return Training(
            base=base_in(file.text(REPOSITORY)),
            task="CAUSAL_LM",
            rank=next(iter(ranks)) if len(ranks) == 1 else None,
            in_out=False,
        )

    def read_leniently(self, path: Path, reading: Reading = AS_STORED) -> tuple[Adapter, tuple[Problem, ...]]:
        file = self.file_at(path)
        kind = file.text(ARCHITECTURE)
        found = Reader(file, reading, [*reading.unused()], architecture=ARCHITECTURES.get(kind, Architecture("")))
        if (lora := file.text(KIND)) != "lora":
            found.unsupported.append(f"{KIND} is {printable(repr(lora))}; expected 'lora'")
        if INVOCATION in file.values:
            found.unsupported.append(f"an activated LoRA, which works only behind certain tokens ({INVOCATION})")
        if kind not in ARCHITECTURES:
            found.unsupported.append(f"architecture {printable(repr(kind))}; known: {', '.join(ARCHITECTURES)}")
        found.trained = alpha_of(file, found)
        if not found.unsupported:
            found.read()
        if norms := [name for name in file.tensors if name.endswith(NORM)]:
            text = f"whole norms are ignored, as llama.cpp ignores them: {some(norms)}"
            found.notes.append(Note("norms-ignored", text))
        adapter = Adapter(
            name=name_of(path).removesuffix(".gguf"),
            format=self.name,
            folder=file.path.parent,
            file=file,
            config={},
            config_file=file.path,
            updates=found.updates,
            sources=found.sources,
            training=self.training_of(file, found.ranks),
            unsupported=tuple(found.unsupported),
            unused=tuple(name for name in file.tensors if not name.endswith((A, B, NORM))),
            notes=tuple(found.notes),
            alone=path.is_file(),
        )
        return adapter if self.model is None else settled(adapter, self.model.config), tuple(found.problems)

    def restated(self, adapter: Adapter, factor: float) -> Restated | None:
        """The metadata under which all updates are stronger by `factor`; None where no α says that."""
        assert isinstance(adapter.file, GgufFile)
        own: Any = adapter.file.values.get(ALPHA)  # 0 or none for a scale of 1
        plain = (u.inner if isinstance(u, Unsettled) else u for u in adapter.updates.values())
        given = {u.scale * u.rank for u in plain if isinstance(u, LowRank)}
        if not own and len(given) != 1:
            return None
        return Restated({ALPHA: (own or given.pop()) * factor})

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


def alpha_of(file: GgufFile, found: Found) -> float:
    """α of all updates; 0 for a scale of 1, or where a problem was told."""
    stored: object = file.values.get(ALPHA, 0.0)
    if isinstance(stored, bool) or not isinstance(stored, (int, float)) or not math.isfinite(stored):
        found.problems.append(Problem(f"{ALPHA} is {printable(repr(stored))}; expected a number"))
        return 0.0
    given = found.reading.input_alpha
    if stored and given is not None:
        text = f"the file contains {ALPHA}, so --input-alpha {given:g} is ignored"
        found.notes.append(Note("input-alpha-not-used", text))
    if not stored and given is None:
        text = f"{ALPHA} is 0 or missing, so updates are multiplied by 1, as llama.cpp does"
        found.notes.append(Note("scale-assumed", text))
    return float(stored or given or 0.0)


GGUF = GgufAdapter()
