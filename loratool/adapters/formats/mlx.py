"""mlx-lm's layout: `adapters.safetensors` beside an `adapter_config.json` that holds the arguments of its training.

Factors lie transposed, `….lora_a` (in, rank) and `….lora_b` (rank, out): ΔW = scale · (a @ b)ᵀ. Of an embedding they are
(tokens, rank) and (rank, width), ΔW = scale · a @ b. Of experts, which mlx-lm has in one `switch_mlp`, they are (experts,
rank, in) and (experts, out, rank), ΔW of each scale · b @ a. `scale` multiplies as it is: it is no α. `….m` are DoRA's
lengths of rows. With `fine_tune_type` full the file holds whole weights. Facts: mlx-lm of August 2026, and of mlx-examples
of 2024, whose `lora.py` wrote no config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter, StoredTensor, is_scale
from loratool.adapters.formats.format import Config, Format, Parts, Spelling, most_common, told_losses, uneven_dora
from loratool.adapters.formats.found import Found, modules_with
from loratool.adapters.formats.known import MlxFiles
from loratool.adapters.formats.rows import entry_of
from loratool.adapters.layers import EXPERT_LAYERS, Contents, Form, Kind, expert_place, innermost, is_expert
from loratool.adapters.model_settings import model_types
from loratool.adapters.reading import AS_STORED, Reading
from loratool.adapters.training import Training
from loratool.adapters.weight_files import weight_files
from loratool.algebra.lowrank.products import Product
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.errors import BAKE, FitError, InputError, Problem, printable
from loratool.files.heads import HasNames
from loratool.files.hub_cache import name_of
from loratool.files.safefile import FLOAT_NAMES, read_safefile
from loratool.files.untrusted import read_json
from loratool.layouts.architectures import INPUT_EMBEDDINGS
from loratool.lazy import Tensor
from loratool.notes import Note
from loratool.provenance.cards import Subject

CONFIG, WEIGHTS = MlxFiles.config_name, MlxFiles.weights_name
A, B, M = ".lora_a", ".lora_b", ".m"
EXPERT_CONTAINERS = ("switch_mlp", "experts", "switch_glu")
OLD_CONTAINER = "block_sparse_moe"  # whose experts transformers calls w1, w2 and w3
# Model types whose layers of all experts are in another container than the first.
CONTAINERS = {
    **dict.fromkeys(("llama4", "llama4_text", "dots1", "afmoe", "Klear", "gpt_oss"), "experts"),
    **dict.fromkeys(("gemma4", "gemma4_text"), "switch_glu"),
}
NO_SCALE = "pass --input-alpha, which is divided by the rank (releases that wrote no config multiplied by 20, the first ones by 2)"
AGAINST_TENSORS = "config-against-tensors"  # the code of a problem


@dataclass
class Reader(Found):
    """One file on its way to an adapter."""

    scale: float | None = None  # None where α alone is known

    def read(self) -> None:
        """Take up every tensor of a file of factors."""
        for module in modules_with(self.file, (A, B)):
            self.told.add(module + M)
            self.take(module)

    def check_lengths(self, kind: object) -> None:
        """Find modules without DoRA's lengths where others have them, or all should by the `fine_tune_type`.

        mlx-lm takes the lengths of the base's rows for those that it does not find, and leaves out those that it does
        not expect, without a word.
        """
        lengths = [target for target, update in self.updates.items() if isinstance(update, Magnitude)]
        plain = [target for target, update in self.updates.items() if not isinstance(update, Magnitude)]
        if kind == "lora" and lengths:
            what = "exists, but fine_tune_type is lora, for which mlx-lm ignores it"
            odd = [(self.sources[target][-1], what) for target in lengths]
        elif lengths or kind == "dora":
            why = "fine_tune_type is dora" if kind == "dora" else f"{printable(self.sources[lengths[0]][-1])} exists"
            names = dict.fromkeys(self.sources[target][0].removesuffix(A) + M for target in plain)
            odd = [(name, f"is missing, although {why}") for name in names]
        else:
            odd = []
        self.problems += [Problem(f"{printable(name)} {what}", AGAINST_TENSORS) for name, what in odd]

    def read_whole(self) -> None:
        """Take up every tensor of a file of whole weights."""
        for name in self.file.tensors:
            stored, experts = self.stored(name), experts_of(name.removesuffix(".weight"))
            if stored.info.dtype not in FLOAT_NAMES or 0 in stored.shape:
                self.refuse(name, f"is {stored.info.dtype} {list(stored.shape)}; expected floats")
            elif experts and name.endswith(".weight") and len(stored.shape) == 3:
                for at in range(stored.shape[0]):
                    self.add(experts(at), Replace(entry_of(stored, at)), [name])  # type: ignore[arg-type]  # loaded later
            else:
                self.add(name, Replace(stored), [name])  # type: ignore[arg-type]  # the same

    def take(self, module: str) -> None:
        """The update of one module, or what is wrong with it."""
        if (pair := self.partners(module, A, B)) is None:
            return
        a, b = pair
        shapes = f"lora_a is {list(a.shape)}, lora_b is {list(b.shape)}"
        if {a.info.dtype, b.info.dtype} - FLOAT_NAMES.keys():
            self.refuse(module, f"stored as {a.info.dtype} and {b.info.dtype}; expected floats")
        elif len(a.shape) == len(b.shape) == 3:
            self.take_experts(module, a, b)
        elif len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or 0 in a.shape + b.shape:
            self.refuse(module, f"{shapes}; expected (in, rank) and (rank, out)")
        else:
            self.take_layer(module, a, b)

    def take_layer(self, module: str, a: StoredTensor, b: StoredTensor) -> None:
        up, down, table = (a, b, True) if is_embedding(module) else (b.T, a.T, False)
        # tensors in a file have a shape and are loaded later
        update: Update = LowRank(up, down, self.scale_at(a.shape[1]), turnable=not table, table=table)  # type: ignore[arg-type]
        names = [module + A, module + B]
        if module + M in self.file.tensors:
            lengths = self.stored(module + M)
            if lengths.shape != update.shape[:1] or lengths.info.dtype not in FLOAT_NAMES:
                found = f"is {lengths.info.dtype} {list(lengths.shape)}"
                self.refuse(module + M, f"{found}; expected {update.shape[0]} values that are floats")
                return
            update = Magnitude(update, lengths)  # type: ignore[arg-type]
            names.append(module + M)
        self.add(f"{module}.weight", update, names)

    def take_experts(self, module: str, a: StoredTensor, b: StoredTensor) -> None:
        """The update of each expert's layer."""
        experts = experts_of(module)
        if a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2] or 0 in a.shape + b.shape:
            shapes = f"lora_a is {list(a.shape)}, lora_b is {list(b.shape)}"
            self.refuse(module, f"{shapes}; expected (experts, rank, in) and (experts, out, rank)")
        elif experts is None or module + M in self.file.tensors:
            what = "DoRA on experts" if experts else "factors of experts on a module that is not known to have any"
            self.unsupported.append(f"{what} ({printable(module)}); fuse it with mlx_lm.fuse")
        else:
            for at in range(a.shape[0]):
                up, down = entry_of(b, at), entry_of(a, at)
                update = LowRank(up, down, self.scale_at(a.shape[1]), turnable=True)  # type: ignore[arg-type]  # loaded later
                self.add(experts(at), update, [module + A, module + B])

    def scale_at(self, rank: int) -> float:
        """What multiplies the product of factors of a rank."""
        return (self.reading.input_alpha or 0.0) / rank if self.scale is None else self.scale


def experts_of(module: str) -> Callable[[int], str] | None:
    """What transformers calls the weight of an expert, by its number, of a layer of all experts; None for any other.

    `….mlp.switch_mlp.up_proj` is `….mlp.experts.3.up_proj.weight`, and in Mixtral's `block_sparse_moe` `….experts.3.w3.weight`.
    """
    container, _, leaf = module.rpartition(".")
    outer, _, last = container.rpartition(".")
    if last not in EXPERT_CONTAINERS or leaf not in EXPERT_LAYERS:
        return None
    called = EXPERT_LAYERS[leaf] if outer.endswith(OLD_CONTAINER) else leaf
    return lambda number: f"{outer}.experts.{number}.{called}.weight"


def is_embedding(module: str) -> bool:
    """Whether a module is a table of vectors, which only its name tells."""
    return module.rpartition(".")[2] in INPUT_EMBEDDINGS


def scale_of(config: Mapping[str, Any], given: float | None, notes: list[Note]) -> float | None:
    """What multiplies a @ b; None where it takes the α that is `given`. Raises `InputError` where it is no number."""
    table = config.get("lora_parameters")
    parameters = table if isinstance(table, Mapping) else {}
    numbers = {name: parameters[name] for name in ("scale", "alpha", "rank") if parameters.get(name) is not None}
    if bad := [name for name, value in numbers.items() if not is_scale(value)]:
        shown = printable(repr(numbers[bad[0]]))
        raise InputError(f"{CONFIG}: {bad[0]} of lora_parameters is {shown}; expected a finite number")
    if "scale" not in numbers and given is not None:
        return None
    if "scale" not in numbers:
        raise InputError(
            f"{CONFIG}: lora_parameters has no scale, the factor its updates are multiplied by; {NO_SCALE}"
        )
    if given is not None:
        text = f"its config contains the scale, so --input-alpha {given:g} is ignored"
        notes.append(Note("input-alpha-not-used", text))
    scale = float(numbers["scale"])
    if "alpha" not in numbers:
        return scale
    if "fine_tune_type" in config or not numbers.get("rank"):
        notes.append(
            Note("alpha-not-used", f"alpha {numbers['alpha']:g} is ignored: mlx-lm multiplies by scale {scale:g}")
        )
        return scale
    found = scale * numbers["alpha"] / numbers["rank"]
    text = (
        "the config is of an mlx-lm release without fine_tune_type, which multiplied by scale · alpha / "
        f"rank: {found:g}"
    )
    notes.append(Note("alpha-used", text))
    return float(found)


def config_beside(file: Path) -> dict[str, Any]:
    """The config in the folder of a file; empty where there is none."""
    path = file.parent / CONFIG
    return read_json(path, lenient=True) if path.is_file() else {}


def is_full(config: Mapping[str, Any]) -> bool:
    """Whether whole weights were trained."""
    return config.get("fine_tune_type") == "full"


def weights_in(folder: Path, notes: list[Note]) -> Path:
    """The weights in a folder: the last ones, or those of the only checkpoint."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    found = sorted(folder.glob(MlxFiles.checkpoints))
    if len(found) != 1:
        names = ", ".join(printable(path.name) for path in found)
        raise InputError(f"{printable(folder)}: {WEIGHTS} is missing; pass the path of a checkpoint ({names})")
    notes.append(Note("other-name", f"its weights were read from {printable(found[0].name)}; mlx-lm reads {WEIGHTS}"))
    return found[0]


def training_of(config: Mapping[str, Any]) -> Training:
    """What a config says of the training."""
    table, base = config.get("lora_parameters"), config.get("model")
    parameters = table if isinstance(table, Mapping) else {}
    rank, dropout = parameters.get("rank"), parameters.get("dropout")
    return Training(
        base=base if isinstance(base, str) else "",
        task="CAUSAL_LM",
        rank=rank if isinstance(rank, int) else None,
        dora=config.get("fine_tune_type") == "dora" or config.get("use_dora") is True,
        dropout=float(dropout) if isinstance(dropout, (int, float)) else 0.0,
        zero_alpha=parameters.get("scale") == 0,
        in_out=False,
    )


class Mlx(MlxFiles, Format):
    """Adapters as mlx-lm saves them."""

    def claims(self, file: HasNames) -> frozenset[str]:
        names = file.tensors
        if file.path.name.endswith(WEIGHTS) and is_full(config_beside(file.path)):
            return frozenset(names)
        modules = {name.removesuffix(slot) for slot in (A, B) for name in names if name.endswith(slot)}
        return frozenset(name for name in names if name.removesuffix(M).removesuffix(A).removesuffix(B) in modules)

    def is_config(self, config: Mapping[str, Any]) -> bool:
        return "lora_parameters" in config

    def training_at(self, path: Path) -> Training:
        return training_of(config_beside(path / WEIGHTS if path.is_dir() else path))

    def read_leniently(self, path: Path, reading: Reading = AS_STORED) -> tuple[Adapter, tuple[Problem, ...]]:
        folder = path if path.is_dir() else path.parent
        notes = list(reading.unused())
        file = read_safefile(weights_in(path, notes) if path.is_dir() else path)
        found = Reader(file, reading, notes)
        config, there = config_beside(file.path), (folder / CONFIG).is_file()
        if not there and reading.input_alpha is None:
            raise InputError(f"{printable(folder / CONFIG)} is missing, so the scale is unknown; {NO_SCALE}")
        if is_full(config):
            found.read_whole()
        else:
            found.scale = scale_of(config, reading.input_alpha, notes)
            found.read()
            found.check_lengths("dora" if config.get("use_dora") is True else config.get("fine_tune_type"))
        alone = path.is_file() and path.name != WEIGHTS
        return Adapter(
            name=name_of(folder),
            format=self.name,
            folder=folder,
            file=file,
            config=config,
            config_file=folder / CONFIG if there else file.path,
            updates=found.updates,
            sources=found.sources,
            training=training_of(config),
            unsupported=tuple(found.unsupported),
            unused=tuple(found.left_over()),
            notes=tuple(notes),
            beside=() if alone else weight_files(folder, file, {file.path.name}),
            alone=alone,
        ), tuple(found.problems)

    def subject(self, config: Config) -> Subject:
        training = training_of(config)
        return Subject(
            title="LoRA adapter",
            trained_with="mlx-lm",
            library="mlx",
            tags=("lora", "mlx"),
            base=training.base,
            ranks=(training.rank,) if training.rank else (),
            snippet=lambda base, where: [
                "from mlx_lm import load",
                "",
                f"model, tokenizer = load({json.dumps(printable(base))}, adapter_path={where})",
            ],
        )

    def spelling(self, kinds: Mapping[str, Kind], release: str = "", dialect: str = "") -> MlxNames:  # noqa: ARG002 (all read the same)
        return MlxNames(self, kinds)

    def stack_of(self, target: str, config: Config) -> tuple[str, int] | None:
        if (place := expert_place(target)) is None:
            return None
        start, number, leaf = place
        containers = (CONTAINERS[kind] for kind in sorted(model_types(config)) if kind in CONTAINERS)
        return f"{start}.{next(containers, EXPERT_CONTAINERS[0])}.{leaf}.weight", number

    def losses(self, adapter: Adapter, dialect: str = "") -> tuple[Note, ...]:  # noqa: ARG002 (there is one)
        return (
            *told_losses(adapter, "not-in-mlx", "mlx-lm cannot store", unspeakable),
            *uneven_dora(adapter, "mlx-lm"),
        )

    def rank_notes(self, own: Mapping[str, int], ranks: Mapping[str, int]) -> Iterator[Note]:
        if filled := [target for target in ranks if own.get(target, 0) < ranks[target]]:
            yield Note(
                "one-rank", f"{len(filled)} layers are padded with zeros, because mlx-lm uses one rank for all layers"
            )

    def rescaled(self, contents: Contents, factors: Mapping[str, float | None], one_alpha: bool) -> dict[str, Any]:  # noqa: ARG002
        scales = {(factor or 1.0) * contents.layers[target].scale for target, factor in factors.items()}
        if max(scales) - min(scales) > 1e-9 * abs(max(scales, key=abs)):
            raise InputError(
                "mlx-lm uses one scale for all modules, but these need several; pass --bake to multiply them into the factors",
                hint=BAKE,
            )
        parameters = {**contents.adapter.config["lora_parameters"], "scale": scales.pop()}
        parameters.pop("alpha", None)  # which multiplied too, in early releases
        return {**contents.adapter.config, "lora_parameters": parameters}


def unspeakable(target: str, update: Update) -> str:
    """What of an update the layout cannot hold, in words; empty where it holds all of it."""
    match update:
        case Magnitude() if is_expert(target):
            return "DoRA of experts"
        case Magnitude(inner=LowRank(kernel=()), by_column=True):
            return "DoRA of columns"
    match innermost(update):
        case LowRank(kernel=()) | ExpertFactors():
            return ""
        case LowRank():
            return "convolution factors"
        case Add():
            return "factor biases"
        case Replace():
            return "tensors saved whole"
        case ReplaceRows():
            return "token rows"
    return "updates other than a product of two factors"


MLX = Mlx()


class MlxNames(Spelling):
    """Names and layouts of an adapter that is written for mlx-lm; `FitError` for what it has no place for."""

    reader = "mlx-lm"

    def __init__(self, form: Mlx, kinds: Mapping[str, Kind]) -> None:
        self.form, self.kinds = form, kinds
        unnamed = {t for t, kind in kinds.items() if kind is Kind.PARAMETER and self.read_as(t) is None}
        if odd := [t for t, kind in kinds.items() if kind is Kind.CONVOLUTION or is_expert(t) or t in unnamed]:
            raise FitError("mlx-lm cannot adapt these layers:", map(printable, odd))

    def factors(self, target: str) -> tuple[str, str]:
        module = target.removesuffix(".weight")
        return module + A, module + B

    def shapes(self, form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if form.kind is Kind.PARAMETER:
            return (form.experts, form.rank, form.columns), (form.experts, form.rows, form.rank)
        first, last = (form.rows, form.columns) if form.kind is Kind.EMBEDDING else (form.columns, form.rows)
        return (first, form.rank), (form.rank, last)

    def stored(self, form: Form, found: Product) -> tuple[Tensor, Tensor]:
        if form.kind is Kind.PARAMETER:
            return found.down.contiguous(), found.up.contiguous()
        a, b = (found.up, found.down) if form.kind is Kind.EMBEDDING else (found.down.T, found.up.T)
        return a.contiguous(), b.contiguous()

    def magnitude(self, target: str) -> str:
        return target.removesuffix(".weight") + M

    def read_as(self, target: str) -> Callable[[int], str] | None:
        return experts_of(target.removesuffix(".weight")) if self.kinds[target] is Kind.PARAMETER else None

    def describe_new(self, training: Training, parts: Parts) -> dict[str, Any]:
        return {
            "fine_tune_type": "dora" if parts.dora else "lora",
            "lora_parameters": {
                "dropout": 0.0,
                "keys": sorted({inside_layer(target) for target in self.kinds}),
                "rank": max(parts.ranks.values()),
                "scale": most_common(parts.scales.values()),
            },
            "model": training.base,
            "num_layers": -1,  # all of them; a factor that is not in the file is zero
        }


def inside_layer(target: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `self_attn.q_proj`: how mlx-lm names what it adapts."""
    parts = target.removesuffix(".weight").split(".")
    last = max((at for at, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])
