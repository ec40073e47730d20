"""What is wrong with how an adapter is written down in PEFT's layout, and what repairs it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import unrecognised
from loratool.adapters.formats.found import MISSING_PARTNER
from loratool.adapters.formats.peft import keys, support
from loratool.adapters.formats.peft.draft import UNGATHERED
from loratool.adapters.formats.peft.files import AGAINST_TENSORS, CONFIG
from loratool.adapters.kinds import image_models, kinds_of_adapter
from loratool.adapters.patterns import match_patterns
from loratool.algebra.updates.residual import Residual
from loratool.errors import printable
from loratool.results.findings import Finding, command, quoted
from loratool.templates import some

PREFIX = "base_model.model."
NAMED_FACTOR = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B)\.(?!weight$|bias$)\w+(?:\.weight|\.bias)?$")
REPAIRS = {  # what to do about problems of reading, by their codes
    UNGATHERED: "gather the parameters when the adapter is saved; the values are not in this file",
    MISSING_PARTNER: "the other factor is not in this file; save the adapter again",
    AGAINST_TENSORS: f"correct {CONFIG} to match the tensors",
}
MOVED = ("pissa_niter_", "corda", "lora_ga", "loftq")  # initialisations after which the base cannot be worked out

TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def findings(adapter: Adapter, path: Path) -> Iterator[Finding]:
    """What names of tensors and the config show; `path` is what commands are told with."""
    yield from look_at_names(adapter, path)
    yield from look_at_config(adapter, path)


def look_at_names(adapter: Adapter, path: Path) -> Iterator[Finding]:
    """Names that other readers do not take apart, and tensors that nobody knows."""
    wrapped = [name for name in adapter.file.tensors if keys.wrappers_in(name)]
    if wrapped:
        words = sorted(set[str]().union(*map(keys.wrappers_in, wrapped)))
        yield Finding(
            "problem",
            "wrapper-prefix",
            f"names contain prefixes that a training wrapper added ({', '.join(words)}), so PEFT finds no module for "
            f"{some(wrapped)}, and silently skips them",
            command("rescale", path, "--bake"),
            tuple(map(printable, wrapped)),
        )
    if doubled := [name for name in adapter.file.tensors if name.startswith(2 * PREFIX)]:
        yield Finding(
            "problem",
            "prefix-doubled",
            f"names begin with PEFT's prefix twice, so PEFT finds no module for {some(doubled)}, and silently skips "
            "them",
            f"loratool merge BASE {quoted(path)} -o OUT",
            tuple(map(printable, doubled)),
        )
    if named := [name for name in adapter.file.tensors if NAMED_FACTOR.search(name)]:
        yield Finding(
            "note",
            "adapter-name-in-names",
            f"names contain the adapter's name after the factor's, as in a training state dict ({some(named)}): PEFT "
            "0.21.2 accepts them, vLLM 0.32.0 reads only …lora_A.weight",
            command("rescale", path, "--bake"),
            tuple(map(printable, named)),
        )
    yield from unrecognised(adapter)


def look_at_config(adapter: Adapter, path: Path) -> Iterator[Finding]:
    """What the config says that is lost, ambiguous, or true of another base only."""
    start = adapter.config.get("init_lora_weights", True)
    row, word = support.initialisation(start), printable(start).lower()
    moved = isinstance(start, str) and word.startswith(MOVED)
    if row is not None and moved:
        yield Finding(
            "problem",
            "base-moved",
            f"init_lora_weights {printable(repr(start))} changed the base before training ({row.title}), and the "
            "adapter does not contain the changed base; on the original base it is wrong, in PEFT too",
            "save it in PEFT with path_initial_model_for_weight_conversion, which converts it to plain LoRA",
        )
    elif residual := [target for target, update in adapter.updates.items() if is_residual(update)]:
        yield Finding(
            "note",
            "base-moved",
            f"training began by subtracting a part from the base ({printable(start)}), so s · BA on the original base "
            "is not what was trained; PEFT and loratool subtract that part again, servers do not",
            f"loratool merge BASE {quoted(path)} -o OUT",
            tuple(map(printable, residual)),
        )
    if adapter.packing:
        yield Finding(
            "problem",
            "expert-packing",
            f"its expert factors are {adapter.packing}, and PEFT silently reads them as rank-major; so do most servers",
            f"loratool rescale {quoted(path)} -o OUT --bake",
        )
    for reason in adapter.unsupported:
        if not moved or reason != support.why_refused(start):
            yield Finding("note", "not-mergeable", reason)
    is_of_images = bool(image_models(kinds_of_adapter(adapter)))  # to which diffusers adds adapters
    if not adapter.config.get("task_type") and not is_of_images:
        yield Finding(
            "note",
            "task-not-named",
            f"{CONFIG} has no task_type: AutoPeftModel cannot choose a class, and PEFT wraps the model without its "
            "generation methods",
            f'set "task_type" in {CONFIG}, to "CAUSAL_LM" for a language model',
        )
    elif (task := adapter.config.get("task_type")) and task not in TASKS:
        yield Finding(
            "note",
            "task-unknown",
            f"PEFT does not load an adapter with the task_type {printable(repr(task))}; it knows {', '.join(TASKS)}",
            f'set "task_type" in {CONFIG} to one of them, or to null',
        )
    if not adapter.config.get("base_model_name_or_path"):
        yield Finding("note", "base-not-named", "the config does not name the adapter's base model")
    yield from look_at_patterns(adapter, path)


def is_residual(update: object) -> bool:
    return isinstance(update, Residual) or isinstance(getattr(update, "inner", None), Residual)


def look_at_patterns(adapter: Adapter, path: Path) -> Iterator[Finding]:
    """Modules that several patterns match with different values: saving sorts them, and the first one counts."""
    modules = [target.removesuffix(".weight") for target in adapter.updates]
    found = {name: adapter.config.get(name) for name in ("rank_pattern", "alpha_pattern")}
    tables = {name: table for name, table in found.items() if isinstance(table, dict)}
    try:
        matching = match_patterns([p for table in tables.values() for p in table], modules)
    except ValueError:
        return  # told with what could not be read
    for name, table in tables.items():
        rivals = [m for m in modules if len({repr(table[p]) for p in table.keys() & matching[m]}) > 1]
        if not rivals:
            continue
        said = ", ".join(f"{printable(p)}: {printable(table[p])}" for p in table if p in matching[rivals[0]])
        if name == "rank_pattern":
            outcome = "PEFT uses the first, and fails where the tensors have the rank of another"
            repair = command("rescale", path, "--bake")
        else:
            outcome = (
                "PEFT uses the first when it loads the adapter, but training may have used another, so the strength "
                "may be wrong"
            )
            repair = command("rescale", path, f"--match {quoted(Path(rivals[0].replace('.', '[.]')))}=FACTOR")
        yield Finding(
            "problem",
            "sorted-patterns",
            f"several entries of {name} match {some(rivals)} ({said}), and they were sorted when saved: {outcome}",
            repair,
            tuple(map(printable, rivals)),
        )
