"""An adapter on its way to its folder: weights as they come, then config, side files and provenance."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import FACTOR_NAMES, Flattened, StoredTensor, stored_tensors, unloaded
from loratool.adapters.formats import NAMED, WRITTEN, format_of, replaceable
from loratool.adapters.formats.format import Format, Parts, Restated, Scaled, Spelling
from loratool.adapters.layers import Contents, Form, Layer
from loratool.adapters.told import as_input
from loratool.adapters.weight_files import MODEL_CONFIG, fates, module_files
from loratool.algebra.lowrank.products import Product
from loratool.algebra.rounding import round_once
from loratool.arguments import PathLike
from loratool.errors import FitError, InputError, UsageError, printable
from loratool.files.digests import recorded
from loratool.files.folders import CARD, PROVENANCE, leaves, sort_side_files
from loratool.files.gguf import GgufFile
from loratool.files.gguf_writer import copy_with_values
from loratool.files.journal import Journal
from loratool.files.model_files import RECORD_KEY
from loratool.files.outputs import as_json, check_target
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.staging import Stage, clearing_spent, staged
from loratool.files.system import shell_word
from loratool.files.tensor_writer import TensorFile, Triple, tensor_file
from loratool.lazy import Tensor, torch
from loratool.notes import Note
from loratool.options.described import dtypes, option
from loratool.options.writing import WritingOptions
from loratool.provenance.cards import card, is_nobodys, terms_of
from loratool.provenance.record import versions
from loratool.results.text import one_of

SPELLED = {name: dtype for dtype, name in {**FACTOR_NAMES, "I64": "int64"}.items()}  # float32 → F32
SLACK = 1 << 16  # bytes of metadata that a copy may have besides
WIDTH = {"F64": 4, "F32": 3, "BF16": 2, "F16": 1}
EIGHT_BITS = {"F8_E4M3": "BF16", "F8_E5M2": "BF16"}  # which holds all that they do


@dataclass(frozen=True, kw_only=True)
class FactorOptions(WritingOptions):
    """Of a command that writes factors."""

    dtype: str = option(
        help="Dtype of the factors.", default="keep", kind=dtypes("keep", "float32", "bfloat16", "float16")
    )


@dataclass
class Carried:
    """Tensors beside the factors, which are written as they are: name → where they lie, or their values."""

    tensors: dict[str, StoredTensor | Tensor] = field(default_factory=dict)
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)  # target → rows, in the order they are stored

    def announced(self) -> Iterator[Triple]:
        for name, tensor in self.tensors.items():
            if isinstance(tensor, StoredTensor):
                yield name, tensor.info.dtype, tensor.info.shape
            else:
                yield name, dtype_name(tensor), tuple(tensor.shape)


@dataclass(frozen=True)
class Rounded:
    """The factors of a layer in the dtype they are stored in."""

    target: str
    factors: Product
    read_back: Product  # what they mean to whoever reads them, in float64

    @property
    def rank(self) -> int:
        return self.factors.rank


@dataclass(frozen=True)
class Copied:
    """The factors of a layer that are written as they lie in another file, byte for byte."""

    target: str
    rank: int
    stored: tuple[StoredTensor, StoredTensor]  # A and B, row by row


@dataclass
class Output:
    """The weights of an adapter that is being written; without a file, those of one that would be."""

    file: TensorFile | None
    stage: Stage | None
    names: Spelling
    forms: Mapping[str, Form]
    dtype: str  # of the factors, as torch calls it
    scales: Mapping[str, float] = field(default_factory=dict)  # what the output says multiplies factors, where not 1
    ranks: dict[str, int] = field(default_factory=dict)  # of the layers that were written

    def rounded(self, target: str, found: Product) -> Rounded:
        """The factors of a layer as they will be stored; raises `FitError` where the dtype cannot hold them."""
        factor = 1 / self.names.times(target)
        factors = found.scaled(factor).to(getattr(torch, self.dtype))
        if not factors.is_finite:
            raise FitError(f"{printable(target)}: the factors overflow {self.dtype}; pass another --dtype")
        return Rounded(target, factors, factors.to(torch.float64).scaled(1 / factor))

    def add(self, found: Rounded | Copied) -> None:
        """Write the factors of a layer, and what says their scale where a tensor does."""
        self.ranks[found.target] = found.rank
        if self.file is None:
            return
        for name, number in self.names.strengths(Parts({found.target: found.rank}, self.scales)).items():
            self.file.add(name, "F32", (), as_float32(number))
        form, names = self.forms[found.target], self.names.factors(found.target)
        if isinstance(found, Copied):
            for name, stored, shape in zip(names, found.stored, self.names.shapes(form), strict=True):
                self.file.copy(name, stored.file, replace(stored.info, shape=shape))
            return
        for name, tensor in zip(names, self.names.stored(form, found.factors), strict=True):
            append(self.file, name, tensor)

    def carry(self, carried: Carried) -> None:
        """Write what stands beside the factors."""
        if self.file is not None:
            for name, tensor in carried.tensors.items():
                append(self.file, name, tensor)

    def tell(self, header: Mapping[str, str]) -> None:
        """Write into the header of the file of tensors what is known now."""
        if self.file is not None:
            self.file.metadata = {**self.file.metadata, **header}

    def complete(self, config: Mapping[str, Any]) -> Path | None:
        """Finish the weights and write the config, after which the adapter can be read from this place."""
        if self.stage is None or self.file is None:
            return None
        self.file.finish()
        if not self.stage.single:  # of a single file no record tells a digest
            self.stage.add(self.names.form.weights_name)
        if (name := self.names.form.config_name) and not self.stage.single:
            self.stage.write(name, as_json(config))
        return self.stage.folder / (self.names.form.weights_name if self.stage.single else "")

    def finish(
        self,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        beside: Mapping[str, Path],
        inputs: Sequence[Path],
    ) -> None:
        """Write everything else; `beside` are files to copy, by name, `inputs` the folders with cards."""
        if self.stage is not None:
            finish(self.stage, self.names.form, config, provenance, beside, inputs)


def finish(
    stage: Stage,
    form: Format,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    beside: Mapping[str, Path],
    inputs: Sequence[Path],
) -> None:
    """Write what lies beside an adapter, and how it was made; nothing lies beside a single file."""
    if stage.single:
        return
    stage.expect([CARD, PROVENANCE, *beside])
    for name, path in beside.items():
        stage.copy(name, path)
    table = {**provenance, "versions": versions()}
    if CARD not in beside or is_nobodys(beside[CARD]):
        stage.write(CARD, card(table, form.subject(form.with_weights(config, stage.folder)), terms_of(*inputs)))
    stage.write(PROVENANCE, as_json({**table, "files": recorded(stage.files)}))


def check_adapter_target(
    out: PathLike, inputs: Sequence[Path], options: WritingOptions, form: Format = WRITTEN
) -> Path:
    """`out` as it will be written, for an adapter, which replaces nothing but adapters; raises as `check_target` does."""
    replaced = replaceable(options.overwrite or options.dry_run)
    single = is_single(Path(out), form)
    if form.config_name and Path(out).suffix == ".safetensors":
        folder = printable(Path(out).with_suffix(""))
        raise UsageError(
            f"{printable(out)}: OUT must be a folder, such as {folder}; only adapters of image and video models can be "
            f"one file, with --to {one_of(NAMED.dialects)}",
            hint=f"-o {shell_word(folder)}",
        )
    with clearing_spent(out, options.dry_run):
        return check_target(Path(out), inputs, replaced, form.config_name or form.weights_name, single)


def is_single(out: Path, form: Format) -> bool:
    """Whether an output is one file, which formats without a config can be."""
    return not form.config_name and out.suffix == Path(form.weights_name).suffix and not out.is_dir()


@contextmanager
def adapter_output(
    out: Path,
    forms: Mapping[str, Form],
    carried: Carried,
    dtype: str,
    names: Spelling,
    options: WritingOptions,
    header: Mapping[str, str] | None = None,
    scales: Mapping[str, float] | None = None,
) -> Iterator[Output]:
    """The output of layers with `forms`, published under `out` when the block ends well. A dry run writes nothing.

    Raises `InputError` where names of layers are flattened, for what is written has dots.
    """
    flat = [] if names.flattens else [target for target in forms if isinstance(target, Flattened)]
    if flat:
        raise InputError(
            "cannot tell which underscores in these names are dots without the base:", map(printable, flat)
        )
    if options.dry_run:
        yield Output(None, None, names, forms, dtype, scales or {})
        return
    form, every = names.form, Parts({target: f.rank for target, f in forms.items()}, scales or {})
    factors = ((names.factors(target), names.shapes(f)) for target, f in forms.items())
    announced: list[Triple] = [
        *((name, SPELLED[dtype], shape) for both in factors for name, shape in zip(*both, strict=True)),
        *((name, "F32", ()) for name in names.strengths(every)),
        *carried.announced(),
    ]
    needed = sum(math.prod(shape) * (8 if d == "F64" else 4) for _, d, shape in announced)
    with (
        staged_weights(out, form, needed, options) as stage,
        form.container(stage.folder / form.weights_name, announced, header or {}) as file,
    ):
        yield Output(file, stage, names, forms, dtype, scales or {})


def staged_weights(out: Path, form: Format, needed: int, options: WritingOptions) -> AbstractContextManager[Stage]:
    """The stage of an adapter whose weights take `needed` bytes."""
    single = form.weights_name if is_single(out, form) else ""
    wanted = Journal(os.urandom(16).hex(), files={form.weights_name})
    return staged(out, wanted, needed, replaceable(options.overwrite), single=single)


def copied_output(
    out: Path, source: Contents, config: Mapping[str, Any], provenance: Mapping[str, Any], options: WritingOptions
) -> None:
    """An adapter with the same weights, byte for byte, under another config."""
    weights, form = source.adapter.file, format_of(source.adapter)
    source.adapter.check_values()
    with staged_weights(out, form, weights.layout.size, options) as stage:
        if weights.files == (weights,):
            stage.copy(form.weights_name, weights.path)
        else:  # of several one is made, which every reader takes
            announced = [(info.name, info.dtype, info.shape) for info in weights.tensors.values()]
            with tensor_file(stage.folder / form.weights_name, announced) as file:
                for name, _, _ in announced:
                    file.copy(name, weights.home(name), weights.home(name).tensors[name])
                file.finish()
            stage.add(form.weights_name)
        weights.check_unchanged()
        stage.write(form.config_name, as_json(config))
        finish(stage, form, config, provenance, files_beside(source), [source.adapter.folder])


def restated_output(
    out: Path, source: Contents, made: Restated, provenance: Mapping[str, Any], options: WritingOptions
) -> None:
    """An adapter with the same tensors, byte for byte, whose one number for their strength is another."""
    form, adapter, file = format_of(source.adapter), source.adapter, source.adapter.file
    adapter.check_values()
    if options.dry_run:
        return
    beside, settings = files_beside(source), adapter.config_file.name
    if made.settings:
        model = adapter.folder / MODEL_CONFIG  # which may tell the heads of the model
        beside |= {MODEL_CONFIG: model} if model.is_file() else {}
        beside.pop(settings, None)
    with staged_weights(out, form, file.layout.size + SLACK, options) as stage:
        if made.settings:
            stage.copy(form.weights_name, file.path)
            stage.write(settings, made.settings)
        else:
            assert isinstance(file, GgufFile)
            told: dict[str, str | float] = {**made.values, RECORD_KEY: json.dumps(provenance)}
            copy_with_values(file, stage.folder / form.weights_name, told)
            stage.add(form.weights_name)
        file.check_unchanged()
        finish(stage, form, adapter.config, provenance, beside, [adapter.folder])


def scaled_output(
    out: Path, source: Contents, scaled: Scaled, provenance: Mapping[str, Any], options: WritingOptions
) -> None:
    """An adapter without a config with the same tensors, but for some that are others."""
    form, file = format_of(source.adapter), source.adapter.file
    source.adapter.check_values()
    if options.dry_run:
        return
    own = {info.name: (info.name, info.dtype, info.shape) for info in file.layout.in_order}
    own |= {n: (n, "F32", file.tensors[n].shape if n in own else ()) for n in scaled.numbers}
    header = {**scaled.header, RECORD_KEY: json.dumps(provenance)}
    with (
        staged_weights(out, form, file.layout.size + 512 * len(scaled.numbers), options) as stage,
        form.container(stage.folder / form.weights_name, own.values(), header) as written,
    ):
        for name, _, shape in own.values():
            if name in scaled.numbers:
                written.add(name, "F32", shape, struct.pack("<f", scaled.numbers[name]) * math.prod(shape))
            elif name in scaled.factors:
                append(written, name, times(source, name, scaled.factors[name]))
            else:
                written.copy(name, file, file.tensors[name])
        written.finish()
        file.check_unchanged()
        stage.add(form.weights_name)
        finish(stage, form, scaled.header, provenance, files_beside(source), [source.adapter.folder])


def append(file: TensorFile, name: str, tensor: StoredTensor | Tensor) -> None:
    """Append a tensor to a file: byte for byte where it is still on disk."""
    if isinstance(tensor, StoredTensor):
        file.copy(name, tensor.file, tensor.info)
    else:
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        file.add(name, dtype_name(tensor), tuple(tensor.shape), content)


def times(source: Contents, name: str, factor: float) -> Tensor:
    """A tensor of a file multiplied by a number, rounded once. Raises `FitError` where its dtype cannot hold that."""
    file = source.adapter.file
    dtype = of_torch(FACTOR_NAMES[file.tensors[name].dtype])
    stored = StoredTensor(file, file.tensors[name]).load(torch.device("cpu"), torch.float64)
    found = round_once(stored * factor, dtype)
    if not bool(found.isfinite().all()):
        raise FitError(f"{printable(name)}: times {factor:g} it overflows {called(dtype)}")
    return found


def carried_over(source: Contents, names: Spelling, factors: Mapping[str, float] | None = None) -> Carried:
    """All of an adapter but its factors, as it is: magnitudes, saved tensors, token rows.

    Biases of lora_B get the scale 1, and those of a layer that is multiplied are too.
    """
    adapter = source.adapter
    source.check_beside()
    carried = Carried()
    for target, layer in source.layers.items():
        if layer.magnitude is not None and target in names.kinds:
            (stored,) = stored_tensors(layer.magnitude.magnitude)
            columns = stored.info.elements if layer.magnitude.by_column else 0
            shape = names.lengths(Form.of(layer, layer.rank), columns)
            assert math.prod(shape) == stored.info.elements, f"{target}: {stored.shape} lengths are no {shape}"
            carried.tensors[names.magnitude(target)] = replace(stored, info=replace(stored.info, shape=shape))
    for target, bias in source.biases.items():
        weight = f"{target.removesuffix('bias')}weight"
        if weight not in names.kinds:
            continue  # left out with its layer
        loaded = source.load_bias(target) * (factors or {}).get(weight, 1.0)
        carried.tensors[names.bias(weight)] = round_once(loaded, torch_dtype(unloaded(bias.value).info.dtype))
    if source.biases:  # that of an attention is read by nobody, and still asked for
        lengths = {t: layer.rows for t, layer in source.layers.items()}
        add_missing_biases(carried, names, lengths, kept_dtype([source], "keep"))
    for target, replacement in (*source.saved.items(), *source.bases.items()):
        inside = target in source.bases or format_of(adapter).was_inside(adapter, target)
        carried.tensors[names.whole(target, inside)] = unloaded(replacement.value)
    for target, change in source.changes.items():
        stored, factor = unloaded(change.value), (factors or {}).get(target, 1.0) * change.scale
        name, dtype = names.change(target, source.is_norm(target)), torch_dtype(next(stored_tensors(change)).info.dtype)
        carried.tensors[name] = (
            stored if factor == 1 else round_once(stored.load(torch.device("cpu"), torch.float64) * factor, dtype)
        )
    for target, rows in source.rows.items():
        carried.tensors[names.rows(target)] = unloaded(rows.values)
        carried.tokens[target] = rows.index
    carried.tensors.update(names.second_copies([adapter], carried.tensors))
    return carried


def add_missing_biases(carried: Carried, names: Spelling, lengths: Mapping[str, int], dtype: torch.dtype) -> None:
    """Zeros where a layer has no lora_B.bias: every layer has one, or none. `lengths` are by target."""
    for target, kind in names.kinds.items():
        if kind.has_bias:
            carried.tensors.setdefault(names.bias(target), torch.zeros(lengths[target], dtype=dtype))


def kept_dtype(sources: Sequence[Contents], asked: str) -> torch.dtype:
    """The dtype of the factors: as asked, or the one that holds those of every source."""
    return of_torch(kept_name(sources, asked))


def kept_name(sources: Sequence[Contents], asked: str) -> str:
    """The same, as torch calls it."""
    every = (tensor for source in sources for layer in source.layers.values() for tensor in factor_tensors(layer))
    return factor_name({tensor.info.dtype for tensor in every}, asked)


def factor_name(stored: Set[str], asked: str) -> str:
    """The dtype of factors: as asked, or the one that holds what is `stored`, of which indices are no floats."""
    if asked != "keep":
        return asked
    found = {EIGHT_BITS.get(name, name) for name in stored} & WIDTH.keys()
    return FLOAT_NAMES["F32" if found == {"BF16", "F16"} else max(found, key=WIDTH.__getitem__, default="F32")]


def factor_tensors(layer: Layer) -> Iterator[StoredTensor]:
    """The stored tensors that its factors are made of."""
    return stored_tensors(layer.update)


def torch_dtype(name: str) -> torch.dtype:
    """F32 → torch.float32; one of 8 bits → the dtype that holds its numbers."""
    return of_torch(FLOAT_NAMES[EIGHT_BITS.get(name, name)])


def of_torch(name: str) -> torch.dtype:
    """float32 → torch.float32."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(tensor: Tensor) -> str:
    return SPELLED[called(tensor.dtype)]


def called(dtype: torch.dtype) -> str:
    """torch.float32 → float32."""
    return str(dtype).removeprefix("torch.")


def as_float32(number: float) -> bytes:
    """A number as a tensor of float32 holds it; infinite where it is too large."""
    found = array("f", [number])
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def files_beside(source: Contents) -> dict[str, Path]:
    """What lies beside an adapter and belongs with it: tokenizer, licence, card, and weights that were trained along.

    Nothing that training left, and no other form of the adapter itself.
    """
    folder = source.adapter.folder
    if source.adapter.alone:
        return {}
    top, _ = sort_side_files(folder, {format_of(source.adapter).weights_name})
    trained = [file.name for file in source.adapter.beside if file.counts]
    left = {file.name for file in source.adapter.beside if not file.counts} | {PROVENANCE}
    names = dict.fromkeys([*(name for name in top if "/" not in name), *trained, *module_files(folder)])
    return {name: folder / name for name in names if name not in left and is_own(folder, name)}


def is_own(folder: Path, name: str) -> bool:
    """Whether a file of a folder is a regular one that lies in it."""
    return (folder / name).is_file() and not leaves(folder, name)


def told_beside(source: Contents, carried: Collection[str] | None = None) -> Iterator[Note]:
    """A note for each other file of weights in an adapter's folder; by default all that were trained are carried over."""
    return fates(source.adapter.beside, carried=files_beside(source) if carried is None else carried)


def described(source: Contents) -> dict[str, Any]:
    """An input, as provenance names it."""
    return as_input(source.adapter, source.name, source.adapter.digests())
