"""torchtune's own layout: `layers.0.attn.q_proj.lora_a.weight` (rank, in), `….lora_b.weight` (out, rank), `….magnitude`.

Beside it lies an `adapter_config.json` with r and lora_alpha; scaling is their quotient. torchtune computes rotary
positions of some models on interleaved pairs, as Meta's code does, and permutes the rows of queries and keys for
it. B and DoRA's lengths have the rows of the weight, so both are permuted back here, and permuted again where an adapter
is written, which takes the model. (torchtune's own export to PEFT leaves the lengths as they are.) Facts: torchtune 0.6.1,
`models/convert_weights.py` and the `_convert_weights.py` of other models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter, StoredTensor, unloaded
from loratool.adapters.formats import rows
from loratool.adapters.formats.format import Config, Format, Parts, Shape, Spelling, most_common
from loratool.adapters.formats.found import Found, modules_with
from loratool.adapters.formats.known import TorchtuneFiles
from loratool.adapters.formats.trainer import TrainerFormat, text_in, tidy, whole_in
from loratool.adapters.layers import Form, Kind, innermost
from loratool.adapters.model_settings import attention_heads, model_needed, model_types
from loratool.adapters.training import Training
from loratool.adapters.unsettled import WAY_OUT, Unsettled
from loratool.algebra.lowrank.products import Product
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.errors import FitError, printable
from loratool.files.heads import HasNames
from loratool.files.tensor_writer import TensorFile, Triple, tensor_file
from loratool.lazy import Tensor
from loratool.notes import Note
from loratool.templates import some

A, B, M = ".lora_a.weight", ".lora_b.weight", ".magnitude"
LAYER = re.compile(r"(?P<start>(?:decoder\.)?layers\.\d+)\.(?P<leaf>attn\.\w+|mlp\.\w+)")
NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
ROTATED = {"q_proj", "k_proj"}
# Model types by transformers' names → whether torchtune permutes the rows of queries and keys.
PERMUTED = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2"), True),
    **dict.fromkeys(("qwen2", "qwen3", "phi3"), False),
}


def heads_of(config: Mapping[str, Any]) -> dict[str, int] | None:
    """The heads of modules whose rows are permuted, by the last part of their names; None where a model does not tell."""
    known, heads = sorted(PERMUTED.keys() & model_types(config)), attention_heads(config)
    if len(known) != 1 or heads is None:
        return None
    return {"q_proj": heads.queries, "k_proj": heads.keys} if PERMUTED[known[0]] else {}


def leaf_of(module: str) -> str:
    return module.rpartition(".")[2]


@dataclass(frozen=True)
class Placed:
    """What becomes of factors of queries or keys on a model."""

    target: str
    update: LowRank | Magnitude

    def __call__(self, config: Mapping[str, Any]) -> Mapping[str, Update]:
        heads = heads_of(config)
        if heads is None:
            raise ValueError(
                "torchtune orders the rows of queries and keys by model and by heads, so the model's config is needed "
                f"(model_type {', '.join(PERMUTED)}, with its number of heads); {WAY_OUT}"
            )
        count, inner = heads.get(leaf_of(self.target.removesuffix(".weight"))), innermost(self.update)
        if count is None:
            return {self.target: self.update}
        assert isinstance(inner, LowRank)
        out, formula = inner.up.shape[0], rows.FromPairs(count)
        if out % (2 * count):
            raise ValueError(f"its {out} rows are not those of {count} heads")
        plain = replace(inner, up=rows.of_rows(out, unloaded(inner.up), formula))
        if not isinstance(self.update, Magnitude):
            return {self.target: plain}
        return {self.target: Magnitude(plain, rows.of_rows(out, unloaded(self.update.magnitude), formula))}


class Torchtune(TorchtuneFiles, TrainerFormat):
    """Adapters as torchtune trains them, before it exports them."""

    title = "torchtune"
    alpha_paths = (("lora_alpha",),)
    takes_model = True

    def __init__(self, model: Mapping[str, Any] | None = None) -> None:
        """`model` is the config of the one for which adapters are written, and read back."""
        self.model = model

    def for_model(self, config: Mapping[str, Any]) -> Torchtune:
        return Torchtune(config)

    def spelling(self, kinds: Mapping[str, Kind], release: str = "", dialect: str = "") -> TorchtuneNames:  # noqa: ARG002 (there is one)
        self.heads()
        return TorchtuneNames(self, kinds)

    @contextmanager
    def container(self, path: Path, announced: Iterable[Triple], metadata: Mapping[str, str]) -> Iterator[TensorFile]:
        with tensor_file(path, announced, metadata) as file:
            yield OrderedFile(file.path, file.descriptor, file.reserved, file.metadata, heads=self.heads())

    def heads(self) -> dict[str, int]:
        """Those of the model. Raises `InputError` where it does not tell them."""
        config = self.model or {}
        if (heads := heads_of(config)) is None:
            raise model_needed("torchtune orders the rows of queries and keys by model and by heads", PERMUTED, config)
        return heads

    def losses(self, adapter: Adapter, dialect: str = "") -> tuple[Note, ...]:  # noqa: ARG002 (there is one)
        lost = [t for t, u in adapter.updates.items() if not isinstance(innermost(u), (LowRank, Unsettled))]
        lost += adapter.bases
        return (Note("not-in-torchtune", f"torchtune stores LoRA and DoRA alone: {some(lost)}"),) if lost else ()

    def model_at(self, folder: Path, config: Config) -> Mapping[str, Any]:
        return self.model if self.model is not None else super().model_at(folder, config)

    def claims(self, file: HasNames) -> frozenset[str]:
        modules = set(modules_with(file, (A, B)))
        return frozenset(n for n in file.tensors if n.endswith((A, B)) or n.removesuffix(M) in modules)

    def training_of(self, config: Config) -> Training:
        return Training(
            base=text_in(config, "base_model_name_or_path"),
            task="CAUSAL_LM",
            rank=whole_in(config, "r"),
            zero_alpha=config.get("lora_alpha") == 0,
            in_out=False,
        )

    def take(self, found: Found, config: Config) -> None:
        alpha = found.alpha(config.get("lora_alpha"), f"lora_alpha in {self.config_name}")
        ranks: set[int] = set()
        for module in modules_with(found.file, (A, B)):
            if (pair := found.pair(module, A, B)) is None:
                continue
            down, up = pair
            if down.shape[0] != up.shape[1]:
                found.refuse(
                    module, f"lora_a has {down.shape[0]} rows and lora_b {up.shape[1]} columns; both are the rank"
                )
                continue
            ranks.add(down.shape[0])
            if (target := target_of(module)) is None:
                found.unsupported.append(f"torchtune's module {printable(module)} has no known name in transformers")
            else:
                self.place(found, module, target, down, up, alpha / down.shape[0])
        rank = whole_in(config, "r")
        if rank is not None and ranks - {rank}:
            found.refuse(
                self.config_name, f"r is {rank}, but the factors have rank {', '.join(map(str, sorted(ranks)))}"
            )

    def place(self, found: Found, module: str, target: str, down: StoredTensor, up: StoredTensor, scale: float) -> None:
        """Take up the factors of one module."""
        update: Any = LowRank(up, down, scale, turnable=True)  # type: ignore[arg-type]  # loaded later
        names = [module + A, module + B]
        lengths = found.lengths(module + M, up.shape[0])
        if lengths is not None:
            update = Magnitude(update, lengths)  # type: ignore[arg-type]  # the same
            names.append(module + M)
        if leaf_of(module) in ROTATED:
            update = Unsettled(up, down, scale, Placed(target, update), lengths)
        found.add(target, update, names)


def target_of(module: str) -> str | None:
    """The name that transformers gives the weight of a module; None where it is not known."""
    if module in ("output", "decoder.output"):
        return "lm_head.weight"
    match = LAYER.fullmatch(module)
    if match is None or match["leaf"] not in NAMES:
        return None
    return f"model.{match['start'].removeprefix('decoder.')}.{NAMES[match['leaf']]}.weight"


def module_of(target: str) -> str | None:
    """What torchtune calls the module of a weight; None for one that it has not."""
    if target == "lm_head.weight":
        return "output"
    match = re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.weight", target)
    found = [leaf for leaf, name in NAMES.items() if match and match[2] == name]
    return f"{match[1]}.{found[0]}" if match and found else None


@dataclass
class OrderedFile(TensorFile):
    """A file in which rows of some tensors are put into another order as they are written."""

    heads: Mapping[str, int] | None = None  # by the last part of a module's name

    def add(self, name: str, dtype: str, shape: tuple[int, ...], content: memoryview | bytes) -> None:
        module = name.removesuffix(B).removesuffix(M)
        count = (self.heads or {}).get(leaf_of(module))
        if count is not None and module != name and len(shape) in (1, 2):
            content = in_pairs(bytes(content), shape[0], count)
        super().add(name, dtype, shape, content)


def in_pairs(content: bytes, rows: int, heads: int) -> bytes:
    """Rows of each head from rotary positions in halves (transformers') to interleaved ones (Meta's): row i + h · width / 2
    becomes row 2i + h.
    """
    each, half = len(content) // rows, rows // heads // 2
    order = (head * 2 * half + part * half + at for head in range(heads) for at in range(half) for part in range(2))
    return b"".join(content[row * each : (row + 1) * each] for row in order)


class TorchtuneNames(Spelling):
    """Names of an adapter that is written for torchtune; `FitError` for what it has no module for."""

    reader = "torchtune"

    def __init__(self, form: Format, kinds: Mapping[str, Kind]) -> None:
        self.form, self.kinds = form, kinds
        self.modules = {target: module for target in kinds if (module := module_of(target)) is not None}
        if odd := [t for t, kind in kinds.items() if kind is not Kind.LINEAR or t not in self.modules]:
            raise FitError("torchtune cannot adapt these layers:", map(printable, odd))

    def factors(self, target: str) -> tuple[str, str]:
        return self.modules[target] + A, self.modules[target] + B

    def shapes(self, form: Form) -> tuple[Shape, Shape]:
        return (form.rank, form.columns), (form.rows, form.rank)

    def stored(self, form: Form, found: Product) -> tuple[Tensor, Tensor]:  # noqa: ARG002 (all alike)
        return found.down.contiguous(), found.up.contiguous()

    def magnitude(self, target: str) -> str:
        return self.modules[target] + M

    def describe_new(self, training: Training, parts: Parts) -> dict[str, Any]:
        rank = max(parts.ranks.values())
        return {
            "r": rank,
            "lora_alpha": tidy(rank * most_common(parts.scales.values())),
            "base_model_name_or_path": training.base or None,
        }


TORCHTUNE = Torchtune()
