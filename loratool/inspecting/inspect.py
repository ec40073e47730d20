"""`inspect()`: what is in an adapter or a checkpoint, from headers and configs; values only where they are asked for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter, stored_tensors
from loratool.adapters.formats import format_at, is_adapter
from loratool.adapters.layers import Layer, layer_of
from loratool.adapters.reading import Reading
from loratool.adapters.unsettled import settled
from loratool.adapters.weight_files import fates
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.arguments import PathLike, Progress
from loratool.errors import InputError, LoratoolError, UsageError, VerificationError, escaped, printable
from loratool.fetching import headers, local
from loratool.files.checkpoint import Checkpoint
from loratool.files.containers import SHARED, compressed_in
from loratool.files.folders import PROVENANCE, holds_weights
from loratool.files.pipelines import itself
from loratool.files.safefile import SafeFile
from loratool.files.untrusted import LARGEST_RECORD, read_json
from loratool.grouping import by_key
from loratool.inspecting.health import examine, examine_model, tell_unreadable, with_record
from loratool.inspecting.metadata import shortened_metadata
from loratool.inspecting.options import InspectOptions, unused_of_model
from loratool.notes import Note
from loratool.provenance.history import history_of
from loratool.results.base import Cost
from loratool.results.facts import (
    AdapterFacts,
    CheckpointFacts,
    ComponentFacts,
    ModuleFacts,
    OneFacts,
    PlaceFacts,
    TensorFacts,
    UnreadableFacts,
    WeightFacts,
)
from loratool.results.findings import NOT_AS_WRITTEN, Finding
from loratool.results.text import counts
from loratool.templates import listed as in_one_line

if TYPE_CHECKING:
    from loratool.bases.adapter_fit import Fit  # which loads all about bases
    from loratool.fetching.outline import Role
    from loratool.results.values import Values

    Measuring = Callable[[Adapter, Fit | None, str, Progress | None], Values]
OF_BLOCK = re.compile(r".*(?:^|_)(?:[a-z]*blocks?|layers?|attentions|resnets)(?:_[0-9]+)+_")  # of a name without dots


def inspect(
    path: PathLike,
    options: InspectOptions,
    progress: Progress | None = None,
    way: Reading | None = None,
    measured: Measuring | None = None,
) -> OneFacts:
    """Describe the adapter or checkpoint at `path`; `loratool.commands.inspect` says all of it.

    `way` is how it is read, where `options` speak of several adapters; `measured` gives the values of an adapter, where
    they come from elsewhere than from its tensors.
    """
    started = time.monotonic()
    if options.base is not None and options.base_config is not None:
        raise UsageError("--base and --base-config are mutually exclusive")
    if alone := [name for name in ("where", "sort") if getattr(options, name) is not None]:
        raise UsageError(f"--{' and --'.join(alone)}: for several adapters; this is one")
    if options.device != "cpu":  # on which all is done but what --values measures
        options.check_needed("device", "values")
    (way,) = (way,) if way is not None else options.readings(1)
    with ExitStack() as stack:
        location = located(path, "any", options, stack)
        against = located(options.base, "model", options, stack) if options.base is not None else None
        if options.base_config is not None:
            against = stack.enter_context(headers(options.base_config))
        facts = look_at(location, path, against, options, progress, way, measured)
        if options.check:
            facts = replace(facts, findings=with_record(facts.findings or (), location))
        device = facts.values.cost.device if isinstance(facts, AdapterFacts) and facts.values else ""
        return replace(facts, cost=Cost.since(started, device))


def located(operand: PathLike, role: Role, options: InspectOptions, stack: ExitStack) -> Path:
    """Where an operand is; of a place on the Hub all that is needed comes here only for its values."""
    whole = options.values or options.check or options.near is not None
    return local(operand, role) if whole else stack.enter_context(headers(operand))


def look_at(
    location: Path,
    path: PathLike,
    against: Path | None,
    options: InspectOptions,
    progress: Progress | None,
    way: Reading,
    measured: Measuring | None = None,
) -> OneFacts:
    """What is at a location, which was asked for as `path`; an adapter is held against the base at `against`."""
    shown = Path(path)
    if not is_adapter(location):
        if options.near is not None:
            raise InputError(f"{printable(shown)}: not an adapter, so --near does not apply")
        if names := compressed_in(location):
            return look_at_compressed(location, shown, names, options)
        return look_at_checkpoint(location, shown, options)
    problems: tuple[str, ...] = ()
    try:
        if options.check:
            adapter, problems = format_at(location).read_leniently(location, way)
        else:
            adapter = format_at(location).read(location, way)
    except LoratoolError as error:
        if not options.check:
            raise
        return UnreadableFacts("unreadable", printable(shown), tell_unreadable(error, location))
    fit: Fit | None = None
    if against:
        from loratool.bases.adapter_fit import fit_of
        from loratool.bases.opening import open_checkpoint

        checkpoint = open_checkpoint(against) if holds_weights(against) else None
        adapter = settled(adapter, checkpoint.config) if checkpoint else adapter
        fit = fit_of(adapter, against, checkpoint, options.maps, options.fan_in_fan_out)
        if not options.check:
            fit.require()
    weights = tuple(file.path.name for file in adapter.file.files)
    made = history_of(adapter.file.path, weights, adapter.file.metadata) if adapter.alone else None
    facts = replace(adapter_facts(adapter, shown, fit), history=made or history_of(adapter.folder, weights))
    if options.tensors:
        facts = replace(facts, tensors=tuple(listed([adapter.file])))
    if options.metadata:
        facts = replace(facts, shown_metadata=shortened_metadata(adapter.file.layout.metadata or {}))
    if options.check:
        facts = replace(facts, findings=examine(adapter, problems, shown, fit, facts.notes))
    if options.values:
        from loratool.measuring.modules import measure

        on_model = settled(adapter, fit.checkpoint.config) if fit and fit.checkpoint else adapter
        facts = replace(facts, values=(measured or measure)(on_model, fit, options.device, progress))
    if options.values or options.near is not None:
        facts = with_sketch(facts, adapter, fit, options)
    return facts


def look_at_compressed(location: Path, path: Path, names: Sequence[str], options: InspectOptions) -> OneFacts:
    """What is in a folder of compressed adapters: the file that all of them share, and their names."""
    facts = look_at_checkpoint(location / SHARED, path, options)
    if isinstance(facts, UnreadableFacts):
        return facts
    text = (
        f"{len(names)} adapters are compressed together: {in_one_line(names)}; `loratool expand` writes one as an "
        "ordinary adapter"
    )
    return replace(facts, notes=(Note("compressed-adapters", text),))


def with_sketch(facts: AdapterFacts, adapter: Adapter, fit: Fit | None, options: InspectOptions) -> AdapterFacts:
    """The facts with a sketch, and with what is nearest to it in an index.

    Raises `LoratoolError` where there is no sketch to look for.
    """
    from loratool.inspecting.neighbours import nearest, read_index
    from loratool.reworking.sketches import sketch_of

    index = read_index(Path(options.near)) if options.near is not None else None
    try:
        sketch = sketch_of(adapter, fit.checkpoint if fit else None)
    except LoratoolError as error:
        if index is not None:
            raise
        reason = error.problems[0] if error.problems else error.message
        return replace(facts, notes=(*facts.notes, Note("not-sketched", f"no sketch: {reason}")))
    facts = replace(facts, sketch=sketch.numbers, sketched=sketch.facts)
    if index is None:
        return facts
    near, notes = nearest(index, sketch, options.top)
    return replace(facts, near=near, notes=(*facts.notes, *notes))


def exit_code_of(findings: Iterable[Finding]) -> int:
    """What a check comes to: 0 where it found notes alone, 5 where a file is not what was written, 3 for any other problem.

    A file that was damaged may be malformed as well, and that it was damaged says more.
    """
    codes = {finding.code for finding in findings if finding.level == "problem"}
    return VerificationError.exit_code if NOT_AS_WRITTEN in codes else InputError.exit_code if codes else 0


def adapter_facts(adapter: Adapter, path: Path, fit: Fit | None = None) -> AdapterFacts:
    """What headers and config tell; with a `fit` also what the base tells."""
    from loratool.adapters.kinds import image_models, kinds_of_adapter  # which knows many models

    layers = {target: layer for target, update in adapter.updates.items() if (layer := layer_in(target, update))}
    training = adapter.training
    counted = set[str]()
    modules = tuple(
        module_facts(adapter, target, update, layers.get(target), training.rslora, fit, counted)
        for target, update in adapter.updates.items()
    )
    groups = by_key(
        ((leaf(module.target), module.shape), module.parameters)
        for module in modules
        if module.rank is not None and module.shape is not None
    )
    unused = tuple(f"tensor {printable(name)} was not recognised" for name in adapter.unused)
    return AdapterFacts(
        kind="adapter",
        path=printable(path),
        format=told_format(adapter),
        peft_type=printable(training.method),
        variants=training.variants,
        base=printable(training.base),
        task=printable(training.task),
        initialisation=printable(training.initialisation),
        ranks=counts(str(m.rank) for m in modules if m.rank is not None),
        alphas=counts(f"{m.alpha:.6g}" for m in modules if m.alpha is not None),
        scalings=counts(f"{m.scaling:.6g}" for m in modules if m.scaling is not None),
        rslora=training.rslora,
        dora=training.dora,
        rank_pattern={printable(pattern): rank for pattern, rank in training.rank_pattern.items()},
        alpha_pattern={printable(pattern): alpha for pattern, alpha in training.alpha_pattern.items()},
        modules_to_save=tuple(map(printable, training.saved_modules)),
        bias=printable(training.bias),
        targets=weight_facts(groups),
        saved=tuple(printable(t) for t, u in adapter.updates.items() if isinstance(u, Replace)),
        parameters=adapter.parameters,
        bytes=adapter.file.layout.size,
        dtypes=counts(t.dtype for t in adapter.file.tensors.values()),
        modules=modules,
        rest={printable(name): why for name, why in rest_of(adapter).items()},
        unsupported=(*adapter.unsupported, *unused),
        notes=(
            *adapter.notes,
            *fates(adapter.beside, otherwise="not part of the adapter"),
            *(fit.notes if fit else ()),
        ),
        metadata={escaped(key): escaped(value) for key, value in (adapter.file.layout.metadata or {}).items()},
        against=fit.base if fit else None,
        models=image_models(kinds_of_adapter(adapter)),
    )


def told_format(adapter: Adapter) -> str | tuple[str, ...]:
    """The dialect of its names, or all of them where it has several; else its format."""
    match tuple(map(printable, adapter.dialects)):
        case ():
            return adapter.format
        case (dialect,):
            return dialect
        case dialects:
            return dialects


def module_facts(
    adapter: Adapter,
    target: str,
    update: Update,
    layer: Layer | None,
    rslora: bool,
    fit: Fit | None,
    counted: set[str],
) -> ModuleFacts:
    """One weight. A tensor that several are made of counts for the first; `counted` are those that have been."""
    names = adapter.sources.get(target, ())
    own = tuple(name for name in names if name.endswith(".bias") == target.endswith(".bias"))
    names = own or names  # the sources are all of a module, and its bias has a target of its own
    shape: tuple[int, ...] | None = update.shape if all(size > 0 for size in update.shape) else None
    if layer is not None:
        shape = (layer.experts, layer.rows, layer.columns) if layer.experts > 1 else (layer.rows, layer.columns)
        if layer.kernel:
            shape = layer.update.shape
    parameters = sum(adapter.file.tensors[name].elements for name in names if name not in counted)
    counted.update(names)
    return ModuleFacts(
        name=printable(target.removesuffix(".weight")),
        target=printable(target),
        kind=kind_of(update, layer),
        shape=shape,
        rank=layer.rank if layer else None,
        alpha=layer.scale * (layer.rank**0.5 if rslora else layer.rank) if layer else None,
        scaling=layer.scale if layer else None,
        parameters=parameters,
        tensors=tuple(map(printable, names)),
        places=tuple(
            PlaceFacts(printable(p.tensor), (p.first_row, p.first_row + p.rows), p.rule)
            for p in fit.places.get(target, ())
        )
        if fit and fit.checkpoint
        else None,
    )


def rest_of(adapter: Adapter) -> dict[str, str]:
    """The tensors that no target is made of, each with the reason."""
    used = {name for names in adapter.sources.values() for name in names}
    bases = {t.info.name for update in adapter.bases.values() for t in stored_tensors(update)}
    reasons = {**dict.fromkeys(adapter.unused, "no known place"), **dict.fromkeys(bases, "weight under an update")}
    return {
        name: reasons.get(name, "for training only, or a second copy")
        for name in adapter.file.tensors
        if name not in used
    }


def layer_in(target: str, update: Update) -> Layer | None:
    """The low-rank layer that this update is, or that others are built around."""
    if (layer := layer_of(target, update)) is not None:
        return layer
    inner = getattr(update, "inner", None)
    return layer_in(target, inner) if inner is not None else None


def kind_of(update: Update, layer: Layer | None) -> str:
    if layer is not None:
        return "low-rank"
    names = {Replace: "saved whole", ReplaceRows: "token rows"}
    return names.get(type(update), type(update).__name__)


def look_at_checkpoint(location: Path, path: Path, options: InspectOptions) -> CheckpointFacts | UnreadableFacts:
    from loratool.bases.opening import open_checkpoint
    from loratool.provenance.inputs import weights_of

    try:
        checkpoint = open_checkpoint(location, unmerged=True)
        facts = replace(
            checkpoint_facts(checkpoint, path), history=history_of(checkpoint.root, tuple(weights_of(checkpoint)))
        )
    except LoratoolError as error:
        if not options.check:
            raise
        return UnreadableFacts("unreadable", printable(path), tell_unreadable(error, location))
    facts = replace(facts, notes=(*facts.notes, *unused_of_model(options)))
    if options.tensors:
        facts = replace(facts, listing=tuple(listed(checkpoint.shards)))
    if options.check:
        facts = replace(facts, findings=examine_model(checkpoint, path))
    return facts


def checkpoint_facts(checkpoint: Checkpoint, path: Path) -> CheckpointFacts:
    """What the headers of a model tell."""
    from loratool.adapters.kinds import image_models  # which knows many models
    from loratool.bases.binding.unlike import kinds_of_base
    from loratool.inspecting.packing import unpacked  # which loads all about packed weights

    seen, packing = unpacked(checkpoint)
    classes = checkpoint.architectures or (checkpoint.model_type,)
    return CheckpointFacts(
        kind="checkpoint",
        path=printable(path),
        architecture=", ".join(printable(c) for c in classes if c) or class_of_diffusers(checkpoint),
        made_by=made_by(checkpoint),
        quantisation=packing.family if packing else "",
        tensors=len(checkpoint.tensors),
        parameters=sum(t.elements for t in seen.tensors.values()),
        bytes=sum(t.nbytes for t in checkpoint.tensors.values()),
        dtypes=counts(t.dtype for t in checkpoint.tensors.values()),
        weights=weight_facts(by_key(((leaf(name), info.shape), info.elements) for name, info in seen.tensors.items())),
        files={name_in(checkpoint, shard.path): itself(shard).layout.size for shard in checkpoint.shards},
        side_files=tuple(map(printable, checkpoint.side_files)),
        left_out=tuple(map(str, checkpoint.left_out)),
        notes=checkpoint.notes,
        packing=packing,
        components=component_facts(checkpoint),
        models=image_models(kinds_of_base(checkpoint)),
    )


def name_in(checkpoint: Checkpoint, path: Path) -> str:
    """A file's name within a model's folder."""
    inside = path.is_relative_to(checkpoint.root) and path != checkpoint.root
    return printable(path.relative_to(checkpoint.root).as_posix() if inside else path.name)


def class_of_diffusers(checkpoint: Checkpoint) -> str:
    """The class that a pipeline's index, or a component's config, names; empty where neither does."""
    named = checkpoint.config.get("_class_name")
    return printable(named) if isinstance(named, str) else ""


def component_facts(checkpoint: Checkpoint) -> tuple[ComponentFacts, ...]:
    """What the components of an image or video model have."""
    from loratool.bases.binding.components import components_of  # which loads all about bases

    found: list[ComponentFacts] = []
    for part in components_of(checkpoint):
        infos = part.model.tensors.values()
        config = part.model.config
        classes = [config.get("_class_name"), *part.model.architectures, part.family.name if part.family else ""]
        named = next((printable(name) for name in classes if isinstance(name, str) and name), "")
        parameters = sum(info.elements for info in infos)
        found.append(
            ComponentFacts(printable(part.name), named, len(infos), parameters, counts(i.dtype for i in infos))
        )
    return tuple(found)


def made_by(checkpoint: Checkpoint) -> str:
    """What loratool.json says of a folder that loratool wrote; empty where there is none that can be read."""
    path = checkpoint.root / PROVENANCE
    if not path.is_file():
        return ""
    try:
        table = read_json(path, LARGEST_RECORD)
    except LoratoolError:
        return ""
    adapters = table.get("adapters")
    named = [a for a in adapters if isinstance(a, dict)] if isinstance(adapters, list) else []
    told = [f"{printable(a.get('name'))} × {printable(a.get('weight', 1))}" for a in named]
    base = table.get("base")
    of = printable(base.get("name")) if isinstance(base, dict) else ""
    return " + ".join(filter(None, ["loratool merge: " + of if of else "loratool", *told]))


def listed(files: Iterable[SafeFile]) -> Iterable[TensorFacts]:
    """Every tensor of some files."""
    for file in files:
        name = printable(file.path.name)
        for info in file.tensors.values():
            yield TensorFacts(printable(info.name), info.dtype, info.shape, info.nbytes, name)


def weight_facts(groups: Mapping[tuple[str, tuple[int, ...]], list[int]]) -> tuple[WeightFacts, ...]:
    """Groups of weights in the order they were found."""
    return tuple(WeightFacts(printable(n), s, len(found), sum(found)) for (n, s), found in groups.items())


def leaf(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` → `q_proj`; a bias keeps its word, and a number what it counts.

    Of a name without dots, what comes after the numbers of its block: `unet_down_blocks_0_resnets_1_conv1` → `conv1`.
    """
    parts = name.removesuffix(".weight").split(".")
    if len(parts) == 1:
        return OF_BLOCK.sub("", parts[0]) or parts[0]
    return ".".join(parts[-2:]) if parts[-1] == "bias" or parts[-1].isdecimal() else parts[-1]
