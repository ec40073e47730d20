"""llama.cpp's adapters: a GGUF file with `X.lora_a` (rank, in) and `X.lora_b` (out, rank) for a tensor X of the base.

α is one number for all, and the scale is α / rank; where it is 0 or missing llama.cpp multiplies by 1. Names and the order
of rows are those of the base's GGUF file, so that rows of queries and keys of some models are put back into transformers'
order, which takes the number of heads. A table of embeddings is a @ bᵀ. Facts: llama.cpp's `llama-adapter.cpp` and
`convert_lora_to_gguf.py`, 2026-11.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter, StoredTensor
from loratool.adapters.formats.format import Config, Format, Restated
from loratool.adapters.formats.gguf_writing import GgufNames, Model, losses, stack_of
from loratool.adapters.formats.rows import derived, entry_of
from loratool.adapters.gguf_names import Back, InModel, in_model, order_of
from loratool.adapters.layers import Kind
from loratool.adapters.model_settings import attention_heads
from loratool.adapters.reading import AS_STORED, Reading
from loratool.adapters.training import Training
from loratool.adapters.unsettled import WAY_OUT, Unsettled, settled
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.data import dataclass
from loratool.errors import InputError, LoratoolError, Problem, printable
from loratool.files.gguf import KEY_OF_TYPE, GgufFile, read_gguf
from loratool.files.gguf_writer import gguf_tensor_file
from loratool.files.heads import HasNames
from loratool.files.hub_cache import name_of
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.tensor_writer import TensorFile, Triple
from loratool.layouts.gguf import ARCHITECTURES, Architecture, Rows
from loratool.notes import Note
from loratool.provenance.cards import Subject
from loratool.results.repairs import some

A, B = ".lora_a", ".lora_b"
NORM = "_norm.weight"
ALPHA, INVOCATION = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
ARCHITECTURE, KIND = "general.architecture", "adapter.type"
REPOSITORY = "general.base_model.0.repo_url"
HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Placed:
    """What becomes of factors on a model: their rows in its order."""

    target: str
    rows: Rows
    update: LowRank

    def __call__(self, config: Mapping[str, Any]) -> Mapping[str, Update]:
        heads = attention_heads(config)
        if heads is None:
            text = "llama.cpp orders these rows by heads, whose number takes the model's config"
            raise ValueError(f"{text}; {WAY_OUT}")
        order, up = order_of(self.rows, heads), self.update.up
        out = up.shape[0]
        if not order.fits(out):
            raise ValueError(f"its {out} rows are not those of {order.groups} heads")
        rows: Any = up
        return {
            self.target: LowRank(derived(out, rows, Back(order)), self.update.down, self.update.scale, turnable=True)
        }


@dataclass
class Reader:
    """One file on its way to an adapter."""

    file: GgufFile
    architecture: Architecture
    alpha: float  # 0 for a scale of 1
    updates: dict[str, Update] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ranks: set[int] = field(default_factory=set)

    def read(self) -> None:
        """Take up every pair of factors."""
        names = dict.fromkeys(name[: -len(A)] for name in self.file.tensors if name.endswith((A, B)))
        for name in sorted(names):
            if missing := [name + slot for slot in (A, B) if name + slot not in self.file.tensors]:
                text = f"{printable(name)}: {printable(missing[0])} is missing"
                self.problems.append(Problem(text, "missing-partner"))
                continue
            found = in_model(name, self.architecture)
            if not found.known:
                self.unsupported.append(f"{printable(name)} has no known name in transformers")
                continue
            self.take(name, found, *(StoredTensor(self.file, self.file.tensors[name + slot]) for slot in (A, B)))

    def take(self, name: str, found: InModel, a: StoredTensor, b: StoredTensor) -> None:
        """The update of one tensor, or what is wrong with it."""
        shapes = f"lora_a is {list(a.shape)}, lora_b is {list(b.shape)}"
        if odd := {a.info.dtype, b.info.dtype} - FLOAT_NAMES.keys():
            self.unsupported.append(
                f"{printable(name)} has factors in {', '.join(sorted(odd))}; convert it in f32 or f16"
            )
        elif 0 in a.shape + b.shape:
            self.problems.append(Problem(f"{printable(name)}: {shapes}; expected factors with values"))
        elif name == "token_embd.weight" and len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1]:
            update = LowRank(a, b.T, self.scale(a.shape[1]), table=True)  # type: ignore[arg-type]  # loaded later
            self.add(found.name, update, name)
        elif len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]:
            self.take_matrix(name, found, a, b)
        elif len(a.shape) == len(b.shape) == 3 and (a.shape[0], a.shape[1]) == (b.shape[0], b.shape[2]):
            for expert in range(a.shape[0]):
                layer, _, part = found.name.rpartition(".")
                up, down = entry_of(b, expert), entry_of(a, expert)
                update = LowRank(up, down, self.scale(a.shape[1]), turnable=True)  # type: ignore[arg-type]  # the same
                self.add(f"{layer}.{expert}.{part}.weight", update, name)
        else:
            self.problems.append(Problem(f"{printable(name)}: {shapes}; expected (rank, in) and (out, rank)"))

    def take_matrix(self, name: str, found: InModel, a: StoredTensor, b: StoredTensor) -> None:
        scale = self.scale(a.shape[0])
        update = LowRank(b, a, scale, turnable=True)  # type: ignore[arg-type]  # loaded later
        if found.rows is None:
            self.add(found.name, update, name)
        else:
            self.add(found.name, Unsettled(b, a, scale, Placed(found.name, found.rows, update)), name)

    def scale(self, rank: int) -> float:
        self.ranks.add(rank)
        return self.alpha / rank if self.alpha else 1.0

    def add(self, target: str, update: Update, name: str) -> None:
        self.updates[target] = update
        self.sources[target] = (name + A, name + B)


class GgufAdapter(Format):
    """Adapters as llama.cpp reads them."""

    name = "gguf"
    config_name = ""  # there is none
    weights_name = "adapter.gguf"
    dialects = ("gguf",)

    def __init__(self, model: Model | None = None) -> None:
        """`model` is the one for which adapters are written, and read back."""
        self.model = model

    def for_model(self, config: Mapping[str, Any]) -> GgufAdapter:
        """The same format, to write adapters of a model with this config; raises `InputError` for an unknown one."""
        return GgufAdapter(Model.of(config))

    def spelling(self, kinds: Mapping[str, Kind], release: str = "", dialect: str = "") -> GgufNames:  # noqa: ARG002 (there is one)
        return GgufNames(self, kinds, self.model or Model.of({}))

    def container(
        self,
        path: Path,
        announced: Iterable[Triple],  # noqa: ARG002 (the data wait for the header)
        metadata: Mapping[str, str],
    ) -> AbstractContextManager[TensorFile]:
        model = self.model or Model.of({})
        return gguf_tensor_file(path, metadata, model.values, model.order)

    def stack_of(self, target: str, config: Config) -> tuple[str, int] | None:  # noqa: ARG002 (all have one name for it)
        return stack_of(target)

    def losses(self, adapter: Adapter, dialect: str = "") -> tuple[Note, ...]:  # noqa: ARG002 (there is one)
        return losses(adapter)

    def recognises(self, path: Path) -> bool:
        if path.suffix == ".gguf":
            return path.is_file()
        return path.is_dir() and self.file_in(path) is not None

    def file_in(self, folder: Path) -> Path | None:
        """The one adapter among the GGUF files of a folder."""
        found = [path for path in sorted(folder.glob("*.gguf")) if is_adapter(path)]
        return found[0] if len(found) == 1 else None

    def claims(self, file: HasNames) -> frozenset[str]:
        own = file.path.suffix == ".gguf" and file.metadata.get(KEY_OF_TYPE) == "adapter"
        return frozenset(file.tensors) if own else frozenset()

    def is_config(self, config: Config) -> bool:  # noqa: ARG002 (there is none)
        return False

    def file_at(self, path: Path) -> GgufFile:
        """The file at a place, with its header read. Raises `InputError` for one that is no adapter."""
        file = read_gguf((self.file_in(path) or path / self.weights_name) if path.is_dir() else path)
        if (kind := file.text(KEY_OF_TYPE)) != "adapter":
            told = f"{KEY_OF_TYPE} is {printable(repr(kind))}" if kind else f"it has no {KEY_OF_TYPE}"
            raise InputError(f"{printable(file.path)}: not an adapter: {told}, so it is a model")
        return file

    def training_at(self, path: Path) -> Training:
        return training_of(self.file_at(path), set())

    def needed(self, location: Path) -> tuple[list[str], list[str]]:
        return [(self.file_in(location) or Path(self.weights_name)).name], []

    def read_leniently(self, path: Path, reading: Reading = AS_STORED) -> tuple[Adapter, tuple[Problem, ...]]:
        file = self.file_at(path)
        kind = file.text(ARCHITECTURE)
        notes, unsupported = list(reading.unused_name()), list[str]()
        if (lora := file.text(KIND)) != "lora":
            unsupported.append(f"{KIND} is {printable(repr(lora))}; expected 'lora'")
        if INVOCATION in file.values:
            unsupported.append(f"an activated LoRA, which works only behind certain tokens ({INVOCATION})")
        if kind not in ARCHITECTURES:
            unsupported.append(f"architecture {printable(repr(kind))}; known: {', '.join(ARCHITECTURES)}")
        alpha, problems = alpha_of(file, reading, notes)
        found = Reader(file, ARCHITECTURES.get(kind, Architecture("")), alpha)
        if not unsupported:
            found.read()
        norms = [name for name in file.tensors if name.endswith(NORM)]
        if norms:
            notes.append(Note("norms-ignored", f"whole norms are ignored, as llama.cpp ignores them: {some(norms)}"))
        adapter = Adapter(
            name=name_of(path).removesuffix(".gguf"),
            format=self.name,
            folder=file.path.parent,
            file=file,
            config={},
            config_file=file.path,
            updates=found.updates,
            sources=found.sources,
            training=training_of(file, found.ranks),
            unsupported=(*unsupported, *found.unsupported),
            unused=tuple(name for name in file.tensors if not name.endswith((A, B, NORM))),
            notes=tuple(notes),
            alone=path.is_file(),
        )
        adapter = settled(adapter, self.model.config) if self.model is not None else adapter
        return adapter, (*problems, *found.problems)

    def restated(self, adapter: Adapter, factor: float) -> Restated | None:
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
        place = str(config.get(REPOSITORY, ""))
        return Subject(
            title="LoRA adapter",
            trained_with="a tool for llama.cpp",
            library="",
            tags=("lora", "gguf", "llama-cpp"),
            base=place.removeprefix(HUB) if place.startswith(HUB) else "",
            ranks=(),
            snippet=lambda base, where: [],  # noqa: ARG005
        )


def alpha_of(file: GgufFile, reading: Reading, notes: list[Note]) -> tuple[float, list[Problem]]:
    """α of all updates, 0 for a scale of 1; and what is wrong with it."""
    stored: object = file.values.get(ALPHA, 0.0)
    if isinstance(stored, bool) or not isinstance(stored, (int, float)) or not math.isfinite(stored):
        return 0.0, [Problem(f"{ALPHA} is {printable(repr(stored))}; expected a number")]
    given = reading.input_alpha
    if stored and given is not None:
        text = f"the file contains {ALPHA}, so --input-alpha {given:g} is ignored"
        notes.append(Note("input-alpha-not-used", text))
    if stored or given is not None:
        return float(stored or given or 0.0), []
    notes.append(Note("scale-assumed", f"{ALPHA} is 0 or missing, so updates are multiplied by 1, as llama.cpp does"))
    return 0.0, []


def training_of(file: GgufFile, ranks: set[int]) -> Training:
    """What the metadata tell of the training."""
    place = file.text(REPOSITORY)
    return Training(
        base=place.removeprefix(HUB) if place.startswith(HUB) else "",
        task="CAUSAL_LM",
        rank=next(iter(ranks)) if len(ranks) == 1 else None,
        in_out=False,
    )


def is_adapter(path: Path) -> bool:
    """Whether a file says of itself that it is one; an empty one, as on the Hub, says nothing."""
    try:
        return path.stat().st_size > 0 and read_gguf(path).text(KEY_OF_TYPE) == "adapter"
    except (LoratoolError, OSError):
        return False


GGUF = GgufAdapter()
