"""llama.cpp's adapters on their way from a GGUF file to an `Adapter`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter, StoredTensor, unloaded
from loratool.adapters.formats.format import Restated
from loratool.adapters.formats.rows import entry_of, of_rows
from loratool.adapters.gguf_names import Back, InModel, in_model, order_of
from loratool.adapters.model_settings import attention_heads
from loratool.adapters.reading import Reading
from loratool.adapters.training import Training
from loratool.adapters.unsettled import WAY_OUT, Unsettled
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.errors import Problem, printable
from loratool.files.gguf import GgufFile
from loratool.files.hub_cache import name_of
from loratool.files.safefile import FLOAT_NAMES
from loratool.layouts.gguf import ARCHITECTURES, Architecture, Rows
from loratool.notes import Note
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
        rows = of_rows(out, unloaded(up), Back(order))
        return {self.target: LowRank(rows, self.update.down, self.update.scale, turnable=True)}


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


def adapter_in(file: GgufFile, path: Path, reading: Reading, form: str) -> tuple[Adapter, list[Problem]]:
    """The adapter of a file, which is at `path`, with all that is wrong with it; `form` is the format's name."""
    kind = file.text(ARCHITECTURE)
    notes, unsupported = list(reading.unused()), list[str]()
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
        format=form,
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
    return adapter, [*problems, *found.problems]


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


def restated(adapter: Adapter, factor: float) -> Restated | None:
    """The metadata under which all updates are stronger by `factor`; None where no α says that."""
    assert isinstance(adapter.file, GgufFile)
    own: Any = adapter.file.values.get(ALPHA)  # 0 or none for a scale of 1
    plain = (u.inner if isinstance(u, Unsettled) else u for u in adapter.updates.values())
    given = {u.scale * u.rank for u in plain if isinstance(u, LowRank)}
    if not own and len(given) != 1:
        return None
    return Restated({ALPHA: (own or given.pop()) * factor})
